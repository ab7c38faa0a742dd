"""Expands a grid of arguments into commands and runs them, here or on a Slurm cluster; shows their progress.

    python sweep.py --grid-config smoke --action local                             # try it: four small trainings
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
import difflib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
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
    python: str | None = None  # interpreter, such as "nice -n 19 python"; by default python, for local that of sweep.py
    output: str | None = None  # save, plot: the file to write; by default {name of the grid}.txt or .png
    reference: str | None = None  # plot: a CSV of published runs to draw as a grey band; see README.md

    verbose: bool = False  # status: show why unfinished runs stopped: their Slurm task and the end of their log
    csv: str | None = None  # status: write the table to this file as well

    workers: int = 1  # local: commands at the same time, sharing the cores
    gpus: str | None = None  # local: GPUs to deal out, such as 0,1,2; by default CUDA_VISIBLE_DEVICES, or else all

    job_name: str | None = None  # local, slurm: names the folder of the logs; by default the name of the grid
    submit: bool = False  # slurm: call sbatch
    runs_per_task: int = 1  # slurm: commands in one array task
    side_by_side: int | None = None  # slurm: commands of a task that run at the same time; by default all
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
    cpus_per_task: int | None = None  # slurm: cores, shared by the commands that run side by side
    gpus_per_task: str | None = None  # slurm: GPUs, such as 1 or a100:1, dealt out to the commands of a task
    dependency: str | None = None  # slurm: what to wait for, such as afterany:ID of another sweep
    sbatch_arg: Repeated = ()  # slurm: any other option of sbatch, such as mail-type=END


SBATCH_OPTIONS = "partition account qos constraint time mem cpus_per_task gpus_per_task dependency".split()
SLURM_FLAGS = "submit runs_per_task side_by_side max_parallel max_restarts max_array_size template setup".split()
FLAGS_OF_ACTION = {  # a flag that is not listed fits every action
    "print": ["only_missing"],
    "save": ["only_missing", "output"],
    "local": ["only_missing", "workers", "gpus", "job_name"],
    "slurm": ["only_missing", "job_name", "sbatch_arg", *SLURM_FLAGS, *SBATCH_OPTIONS],
    "status": ["verbose", "csv"],
    "plot": ["output", "reference"],
}
MAY_BE_ZERO = ("start_index", "sample_seed", "max_restarts")  # other whole numbers are at least 1
PLAIN_TYPES = ("int", "float", "bool", "str")  # that a grid can set
# The arguments that are in every run's name, and the prefixes of their values. "script" stands for its file name.
IN_EVERY_NAME = {
    "env_id": "", "distribution_mode": "", "num_levels": "", "script": "", "learning_rate": "lr",
    "update_epochs": "epoch", "num_minibatches": "mb", "vf_coef": "v", "ent_coef": "ha",
}  # fmt: skip
# The arguments that decide where collect_procgen.py writes.
DATASET_ARGUMENTS = "env_id ratio ratio_checkpoint_dir ratio_dataset_dir checkpoint dataset_saving_dir".split()
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_STOPPED = 75  # of a script that was stopped by a signal with everything saved
UNSAFE = "[\0-\x1f\x7f-\x9f\ud800-\udfff]"  # control characters, and halves of surrogate pairs
PLACEHOLDER = r"{{\s*(\w+)\s*}}"  # in the template
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
GAMES = tuple(RANGES["easy"])


class Script(NamedTuple):
    path: Path
    annotations: dict  # {argument: annotation}, as its source has them
    defaults: dict  # {argument: default}, None if it is computed
    computed: list  # arguments whose default is not a constant
    free: tuple  # FREE_ARGUMENTS, which do not affect the result: a run's name has them only if they are swept
    extra_modes: dict | None  # EXTRA_MODES of Procgen's games, {mode: games}; None in a script for other games


class Run(NamedTuple):
    command: str
    name: str  # the xpid, or for a script without xpids the number of the command
    configuration: str  # the swept arguments without the seed, as status shows them
    method: str  # the same without the game
    settings: dict  # {name: value} of every argument of the script


class Progress(NamedTuple):
    state: str  # one of STATES
    fraction: float = 0.0
    train_return: float = math.nan
    test_return: float = math.nan
    game: tuple = (None, None)  # mode and name
    reason: str = ""  # why it is damaged


STATES = ("done", "running", "stopped", "not started", "damaged")
OUTCOMES = ("done", "failed", "stopped", "in use", "not started")  # of a command that runs here


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; code 2 is for arguments and grids, 1 for the rest."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_args(args: Args) -> None:
    """Exit with code 2 and one line that names the flag, its value and what would be right."""

    def require(condition, name, wanted):
        if not condition:
            fail(f"{flag(name)} is {getattr(args, name)!r}; it must be {wanted}", 2)

    require(args.action in FLAGS_OF_ACTION, "action", f"one of {', '.join(FLAGS_OF_ACTION)}")
    for field in fields(Args):
        value = getattr(args, field.name)
        actions = [action for action, flags in FLAGS_OF_ACTION.items() if field.name in flags]
        is_fitting = not actions or args.action in actions or value == field.default
        require(is_fitting, field.name, f"left out here: it is for --action {' and '.join(actions)}")
        if type(value) is int:
            smallest = 0 if field.name in MAY_BE_ZERO else 1
            require(value >= smallest, field.name, f"at least {smallest}")
    require(re.fullmatch(r"\w[\w.+-]*", args.job_name or "_"), "job_name", "letters, digits and .+-_")
    require(re.fullmatch(r"[\w/-]+(,[\w/-]+)*", args.gpus or "0"), "gpus", "numbers, such as 0,1,2")
    # Minutes, minutes:seconds or hours:minutes:seconds, below five minutes; 0 is no limit.
    is_short = re.fullmatch(r"(0+:)?0*[0-4](:\d+)?", args.time or "") and re.search("[1-9]", args.time)
    require(not is_short, "time", "at least 5 minutes, as SIGUSR2 comes two minutes before the limit")
    if args.python is not None:
        try:
            words = shlex.split(args.python)
        except ValueError:  # a quote is open
            words = []
        is_found = words and (args.action != "local" or shutil.which(words[0]))
        require(is_found, "python", "a command that can be found, such as python or 'nice -n 19 python'")
    if args.submit and not shutil.which("sbatch"):
        fail("--submit needs sbatch, which is not installed here; leave --submit out, and submit where sbatch is", 2)


def read_file(path: Path, name: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{name} {path} cannot be read: {getattr(error, 'strerror', 'it is not text')}", 2)


def write_file(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    except OSError as error:
        fail(f"{path} could not be written: {error.strerror}")


def resolve_path(path: str) -> Path:
    """The path itself if it exists from the current folder; otherwise, the path from this script's folder."""
    return Path(path) if os.path.exists(path) else HERE / path


