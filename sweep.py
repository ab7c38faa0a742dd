"""Expands a grid of arguments into commands, a command file or sbatch array files; shows how far a sweep has come.

    python sweep.py --grid-config ppo --num-trials 5                          # print the commands
    python sweep.py --grid-config ppo --num-trials 5 --action save            # write them to ppo.txt
    python sweep.py --grid-config ppo --num-trials 5 --action slurm --submit  # run them on a Slurm cluster
    python sweep.py --grid-config ppo --num-trials 5 --action status          # what is done, and with which returns

A grid is a JSON file: {"script": "ppo_procgen.py", "grid": {"env_id": ["miner", "maze"], "learning_rate": [0.0005]}}.
Exit codes: 0 done, 1 failed, 2 bad arguments or a bad grid, 3 (status) not everything is finished.
"""

import ast
import csv
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote

import tyro

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]  # --flag A --flag B


@dataclass
class Args:
    grid_config: str  # the grid: NAME for grids/NAME.json, or the path of a JSON file
    action: str = "print"  # print, save (a command file), slurm (sbatch array files) or status
    num_trials: int = 1  # seeds of each configuration
    start_index: int = 0  # added to the first seed
    only_missing: bool = False  # leave out what is finished
    python: str = "python"  # interpreter in the commands
    output: str | None = None  # save: the command file; by default {name of the grid}.txt

    job_name: str | None = None  # slurm: files go to slurm/generated/{job_name}/; by default the name of the grid
    submit: bool = False  # slurm: call sbatch
    runs_per_task: int = 1  # slurm: commands side by side in one array task
    max_parallel: int | None = None  # slurm: array tasks at the same time
    max_restarts: int = 100  # slurm: times that a task is requeued after a signal
    max_array_size: int | None = None  # slurm: MaxArraySize of the cluster; by default scontrol is asked, else 1001
    template: str = "slurm/array.sbatch.template"  # slurm: the file that is filled in
    setup: Repeated = ()  # slurm: a line of bash to run first, such as "source .venv/bin/activate"
    partition: str | None = None  # slurm: partition to run in
    account: str | None = None  # slurm: account to charge
    qos: str | None = None  # slurm: quality of service
    constraint: str | None = None  # slurm: features that the node must have
    time: str | None = None  # slurm: time limit, such as 12:00:00
    mem: str | None = None  # slurm: memory, such as 16G
    cpus_per_task: int | None = None  # slurm: cores, shared by the commands of a task
    gpus_per_task: str | None = None  # slurm: GPUs, such as 1 or a100:1, shared by the commands of a task
    dependency: str | None = None  # slurm: what to wait for, such as afterok:ID of another sweep
    sbatch_arg: Repeated = ()  # slurm: any other option of sbatch, such as mail-type=END


SBATCH_OPTIONS = "partition account qos constraint time mem cpus_per_task gpus_per_task dependency".split()
# What decides where collect_procgen.py writes.
DATASET_ARGUMENTS = "env_id ratio ratio_checkpoint_dir ratio_dataset_dir checkpoint dataset_saving_dir".split()
# Without a part in the result, so not in a run's name unless swept; a script may have a list of its own.
FREE_ARGUMENTS = "total_timesteps log_interval archive_interval num_eval_episodes cuda torch_deterministic save_dataset"
FREE_ARGUMENTS = (*FREE_ARGUMENTS.split(), "model_saving_dir", "resume", "track", "wandb_project_name", "wandb_entity")
HERE = Path(__file__).parent
# Return ranges of Cobbe et al. 2020, appendix C, for the normalised return (R - min) / (max - min).
RANGES = {
    "easy": {
        "bigfish": (1, 40), "bossfight": (0.5, 13), "caveflyer": (3.5, 12), "chaser": (0.5, 13), "climber": (2, 12.6),
        "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-1.5, 32.4), "heist": (3.5, 10), "jumper": (3, 10),
        "leaper": (3, 10), "maze": (5, 10), "miner": (1.5, 13), "ninja": (3.5, 10), "plunder": (4.5, 30),
        "starpilot": (2.5, 64),
    },
    "hard": {
        "bigfish": (0, 40), "bossfight": (0.5, 13), "caveflyer": (2, 13.4), "chaser": (0.5, 14.2), "climber": (1, 12.6),
        "coinrun": (5, 10), "dodgeball": (1.5, 19), "fruitbot": (-0.5, 27.2), "heist": (2, 10), "jumper": (1, 10),
        "leaper": (1.5, 10), "maze": (4, 10), "miner": (1.5, 20), "ninja": (2, 10), "plunder": (3, 30),
        "starpilot": (1.5, 35),
    },
}  # fmt: skip


