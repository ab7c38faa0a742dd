"""Expands a grid of arguments into commands and runs them, here or on a Slurm cluster; shows how far they have come.

    python sweep.py --grid-config ppo --num-trials 5                               # print the commands
    python sweep.py --grid-config ppo --num-trials 5 --action save                 # write them to ppo.txt
    python sweep.py --grid-config ppo --num-trials 5 --action local --workers 4    # run them here, four at a time
    python sweep.py --grid-config ppo --num-trials 5 --action slurm --submit       # run them on a Slurm cluster
    python sweep.py --grid-config ppo --num-trials 5 --action status               # what is done, with which returns
    python sweep.py --grid-config ppo --num-trials 5 --action plot                 # learning curves, and a table

A grid is a JSON file: {"script": "ppo_procgen.py", "grid": {"env_id": ["miner", "maze"], "learning_rate": [0.0005]}}.
Exit codes: 0 done, 1 failed, 2 bad arguments or a bad grid, 3 (status) not everything is finished, 75 (local) stopped.
"""

import ast
import csv
import fcntl
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote

import numpy as np
import tyro
from tqdm import tqdm

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]  # --flag A --flag B


@dataclass
class Args:
    grid_config: str  # the grid: NAME for grids/NAME.json, or the path of a JSON file
    action: str = "print"  # print, save (a command file), local (run here), slurm (sbatch array files), status or plot
    num_trials: int = 1  # seeds of each configuration
    start_index: int = 0  # added to the first seed
    num_samples: int | None = None  # take so many random configurations instead of all
    sample_seed: int = 0  # which ones --num-samples takes
    only_missing: bool = False  # leave out what is finished or running
    python: str = "python"  # interpreter in the commands; several words if need be, such as "nice -n 19 python"
    output: str | None = None  # save, plot: the file to write; by default {name of the grid}.txt or .png
    reference: str | None = None  # plot: a CSV of published runs to draw as a grey band; see README.md

    verbose: bool = False  # status: show the newest log of each unfinished run, and its last line
    csv: str | None = None  # status: write the table to this file as well

    workers: int = 1  # local: commands at the same time, sharing the cores
    gpus: str | None = None  # local: GPUs to spread the workers over, such as 0,1,2; by default CUDA_VISIBLE_DEVICES

    job_name: str | None = None  # local, slurm: names the folder of the logs; by default the name of the grid
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
    gpus_per_task: str | None = None  # slurm: GPUs, such as 1 or a100:1, dealt out to the commands of a task
    dependency: str | None = None  # slurm: what to wait for, such as afterany:ID of another sweep
    sbatch_arg: Repeated = ()  # slurm: any other option of sbatch, such as mail-type=END


ACTIONS = ("print", "save", "local", "slurm", "status", "plot")
# The actions that a flag is for. Those from submit on are for slurm; those that are not here fit all.
FLAGS = {"only_missing": "print save local slurm", "output": "save plot", "verbose": "status", "csv": "status"}
FLAGS |= {"reference": "plot", "workers": "local", "gpus": "local", "job_name": "local slurm"}
NAMES = [field.name for field in fields(Args)]
FLAGS |= dict.fromkeys(NAMES[NAMES.index("submit") :], "slurm")
SBATCH_OPTIONS = NAMES[NAMES.index("partition") : NAMES.index("sbatch_arg")]
# What decides where collect_procgen.py writes.
DATASET_ARGUMENTS = "env_id ratio ratio_checkpoint_dir ratio_dataset_dir checkpoint dataset_saving_dir".split()
EXIT_STOPPED = 75  # of a script that was stopped by a signal with everything saved
UNSAFE = "[\0-\x1f\x7f-\x9f\ud800-\udfff]"  # control characters, and what is no text
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
    name: str  # the xpid, or the place in the sweep of a script that has none
    configuration: str  # the swept arguments but for the seed, as status shows them
    method: str  # the same without the game
    settings: dict  # every argument of the script; if the grid has it not, its default, or None if that is computed


class Progress(NamedTuple):
    state: str  # one of STATES
    fraction: float = 0.0
    train_return: float = math.nan
    test_return: float = math.nan
    game: tuple = (None, None)  # mode and name
    reason: str = ""  # why it is damaged