def did_you_mean(word: str, known) -> str:
    """The end of a message about a word that is not known."""
    similar = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


# FROM A GRID TO RUNS


def read_script(path: Path) -> Script:
    """Read the class Args and some constants in a script's source. The script is not run."""
    try:
        tree = ast.parse(read_file(path, "the grid's script"), str(path))
    except (ValueError, SyntaxError) as error:
        fail(f"the grid's script {path} is no Python: {error}", 2)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    nodes = {}

    def add_fields(class_name):
        if class_name not in classes:
            fail(f"the grid's script {path} has no class {class_name}, whose fields would be its arguments", 2)
        for base in classes[class_name].bases:
            add_fields(ast.unparse(base))
        for node in classes[class_name].body:
            if isinstance(node, ast.AnnAssign):
                nodes[ast.unparse(node.target)] = node

    add_fields("Args")
    annotations = {name: ast.unparse(node.annotation) for name, node in nodes.items()}
    defaults = dict.fromkeys(nodes)
    computed = []
    for name, node in nodes.items():
        try:
            defaults[name] = as_annotated(ast.literal_eval(node.value), annotations[name])
        except (ValueError, TypeError):  # it is no literal, or there is none
            computed.append(name)
    constants = {"FREE_ARGUMENTS": ("resume",), "EXTRA_MODES": None, "AGENT_OF": None}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in constants:
            name = ast.unparse(node.targets[0])
            try:
                constants[name] = ast.literal_eval(node.value)
            except ValueError:
                fail(f"the grid's script {path}: {name} must be a literal, without names or calls", 2)
    if "agent_from" in defaults:
        defaults["agent_from"] = constants["AGENT_OF"]
    return Script(path, annotations, defaults, computed, constants["FREE_ARGUMENTS"], constants["EXTRA_MODES"])


def as_annotated(value, annotation: str):
    """Convert a number to the type of its argument: 1 to 1.0 for a float, JSON's 25e6 to 25000000 for an int."""
    if type(value) in (int, float):
        if annotation.startswith("float"):
            return float(value)
        if annotation.startswith("int") and value == int(value):
            return int(value)
    return value


def read_grid(path: Path) -> tuple:
    """The Script of a grid file and its lists of values, {name: values}. A mistake is one line and exit code 2."""

    def as_dict(pairs):
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                fail(f"{path}: {name!r} is there {names.count(name)} times", 2)
        return dict(pairs)

    text = read_file(path, "--grid-config takes a name in grids/ or the path of a JSON file, but")
    try:
        content = json.loads(text, object_pairs_hook=as_dict)
    except (ValueError, RecursionError) as error:
        fail(f"{path} is no JSON: {error}", 2)
    is_grid = isinstance(content, dict) and content.keys() == {"script", "grid"}
    if not is_grid or not isinstance(content["grid"], dict):
        fail(f'{path}: it must be {{"script": "ppo_procgen.py", "grid": {{"env_id": ["miner"], ...}}}}', 2)
    script = read_script(resolve_path(str(content["script"])))
    grid = content["grid"]
    for name, values in grid.items():
        if name not in script.annotations:
            hint = did_you_mean(name, script.annotations)
            fail(f"{path}: {script.path} has no argument {name!r}{hint}; it has {', '.join(script.annotations)}", 2)
        if not isinstance(values, list) or not values:
            fail(f"{path}: {name!r} is {json.dumps(values)}; it must be a list of one or more values", 2)
        annotation = script.annotations[name]
        if not re.fullmatch(rf"({'|'.join(PLAIN_TYPES)}|Literal\[.*\])( \| None)?", annotation):
            wanted = "a grid can set int, float, bool, str and Literal, and each of these | None"
            fail(f"{path}: {name!r} is annotated as {annotation} in {script.path}; {wanted}", 2)
        grid[name] = [read_value(path, name, value, annotation) for value in values]
    return script, grid


def read_value(path: Path, name: str, value, annotation: str):
    """A value of a grid as the script will see it. If it is not of the argument's type, exit with code 2."""
    if value is None:  # the default
        return None
    where = f"{path}: {name!r} is {json.dumps(value)[:300]}"
    if isinstance(value, (int, float)) and not -1e308 < value < 1e308:
        fail(f"{where}; it must be a finite number", 2)
    if isinstance(value, str) and re.search(UNSAFE, value):
        fail(f"{where}; it must be text without control characters", 2)
    value = as_annotated(value, annotation)
    type_name = annotation.removesuffix(" | None")
    if type_name in PLAIN_TYPES:
        is_valid = type(value).__name__ == type_name
    else:
        is_valid = value in ast.literal_eval(type_name.removeprefix("Literal"))
    if not is_valid:
        fail(f"{where}; it must be of type {type_name}", 2)
    return value


def check_game(path: Path, script: Script, settings: dict) -> None:
    """Exit with code 2 and one line if Procgen does not have this game, or this game does not have the mode."""
    env_id, mode = settings.get("env_id"), settings.get("distribution_mode")
    if env_id is None or script.extra_modes is None:
        return
    if env_id not in GAMES:
        fail(f"{path}: 'env_id' is {env_id!r}{did_you_mean(env_id, GAMES)}; the games are {', '.join(GAMES)}", 2)
    modes = ["easy", "hard"] + [extra for extra, games in script.extra_modes.items() if env_id in games]
    if mode not in (None, *modes):
        fail(f"{path}: 'distribution_mode' is {mode!r}; it must be one of {', '.join(modes)} for {env_id}", 2)