class Run(NamedTuple):
    command: str
    configuration: str  # the swept arguments but for the seed, as status shows them
    settings: dict  # every argument of the script; if the grid has it not, its default, or None if that is computed


class Progress(NamedTuple):
    state: str  # one of STATES
    fraction: float = 0.0
    train_return: float = math.nan
    test_return: float = math.nan
    game: tuple = (None, None)  # mode and name


STATES = ("done", "running", "stopped", "not started")


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments and grids, 1 for the rest."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def check_args(args: Args) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right."""

    def require(condition, name, wanted):
        if not condition:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; it must be {wanted}", 2)

    require(args.action in ("print", "save", "slurm", "status"), "action", "print, save, slurm or status")
    for name, least in dict(num_trials=1, start_index=0, runs_per_task=1, max_parallel=1, max_restarts=0).items():
        require(getattr(args, name) is None or getattr(args, name) >= least, name, f"at least {least}")
    require(args.max_array_size is None or args.max_array_size >= 2, "max_array_size", "at least 2")
    require(args.action == "slurm" or not args.submit, "submit", "left out, or --action slurm given")
    if args.action == "slurm":
        require(re.fullmatch(r"\w[\w.+-]*", args.job_name), "job_name", "letters, digits and .+-_")
    for name in (*SBATCH_OPTIONS, "sbatch_arg"):
        words = "".join(args.sbatch_arg) if name == "sbatch_arg" else str(getattr(args, name))
        require(not re.search('["\n]', words), name, 'free of " and line ends')
    if args.submit and not shutil.which("sbatch"):
        fail("--submit needs sbatch, which is not installed here; leave it out, and submit where it is", 2)


def read_file(path: Path, name: str, code: int = 2) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{name} {path} cannot be read: {getattr(error, 'strerror', 'it is no text')}", code)


def find(path: str) -> Path:
    """A file of the current folder or else of the one that this script is in."""
    return Path(path) if os.path.exists(path) else HERE / path


def read_script(script: Path) -> tuple:
    """Of a script, which is not run: {name: (annotation, default)} of the fields of Args, and its FREE_ARGUMENTS."""
    try:
        tree = ast.parse(read_file(script, "the grid's script"), str(script))
    except (ValueError, SyntaxError) as error:
        fail(f"the grid's script {script} is no Python: {error}", 2)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    arguments, free = {}, FREE_ARGUMENTS

    def add_fields(name):
        if name not in classes:
            fail(f"the grid's script {script} has no class {name}, whose fields would be its arguments", 2)
        for base in classes[name].bases:
            add_fields(ast.unparse(base))
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign):
                try:
                    default = ast.literal_eval(node.value)
                except (ValueError, TypeError):  # no default, or one that is computed
                    default = None
                arguments[node.target.id] = (ast.unparse(node.annotation), default)

    add_fields("Args")
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FREE_ARGUMENTS":
            free = ast.literal_eval(node.value)
    return arguments, free


class JsonFloat(float):
    """A float that remembers how the file spells it."""

    def __new__(cls, text):
        number = super().__new__(cls, text)
        number.text = text
        return number


def read_grid(path: Path) -> tuple:
    """The script's path, its arguments, which of them are free, and the lists of a grid file.

    Exits with code 2 and one line that says what is wrong where.
    """

    def as_dict(pairs):
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                fail(f"{path}: {name!r} stands there {count} times", 2)
        return dict(pairs)

    text = read_file(path, "--grid-config takes a name in grids/ or the path of a JSON file, but")
    try:
        grid = json.loads(text, parse_float=JsonFloat, parse_constant=JsonFloat, object_pairs_hook=as_dict)
    except (ValueError, RecursionError) as error:
        fail(f"{path} is no JSON: {error}", 2)
    if not isinstance(grid, dict) or grid.keys() != {"script", "grid"} or not isinstance(grid["grid"], dict):
        fail(f'{path}: it must be {{"script": "ppo_procgen.py", "grid": {{"env_id": ["miner"], ...}}}}', 2)
    script = find(str(grid["script"]))
    arguments, free = read_script(script)
    for name, values in grid["grid"].items():
        if name not in arguments:
            fail(f"{path}: {script} has no argument {name!r}; it has {', '.join(arguments)}", 2)
        if not isinstance(values, list) or not values:
            fail(f"{path}: {name!r} is {json.dumps(values)}; it must be a list of one or more values", 2)
        for value in values:
            check_value(path, name, value, arguments[name][0])
    return script, arguments, free, grid["grid"]