STATES = ("done", "running", "stopped", "not started", "damaged")


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments and grids, 1 for the rest."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def check_args(args: Args) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right."""

    def require(condition, name, wanted):
        if not condition:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; it must be {wanted}", 2)

    require(args.action in ACTIONS, "action", f"one of {', '.join(ACTIONS)}")
    for field in fields(Args):
        actions = FLAGS.get(field.name, args.action).split()
        fits = args.action in actions or getattr(args, field.name) == field.default
        require(fits, field.name, f"left out here: it is for --action {' and '.join(actions)}")
    smallest = dict.fromkeys("num_trials num_samples workers runs_per_task max_parallel cpus_per_task".split(), 1)
    for name, least in {**smallest, "start_index": 0, "max_restarts": 0, "max_array_size": 2}.items():
        require(getattr(args, name) is None or getattr(args, name) >= least, name, f"at least {least}")
    require(args.job_name is None or re.fullmatch(r"\w[\w.+-]*", args.job_name), "job_name", "letters, digits and .+-_")
    require(args.gpus is None or re.fullmatch(r"[\w/-]+(,[\w/-]+)*", args.gpus), "gpus", "numbers, such as 0,1,2")
    for name in (*SBATCH_OPTIONS, "sbatch_arg"):
        words = "".join(args.sbatch_arg) if name == "sbatch_arg" else str(getattr(args, name))
        require(not re.search(f'"|{UNSAFE}', words), name, 'free of " and line ends')
    try:
        words = shlex.split(args.python)
    except ValueError:  # a quote is open
        words = []
    require(words and not re.search(UNSAFE, args.python), "python", "a command, such as python or 'nice -n 19 python'")
    require(args.action != "local" or shutil.which(words[0]), "python", "a program that can be found here")
    if args.submit and not shutil.which("sbatch"):
        fail("--submit needs sbatch, which is not installed here; leave it out, and submit where it is", 2)