def argument_words(name: str, value, annotation: str) -> list:
    """The words of a command that give an argument its value; none for None, which means the default."""
    if value is None:
        return []
    if annotation == "bool":
        return [flag(name) if value else flag(f"no_{name}")]
    if str(value).startswith("-"):
        return [f"{flag(name)}={value}"]
    return [flag(name), str(value)]


@functools.cache
def checkpoint_name(path: str) -> str:
    """A checkpoint in a run's name: the name of its file, and a hash of its content."""
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        fail(f"the grid's checkpoint {path} cannot be read: {error.strerror}; it is named by its content", 2)
    return f"{Path(path).stem[:40]}-{digest[:8]}"


def run_name(script: Script, settings: dict, swept: list) -> str:
    """A run's name without its seed. It depends on the run alone, not on the rest of the grid."""
    if settings["xpid"] is not None:
        words = [settings["xpid"]]
        others = swept
    else:
        values = {**settings, "script": script.path.stem.removesuffix("_procgen")}
        words = [f"{short}{values[name]}" for name, short in IN_EVERY_NAME.items() if name in values]
        others = []
        for name, default in script.defaults.items():
            is_free = name in script.free and name not in swept
            if settings[name] != default and name not in IN_EVERY_NAME and not is_free:
                others.append(name)
    for name in others:
        if name == "checkpoint" and settings[name] is not None:
            words.append(f"checkpoint{checkpoint_name(settings[name])}")
        elif name not in ("seed", "xpid"):
            words.append(f"{name}{settings[name]}")
    return quote("-".join(str(word) for word in words), safe="+")


def seeds_of(args: Args, path: Path, script: Script, grid: dict) -> list:
    """The seeds of each configuration: those of the grid, or the script's default, and the next num_trials - 1."""
    default = script.defaults.get("seed")
    seeds = [default if seed is None else seed for seed in grid.pop("seed", [None])]
    if seeds == [None] and args.num_trials == 1 and args.start_index == 0 and "xpid" not in script.defaults:
        return seeds  # the script chooses
    if None in seeds:
        fail(f'{path}: seeds count up from those of the grid, which must be whole numbers, such as "seed": [0]', 2)
    return [seed + args.start_index + trial for seed in seeds for trial in range(args.num_trials)]


def configurations_of(args: Args, path: Path, grid: dict) -> list:
    """The values of each configuration: the product of the grid's lists, the last one fastest, or samples of it."""
    if args.num_samples is None:
        return list(itertools.product(*grid.values()))
    total = math.prod(len(values) for values in grid.values())
    if args.num_samples > total:
        fail(f"--num-samples is {args.num_samples}; {path} has {total} configurations", 2)
    generator = random.Random(args.sample_seed)
    picked = set()
    while len(picked) < args.num_samples:  # a larger --num-samples includes the samples of a smaller one
        picked.add(generator.randrange(total))
    configurations = []
    for index in sorted(picked):
        configuration = []
        for values in reversed(grid.values()):
            index, place = divmod(index, len(values))
            configuration.insert(0, values[place])
        configurations.append(configuration)
    return configurations


def expand(args: Args, path: Path) -> list:
    """The runs of a grid: every configuration with every seed."""
    script, grid = read_grid(path)
    seeds = seeds_of(args, path, script, grid)
    swept = [name for name, values in grid.items() if len(values) > 1]
    has_xpid = "xpid" in script.defaults
    computed = [name for name in script.computed if name not in script.free]
    if has_xpid and computed and grid.get("xpid", [None]) == [None]:
        why = f"the default of {computed[0]} in {script.path} is not a constant, so sweep.py cannot tell a run's name"
        fail(f'{path}: {why}; write a constant there, or give the grid a name, "xpid": ["my_name"]', 2)
    if "resume" in script.defaults:
        grid.setdefault("resume", [True])  # so that a command can be run again
    interpreter = [sys.executable if args.action == "local" else "python"]
    if args.python is not None:
        interpreter = shlex.split(args.python)

    runs = []
    for values in configurations_of(args, path, grid):
        given = dict(zip(grid, values))
        settings = {**script.defaults, **{name: value for name, value in given.items() if value is not None}}
        check_game(path, script, settings)
        words = [*interpreter, str(script.path)]
        for name, value in given.items():
            if name != "xpid":
                words += argument_words(name, value, script.annotations[name])
        labels = {name: f"{name}={settings[name]}" for name in swept}
        configuration = " ".join(labels.values()) or path.stem
        labels.pop("env_id", None)
        method = " ".join(labels.values())
        xpid = run_name(script, settings, swept) if has_xpid else None
        for seed in seeds:
            run_settings = {**settings, "seed": seed}
            run_words = words + argument_words("seed", seed, "int")
            name = f"{path.stem}_{len(runs) + 1}"
            if has_xpid:
                name = f"{xpid}_{seed}"
                run_settings["xpid"] = name
                run_words += argument_words("xpid", name, "str")
            runs.append(Run(shlex.join(run_words), name, configuration, method, run_settings))
    check_folders(path, runs)
    return runs


def check_folders(path: Path, runs: list) -> None:
    """Exit with code 2 if two commands would write into one folder."""
    folders = set()
    for run in runs:
        if "xpid" in run.settings:
            names = ["env_id", "xpid"]
            shared = f"the xpid {run.name}"
        elif run.settings.get("save_dataset"):
            names = DATASET_ARGUMENTS
            shared = "the same " + ", ".join(names)
        else:
            continue  # it writes nothing, as far as is known here
        folder = tuple(run.settings.get(name) for name in names)
        if folder in folders:
            fail(f"{path}: two commands would write into one folder, as both have {shared}", 2)
        folders.add(folder)


# STATUS