def check_value(path: Path, name: str, value, annotation: str) -> None:
    types = {"int": (int,), "float": (int, JsonFloat), "bool": (bool,), "str": (str,)}
    scalars = (int, JsonFloat, bool, str)  # of other annotations the script itself is the judge
    if value is not None and type(value) not in types.get(annotation.replace(" | None", ""), scalars):
        wanted = "a number, string, boolean or null" if isinstance(value, (list, dict)) else annotation
        fail(f"{path}: {name!r} is {json.dumps(value)}; {wanted} is wanted", 2)
    if isinstance(value, (int, float)) and not -1e308 < value < 1e308:
        fail(f"{path}: {name!r} is {getattr(value, 'text', 'too large')}; a finite number is wanted", 2)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]|\n\\Z", value):
        fail(f"{path}: {name!r} is {json.dumps(value)}; it must be text that does not end in a line end", 2)


def flag(name: str, value, annotation: str) -> str:
    """The words of a shell command that give an argument its value; none for None, which stands for the default."""
    name = f"--{name.replace('_', '-')}"
    if value is None:
        return ""
    if annotation == "bool":
        return name if value else name.replace("--", "--no-", 1)
    text = value.text if isinstance(value, JsonFloat) else str(value)
    word = shlex.quote(text)
    if "\n" in text:  # a command is one line of a file
        word = '"$(printf %b ' + shlex.quote(text.replace("\\", "\\\\").replace("\n", "\\n")) + ')"'
    return f"{name}={word}" if text.startswith("-") else f"{name} {word}"


def run_name(script: Path, arguments: dict, free: tuple, settings: dict, swept: list) -> str:
    """A run's name but for the seed: the script's default one, and the free arguments that are swept.

    It depends on the run alone, not on what else is in the grid: what differs from its default is named, swept or not.
    """
    algorithm = script.stem.removesuffix("_procgen")
    parts = {"env_id": "", "distribution_mode": "-", "num_levels": "-", "learning_rate": f"-{algorithm}-lr"}
    parts |= {"update_epochs": "-epoch", "num_minibatches": "-mb", "vf_coef": "-v", "ent_coef": "-ha"}
    named = [name for name, (_, default) in arguments.items() if settings[name] != default]
    named = [name for name in named if name not in free or name in swept]
    if settings["xpid"] is not None:  # as the grid has it, and what is swept, so that no two runs share a folder
        parts, named = {"xpid": ""}, swept
    named = [name for name in named if name not in (*parts, "seed", "xpid")]
    parts |= {name: f"-{name}" for name in named}
    return quote("".join(f"{part}{settings[name]}" for name, part in parts.items() if name in arguments), safe="+")


def expand(args: Args, path: Path) -> list:
    """The runs of a grid: the product of its lists, the last one fastest, and of each the seeds."""
    script, arguments, free, grid = read_grid(path)
    if "resume" in arguments:
        grid.setdefault("resume", [True])  # so that a command can be run again
    if grid.get("xpid") == [None]:
        del grid["xpid"]
    seeds = grid.pop("seed", [arguments["seed"][1] if "seed" in arguments else None])
    if all(type(seed) is int for seed in seeds):
        seeds = [seed + args.start_index + trial for seed in seeds for trial in range(args.num_trials)]
    elif seeds != [None] or args.num_trials > 1 or args.start_index:
        fail(f'{path}: to count seeds up, whole numbers to begin with are needed, such as "seed": [0]', 2)
    grid["seed"] = seeds
    swept = [name for name, values in grid.items() if len(values) > 1]

    axes = []  # for each argument its flags and the values that the script will see
    for name, values in grid.items():
        annotation, default = arguments.get(name, ("int", None))
        effective = [default if value is None else value for value in values]
        if annotation.startswith("float"):
            effective = [value if value is None else float(value) for value in effective]
        for value, count in Counter(effective).items():
            if count > 1:
                fail(f"{path}: {name!r} is {value!r} in {count} configurations that are otherwise equal", 2)
        flags = [flag(name, value, annotation) if name != "xpid" else "" for value in values]
        axes.append(list(zip(flags, effective)))

    seeds = axes.pop()
    start = f"{shlex.quote(args.python)} {shlex.quote(str(script))}"
    label = " ".join(f"{name}={{{name}}}" for name in swept if name != "seed")
    defaults = {name: default for name, (_, default) in arguments.items()}
    runs, folders = [], set()
    for combination in itertools.product(*axes):
        words = [start, *(flags for flags, _ in combination if flags)]
        settings = defaults | {name: value for name, (_, value) in zip(grid, combination)}
        configuration = label.format_map(settings).replace("\n", " ") or path.stem
        xpid = run_name(script, arguments, free, settings, swept) if "xpid" in arguments else None
        for seed_flag, seed in seeds:
            settings = {**settings, "seed": seed}
            command = [*words, seed_flag] if seed_flag else list(words)
            if xpid is not None:
                settings["xpid"] = f"{xpid}_{seed}"
                command.append(flag("xpid", settings["xpid"], "str"))
                folders.add((settings.get("env_id"), settings["xpid"]))
            elif settings.get("save_dataset"):
                folders.add(tuple(map(settings.get, DATASET_ARGUMENTS)))
            runs.append(Run(" ".join(command), configuration, settings))
    if folders and len(folders) < len(runs):
        names = "xpid" if "xpid" in arguments else f"dataset, as that depends on {', '.join(DATASET_ARGUMENTS)} only"
        fail(f"{path}: two commands would share a folder, as they have the same {names}", 2)
    if longest := max((xpid for _, xpid in folders if len(xpid) > 255), default=None) if "xpid" in arguments else None:
        fail(f"{path}: {longest} is too long for a folder's name; sweep shorter values", 2)
    return runs