def read_file(path: Path, name: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{name} {path} cannot be read: {getattr(error, 'strerror', 'it is no text')}", 2)


def write_file(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    except OSError as error:
        fail(f"{path} could not be written: {error.strerror}")


def find(path: str) -> Path:
    """A file of the current folder or else of the one that this script is in."""
    return Path(path) if os.path.exists(path) else HERE / path


# FROM A GRID TO RUNS


def read_script(script: Path) -> tuple:
    """Read a script without running it: {name: (annotation, default)} of the fields of Args, and its FREE_ARGUMENTS.

    The latter have no part in the result, so they stand in a run's name only if they are swept. What agent_from is by
    default, AGENT_OF says.
    """
    try:
        tree = ast.parse(read_file(script, "the grid's script"), str(script))
    except (ValueError, SyntaxError) as error:
        fail(f"the grid's script {script} is no Python: {error}", 2)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    arguments, free = {}, ("resume",)

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
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in {"FREE_ARGUMENTS", "AGENT_OF"} & {ast.unparse(target) for target in targets if target}:
            try:
                value = ast.literal_eval(node if isinstance(node, ast.AugAssign) else node.value)
            except ValueError:
                fail(f"the grid's script {script}: {name} must be written out in one piece", 2)
            if name == "FREE_ARGUMENTS":
                free = value
            elif "agent_from" in arguments:
                arguments["agent_from"] = (arguments["agent_from"][0], value)
    return arguments, free


def read_grid(path: Path) -> tuple:
    """The script's path, its arguments, which of them are free, and the lists of a grid file.

    Exits with code 2 and one line that says what is wrong where.
    """

    def as_dict(pairs):
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                fail(f"{path}: {name!r} stands there {names.count(name)} times", 2)
        return dict(pairs)

    text = read_file(path, "--grid-config takes a name in grids/ or the path of a JSON file, but")
    try:
        grid = json.loads(text, object_pairs_hook=as_dict)
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
        values[:] = [check_value(path, name, value, arguments[name][0]) for value in values]
    return script, arguments, free, grid["grid"]


def check_value(path: Path, name: str, value, annotation: str):
    """The value as the script will see it."""
    if annotation.startswith("int") and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON's 25e6
    types = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    scalars = (int, float, bool, str)  # of other annotations the script itself is the judge
    if value is not None and type(value) not in types.get(annotation.replace(" | None", ""), scalars):
        wanted = "a number, string, boolean or null" if isinstance(value, (list, dict)) else annotation
        fail(f"{path}: {name!r} is {json.dumps(value)}; {wanted} is wanted", 2)
    if isinstance(value, (int, float)) and not -1e308 < value < 1e308:
        fail(f"{path}: {name!r} is {json.dumps(value)[:20]}; a finite number is wanted", 2)
    if isinstance(value, str) and re.search(UNSAFE, value):
        fail(f"{path}: {name!r} is {json.dumps(value)}; it must be text without control characters", 2)
    return float(value) if annotation.startswith("float") and value is not None else value


def flag(name: str, value, annotation: str) -> str:
    """The words of a shell command that give an argument its value; none for None, which stands for the default."""
    name = f"--{name.replace('_', '-')}"
    if value is None:
        return ""
    if annotation == "bool":
        return name if value else name.replace("--", "--no-", 1)
    word = shlex.quote(str(value))
    return f"{name}={word}" if str(value).startswith("-") else f"{name} {word}"


def run_name(script: Path, arguments: dict, free: tuple, settings: dict, swept: list) -> str:
    """A run's name but for the seed: the script's default one, and the free arguments that are swept.

    It depends on the run alone, not on what else is in the grid: what differs from its default is named, swept or not.
    """
    algorithm = script.stem.removesuffix("_procgen")
    parts = {"env_id": "", "distribution_mode": "-", "num_levels": "-", "": f"-{algorithm}", "learning_rate": "-lr"}
    parts |= {"update_epochs": "-epoch", "num_minibatches": "-mb", "vf_coef": "-v", "ent_coef": "-ha"}
    named = [name for name, (_, default) in arguments.items() if settings[name] != default]
    named = [name for name in named if name not in free or name in swept]
    if settings["xpid"] is not None:  # as the grid has it, and what is swept, so that no two runs share a folder
        parts, named = {"xpid": ""}, swept
    named = [name for name in named if name not in (*parts, "seed", "xpid")]
    parts |= {name: f"-{name}" for name in named}
    words = [f"{part}{settings.get(name, '')}" for name, part in parts.items() if name in ("", *arguments)]
    return quote("".join(words), safe="+")


def expand(args: Args, path: Path) -> list:
    """The runs of a grid: the product of its lists, the last one fastest, or samples of it, and of each the seeds."""
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
    for name, values in {**grid, "seed": seeds}.items():
        effective = [arguments.get(name, (None, 0))[1] if value is None else value for value in values]
        for value in effective:
            if (count := effective.count(value)) > 1:
                fail(f"{path}: {name!r} is {value!r} in {count} configurations that are otherwise equal", 2)
    swept = [name for name, values in grid.items() if len(values) > 1]

    shape, picked = [len(values) for values in grid.values()], set()
    if args.num_samples is not None:
        if args.num_samples > math.prod(shape):
            fail(f"--num-samples is {args.num_samples}; {path} has {math.prod(shape)} configurations", 2)
        generator = random.Random(args.sample_seed)
        while len(picked) < args.num_samples:  # the first ones stay when more are asked for
            picked.add(generator.randrange(math.prod(shape)))

    start = [shlex.join(shlex.split(args.python)), shlex.quote(str(script))]
    defaults = {name: default for name, (_, default) in arguments.items()}
    runs, folders = [], set()
    for index in sorted(picked) or range(math.prod(shape)):
        places = np.unravel_index(index, shape) if shape else ()
        given = {name: values[place] for (name, values), place in zip(grid.items(), places)}
        words = [*start, *(flag(name, value, arguments[name][0]) for name, value in given.items() if name != "xpid")]
        settings = defaults | {name: value for name, value in given.items() if value is not None}
        labels = {name: f"{name}={settings[name]}" for name in swept}
        configuration = " ".join(labels.values()) or path.stem
        method = " ".join(label for name, label in labels.items() if name != "env_id")
        xpid = run_name(script, arguments, free, settings, swept) if "xpid" in arguments else None
        for seed in seeds:
            settings = {**settings, "seed": seed}
            command, name = [*words, flag("seed", seed, "int")], f"{path.stem}_{len(runs) + 1}"
            if xpid is not None:
                settings["xpid"] = name = f"{xpid}_{seed}"
                if len(name) > 200:  # quoted, so that a character is a byte
                    fail(f'{path}: the xpid {name} has more than 200 bytes; give the grid one, "xpid": ["short"]', 2)
                command.append(flag("xpid", name, "str"))
                folders.add((settings.get("env_id"), name))
            elif settings.get("save_dataset"):
                folders.add(tuple(map(settings.get, DATASET_ARGUMENTS)))
            runs.append(Run(" ".join(filter(None, command)), name, configuration, method, settings))
    if folders and len(folders) < len(runs):
        names = "xpid" if "xpid" in arguments else f"dataset, as that depends on {', '.join(DATASET_ARGUMENTS)} only"
        fail(f"{path}: two commands would share a folder, as they have the same {names}", 2)
    return runs


# STATUS


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


COLUMNS = ("global_step", "charts/episodic_return", "charts/test_return")


def read_curves(table: Path, last: int | None = None) -> list:
    """(steps, train return, test return or nan) of the rows of a progress.csv, or of those in its last bytes only."""
    with open(table, "rb") as file:
        names = file.readline().decode().strip().split(",")
        columns = [names.index(name) for name in COLUMNS]
        size = table.stat().st_size
        if last is not None and size - last > file.tell():
            file.seek(size - last)
            file.readline()  # the rest of a row
        rows = [line.split(",") for line in file.read().decode().splitlines(keepends=True)]
    if any(len(row) != len(names) or not rows[-1][-1].endswith("\n") for row in rows):
        raise ValueError("a row is cut off")
    return [tuple(float(row[column]) for column in columns) for row in rows]


def run_folder(settings: dict) -> Path:
    return Path(settings["model_saving_dir"], settings["env_id"], settings["xpid"])


def training_progress(settings: dict) -> Progress:
    """Of a run in {model_saving_dir}/{env_id}/{xpid}/, from the end of its progress.csv."""
    folder = run_folder(settings)
    rows, tests = [], []
    if (folder / "progress.csv").exists():
        for last in (2**15, None):  # all of it only if no test is found near the end
            rows = read_curves(folder / "progress.csv", last)
            if tests := [test for *_, test in rows if not math.isnan(test)]:
                break
    steps, train_return, _ = rows[-1] if rows else (0, math.nan, None)
    batch_size = settings["num_envs"] * settings["num_steps"]
    total_steps = settings["total_timesteps"] // batch_size * batch_size
    finals = [path for path in folder.glob("final/*.pt") if re.fullmatch(r"model_-?\d+\.\d\d\.pt", path.name)]
    state = state_of(folder, steps >= total_steps and finals, (folder / "rolling" / "model.pt").exists())
    game = (settings.get("distribution_mode"), settings["env_id"])
    fraction = min(1.0, steps / max(total_steps, 1))
    return Progress(state, fraction, train_return, tests[-1] if tests else math.nan, game)


def dataset_progress(folder: Path, settings: dict) -> Progress:
    """Of a dataset, from its metadata.json. Its mean return stands for the test return."""
    started = (folder / "metadata.json").exists()
    wanted = ("episodes", "num_episodes") if settings.get("num_episodes") else ("steps", "total_timesteps")
    metadata = json.loads((folder / "metadata.json").read_text("utf-8")) if started else {}
    fraction = metadata.get(wanted[0], 0) / settings[wanted[1]]
    mean = float(math.nan if metadata.get("return_mean") is None else metadata["return_mean"])
    state = state_of(folder, bool(metadata.get("complete")) and fraction >= 1, started)
    game = (metadata.get("distribution_mode"), metadata.get("env_id"))
    return Progress(state, min(1.0, fraction), math.nan, mean, game)


def collection_progress(settings: dict) -> Progress:
    """Of a command that collects: if it does from every run of a game, it is done when all its datasets are."""
    if settings.get("ratio") is None:
        return dataset_progress(Path(settings["dataset_saving_dir"]), settings)
    needs = ("final",) if settings["ratio"] == 1 else ("final", "checkpoint")  # other runs are skipped by the script
    runs = sorted(Path(settings["ratio_checkpoint_dir"], settings["env_id"]).glob("*/"))
    runs = [run for run in runs if all(any(run.glob(f"{name}/*.pt")) for name in needs)]
    if source := settings.get("agent_from"):  # a run has a copy of the script that made it
        runs = [run for run in runs if (run / Path(source).name).exists()]
    folders = [run / settings["ratio_dataset_dir"] / str(settings["ratio"]) for run in runs]
    parts = [dataset_progress(folder, settings) for folder in folders] or [Progress("not started")]
    states = {part.state for part in parts}
    state = states.pop() if len(states) == 1 else "running" if "running" in states else "stopped"
    returns = [part.test_return for part in parts if not math.isnan(part.test_return)]
    mean = statistics.fmean(returns) if returns else math.nan
    return Progress(state, statistics.fmean(part.fraction for part in parts), math.nan, mean, parts[0].game)


def check_known(runs: list) -> None:
    """Exit with code 2 if grid and script do not tell where the runs are and how long they will be."""
    for settings in (run.settings for run in runs):
        needed = ["total_timesteps", "dataset_saving_dir"]
        if "xpid" in settings:
            needed = ["model_saving_dir", "env_id", "num_envs", "num_steps", "total_timesteps"]
        elif settings.get("ratio") is not None:
            needed = ["env_id", "ratio_checkpoint_dir", "ratio_dataset_dir", "total_timesteps"]
        if unknown := ", ".join(name for name in needed if not settings.get(name)):
            fail(f"status, plot and --only-missing need {unknown}: neither grid nor script says it plainly", 2)


def progress_of(run: Run) -> Progress:
    try:
        return training_progress(run.settings) if "xpid" in run.settings else collection_progress(run.settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever is in the files
        return Progress("damaged", reason=f"{type(error).__name__}: {error}")


def mean_of(values) -> float:
    values = [value for value in values if not math.isnan(value)]
    return statistics.fmean(values) if values else math.nan


def summarise(runs: list, progress: list) -> tuple:
    """A row per configuration, as a dict, and for each method the normalised test returns of its games, {game: [...]}.

    Deviations are those of a sample, and nan for one seed. Latest returns are of all seeds, final ones of those done.
    """
    table, methods = {}, {}
    for run, seed in zip(runs, progress):
        table.setdefault((run.method, run.configuration), []).append(seed)
    for (method, configuration), seeds in table.items():
        row = {"configuration": configuration}
        row |= {state.replace(" ", "_"): sum(seed.state == state for seed in seeds) for state in STATES}
        row["progress"] = statistics.fmean(seed.fraction for seed in seeds)
        finished = [seed for seed in seeds if seed.state == "done"]
        for name in ("train_return", "test_return"):
            row[name] = mean_of(getattr(seed, name) for seed in seeds)
            final = [getattr(seed, name) for seed in finished]
            row[f"final_{name}"] = mean_of(final)
            row[f"final_{name}_deviation"] = statistics.stdev(final) if len(final) > 1 else math.nan
        low, high = RANGES.get(finished[0].game[0], {}).get(finished[0].game[1], (0, math.nan)) if finished else (0, 1)
        normalised = [(seed.test_return - low) / (high - low) for seed in finished]
        normalised = [value for value in normalised if not math.isnan(value)]
        row["normalised"] = mean_of(normalised)
        table[method, configuration] = row
        if normalised:
            methods.setdefault(method, {}).setdefault(finished[0].game, []).extend(normalised)
    return list(table.values()), methods


def interquartile_mean(games: dict) -> str:
    """The mean of the middle half of all runs, given as {game: normalised returns}, and how certain it is.

    Agarwal et al. 2021: a percentile bootstrap that draws the seeds of each game anew.
    """

    def iqm(returns):  # along the last axis
        cut = returns.shape[-1] // 4
        return np.sort(returns)[..., cut : returns.shape[-1] - cut].mean(-1)

    generator = np.random.default_rng(0)
    resampled = np.concatenate([generator.choice(x, (10_000, len(x))) for x in games.values()], axis=1)
    low, high = np.percentile(iqm(resampled), [2.5, 97.5])
    interval = (
        f"95 % interval {low:.2f} to {high:.2f}" if min(map(len, games.values())) > 1 else "one seed: no interval"
    )
    runs = f"{len(games)} game{'s' * (len(games) > 1)}, {resampled.shape[1]} runs"
    return f"{iqm(np.concatenate([*games.values()])):.2f} ({interval}; {runs})"


def write_csv(path: Path, rows: list) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def last_words(log: Path) -> str:
    """A log and the last line in it that the command has written."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if not line.startswith("== ")]
    return f"{log}: {([''] + [line for line in lines if line])[-1]}"


def print_logs(runs: list, progress: list) -> None:
    """For each unfinished run its state, its newest log and the last line of that."""
    logs = [path for names in ("logs/*/*.log", "slurm/generated/*/logs/*.log") for path in Path().glob(names)]
    newest = {}  # {arguments: log}, without the interpreter, which may have been another
    for log in sorted(logs, key=lambda log: log.stat().st_mtime):
        for command in re.findall(r"^== .*?\.py (.*)$", log.read_text("utf-8", "replace"), re.MULTILINE):
            newest[command] = log
    for run, (state, *_, reason) in zip(runs, progress):
        if state != "done":
            log = newest.get(run.command.partition(".py ")[2])
            print(f"{run.name}: {state}{reason and f' ({reason})'}; {last_words(log) if log else 'no log'}")


def print_status(args: Args, runs: list) -> int:
    """Print a row per configuration and a summary. Returns the exit code: 3 unless everything is done."""

    def cell(row, name):
        mean, deviation = row[name], row.get(f"{name}_deviation", math.nan)
        if math.isnan(mean):
            return "-"
        return f"{mean:.2f}" + ("" if math.isnan(deviation) else f" +- {deviation:.2f}")

    progress = [progress_of(run) for run in runs]
    table, methods = summarise(runs, progress)
    names = ("train_return", "test_return", "final_train_return", "final_test_return", "normalised")
    titles = (name.removesuffix("_return") if name.startswith("final") else name for name in names)
    lines = [["configuration", *STATES, "progress", *(title.replace("_", " ") for title in titles)]]
    for row in table:
        counts = [str(row[state.replace(" ", "_")]) for state in STATES]
        lines.append([row["configuration"], *counts, f"{100 * row['progress']:.1f} %", *(cell(row, x) for x in names)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")
    if args.verbose:
        print_logs(runs, progress)
    if args.csv is not None:
        write_csv(Path(args.csv), table)
    counts = [sum(seed.state == state for seed in progress) for state in STATES]
    states = ", ".join(f"{count} {state}" for count, state in zip(counts, STATES) if count or state != "damaged")
    fraction = statistics.fmean(seed.fraction for seed in progress)
    deviation = "; +- is the sample standard deviation over seeds" if "+-" in str(lines) else ""
    print(f"{len(table)} configurations, {len(runs)} runs: {states}; {100 * fraction:.1f} % in all{deviation}")
    for method, games in methods.items():
        if sum(map(len, games.values())) > 1:
            print(
                f"interquartile mean of normalised test returns{method and ', '}{method}: {interquartile_mean(games)}"
            )
    return 0 if counts[0] == len(runs) else 3


# CURVES

LINE_STYLES = {"train": "-", "test": "--"}


def draw(axes, seeds: list, column: int, **line) -> None:
    """Mean and deviation of a column as far as all seeds have come; beyond that each seed by itself, thin."""
    seeds = [seed[~np.isnan(seed[:, column])][:, [0, column]] for seed in seeds]
    seeds = [seed for seed in seeds if len(seed)]
    if not seeds:
        return
    points, together = {}, min(seed[-1, 0] for seed in seeds)
    for seed in seeds:
        for steps, value in seed:
            points.setdefault(steps / 1e6, []).append(value)
        ahead = seed[max(0, np.searchsorted(seed[:, 0], together, "right") - 1) :]
        axes.plot(ahead[:, 0] / 1e6, ahead[:, 1], linewidth=0.5, alpha=0.7, **line)
    points = {steps: values for steps, values in sorted(points.items()) if len(values) == len(seeds)}
    mean = np.array([statistics.fmean(values) for values in points.values()])
    axes.plot(points.keys(), mean, linewidth=1.3, **line)
    if len(seeds) > 1:
        deviation = np.array([statistics.stdev(values) for values in points.values()])
        band = {"color": line["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(list(points), mean - deviation, mean + deviation, **band)


def read_reference(path: Path) -> dict:
    """The runs of a CSV file with the columns game, levels (train or test), steps and a return each in run0, run1, ...

    Returns {(game, levels): [(steps, lowest return, highest return), ...]}.
    """
    bands = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                returns = [float(value) for name, value in row.items() if name.startswith("run")]
                if row["levels"] not in LINE_STYLES:
                    raise ValueError(f"levels is {row['levels']!r}, not train or test")
                band = bands.setdefault((row["game"], row["levels"]), [])
                band.append((float(row["steps"]), min(returns), max(returns)))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        wanted = "a CSV file with the columns game, levels (train or test), steps, run0, run1 and so on"
        fail(f"--reference {path} must be {wanted} ({type(error).__name__}: {error})", 2)
    return bands


def draw_reference(axes, bands: dict, env_id: str, total: int) -> None:
    """Fill the area between the lowest and the highest run of a game, as far as the panel reaches."""
    for levels, opacity in (("train", 0.4), ("test", 0.2)):
        band = np.array([row for row in bands.get((env_id, levels), []) if row[0] <= total])
        if len(band):
            axes.fill_between(band[:, 0] / 1e6, band[:, 1], band[:, 2], color="gray", alpha=opacity, linewidth=0)


def plot(runs: list, output: Path, reference: dict) -> None:
    """Draw a panel per game and a line per method, and write status's table beside it.

    reference is read_reference()'s; it may be empty.
    """
    import matplotlib  # here, as it is slow and only this needs it
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if "xpid" not in runs[0].settings:
        fail("--action plot draws the curves of trainings, and the grid's script has no argument xpid", 2)
    panels = {}  # {game: {method: [(steps, train return, test return) of a seed, as an array of rows]}}
    for run in runs:
        table = run_folder(run.settings) / "progress.csv"
        seeds = panels.setdefault(run.settings["env_id"], {}).setdefault(run.method, [])
        try:
            rows = read_curves(table) if table.exists() else []
        except (OSError, ValueError) as error:
            print(f"{table} is left out, as it is damaged ({error})")
            continue
        seeds += [np.array(rows)] if rows else []
    if not any(seeds for methods in panels.values() for seeds in methods.values()):
        fail("there is nothing to draw: none of these runs has got as far as a row in its progress.csv")

    methods = list(dict.fromkeys(run.method for run in runs))
    palette = matplotlib.colormaps["tab10" if len(methods) <= 10 else "turbo"].resampled(max(10, len(methods)))
    colours = {method: palette(i) for i, method in enumerate(methods)}
    lines = [Line2D([], [], color="gray", linestyle=style) for style in LINE_STYLES.values()]
    lines += [Line2D([], [], color=colours[method], linewidth=3) for method in methods if method]
    labels = ["training levels", "test levels"]
    if reference:
        lines.insert(2, Patch(color="gray", alpha=0.4, linewidth=0))
        labels.append("reference, lowest to highest run")
    labels += [textwrap.fill(method, 100).replace("$", r"\$") for method in methods if method]
    columns = len(panels) if len(panels) <= 3 else math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    size = (6, 3.4) if len(panels) == 1 else (2.6 * columns, 2.1 * rows)
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for i, (axes, (env_id, seeds_of)) in enumerate(zip(grid.flat, panels.items())):
            for method, seeds in seeds_of.items():
                draw(axes, seeds, 1, color=colours[method], linestyle=LINE_STYLES["train"])
                draw(axes, seeds, 2, color=colours[method], linestyle=LINE_STYLES["test"])
            total = max(run.settings["total_timesteps"] for run in runs if run.settings["env_id"] == env_id)
            draw_reference(axes, reference, env_id, total)
            axes.set(title=env_id, xlim=(0, total / 1e6), ylabel="" if i % columns else "episode return")
            axes.set_xlabel("environment steps (millions)" if i + columns >= len(panels) else "")
            axes.locator_params(axis="x", nbins=4)
            axes.grid(alpha=0.3)
        several = any(len(seeds) > 1 for methods in panels.values() for seeds in methods.values())
        legend = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False}
        legend["title"] = (
            "mean of the seeds, band: sample standard deviation, thin: seeds that are ahead" if several else ""
        )
        legend["ncols"] = max(1, min(len(labels), int(14 * size[0]) // max(map(len, labels))))
        figure.legend(lines, labels, **legend)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(output, dpi=200, bbox_inches="tight")  # which makes room for the legend
        except ValueError as error:  # of matplotlib, about the suffix
            fail(f"--output {output}: {error}", 2)
    write_csv(output.with_suffix(".csv"), summarise(runs, [progress_of(run) for run in runs])[0])
    print(f"{output}, and its table {output.with_suffix('.csv')}")


# RUNNING HERE


def run_local(args: Args, runs: list) -> int:
    """Run the commands here, with a log each; SIGINT and SIGTERM are passed on to them. Returns the exit code."""
    folder = Path("logs", args.job_name)
    folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {"OMP_NUM_THREADS": str(max(1, cores // args.workers)), **os.environ}
    gpus = (args.gpus or os.environ.get("CUDA_VISIBLE_DEVICES", "")).split(",")
    signals, waiting, active, ended = [], runs[::-1], {}, Counter()  # active: {worker: (run, process)}
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: signals.append(signum))
    form = "{percentage:.1f} %|{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]{postfix}"
    bar, passed_on = tqdm(total=len(runs), bar_format=form, disable=None), 0
    print(f"{len(runs)} runs, {min(args.workers, len(runs))} at a time; logs in {folder}/", flush=True)
    while active or (waiting and not signals):
        for worker in range(args.workers):
            if worker in active or not waiting or signals:
                continue
            run = waiting.pop()
            if gpus != [""]:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
            with open(folder / f"{run.name}.log", "a") as log:
                print(f"== {run.command}", file=log, flush=True)
                options = {"env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                options["start_new_session"] = True  # so that Ctrl-C reaches it through this process, once
                active[worker] = run, subprocess.Popen(shlex.split(run.command), **options)
        time.sleep(0.1)
        if passed_on < len(signals):
            passed_on = len(signals)
            for _, process in active.values():
                process.terminate()
        for worker, (run, process) in list(active.items()):
            if (code := process.poll()) is not None:
                del active[worker]
                # A script that our signal has killed was not yet ready for it: it has nothing to save.
                stopped = code == EXIT_STOPPED or (signals and code in (-signal.SIGTERM, 128 + signal.SIGTERM))
                ended["done" if code == 0 else "stopped" if stopped else "failed"] += 1
                if code and not stopped:
                    tqdm.write(f"{run.name} failed with exit code {code}: {last_words(folder / f'{run.name}.log')}")
                elif bar.disable:
                    print(f"{run.name} is {'stopped' if code else 'done'}, {ended.total()} of {len(runs)}")
                sys.stdout.flush()
        if not bar.disable:
            bar.n = ended.total() + sum(progress_of(run).fraction for run, _ in active.values())
            bar.set_postfix({**ended, "running": len(active)})
    bar.close()
    ended["not started"] = len(waiting)
    counts = ", ".join(f"{ended[state]} {state}" for state in ("done", "failed", "stopped", "not started"))
    print(f"{len(runs)} runs: {counts}")
    if ended["failed"] and not signals:
        return 1
    return 0 if ended["done"] == len(runs) else EXIT_STOPPED


# RUNNING ON SLURM


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
    if re.search(rf'["%\\]|{UNSAFE}', here):
        fail(f'the current folder is {here!r}; sbatch takes none with ", %, \\ or a line end in its name', 2)
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
        **dict.fromkeys(("array", "offset", "file")),  # they differ from file to file
    }
    placeholders = set(re.findall(r"{{\s*(\w+)\s*}}", template))
    if odd := placeholders - values.keys() or {"array"} - placeholders:
        known = f"there are {', '.join(values)}, and array must be there"
        fail(f"--template {args.template}: look at {{{{{odd.pop()}}}}}; {known}", 2)
    files = {}
    for i, (offset, num_tasks, parallel) in enumerate(arrays, 1):
        name = "array.sbatch" if len(arrays) == 1 else f"array_{i}.sbatch"
        values["array"] = f"1-{num_tasks}" + (f"%{parallel}" if parallel else "")
        values["offset"], values["file"] = offset, folder / name
        files[folder / name] = re.sub(r"{{\s*(\w+)\s*}}", lambda match: str(values[match[1]]), template)
    for leftover in set(folder.glob("array*.sbatch")) - files.keys():  # of a call that made more files
        leftover.unlink()
    write_file(folder / "commands.txt", commands)
    write_file(folder / "logs" / ".keep", "")  # sbatch does not make the folder
    for path, content in files.items():
        write_file(path, content)
    submit_all = "".join(f"sbatch {shlex.quote(str(path.absolute()))}\n" for path in files)
    start = "#!/bin/sh\n# Submits all of this sweep's arrays.\nset -e\nunset SLURM_RESTART_COUNT\n"
    write_file(folder / "submit_all.sh", start + submit_all)
    return list(files)


def submit(paths: list) -> None:
    os.environ.pop("SLURM_RESTART_COUNT", None)  # of a job that submits: its jobs would inherit it
    for i, path in enumerate(paths):
        result = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
        if result.returncode:
            left = " && ".join(f"sbatch {path}" for path in paths[i:])
            fail(f"sbatch {path} failed: {' '.join(result.stderr.split())}. To submit what is left: {left}")
        print(f"submitted {path} as job {result.stdout.strip().split(';')[0]}; logs in {path.parent}/logs/", flush=True)


def main() -> int:
    """Returns the exit code."""
    args = tyro.cli(Args, description=__doc__)
    args.action = args.action.lower()  # gen_dgrl's are in capitals
    check_args(args)
    path = Path(args.grid_config)
    if path.suffix != ".json" and not os.path.isfile(path):
        path = find(f"grids/{args.grid_config}.json")
    args.job_name = args.job_name or re.sub(r"[^\w.+-]", "_", path.stem)
    runs = expand(args, path)
    if args.action in ("status", "plot") or args.only_missing:
        check_known(runs)
    if args.action == "status":
        return print_status(args, runs)
    if args.action == "plot":
        reference = read_reference(Path(args.reference)) if args.reference else {}
        plot(runs, Path(args.output or f"{path.stem}.png"), reference)
        return 0
    if args.only_missing:
        runs = [run for run in runs if progress_of(run).state not in ("done", "running")]
    if args.action == "print":
        for run in runs:
            print(run.command)
    elif args.action == "save":
        output = Path(args.output or f"{path.stem}.txt")
        write_file(output, "".join(f"{run.command}\n" for run in runs))
        print(f"{output}: {len(runs)} commands")
    elif not runs:
        print("all runs are done or running; there is nothing to start")
    elif args.action == "local":
        return run_local(args, runs)
    else:
        paths = write_sbatch(args, runs)
        print(f"{paths[0].parent / 'commands.txt'}: {len(runs)} commands")
        if args.submit:
            submit(paths)
        else:
            print(f"sbatch {paths[0]}" if len(paths) == 1 else f"sh {paths[0].parent / 'submit_all.sh'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nor one if the reader, such as head, has had enough
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        fail(f"the package {error.name} is missing: pip install -r requirements.txt")
    except OSError as error:
        fail(f"{error.filename or 'the output'} could not be used: {error.strerror}")