def state_of(folder: Path, done: bool, started: bool) -> str:
    """One of STATES. This locks the folder for a moment; a script that starts just then waits for the lock."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released as the file is closed
    except BlockingIOError:
        return "done" if done else "running"
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        why = f"its file system has no flock ({error.strerror}), so it is not known which runs are running"
        fail(f"{folder / '.lock'} cannot be locked: {why}; put the runs on another file system")
    if done:
        return "done"
    return "stopped" if started else "not started"


def read_curves(table: Path) -> np.ndarray:
    """Steps, training returns and test returns of a progress.csv as columns, nan where unknown."""
    try:
        text = table.read_text("utf-8")
    except FileNotFoundError:
        text = ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # without an unfinished one, which a crash can leave
    rows = []
    for row in csv.DictReader(filter(str.strip, lines)):
        rows.append([float(row[name]) for name in ("global_step", "charts/episodic_return", "charts/test_return")])
    return np.array(rows).reshape(-1, 3)


def run_folder(settings: dict) -> Path:
    return Path(settings["model_saving_dir"], settings["env_id"], settings["xpid"])


def training_progress(settings: dict) -> Progress:
    """The progress of a training, from its progress.csv."""
    folder = run_folder(settings)
    curves = read_curves(folder / "progress.csv")
    finals = [path for path in folder.glob("final/*.pt") if re.fullmatch(r"model_-?\d+\.\d\d\.pt", path.name)]
    batch_size = settings["num_envs"] * settings["num_steps"]
    total_steps = max(1, settings["total_timesteps"] // batch_size) * batch_size
    steps, train_return, test_return = 0, math.nan, math.nan
    if len(curves):
        steps, train_return = curves[-1, :2]
        tests = curves[~np.isnan(curves[:, 2]), 2]
        test_return = tests[-1] if len(tests) else math.nan
    elif finals:  # the run has ended, and its table was lost; the return is in the file's name
        steps, test_return = total_steps, float(finals[-1].stem.removeprefix("model_"))
    is_done = steps >= total_steps and len(finals) > 0
    state = state_of(folder, is_done, (folder / "rolling" / "model.pt").exists())
    game = (settings.get("distribution_mode"), settings["env_id"])
    return Progress(state, min(1.0, float(steps / total_steps)), float(train_return), float(test_return), game)


def dataset_progress(folder: Path, settings: dict) -> Progress:
    """The progress of a dataset, from its metadata.json. Its mean return is shown as the test return."""
    if not (folder / "metadata.json").exists():
        return Progress(state_of(folder, done=False, started=False))
    metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
    if settings.get("num_episodes"):
        fraction = metadata["episodes"] / settings["num_episodes"]
    else:
        fraction = metadata["steps"] / settings["total_timesteps"]
    mean = math.nan if metadata["return_mean"] is None else float(metadata["return_mean"])
    state = state_of(folder, metadata["complete"] and fraction >= 1, started=True)
    game = (metadata["distribution_mode"], metadata["env_id"])
    return Progress(state, min(1.0, fraction), test_return=mean, game=game)


def collection_progress(settings: dict) -> Progress:
    """The progress of a collection. With a ratio it collects from all runs of a game, and this is their mean."""
    if settings.get("ratio") is None:
        return dataset_progress(Path(settings["dataset_saving_dir"]), settings)
    # The script skips the other runs.
    needed = ["final"] if settings["ratio"] == 1 else ["final", "checkpoint"]
    source = settings.get("agent_from")  # a run has a copy of the script that made it
    datasets = []
    for run in sorted(Path(settings["ratio_checkpoint_dir"], settings["env_id"]).glob("*/")):
        has_checkpoints = all(any(run.glob(f"{name}/*.pt")) for name in needed)
        if has_checkpoints and (source is None or (run / Path(source).name).exists()):
            folder = run / settings["ratio_dataset_dir"] / str(settings["ratio"])
            datasets.append(dataset_progress(folder, settings))
    if not datasets:
        return Progress("not started")
    states = {dataset.state for dataset in datasets}
    state = "running" if "running" in states else "stopped"
    if len(states) == 1:
        state = states.pop()
    fraction = nan_mean([dataset.fraction for dataset in datasets])
    mean = nan_mean([dataset.test_return for dataset in datasets])
    return Progress(state, fraction, test_return=mean, game=datasets[0].game)


def require_known_paths(settings: dict) -> None:
    """Exit with code 2 if grid and script do not tell where the runs are and how long they will be."""
    needed = ["total_timesteps", "dataset_saving_dir"]
    if "xpid" in settings:
        needed = ["model_saving_dir", "env_id", "num_envs", "num_steps", "total_timesteps"]
    elif settings.get("ratio") is not None:
        needed = ["env_id", "ratio_checkpoint_dir", "ratio_dataset_dir", "total_timesteps"]
    unknown = [name for name in needed if not settings.get(name)]
    if unknown:
        fail(f"status, plot and --only-missing need {', '.join(unknown)} from the grid or as a constant default", 2)


def arguments_of(command: str) -> str:
    """What a command has after its script. The interpreter is left out, so that a run is found whatever ran it."""
    match = re.search(r"\.py'? (.*)", command)
    return match[1] if match else ""


def commands_here() -> set:
    """The arguments of every process of this folder. A run that is still importing has no lock yet."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == os.getcwd():
                words = (process / "cmdline").read_text("utf-8").split("\0")
                found.add(arguments_of(shlex.join(words[:-1])))
        except (OSError, UnicodeDecodeError):  # it has ended, is another user's, or no command of ours
            continue
    return found - {""}


def read_progress(run: Run, commands: set = frozenset()) -> Progress:
    """A run's progress, from its files. commands: the arguments of the processes here; a run among them is running."""
    try:
        is_training = "xpid" in run.settings
        progress = training_progress(run.settings) if is_training else collection_progress(run.settings)
    except Exception as error:  # depends on what is in the files
        return Progress("damaged", reason=f" ({type(error).__name__}: {error})")
    if progress.state in ("stopped", "not started") and arguments_of(run.command) in commands:
        return progress._replace(state="running")
    return progress


def progress_of(runs: list) -> list:
    commands = commands_here()
    return [read_progress(run, commands) for run in runs]


def is_running(run: Run) -> bool:
    return read_progress(run, commands_here()).state == "running"