def state_of(folder: Path, done: bool, started: bool) -> str:
    """One of STATES. The scripts wait a second for the lock of their folder, so asking does not get in their way."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released as the file is closed
    except BlockingIOError:
        return "done" if done else "running"
    except OSError:  # there is none
        pass
    return "done" if done else "stopped" if started else "not started"


def training_progress(settings: dict) -> Progress:
    """Of a run in {model_saving_dir}/{env_id}/{xpid}/, from its progress.csv."""
    folder = Path(settings["model_saving_dir"], settings["env_id"], settings["xpid"])
    table, rows = folder / "progress.csv", []
    if table.exists():
        rows = list(csv.DictReader(read_file(table, "the table", 1).splitlines()))
    last = rows[-1] if rows else {"global_step": 0, "charts/episodic_return": "nan"}
    try:
        steps, train_return = int(last["global_step"]), float(last["charts/episodic_return"])
        tests = [row["charts/test_return"] for row in rows if row["charts/test_return"] != "nan"]
        test_return = float(tests[-1] if tests else "nan")
    except (KeyError, ValueError, TypeError) as error:
        fail(f"{table} is damaged ({type(error).__name__}: {error})")
    batch_size = settings["num_envs"] * settings["num_steps"]
    total_steps = settings["total_timesteps"] // batch_size * batch_size
    done = steps >= total_steps and any(folder.glob("final/model_*.pt"))
    state = state_of(folder, done, (folder / "rolling" / "model.pt").exists())
    game = (settings.get("distribution_mode"), settings["env_id"])
    return Progress(state, min(1.0, steps / max(total_steps, 1)), train_return, test_return, game)


def dataset_progress(folder: Path, settings: dict) -> Progress:
    """Of a dataset, from its metadata.json. Its mean return stands for the test return."""
    started = (folder / "metadata.json").exists()
    wanted = ("episodes", "num_episodes") if settings.get("num_episodes") else ("steps", "total_timesteps")
    try:
        metadata = json.loads(read_file(folder / "metadata.json", "the dataset's", 1)) if started else {}
        fraction = metadata.get(wanted[0], 0) / settings[wanted[1]]
        mean = float(math.nan if metadata.get("return_mean") is None else metadata["return_mean"])
        state = state_of(folder, bool(metadata.get("complete")) and fraction >= 1, started)
    except (AttributeError, ValueError, TypeError) as error:
        fail(f"{folder / 'metadata.json'} is damaged ({type(error).__name__}: {error})")
    game = (metadata.get("distribution_mode"), metadata.get("env_id"))
    return Progress(state, min(1.0, fraction), math.nan, mean, game)


def progress_of(run: Run) -> Progress:
    """How far a command has come. One that collects from every run of a game is done when all its datasets are."""
    settings = run.settings
    if "xpid" in settings:
        needed = ["model_saving_dir", "env_id", "num_envs", "num_steps", "total_timesteps"]
    elif settings.get("ratio") is not None:
        needed = ["env_id", "ratio_checkpoint_dir", "ratio_dataset_dir", "total_timesteps"]
    else:
        needed = ["dataset_saving_dir", "total_timesteps"]
    if unknown := [name for name in needed if not settings.get(name)]:
        fail(f"status and --only-missing need to know {', '.join(unknown)}: neither grid nor script says it plainly", 2)
    if "xpid" in settings:
        return training_progress(settings)
    folders = [settings["dataset_saving_dir"]]
    if settings.get("ratio") is not None:
        needs = (
            ("final",) if settings["ratio"] == 1 else ("final", "checkpoint")
        )  # other runs are skipped by the script
        runs = sorted(Path(settings["ratio_checkpoint_dir"], settings["env_id"]).glob("*/"))
        runs = [run for run in runs if all(any(run.glob(f"{name}/*.pt")) for name in needs)]
        folders = [run / settings["ratio_dataset_dir"] / str(settings["ratio"]) for run in runs]
    parts = [dataset_progress(Path(folder), settings) for folder in folders] or [Progress("not started")]
    states = {part.state for part in parts}
    state = states.pop() if len(states) == 1 else "running" if "running" in states else "stopped"
    returns = [part.test_return for part in parts if not math.isnan(part.test_return)]
    mean = statistics.fmean(returns) if returns else math.nan
    return Progress(state, statistics.fmean(part.fraction for part in parts), math.nan, mean, parts[0].game)


def print_status(runs: list) -> int:
    """Print a row per configuration and a summary. Returns the exit code: 3 unless everything is done."""

    def mean(values, spread=False):
        values = [value for value in values if not math.isnan(value)]
        if not values:
            return "-"
        deviation = f" +- {statistics.pstdev(values):.2f}" if spread else ""
        return f"{statistics.fmean(values):.2f}{deviation}"

    def summary(seeds):
        counts = [sum(seed.state == state for seed in seeds) for state in STATES]
        return counts, f"{100 * statistics.fmean(seed.fraction for seed in seeds):.1f} %"

    columns = ("progress", "train return", "test return", "final train", "final test", "normalised")
    table = [["configuration", *STATES, *columns]]
    configurations = {}
    for run in runs:
        configurations.setdefault(run.configuration, []).append(progress_of(run))
    for configuration, seeds in configurations.items():
        counts, fraction = summary(seeds)
        latest = [mean(seed.train_return for seed in seeds), mean(seed.test_return for seed in seeds)]
        finished = [seed for seed in seeds if seed.state == "done"]
        final = [mean((getattr(seed, name) for seed in finished), True) for name in ("train_return", "test_return")]
        mode, env_id = finished[0].game if finished else (None, None)
        low, high = RANGES.get(mode, {}).get(env_id, (0, math.nan))
        normalised = mean((seed.test_return - low) / (high - low) for seed in finished)
        table.append([configuration, *map(str, counts), fraction, *latest, *final, normalised])
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *cells in table:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")
    counts, fraction = summary(list(itertools.chain(*configurations.values())))
    states = ", ".join(f"{count} {state}" for count, state in zip(counts, STATES))
    print(f"{len(configurations)} configurations, {len(runs)} runs: {states}; {fraction} in all")
    return 0 if counts[0] == len(runs) else 3


def write_file(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    except OSError as error:
        fail(f"{path} could not be written: {error.strerror}")


def ask_max_array_size() -> int:
    """MaxArraySize of the cluster at hand; Slurm's default where there is none."""
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    size = int(re.search(r"MaxArraySize\s*=\s*(\d+)", shown + "MaxArraySize = 1001")[1])
    return size if size > 1 else fail(f"MaxArraySize of this cluster is {size}: it takes no arrays")