def nan_mean(values) -> float:
    """The mean of the values that are not nan, or nan if none is left."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def normalised_return(progress: Progress) -> float:
    """The test return in the range of its game, (R - min) / (max - min), or nan if that is not known."""
    mode, env_id = progress.game
    if env_id not in RANGES.get(mode, {}):
        return math.nan
    low, high = RANGES[mode][env_id]
    return (progress.test_return - low) / (high - low)


def summarise(runs: list, progress: list) -> tuple:
    """A row per configuration, as a dict, and the normalised returns of finished runs, {method: {game: returns}}."""
    configurations = {}
    for run, run_progress in zip(runs, progress):
        configurations.setdefault((run.method, run.configuration), []).append(run_progress)
    table, normalised_returns = [], {}
    for (method, configuration), seeds in configurations.items():
        row = {"configuration": configuration}
        for state in STATES:
            row[state.replace(" ", "_")] = sum(seed.state == state for seed in seeds)
        row["progress"] = nan_mean([seed.fraction for seed in seeds])
        done = [seed for seed in seeds if seed.state == "done"]
        for name in ("train_return", "test_return"):
            final = [getattr(seed, name) for seed in done]
            row[name] = nan_mean([getattr(seed, name) for seed in seeds])
            row[f"final_{name}"] = nan_mean(final)
            row[f"final_{name}_deviation"] = float(np.std(final, ddof=1)) if len(final) > 1 else math.nan
        normalised = [normalised_return(seed) for seed in done]
        row["normalised"] = nan_mean(normalised)
        for seed, value in zip(done, normalised):
            if not math.isnan(value):
                normalised_returns.setdefault(method, {}).setdefault(seed.game, []).append(value)
        table.append(row)
    return table, normalised_returns


def interquartile_mean(games: dict) -> str:
    """The mean of the middle half of {game: normalised returns}, and how certain it is, by Agarwal et al. 2021."""

    def iqm(returns):  # along the last axis
        cut = returns.shape[-1] // 4
        return np.sort(returns)[..., cut : returns.shape[-1] - cut].mean(-1)

    if any(len(returns) == 1 for returns in games.values()):
        interval = "one seed: no interval"
    else:
        generator = np.random.default_rng(0)  # a percentile bootstrap that draws the seeds of each game anew
        resampled = [generator.choice(returns, (10_000, len(returns))) for returns in games.values()]
        low, high = np.percentile(iqm(np.concatenate(resampled, axis=1)), [2.5, 97.5])
        interval = f"95 % interval {low:.2f} to {high:.2f}"
    everything = np.concatenate(list(games.values()))
    plural = "s" if len(games) > 1 else ""
    return f"{iqm(everything):.2f} ({interval}; {len(games)} game{plural}, {len(everything)} runs)"


def write_csv(path: Path, rows: list) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def last_log_line(log: Path) -> str:
    """A log and the last line in it that a command has written."""
    lines = re.findall(r"^(?!== ).*\S", log.read_text("utf-8", "replace"), re.MULTILINE)
    return f"{log}: {lines[-1].strip() if lines else ''}"


def newest_logs() -> dict:
    """The newest log of each command, {arguments: path}."""
    logs = [*Path().glob("logs/*/*.log"), *Path().glob("slurm/generated/*/logs/*.log")]
    newest = {}
    for log in sorted(logs, key=lambda log: log.stat().st_mtime):
        for command in re.findall(r"^== (.*\.py.*)$", log.read_text("utf-8", "replace"), re.MULTILINE):
            newest[arguments_of(command)] = log
    return newest


def print_unfinished(runs: list, progress: list) -> None:
    """For each unfinished run its state, its last Slurm task, its newest log and the last line of that."""
    logs, tasks = newest_logs(), newest_tasks()
    for run, run_progress in zip(runs, progress):
        if run_progress.state == "done":
            continue
        arguments = arguments_of(run.command)
        words = [f"{run.name}: {run_progress.state}{run_progress.reason}"]
        if arguments in tasks:
            words.append(f"Slurm task {tasks[arguments]}")
        words.append(last_log_line(logs[arguments]) if arguments in logs else "no log")
        print("; ".join(words))


def print_status(args: Args, runs: list) -> int:
    """Print a row per configuration and a summary. Returns the exit code: 3 unless everything is done."""
    progress = progress_of(runs)
    table, normalised_returns = summarise(runs, progress)
    titles = {
        "train_return": "train return", "test_return": "test return", "final_train_return": "final train",
        "final_test_return": "final test", "normalised": "normalised",
    }  # fmt: skip
    lines = [["configuration", *STATES, "progress", *titles.values()]]
    for row in table:
        line = [row["configuration"]]
        line += [str(row[state.replace(" ", "_")]) for state in STATES]
        line.append(f"{100 * row['progress']:.1f} %")
        for name in titles:
            cell = "-" if math.isnan(row[name]) else f"{row[name]:.2f}"
            deviation = row.get(f"{name}_deviation", math.nan)
            line.append(cell if math.isnan(deviation) else f"{cell} +- {deviation:.2f}")
        lines.append(line)
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")
    if args.verbose:
        print_unfinished(runs, progress)
    if args.csv is not None:
        write_csv(Path(args.csv), table)
    counts = Counter(seed.state for seed in progress)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state] or state != "damaged")
    summary += f"; {100 * nan_mean([seed.fraction for seed in progress]):.1f} % in all"
    if any("+-" in cell for line in lines for cell in line):
        summary += "; +- is the sample standard deviation over seeds"
    print(f"{len(table)} configurations, {len(runs)} runs: {summary}")
    for method, games in normalised_returns.items():
        if sum(len(returns) for returns in games.values()) > 1:
            title = f"interquartile mean of normalised test returns, {method}".removesuffix(", ")
            print(f"{title}: {interquartile_mean(games)}")
    return 0 if counts["done"] == len(runs) else 3


# CURVES


def align(curves: list) -> tuple:
    """Millions of steps, and returns as (seed, step, training or test), nan where a seed has none."""
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    returns = np.full((len(curves), len(steps), 2), math.nan)
    for seed, curve in enumerate(curves):
        returns[seed, np.searchsorted(steps, curve[:, 0])] = curve[:, 1:]
    return steps / 1e6, returns


def draw_returns(axes, steps: np.ndarray, returns: np.ndarray, style: dict) -> None:
    """Draw returns (seed, step): mean and deviation while all seeds have values, and then a thin line per seed."""
    returns = returns[~np.isnan(returns).all(axis=1)]
    if len(returns) == 0:
        return
    has_all_seeds = ~np.isnan(returns).any(axis=0)
    mean = returns[:, has_all_seeds].mean(axis=0)
    axes.plot(steps[has_all_seeds], mean, **style)
    if len(returns) > 1:
        deviation = returns[:, has_all_seeds].std(axis=0, ddof=1)
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(steps[has_all_seeds], mean - deviation, mean + deviation, **band)
    last = np.flatnonzero(has_all_seeds).max(initial=0)
    for seed_returns in returns:
        rest = ~np.isnan(seed_returns)
        rest[:last] = False
        if rest.sum() > 1:
            axes.plot(steps[rest], seed_returns[rest], **{**style, "linewidth": 0.5, "alpha": 0.7})


def draw_panel(axes, env_id: str, total_steps: int, curves: dict, styles: dict, reference: dict) -> None:
    """Draw a game: of each method a solid line for training levels and a dashed one for test levels."""
    for method, style in styles.items():
        if (env_id, method) in curves:
            steps, returns = align(curves[env_id, method])
            draw_returns(axes, steps, returns[:, :, 0], {**style, "linestyle": "-"})
            draw_returns(axes, steps, returns[:, :, 1], {**style, "linestyle": "--"})
    for levels, opacity in (("train", 0.4), ("test", 0.2)):
        rows = [row for row in reference.get(levels, {}).get(env_id, []) if row[0] <= total_steps]
        if rows:
            steps, lowest, highest = np.transpose(rows)
            axes.fill_between(steps / 1e6, lowest, highest, color="gray", alpha=opacity, linewidth=0)
    axes.set(title=env_id, xlim=(0, total_steps / 1e6))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(alpha=0.3)


def read_reference(path: Path) -> dict:
    """Published runs from a CSV file: {levels: {game: [(steps, lowest return, highest return), ...]}}."""
    bands = {"train": {}, "test": {}}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                returns = [float(value) for name, value in row.items() if name.startswith("run")]
                band = bands[row["levels"]].setdefault(row["game"], [])
                band.append((float(row["steps"]), min(returns), max(returns)))
    except Exception as error:  # depends on what is in the file
        wanted = "a CSV file with the columns game, levels (train or test), steps, run0, run1 and so on"
        fail(f"--reference {path} must be {wanted} ({type(error).__name__}: {error})", 2)
    return bands


def read_all_curves(runs: list) -> dict:
    """The curves of the seeds of each game and method, {(env_id, method): [curves, ...]}."""
    everything = {}
    for run in runs:
        table = run_folder(run.settings) / "progress.csv"
        try:
            curves = read_curves(table)
        except Exception as error:  # depends on what is in it
            print(f"{table} is left out, as it is damaged ({error})")
            continue
        if len(curves):
            everything.setdefault((run.settings["env_id"], run.method), []).append(curves)
    return everything


def add_legend(figure, styles: dict, has_seeds: bool, has_reference: bool) -> None:
    """Explain the lines below the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D  # in these functions, as it is slow and only they need it
    from matplotlib.patches import Patch

    handles = [Line2D([], [], color="gray", label="training levels")]
    handles.append(Line2D([], [], color="gray", linestyle="--", label="test levels"))
    if has_reference:
        handles.append(Patch(color="gray", alpha=0.4, linewidth=0, label="reference, lowest to highest run"))
    for method, style in styles.items():
        if method:
            label = textwrap.fill(method, 100).replace("$", r"\$")
            handles.append(Line2D([], [], color=style["color"], linewidth=3, label=label))
    titles = []
    if len(styles) > 1:
        titles.append(f"{len(styles)} configurations")
    if has_seeds:
        titles.append("thick line: mean of the seeds, band: their standard deviation")
        titles.append("thin line: one seed, beyond the last step that all seeds have reached")
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(14 * figure.get_figwidth()) // longest)  # 14 characters take about an inch
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False}
    figure.legend(handles=handles, title="\n".join(titles), ncols=columns, **place)


def plot(runs: list, output: Path, reference: dict) -> None:
    """Draw a panel per game and a line per method, and write status's table to a .csv file of the same name."""
    import matplotlib
    from matplotlib.figure import Figure

    if "xpid" not in runs[0].settings:
        fail("--action plot draws the curves of trainings, and the grid's script has no argument xpid", 2)
    curves = read_all_curves(runs)
    if not curves:
        fail("there is nothing to draw: none of these runs has got as far as a row in its progress.csv")
    methods = list(dict.fromkeys(run.method for run in runs))
    palette = matplotlib.colormaps["tab10"]
    if len(methods) > 10:
        palette = matplotlib.colormaps["turbo"].resampled(len(methods))
    # Later lines are thinner, so that an earlier line of the same values can be seen behind them.
    widest = 2.6 if 1 < len(methods) <= 6 else 1.3
    widths = np.linspace(widest, widest / 2, len(methods))
    styles = {}
    for i, method in enumerate(methods):
        styles[method] = {"color": palette(i), "linewidth": widths[i]}

    games = list(dict.fromkeys(run.settings["env_id"] for run in runs))
    columns = len(games) if len(games) <= 3 else math.ceil(math.sqrt(len(games)))
    rows = math.ceil(len(games) / columns)
    matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure((6, 3.4) if len(games) == 1 else (2.6 * columns, 2.1 * rows), layout="constrained")
    for i, env_id in enumerate(games):
        axes = figure.add_subplot(rows, columns, i + 1)
        total_steps = max(run.settings["total_timesteps"] for run in runs if run.settings["env_id"] == env_id)
        draw_panel(axes, env_id, total_steps, curves, styles, reference)
        if i % columns == 0:
            axes.set_ylabel("episode return")
        if i + columns >= len(games):
            axes.set_xlabel("environment steps (millions)")
    has_seeds = any(len(seeds) > 1 for seeds in curves.values())
    add_legend(figure, styles, has_seeds, has_reference=bool(reference))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=200, bbox_inches="tight")  # "tight" makes room for the legend
    except ValueError as error:  # matplotlib does not know the suffix
        fail(f"--output {output}: {error}", 2)
    table, _ = summarise(runs, progress_of(runs))
    write_csv(output.with_suffix(".csv"), table)
    print(f"{output}, and its table {output.with_suffix('.csv')}")


# RUNNING HERE