def split_tasks(num_tasks: int, max_array_size: int, max_parallel: int | None) -> list:
    """(tasks before it, tasks, tasks at a time) of each array. Indices count from 1, and are below max_array_size."""
    size = max_array_size - 1
    offsets = range(0, num_tasks, size)
    shares = [max_parallel and (max_parallel + i) // len(offsets) for i in range(len(offsets))]
    return [(offset, min(size, num_tasks - offset), share) for offset, share in zip(offsets, shares)]


def write_sbatch(args: Args, runs: list) -> list:
    """Write slurm/generated/{job_name}/: commands.txt, logs/ and the sbatch files, whose paths are returned."""
    folder, here = Path("slurm", "generated", args.job_name), os.getcwd()
    if re.search('["\n]', here):
        fail(f"the current folder {here!r} has a character in its name that sbatch does not take", 2)
    commands = "".join(f"{run.command}\n" for run in runs)
    if (folder / "commands.txt").exists() and (folder / "commands.txt").read_bytes() != commands.encode():
        another = f"{args.job_name}_{time.strftime('%m%d_%H%M')}"
        fail(f"{folder} holds other commands, which jobs may still need; choose another --job-name, as {another}", 2)
    max_array_size = args.max_array_size or ask_max_array_size()
    arrays = split_tasks(math.ceil(len(runs) / args.runs_per_task), max_array_size, args.max_parallel)
    if args.max_parallel is not None and args.max_parallel < len(arrays):
        fail(f"--max-parallel is {args.max_parallel}; it must be at least {len(arrays)}, one for each array file", 2)
    template = read_file(find(args.template), "--template")
    options = [(name.replace("_", "-"), getattr(args, name)) for name in SBATCH_OPTIONS]
    options = [f'--{name}="{value}"' for name, value in options if value is not None]
    for option in filter(None, args.sbatch_arg):
        name, equals, value = (option if option.startswith("-") else f"--{option}").partition("=")
        options.append(f'{name}="{value}"' if equals else name)
    values = {
        "job_name": args.job_name,
        "folder": str(folder),
        "working_dir": here,
        "options": "\n".join(f"#SBATCH {option}" for option in options),
        "setup": "\n".join(args.setup),
        "runs_per_task": args.runs_per_task,
        "max_restarts": args.max_restarts,
    }
    placeholders = set(re.findall(r"{{\s*(\w+)\s*}}", template))
    if unknown := placeholders - values.keys() - {"array", "offset"} or {"array"} - placeholders:
        names = ", ".join((*values, "array", "offset"))
        fail(
            f"--template {args.template}: look at {{{{{unknown.pop()}}}}}; there are {names}, and array must be there",
            2,
        )
    files = {}
    for i, (offset, num_tasks, parallel) in enumerate(arrays, 1):
        name = "array.sbatch" if len(arrays) == 1 else f"array_{i}.sbatch"
        values.update(array=f"1-{num_tasks}" + (f"%{parallel}" if parallel else ""), offset=offset)
        files[folder / name] = re.sub(r"{{\s*(\w+)\s*}}", lambda match: str(values[match[1]]), template)
    for leftover in set(folder.glob("array*.sbatch")) - files.keys():  # of a call that made more files
        leftover.unlink()
    write_file(folder / "commands.txt", commands)
    write_file(folder / "logs" / ".keep", "")  # sbatch does not make the folder
    for path, content in files.items():
        write_file(path, content)
    submit_all = "".join(f"sbatch {shlex.quote(str(path.absolute()))}\n" for path in files)
    write_file(folder / "submit_all.sh", f"#!/bin/sh\n# Submits all of this sweep's arrays.\nset -e\n{submit_all}")
    return list(files)


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C without a traceback
    args = tyro.cli(Args, description=__doc__)
    path = Path(args.grid_config)
    if path.suffix != ".json" and not os.path.isfile(path):
        path = find(f"grids/{args.grid_config}.json")
    if args.job_name is None:
        args.job_name = path.stem
    check_args(args)
    runs = expand(args, path)
    if args.action == "status":
        return print_status(runs)
    if args.only_missing:
        runs = [run for run in runs if progress_of(run).state != "done"]
    if args.action == "print":
        for run in runs:
            print(run.command)
    elif args.action == "save":
        output = Path(args.output or f"{path.stem}.txt")
        write_file(output, "".join(f"{run.command}\n" for run in runs))
        print(f"{output}: {len(runs)} commands; xargs -d '\\n' -P 2 -I{{}} sh -c '{{}}' < {shlex.quote(str(output))}")
    elif not runs:
        print("all runs are done; there is nothing to submit")
    else:
        paths = write_sbatch(args, runs)
        print(f"{paths[0].parent / 'commands.txt'}: {len(runs)} commands")
        if not args.submit:
            print(f"sbatch {paths[0]}" if len(paths) == 1 else f"sh {paths[0].parent / 'submit_all.sh'}")
        for path in paths if args.submit else []:
            result = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
            if result.returncode:
                fail(f"sbatch {path} failed: {' '.join(result.stderr.split())}")
            print(f"submitted {path} as job {result.stdout.strip().split(';')[0]}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has had enough
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename or 'the output'} could not be used: {error.strerror}")
    sys.exit(code)