def say(message: str) -> None:
    """Print a line above the bar. A terminal that is gone must not end the sweep while its commands run."""
    try:
        tqdm.write(message)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def gpus_here(args: Args) -> list:
    """The GPUs to deal out to the workers, or an empty list to leave CUDA_VISIBLE_DEVICES alone."""
    listed = args.gpus or os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return re.findall(r"^GPU (\d+):", output_of("nvidia-smi", "-L"), re.MULTILINE)
    return [gpu for gpu in listed.split(",") if gpu]


def output_of(*command) -> str:
    """What a command prints, or nothing where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def start_command(run: Run, log: Path, environment: dict) -> subprocess.Popen:
    """Start a command in its own session: Ctrl-C then reaches only this process, which stops the command."""
    with open(log, "a") as file:
        print(f"== {run.command}", file=file, flush=True)
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
        return subprocess.Popen(shlex.split(run.command), env=environment, **options)


def outcome_of(run: Run, code: int, stopping: bool) -> str:
    """How a command ended, by its exit code. SIGTERM kills a command that still imports; this counts as stopped."""
    if code == 0:
        return "done"
    if code == EXIT_STOPPED or (stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM)):
        return "stopped"
    return "in use" if is_running(run) else "failed"


def catch_stop_signals() -> list:
    """From now on a signal to stop does not end this process: it is appended to the list that is returned."""
    caught = []
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, lambda signum, frame: caught.append(signum))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # say() deals with a closed pipe
    return caught


def describe_failure(run: Run, code: int, log: Path) -> str:
    hint = ""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        hint = " (killed, usually because memory ran out: use fewer --workers)"
    return f"{run.name} failed with exit code {code}{hint}: {last_log_line(log)}"


def run_local(args: Args, runs: list) -> int:
    """Run the commands here, each with a log. A signal stops them with SIGTERM. Returns the exit code."""
    folder = Path("logs", args.job_name)
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // args.workers)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    gpus = gpus_here(args)
    stop_signals = catch_stop_signals()
    waiting = list(runs)
    active = {}  # {worker: (run, process)}
    stopped = []
    counts = Counter()  # of OUTCOMES
    form = "{percentage:.1f} %|{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]{postfix}"
    bar = tqdm(total=len(runs), bar_format=form, disable=None)
    say(f"{len(runs)} runs, {min(args.workers, len(runs))} at a time; logs in {folder}/")

    def start_next(worker):
        run = waiting.pop(0)
        if is_running(run):
            counts["in use"] += 1
            say(f"{run.name} is in use by another process, so it is not started")
            return
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
        active[worker] = run, start_command(run, folder / f"{run.name}.log", environment)

    def collect_ended():
        for worker, (run, process) in list(active.items()):
            code = process.poll()
            if code is None:
                continue
            del active[worker]
            outcome = outcome_of(run, code, stopping=bool(stop_signals))
            counts[outcome] += 1
            if outcome == "stopped":
                stopped.append(run)
            if outcome == "failed":
                say(describe_failure(run, code, folder / f"{run.name}.log"))
            elif bar.disable:
                say(f"{run.name} is {outcome}, {counts.total()} of {len(runs)}")
        if not bar.disable:
            bar.n = completed()
            bar.set_postfix({**counts, "running": len(active)})

    def completed():  # as a number of runs
        unfinished = [*stopped, *(run for run, _ in active.values())]
        return counts["done"] + sum(read_progress(run).fraction for run in unfinished)

    while (active or waiting) and not stop_signals:
        for worker in range(args.workers):
            if worker not in active and waiting and not stop_signals:
                start_next(worker)
        time.sleep(0.1)
        collect_ended()
    for _, process in active.values():  # after a signal
        process.terminate()
    while active:
        time.sleep(0.1)
        collect_ended()
    bar.close()

    counts["not started"] = len(waiting)
    shown = [f"{counts[name]} {name}" for name in OUTCOMES if counts[name] or name != "in use"]
    summary = f"{len(runs)} runs: {', '.join(shown)}"
    if stopped:
        summary += f"; {100 * completed() / len(runs):.1f} % in all"
    code = 0
    if counts["failed"] and not stop_signals:
        code = 1
    elif counts["done"] < len(runs):
        code = EXIT_STOPPED
        summary += "; run the same command again to continue"
    say(summary)
    return code


# RUNNING ON SLURM


def ask_max_array_size() -> int:
    """MaxArraySize of the cluster at hand; Slurm's default where there is none."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", output_of("scontrol", "show", "config"))
    return int(match[1]) if match else 1001


def split_tasks(num_tasks: int, max_array_size: int, max_parallel: int | None) -> list:
    """For each array (its offset, its number of tasks, how many run at the same time).

    Indices count from 1, and are below max_array_size.
    """
    size = max_array_size - 1
    offsets = range(0, num_tasks, size)
    arrays = []
    for i, offset in enumerate(offsets):
        at_a_time = None if max_parallel is None else (max_parallel + i) // len(offsets)
        arrays.append((offset, min(size, num_tasks - offset), at_a_time))
    return arrays


def sbatch_options(args: Args) -> list:
    """The options for sbatch, such as --time="12:00:00"."""
    given = [f"{flag(name)}={getattr(args, name)}" for name in SBATCH_OPTIONS if getattr(args, name) is not None]
    options = []
    for option in filter(None, [*given, *args.sbatch_arg]):
        if re.search(f'"|{UNSAFE}', option):
            fail(f'{option!r} cannot be an option of sbatch: it has a " or a line end', 2)
        name, equals, value = option.partition("=")
        name = name if name.startswith("-") else f"--{name}"
        options.append(f'{name}="{value}"' if equals else name)
    return options


def write_sbatch(args: Args, runs: list) -> list:
    """Write slurm/generated/{job_name}/: commands.txt, logs/ and the sbatch files, whose paths are returned."""
    folder = Path("slurm", "generated", args.job_name)
    commands = "".join(f"{run.command}\n" for run in runs)
    existing = folder / "commands.txt"
    if existing.exists() and existing.read_bytes() != commands.encode():
        another = f"{args.job_name}_{time.strftime('%m%d_%H%M')}"
        fail(f"{existing} has other commands, which queued tasks still read; give --job-name {another}", 2)
    num_tasks = math.ceil(len(runs) / args.runs_per_task)
    max_array_size = max(2, args.max_array_size or ask_max_array_size())
    arrays = split_tasks(num_tasks, max_array_size, args.max_parallel)
    if args.max_parallel is not None and args.max_parallel < len(arrays):
        fail(f"--max-parallel is {args.max_parallel}; it must be at least {len(arrays)}, one for each array file", 2)
    template = read_file(resolve_path(args.template), "--template")
    values = {**vars(args), "folder": folder, "working_dir": os.getcwd()}
    values["options"] = "\n".join(f"#SBATCH {option}" for option in sbatch_options(args))
    values["setup"] = "\n".join(args.setup)
    values["side_by_side"] = min(args.side_by_side or args.runs_per_task, args.runs_per_task)
    placeholders = set(re.findall(PLACEHOLDER, template))
    unknown = placeholders - values.keys() - {"array", "offset", "file"} or {"array"} - placeholders
    if unknown:
        name = "{{" + unknown.pop() + "}}"
        wanted = "it must have {{array}}, and only names of slurm/array.sbatch.template"
        fail(f"--template {args.template}: {name} is missing or unknown; {wanted}", 2)

    write_file(folder / "commands.txt", commands)
    write_file(folder / "logs" / ".keep", "")  # sbatch does not make the folder
    submit_all = "#!/bin/sh\n# Submits all of this sweep's arrays.\nset -e\nunset SLURM_RESTART_COUNT\n"
    paths = []
    for i, (offset, size, at_a_time) in enumerate(arrays, 1):
        path = folder / ("array.sbatch" if len(arrays) == 1 else f"array_{i}.sbatch")
        values["array"] = f"1-{size}" if at_a_time is None else f"1-{size}%{at_a_time}"
        values["offset"] = offset
        values["file"] = path
        write_file(path, re.sub(PLACEHOLDER, lambda match: str(values[match[1]]), template))
        submit_all += f"sbatch {shlex.quote(str(path.absolute()))}\n"
        paths.append(path)
    write_file(folder / "submit_all.sh", submit_all)
    return paths


def submit(paths: list) -> None:
    os.environ.pop("SLURM_RESTART_COUNT", None)  # set in a job that submits; its jobs would inherit it
    for i, path in enumerate(paths):
        result = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
        if result.returncode:
            message = f"sbatch {path} failed: {' '.join(result.stderr.split())}"
            if re.search("MaxSubmit|job submit limit", result.stderr):  # the number of tasks that a user may queue
                message += ". For MaxSubmitJobs, wait until some have ended, or have fewer with --runs-per-task"
            rest = " && ".join(f"sbatch {path}" for path in paths[i:])
            fail(f"{message}. To submit what is left: {rest}")
        print(f"submitted {path} as job {result.stdout.strip().split(';')[0]}; logs in {path.parent}/logs/", flush=True)


def newest_tasks() -> dict:
    """The last Slurm task of each command and its state, {arguments: "7_1 TIMEOUT"}, as sacct and squeue tell."""
    os.environ["SLURM_BITSTR_LEN"] = "0"  # do not shorten lists of tasks
    listed = output_of(
        "sacct", "--allocations", "--noheader", "--parsable2", "--starttime=now-30days", "--endtime=now",
        "--state=BF,CA,CD,DL,F,NF,OOM,PR,RV,TO",  # or it leaves out tasks that were cancelled before they started
        "--format=JobID,State,WorkDir,JobName,SubmitLine",
    )  # fmt: skip
    listed += output_of("squeue", "--me", "--noheader", "--format=%F_%K|%T (%r)|%Z|%j|%o")
    newest = {}
    for line in listed.splitlines():
        columns = line.split("|", 4)
        if len(columns) < 5 or columns[2] != os.getcwd():
            continue  # of another project, or the rest of a job's command that has several lines
        tasks, state, _, job_name, command = columns
        file = re.search(r"\barray(_\d+)?\.sbatch", command)
        if file is None:
            continue
        path = Path("slurm", "generated", job_name, file[0])
        job, _, indices = tasks.partition("_")  # such as 7_1, or for tasks in the queue 7_[2-4,6%2]
        for first, last in re.findall(r"(\d+)-?(\d*)", indices.partition("%")[0]):
            for index in range(int(first), int(last or first) + 1):
                for arguments in task_commands(path, index):
                    newest[arguments] = f"{job}_{index} {state.removesuffix(' (None)')}"
    return newest


def task_commands(path: Path, index: int) -> list:
    """The arguments of the commands that a task runs, by the variables that the template sets in its sbatch file."""
    try:
        commands = (path.parent / "commands.txt").read_text("utf-8").splitlines()
        variables = dict(re.findall(r"^(offset|runs_per_task)=(\d+)$", path.read_text("utf-8"), re.MULTILINE))
    except OSError:  # the folder was removed
        return []
    size = int(variables.get("runs_per_task", 1))
    first = (int(variables.get("offset", 0)) + index - 1) * size
    return [arguments_of(command) for command in commands[first : first + size]]


def main() -> int:
    """Returns the exit code."""
    args = tyro.cli(Args, description=__doc__)
    args.action = args.action.lower()  # gen_dgrl's are in capitals
    check_args(args)
    path = Path(args.grid_config)
    if path.suffix != ".json" and not path.is_file():
        path = resolve_path(f"grids/{args.grid_config}.json")
    args.job_name = args.job_name or re.sub(r"[^\w.+-]", "_", path.stem)
    runs = expand(args, path)
    if args.action in ("status", "plot") or args.only_missing:
        require_known_paths(runs[0].settings)
    if args.action == "status":
        return print_status(args, runs)
    if args.action == "plot":
        reference = read_reference(Path(args.reference)) if args.reference else {}
        plot(runs, Path(args.output or f"{path.stem}.png"), reference)
        return 0
    if args.only_missing:
        started = ("done", "running")
        runs = [run for run, progress in zip(runs, progress_of(runs)) if progress.state not in started]
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nor one if a reader such as head closes the pipe
    try:
        code = main()
    except ModuleNotFoundError as error:
        fail(f"the package {error.name} is missing: pip install -r requirements.txt")
    except OSError as error:
        fail(f"{error.filename or 'the output'} could not be used: {error.strerror}")
    for signum in STOP_SIGNALS:  # during interpreter shutdown, a late one would change the exit code
        signal.signal(signum, signal.SIG_IGN)
    sys.exit(code)
