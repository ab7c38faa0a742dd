"""The specification of sweep.py, but for what Slurm does with its files: test_slurm.py."""

import ast
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
import tyro
from conftest import assert_one_line, wait_for
from matplotlib.figure import Figure
from runs import run_main

import collect_procgen
import ppo_procgen
import sweep

PROJECT = Path(sweep.__file__).parent
TINY = {"num_envs": [4], "num_steps": [16], "num_minibatches": [2], "update_epochs": [1], "num_eval_episodes": [2]}
# A script that is no training: it notes what it was given. It would fail if it were imported.
NOTE_ARGUMENTS = """
import json, sys
from typing import Literal
assert __name__ == "__main__"

class Args:
    text: str = "a"
    number: float = 0.5
    count: int | None = None
    flag: bool = True
    choice: Literal["x", "y"] = "x"
    seed: int = 0

with open("noted.txt", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""


def write_grid(folder, grid, script="ppo_procgen.py", name="my_grid"):
    path = folder / f"{name}.json"
    path.write_text(grid if isinstance(grid, str) else json.dumps({"script": str(script), "grid": grid}))
    return str(path)


def write_script(folder, text=NOTE_ARGUMENTS, name="note.py"):
    (folder / name).write_text(text)
    return folder / name


def trainers_arguments():
    """The beginning of a script that has the arguments of ppo_procgen.py, and does what follows at once."""
    source = PROJECT.joinpath("ppo_procgen.py").read_text()
    nodes = [ast.get_source_segment(source, node) for node in ast.parse(source).body]
    wanted = [node for node in nodes if node.startswith(("class Args", "FREE_ARGUMENTS"))]
    assert len(wanted) == 2
    return "\n".join(["from __future__ import annotations", *wanted, ""])


def run_sweep(folder, *arguments):
    return run_main(sweep, ["--grid-config", *map(str, arguments)], folder)


def commands(folder, *arguments):
    result = run_sweep(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def xpids(lines):
    return [shlex.split(line)[shlex.split(line).index("--xpid") + 1] for line in lines]


# EXPANSION


def test_every_combination_times_every_seed_the_last_list_fastest(tmp_path):
    grid = write_grid(tmp_path, {"env_id": ["miner", "maze"], "learning_rate": [0.0005, 0.001]})
    lines = commands(tmp_path, grid, "--num-trials", 2)
    assert [line.split(" --resume")[0] for line in lines[::2]] == [
        "python ppo_procgen.py --env-id miner --learning-rate 0.0005".replace("ppo_", f"{PROJECT}/ppo_"),
        f"python {PROJECT}/ppo_procgen.py --env-id miner --learning-rate 0.001",
        f"python {PROJECT}/ppo_procgen.py --env-id maze --learning-rate 0.0005",
        f"python {PROJECT}/ppo_procgen.py --env-id maze --learning-rate 0.001",
    ]
    assert [line.split("--seed ")[1][0] for line in lines] == list("01010101")
    assert lines[1].endswith("--resume --seed 1 --xpid miner-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01_1")


@pytest.mark.parametrize(
    "seeds, options, expected",
    [
        (None, [], [0]),
        ([7], ["--num-trials", 3], [7, 8, 9]),
        ([7], ["--num-trials", 2, "--start-index", 5], [12, 13]),
        ([0, 100], ["--num-trials", 2], [0, 1, 100, 101]),
    ],
)
def test_seeds_count_up_from_the_grids_seed_and_the_start_index(tmp_path, seeds, options, expected):
    lines = commands(tmp_path, write_grid(tmp_path, {"seed": seeds} if seeds else {}), *options)
    assert [int(line.split("--seed ")[1].split()[0]) for line in lines] == expected


def test_numbers_arrive_as_they_are(tmp_path):
    """A float in the shortest form that is the same float, a whole number for an int, however the file spells it."""
    spelled = ["0.0005", "25e6", "0.00001", "-0.50", "100000000000000000000", "3"]
    grid = write_grid(
        tmp_path, f'{{"script": "{write_script(tmp_path)}", "grid": {{"number": [{", ".join(spelled)}]}}}}'
    )
    words = [line.split("--number")[1][1:].split()[0] for line in commands(tmp_path, grid)]
    assert words == ["0.0005", "25000000.0", "1e-05", "-0.5", "1e+20", "3.0"]
    assert [float(word) for word in words] == [float(text) for text in spelled]
    grid = write_grid(tmp_path, '{"script": "ppo_procgen.py", "grid": {"total_timesteps": [25e6, 16384.0]}}')
    words = [line.split("--total-timesteps ")[1].split()[0] for line in commands(tmp_path, grid)]
    assert words == ["25000000", "16384"]


def test_samples_are_configurations_of_the_grid_the_same_every_time(tmp_path):
    grid = write_grid(
        tmp_path, {"gamma": [i / 100 for i in range(100)], "learning_rate": [i / 1e4 for i in range(1, 90)]}
    )
    everything = commands(tmp_path, grid)
    ten = commands(tmp_path, grid, "--num-samples", 10)
    assert len(set(ten)) == 10 and set(ten) < set(everything)
    assert ten == commands(tmp_path, grid, "--num-samples", 10) == [line for line in everything if line in ten]
    assert set(ten) < set(commands(tmp_path, grid, "--num-samples", 20))  # a search can be enlarged
    assert not set(ten) & set(commands(tmp_path, grid, "--num-samples", 10, "--sample-seed", 1))
    assert len(commands(tmp_path, grid, "--num-samples", 10, "--num-trials", 3)) == 30
    assert commands(tmp_path, grid, "--num-samples", 8900) == everything
    result = run_sweep(tmp_path, grid, "--num-samples", 8901)
    assert result.returncode == 2
    assert_one_line(result.stderr, "--num-samples is 8901", "my_grid.json has 8900")


def test_the_interpreter_may_be_several_words(tmp_path):
    grid = write_grid(tmp_path, {"text": ["a"]}, write_script(tmp_path))
    (line,) = commands(tmp_path, grid, "--python", f"nice -n 19 '{sys.executable}'")
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "noted.txt").read_text())[:2] == ["--text", "a"]
    (line,) = commands(tmp_path, grid, "--python", "'my env/python' -u")
    assert shlex.split(line)[:3] == ["my env/python", "-u", f"{tmp_path}/note.py"]


def test_booleans_become_flags_and_null_leaves_an_argument_out(tmp_path):
    grid = write_grid(tmp_path, {"anneal_lr": [True], "norm_adv": [False], "target_kl": [None, 0.01]})
    without, given = commands(tmp_path, grid)
    for line in (without, given):
        assert "--anneal-lr --no-norm-adv" in line
    assert "--target-kl" not in without and "--target-kl 0.01" in given


HOSTILE = [
    "two words",
    "it's",
    '"',
    "$(touch bad)",
    "`touch bad`",
    "a;b|c&d>e*?",
    "-5",
    "--x",
    "~",
    "#",
    "",
    "\\n",
    "é",
]
HOSTILE += ["{}", "%b", "!!", "$HOME \\ $$"]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_hostile_values_arrive_as_they_are(tmp_path, shell):
    grid = write_grid(tmp_path, {"text": HOSTILE}, write_script(tmp_path))
    saved = run_sweep(tmp_path, grid, "--action", "save", "--python", sys.executable)
    assert saved.returncode == 0 and len((tmp_path / "my_grid.txt").read_text().splitlines()) == len(HOSTILE)
    xargs = ["xargs", "-d", "\n", "-I{}", shell, "-c", "{}"]
    subprocess.run(xargs, stdin=open(tmp_path / "my_grid.txt"), cwd=tmp_path, check=True)
    noted = [json.loads(line) for line in (tmp_path / "noted.txt").read_text().splitlines()]
    given = [words[0].partition("=")[2] if words[0] != "--text" else words[1] for words in noted]
    assert given == HOSTILE and not (tmp_path / "bad").exists()


def test_values_are_those_that_the_real_parser_reads(tmp_path):
    grid = {"env_id": ["maze"], "learning_rate": [1e-05], "anneal_lr": [True], "cuda": [False], "target_kl": [0.01]}
    (line,) = commands(tmp_path, write_grid(tmp_path, {**grid, "model_saving_dir": ["a b/$HOME"]}))
    args = tyro.cli(ppo_procgen.Args, args=shlex.split(line)[2:])
    assert (args.env_id, args.learning_rate, args.anneal_lr, args.cuda) == ("maze", 1e-05, True, False)
    assert args.model_saving_dir == "a b/$HOME" and args.resume
    assert args.xpid == "maze-easy-200-ppo-lr1e-05-epoch3-mb8-v0.5-ha0.01-anneal_lrTrue-target_kl0.01_0"
    args.xpid = None
    assert ppo_procgen.default_xpid(args) in line  # the script itself names it so


def test_a_name_depends_on_the_run_alone(tmp_path):
    """What differs from its default is named, swept or not; what has no part in the result, only if it is swept."""
    (alone,) = xpids(commands(tmp_path, write_grid(tmp_path, {"gamma": [0.9], "total_timesteps": [99999]})))
    assert alone == "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01-gamma0.9_0"
    grid = {"gamma": [0.999, 0.9], "norm_adv": [True, False], "log_interval": [3], "seed": [0]}
    names = xpids(commands(tmp_path, write_grid(tmp_path, grid), "--num-trials", 2))
    plain = "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01"
    suffixes = ("", "-norm_advFalse", "-gamma0.9", "-gamma0.9-norm_advFalse")
    assert names == [f"{plain}{suffix}_{seed}" for suffix in suffixes for seed in (0, 1)]
    totals = xpids(commands(tmp_path, write_grid(tmp_path, {"total_timesteps": [16384, 25000000]})))
    assert totals == [f"{plain}-total_timesteps16384_0", f"{plain}_0"]


def test_names_are_those_that_the_script_gives_itself(tmp_path):
    """Over random values of every argument."""
    generator = random.Random(0)
    values = {"int": lambda: generator.randrange(1, 10**6), "float": lambda: generator.choice([1, generator.random()])}
    values |= {
        "bool": lambda: generator.random() < 0.5,
        "str": lambda: "x" + "".join(generator.choices("a/ %é+-.", k=4)),
    }
    annotations = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(ppo_procgen.Args)}
    others = {"xpid", "resume", "env_id", "distribution_mode", "checkpoint"}  # whose values are checked
    for _ in range(40):
        names = generator.sample(sorted(annotations.keys() - others), 5)
        given = {name: values[annotations[name].split(" |")[0]]() for name in names}
        given["env_id"] = generator.choice(sweep.GAMES)
        (line,) = commands(tmp_path, write_grid(tmp_path, {key: [value] for key, value in given.items()}))
        args = tyro.cli(ppo_procgen.Args, args=shlex.split(line)[2:])  # what the script will see
        name, args.xpid = args.xpid, None
        assert name == ppo_procgen.default_xpid(args)


def test_hostile_values_give_xpids_that_are_folder_names_and_differ(tmp_path):
    values = ["a b", "a_b", "a/b", "a%20b", "a:b"]
    fork = (
        PROJECT.joinpath("ppo_procgen.py").read_text().replace("    env_id: str", "    mine: str = ''\n    env_id: str")
    )
    script = write_script(tmp_path, fork, "ppo_procgen.py")
    names = xpids(commands(tmp_path, write_grid(tmp_path, {"mine": values}, script)))
    assert len(set(names)) == len(values) and all(re.fullmatch(r"[\w.%+-]+", name) for name in names)


def test_a_grid_may_name_its_runs(tmp_path):
    names = xpids(commands(tmp_path, write_grid(tmp_path, {"xpid": ["baseline"], "env_id": ["maze", "miner"]})))
    assert names == ["baseline-env_idmaze_0", "baseline-env_idminer_0"]


def test_a_forks_own_arguments_are_known_and_its_code_is_not_run(tmp_path):
    fork = (
        PROJECT.joinpath("ppo_procgen.py")
        .read_text()
        .replace("    env_id: str", "    bonus: float = 0.1\n    env_id: str")
    )
    script = write_script(tmp_path, fork + "\nraise SystemExit('imported')\n", "ppo_bonus_procgen.py")
    lines = commands(tmp_path, write_grid(tmp_path, {"bonus": [0.1, 0.2]}, script))
    assert "--bonus 0.1" in lines[0] and "-ppo_bonus-lr" in lines[0]
    assert lines[0].endswith("-ha0.01_0") and lines[1].endswith("-bonus0.2_0")


def test_a_checkpoint_is_named_by_its_file_and_its_content(tmp_path):
    """Not by its folder: a long path would make the name too long, and a file may move."""
    name = "model_" + "9" * 50 + ".50"
    for folder in ("here", "deep/" * 20):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{name}.pt").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    for folder in ("here", "deep/" * 20):
        grid = write_grid(tmp_path, {"checkpoint": [f"{folder}/{name}.pt"], "env_id": ["maze"]})
        (xpid,) = xpids(commands(tmp_path, grid))
        assert xpid == f"maze-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01-checkpoint{name[:40]}-{digest}_0"


def fork_of(tmp_path, *fields):
    source = PROJECT.joinpath("ppo_procgen.py").read_text()
    assert "    env_id: str" in source
    fields = "".join(f"    {field}\n" for field in fields)
    return write_script(tmp_path, source.replace("    env_id: str", f"{fields}    env_id: str", 1), "ppo_procgen.py")


def test_a_number_is_named_as_its_annotation_has_it(tmp_path):
    """So that a default of 0 and a 0 in the grid name the same run."""
    fork = fork_of(tmp_path, "my_coef: float = 0", "my_count: int = 2")
    fork.write_text(fork.read_text().replace("ent_coef: float = 0.01", "ent_coef: float = 0"))
    plain = "coinrun-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.0"
    for value, named in ((0, ""), (0.0, ""), (1, "-my_coef1.0")):
        assert xpids(commands(tmp_path, write_grid(tmp_path, {"my_coef": [value]}, fork))) == [f"{plain}{named}_0"]
    assert xpids(commands(tmp_path, write_grid(tmp_path, {"my_count": [2.0]}, fork))) == [f"{plain}_0"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("mine: Optional[float] = None", 1),
        ("mine: Annotated[bool, tyro.conf.arg(help='x')] = False", True),
        ("mine: 'int' = 3", 4),
        ("mine: tuple[int, int] = (1, 2)", [1, 2]),
    ],
)
def test_an_annotation_that_is_not_plain_cannot_be_swept(tmp_path, field, value):
    fork = fork_of(tmp_path, field)
    assert len(commands(tmp_path, write_grid(tmp_path, {"gamma": [0.9]}, fork))) == 1  # it may be there
    result = run_sweep(tmp_path, write_grid(tmp_path, {"mine": [value]}, fork))
    assert result.returncode == 2
    annotation = field.removeprefix("mine: ").split(" = ")[0]
    assert_one_line(result.stderr, "'mine'", annotation.split("(")[0], "int, float, bool, str and Literal")


def test_choices_can_be_swept(tmp_path):
    fork = fork_of(tmp_path, "mine: Literal['a', 'b'] = 'a'")
    lines = commands(tmp_path, write_grid(tmp_path, {"mine": ["a", "b"]}, fork))
    assert ["--mine b" in line for line in lines] == ["-mineb_" in line for line in lines] == [False, True]
    result = run_sweep(tmp_path, write_grid(tmp_path, {"mine": ["c"]}, fork))
    assert_one_line(result.stderr, "'mine'", '"c"', "Literal['a', 'b']")


@pytest.mark.parametrize("default", ["= field(default_factory=list)", "= 2 * BASE", ""])
def test_a_default_that_is_not_a_constant_asks_for_a_name(tmp_path, default):
    """The script itself would name such a run in another way."""
    fork = fork_of(tmp_path, f"mine: int {default}")
    result = run_sweep(tmp_path, write_grid(tmp_path, {"gamma": [0.9, 0.99]}, fork))
    assert result.returncode == 2
    assert_one_line(result.stderr, "the default of mine", "ppo_procgen.py", '"xpid": ["my_name"]')
    names = xpids(commands(tmp_path, write_grid(tmp_path, {"gamma": [0.9, 0.99], "xpid": ["my_name"]}, fork)))
    assert names == ["my_name-gamma0.9_0", "my_name-gamma0.99_0"]


def test_a_seed_of_null_is_the_default(tmp_path):
    (line,) = commands(tmp_path, write_grid(tmp_path, {"seed": [None]}))
    assert "--seed 0 --xpid" in line and line.endswith("-ha0.01_0")


def test_many_seeds_take_time_in_proportion(tmp_path):
    """Fifty thousand took half a minute when each was compared with each."""
    started = time.process_time()
    assert len(commands(tmp_path, write_grid(tmp_path, {}), "--num-trials", 50_000)) == 50_000
    assert time.process_time() - started < 10


def test_another_suites_games_are_its_own_matter(tmp_path):
    script = write_script(tmp_path, "class Args:\n    env_id: str = 'Breakout-v5'\n    seed: int = 0\n")
    assert len(commands(tmp_path, write_grid(tmp_path, {"env_id": ["Pong-v5"]}, script))) == 1


def test_free_arguments_that_are_not_written_out_are_one_line(tmp_path):
    change = 'FREE_ARGUMENTS = FREE_ARGUMENTS + ("x",)'
    source = PROJECT.joinpath("ppo_procgen.py").read_text()
    script = write_script(tmp_path, f"{source}\n{change}\n", "ppo_procgen.py")
    result = run_sweep(tmp_path, write_grid(tmp_path, {"gamma": [0.9]}, script))
    assert result.returncode == 2
    assert_one_line(result.stderr, "FREE_ARGUMENTS must be a literal")


def test_inherited_arguments_count(tmp_path):
    script = PROJECT.joinpath("ppo_procgen.py").read_text().replace("class Args:", "class Base:")
    script += "\n\n@dataclass\nclass Args(Base):\n    bonus: float = 0.1\n    gamma: float = 0.9\n"
    script = write_script(tmp_path, script, "ppo_procgen.py")
    (line,) = commands(tmp_path, write_grid(tmp_path, {"bonus": [0.2], "num_envs": [8]}, script))
    assert "--bonus 0.2 --num-envs 8 --resume --seed 0 --xpid coinrun-easy-200-ppo-lr" in line
    assert line.endswith("-ha0.01-num_envs8-bonus0.2_0")  # the order of the fields


def test_a_script_of_the_current_folder_comes_first(tmp_path):
    write_script(tmp_path, name="collect_procgen.py")
    assert (
        "python collect_procgen.py --text b"
        in commands(tmp_path, write_grid(tmp_path, {"text": ["b"]}, "collect_procgen.py"))[0]
    )


@pytest.mark.parametrize("name, count", [("ppo", 16), ("ppo_hparams", 36), ("collect", 32), ("smoke", 4)])
def test_the_grids_that_come_along_are_taken_by_their_scripts(tmp_path, name, count):
    lines = commands(tmp_path, name)
    assert len(set(lines)) == count
    for line in lines:
        module = collect_procgen if name == "collect" else ppo_procgen
        module.check_args(tyro.cli(module.Args, args=shlex.split(line)[2:]))


def test_a_hundred_thousand_commands_differ(tmp_path):
    grid = {"learning_rate": [i / 1e5 for i in range(1, 101)], "gamma": [i / 100 for i in range(100)]}
    result = run_sweep(tmp_path, write_grid(tmp_path, grid), "--num-trials", 10, "--action", "save")
    assert result.returncode == 0
    assert len(set((tmp_path / "my_grid.txt").read_text().splitlines())) == 100_000


# MISTAKES


@pytest.mark.parametrize(
    "grid, parts",
    [
        ({"envid": ["miner"]}, ["my_grid.json", "'envid'", "env_id"]),
        ({"env_id": "miner"}, ["my_grid.json", "'env_id'", '"miner"', "list"]),
        ({"env_id": []}, ["'env_id'", "[]", "list"]),
        ({"env_id": ["miner", "maze", "miner"]}, ["my_grid.json", "both have the xpid miner-easy-200"]),
        ({"learning_rate": [0.0005, None]}, ["both have the xpid", "-lr0.0005-"]),
        ({"vf_coef": [1, 1.0]}, ["both have the xpid", "-v1.0-"]),
        ({"seed": [0, 1]}, ["both have the xpid", "-ha0.01_1"]),
        ({"seed": [None, 1]}, ["my_grid.json", "both have the xpid"]),
        ({"num_envs": [64.5]}, ["'num_envs'", "64.5", "int"]),
        ({"num_envs": [True]}, ["'num_envs'", "true", "int"]),
        ({"anneal_lr": ["yes"]}, ["'anneal_lr'", '"yes"', "bool"]),
        ({"env_id": [3]}, ["'env_id'", "3", "str"]),
        ({"env_id": [["miner"]]}, ["'env_id'", "str"]),
        ({"gamma": [float("nan")]}, ["'gamma'", "NaN", "finite"]),
        ('{"script": "ppo_procgen.py", "grid": {"gamma": [1e999]}}', ["'gamma'", "Infinity", "finite"]),
        ({"checkpoint": ["a\n"]}, ["'checkpoint'", "control characters"]),
        ('{"script": "ppo_procgen.py", "grid": {"checkpoint": ["\\ud800"]}}', ["'checkpoint'", "text"]),
        ({"gamma": [10**400]}, ["'gamma'", "finite"]),
        ({"lr": [0.1]}, ["'lr'", "it has", "learning_rate"]),
        ({"learning_rat": [0.1]}, ["did you mean learning_rate?"]),
        ({"env_id": ["coinrun", "coinrum"]}, ["'env_id'", "'coinrum'", "did you mean coinrun?", "bigfish, bossfight"]),
        ({"distribution_mode": ["eazy"]}, ["'distribution_mode'", "'eazy'", "easy, hard", "coinrun"]),
        ({"env_id": ["maze", "miner"], "distribution_mode": ["exploration"]}, ["'exploration'", "memory for miner"]),
        ({"checkpoint": ["none/model_1.00.pt"]}, ["checkpoint none/model_1.00.pt", "No such file"]),
        ("[" * 100_000, ["my_grid.json", "JSON"]),
        ('{"script": "ppo_procgen.py", "grid": {"env_id": ["miner",]}}', ["my_grid.json", "JSON", "line 1 column"]),
        ('{"script": "ppo_procgen.py", "grid": {"env_id": ["miner"], "env_id": ["maze"]}}', ["'env_id'", "2 times"]),
        ('{"grid": {}}', ["my_grid.json", "script"]),
        ('{"script": "ppo_procgen.py", "grid": [1]}', ["my_grid.json", "script"]),
        ("[]", ["my_grid.json", "script"]),
        ('{"script": "nothing.py", "grid": {}}', ["nothing.py", "No such file"]),
        (f'{{"script": "{PROJECT}/README.md", "grid": {{}}}}', ["README.md", "no Python"]),
        (f'{{"script": "{PROJECT}/tests/conftest.py", "grid": {{}}}}', ["conftest.py", "class Args"]),
    ],
)
def test_a_mistake_in_a_grid_is_one_line_that_says_where(tmp_path, grid, parts):
    result = run_sweep(tmp_path, write_grid(tmp_path, grid), "--num-trials", 2)
    assert result.returncode == 2 and not result.stdout
    assert_one_line(result.stderr, *parts)


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--action", "run"], ["--action", "'run'", "status"]),
        (["--num-trials", 0], ["--num-trials", "at least 1"]),
        (["--start-index", -1], ["--start-index", "at least 0"]),
        (["--action", "slurm", "--runs-per-task", 0], ["--runs-per-task", "at least 1"]),
        (["--action", "local", "--workers", 0], ["--workers", "at least 1"]),
        (["--action", "local", "--gpus", "0;1"], ["--gpus", "'0;1'", "0,1,2"]),
        (["--num-samples", 0], ["--num-samples", "at least 1"]),
        (["--action", "slurm", "--side-by-side", 0], ["--side-by-side", "at least 1"]),
        (["--python", "'python"], ["--python", "a command"]),
        (["--python", ""], ["--python", "a command"]),
        (["--action", "local", "--python", "no/python"], ["--python", "'no/python'", "found"]),
        (["--submit"], ["--submit", "--action slurm"]),
        (["--action", "local", "--partition", "gpu"], ["--partition", "--action slurm"]),
        (["--action", "slurm", "--workers", 2], ["--workers", "--action local"]),
        (["--action", "status", "--only-missing"], ["--only-missing", "print and save and local and slurm"]),
        (["--action", "slurm", "--output", "x"], ["--output", "save and plot"]),
        (["--action", "save", "--verbose"], ["--verbose", "--action status"]),
        (["--csv", "x"], ["--csv", "--action status"]),
        (["--action", "plot"], ["nothing to draw", "progress.csv"]),
        (["--action", "slurm", "--job-name", "a/b"], ["--job-name", "'a/b'"]),
        (["--action", "slurm", "--partition", 'a"b'], ["--partition"]),
        (["--action", "slurm", "--sbatch-arg", "a\nb"], [r"a\nb", "option of sbatch"]),
        (["--action", "slurm", "--template", "none.txt"], ["--template", "none.txt", "No such file"]),
        (["--action", "slurm", "--max-array-size", 2, "--max-parallel", 1], ["--max-parallel is 1", "at least 2"]),
        (["--action", "save", "--output", "/dev/null/x"], ["/dev/null/x", "could not be written"]),
    ],
)
def test_a_mistake_in_an_option_is_one_line_and_writes_nothing(tmp_path, options, parts):
    grid = write_grid(tmp_path, {"env_id": ["miner", "maze"]})
    result = run_sweep(tmp_path, grid, *options)
    assert result.returncode == (1 if "/dev/null/x" in options or "plot" in options else 2)
    assert_one_line(result.stderr, *parts)
    assert os.listdir(tmp_path) == ["my_grid.json"]


def test_a_grid_that_is_not_there_is_one_line(tmp_path):
    assert_one_line(run_sweep(tmp_path, "nothing").stderr, "--grid-config", "grids/nothing.json", "No such file")


def test_two_collections_into_one_folder_are_refused(tmp_path):
    grid = {"env_id": ["maze"], "ratio": [1.0], "seed": [0]}
    result = run_sweep(tmp_path, write_grid(tmp_path, grid, "collect_procgen.py"), "--num-trials", 2)
    assert result.returncode == 2
    assert_one_line(result.stderr, "my_grid.json", "ratio_dataset_dir")
    grid.update(save_dataset=[False])
    assert len(commands(tmp_path, write_grid(tmp_path, grid, "collect_procgen.py"), "--num-trials", 2)) == 2


def test_seeds_of_a_script_without_one_cannot_be_counted_up(tmp_path):
    result = run_sweep(tmp_path, "collect", "--num-trials", 2)
    assert result.returncode == 2
    assert_one_line(result.stderr, "collect.json", "seed")


# FILES


def test_printing_writes_nothing(tmp_path):
    grid = write_grid(tmp_path, {})
    commands(tmp_path, grid)
    assert os.listdir(tmp_path) == ["my_grid.json"]


def test_a_reader_that_has_had_enough_is_no_error(tmp_path):
    command = f"{sys.executable} {PROJECT}/sweep.py --grid-config ppo --num-trials 5000 | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert len(result.stdout.splitlines()) == 1 and not result.stderr


def test_a_status_that_nobody_reads_is_not_taken_for_done(tmp_path):
    command = f"set -o pipefail; {sys.executable} -u {PROJECT}/sweep.py --grid-config ppo --action status | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode and not result.stderr


def test_the_command_file_gets_the_grids_name_or_the_given_one(tmp_path):
    grid = write_grid(tmp_path, {"env_id": ["miner", "maze"]})
    printed = commands(tmp_path, grid)
    run_sweep(tmp_path, grid, "--action", "save")
    run_sweep(tmp_path, grid, "--action", "save", "--output", "deep/er.txt")
    run_sweep(tmp_path, grid, "--action", "SAVE", "--output", "capitals.txt")
    for path in ("my_grid.txt", "deep/er.txt", "capitals.txt"):
        assert (tmp_path / path).read_text().splitlines() == printed


@pytest.mark.parametrize("num_tasks", [1, 2, 9, 10, 11, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("max_array_size", [2, 3, 11, 1001])
@pytest.mark.parametrize("max_parallel", [None, 2500])
def test_arrays_cover_every_task_once_within_the_clusters_limit(num_tasks, max_array_size, max_parallel):
    arrays = sweep.split_tasks(num_tasks, max_array_size, max_parallel)
    tasks = [offset + i for offset, size, _ in arrays for i in range(1, size + 1)]
    assert tasks == list(range(1, num_tasks + 1))
    assert max(size for _, size, _ in arrays) < max_array_size  # the largest index, which must be below it
    if max_parallel:
        assert sum(parallel for *_, parallel in arrays) == max_parallel


@pytest.mark.parametrize("limit", ["4", "4:59", "0:30", "00:02:00", "0:04:59"])
def test_a_time_limit_below_five_minutes_is_refused(tmp_path, limit):
    """The warning would come as the run starts, and the task would requeue itself for ever."""
    result = run_sweep(tmp_path, write_grid(tmp_path, {}), "--action", "slurm", "--time", limit)
    assert result.returncode == 2 and os.listdir(tmp_path) == ["my_grid.json"]
    assert_one_line(result.stderr, "--time", limit, "at least 5 minutes")


@pytest.mark.parametrize("limit", ["5", "10", "7:30", "12:00:00", "1:00:00", "0-1", "1-2:30:30", "0", "UNLIMITED"])
def test_longer_time_limits_are_those_of_sbatch(tmp_path, limit):
    run_sweep(tmp_path, write_grid(tmp_path, {}), "--action", "slurm", "--time", limit)
    assert f'#SBATCH --time="{limit}"' in (tmp_path / "slurm/generated/my_grid/array.sbatch").read_text()


SITE = [
    "--partition",
    "gpu long",
    "--account",
    "it's",
    "--qos",
    "high",
    "--constraint",
    "a100|h100",
    "--time",
    "1-0:00",
]
SITE += ["--mem", "4G", "--cpus-per-task", 2, "--gpus-per-task", "a100:1", "--dependency", "afterok:1:2"]
SITE += [
    "--sbatch-arg=--mail-type=END",
    "--sbatch-arg",
    "exclusive",
    "--setup",
    "module load 'cuda'",
    "--setup",
    "export X=1",
]


def test_sbatch_files_are_sound_bash_with_the_sites_settings(tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    grid = write_grid(folder, {"text": HOSTILE}, write_script(folder))
    result = run_sweep(folder, grid, "--action", "slurm", *SITE, "--max-array-size", 6, "--max-parallel", 7)
    assert result.returncode == 0, result.stderr
    generated = folder / "slurm" / "generated" / "my_grid"
    names = ["commands.txt", "logs", "submit_all.sh"] + [f"array_{i}.sbatch" for i in (1, 2, 3, 4)]
    assert sorted(os.listdir(generated)) == sorted(names)
    text = (generated / "array_2.sbatch").read_text()
    for line in (
        "#SBATCH --array=1-5%2", f'#SBATCH --chdir="{folder}"', "#SBATCH --requeue", "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR2@120", '#SBATCH --partition="gpu long"', '#SBATCH --account="it\'s"',
        '#SBATCH --constraint="a100|h100"', '#SBATCH --gpus-per-task="a100:1"', '#SBATCH --dependency="afterok:1:2"',
        '#SBATCH --mail-type="END"', "#SBATCH --exclusive", "module load 'cuda'", "export X=1",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "{{" not in text
    scripts = [*generated.glob("*.sbatch"), generated / "submit_all.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    assert "unset SLURM_RESTART_COUNT" in (generated / "submit_all.sh").read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *scripts], check=True)
    else:
        assert not os.environ.get("CI"), "CI must have shellcheck"


def test_a_smaller_sweep_of_a_name_is_refused_and_the_same_one_written_again(tmp_path):
    grid = write_grid(tmp_path, {"env_id": ["miner", "maze", "ninja"]})
    options = ["--action", "SLURM", "--job-name", "job"]
    assert run_sweep(tmp_path, grid, *options, "--max-array-size", 2).returncode == 0
    assert run_sweep(tmp_path, grid, *options, "--time", 5).returncode == 0
    assert "1-3" in (tmp_path / "slurm/generated/job/array.sbatch").read_text()
    result = run_sweep(tmp_path, write_grid(tmp_path, {"env_id": ["miner"]}), *options)
    assert result.returncode == 2
    assert_one_line(result.stderr, "slurm/generated/job", "queued tasks still read", "--job-name job_")


SBATCH = """#!/bin/sh
echo "$2 restart=$SLURM_RESTART_COUNT" >> submitted.txt
case $2 in *_2.sbatch) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;; esac
echo 1234
"""


def test_a_refused_array_is_named_with_those_after_it(tmp_path, monkeypatch):
    """And the restarts of a job that submits are not those of its jobs."""
    (tmp_path / "bin").mkdir()
    write_script(tmp_path / "bin", SBATCH, "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    grid = write_grid(tmp_path, {"env_id": ["miner", "maze", "ninja"]})
    result = run_sweep(tmp_path, grid, "--action", "slurm", "--max-array-size", 2, "--submit")
    first, second, third = (f"slurm/generated/my_grid/array_{i}.sbatch" for i in (1, 2, 3))
    assert result.returncode == 1
    assert f"submitted {first} as job 1234; logs in slurm/generated/my_grid/logs/" in result.stdout
    assert_one_line(result.stderr, "QOSMax", f"left: sbatch {second} && sbatch {third}")
    assert (tmp_path / "submitted.txt").read_text() == f"{first} restart=\n{second} restart=\n"


def test_a_labs_own_template_is_filled_and_its_mistakes_are_named(tmp_path):
    grid = write_grid(tmp_path, {})
    (tmp_path / "lab.txt").write_text("#!/bin/bash\n#SBATCH --array={{array}}\n{{setup}}\nrun {{folder}}\n")
    options = ["--action", "slurm", "--template", "lab.txt", "--setup", "module load x"]
    assert run_sweep(tmp_path, grid, *options).returncode == 0
    text = (tmp_path / "slurm/generated/my_grid/array.sbatch").read_text()
    assert text == "#!/bin/bash\n#SBATCH --array=1-1\nmodule load x\nrun slurm/generated/my_grid\n"
    (tmp_path / "lab.txt").write_text("{{arrays}}")
    assert_one_line(run_sweep(tmp_path, grid, *options).stderr, "lab.txt", "{{arrays}}", "it must have {{array}}")


def test_the_ranges_are_those_of_the_collector():
    assert sweep.RANGES == collect_procgen.RANGES


# STATUS, AND RUNNING HERE


def rows(folder, *arguments):
    """Cells of status by configuration, its summary line, and the exit code."""
    result = run_sweep(folder, *arguments, "--action", "status")
    assert not result.stderr
    header, *lines = result.stdout.splitlines()
    names = re.split(r"\s{2,}", header.strip())
    (end,) = [i for i, line in enumerate(lines) if re.match(r"\d+ configurations, ", line)]
    table = [dict(zip(names, re.split(r"\s{2,}", line.strip()))) for line in lines[:end]]
    return {row["configuration"]: row for row in table}, lines[end], result.returncode


def start_sweep(folder, *arguments):
    command = [sys.executable, PROJECT / "sweep.py", "--grid-config", *map(str, arguments), "--action", "local"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--python", sys.executable], cwd=folder, start_new_session=True, **pipes)


def test_a_sweep_that_runs_here_is_stopped_and_goes_on_and_status_follows_it(tmp_path):
    grid = {**TINY, "env_id": ["bossfight", "starpilot"], "total_timesteps": [640], "archive_interval": [10]}
    options = [write_grid(tmp_path, grid), "--python", sys.executable]
    table, summary, code = rows(tmp_path, *options)
    assert (table["env_id=starpilot"]["not started"], table["env_id=starpilot"]["progress"], code) == ("1", "0.0 %", 3)

    process = start_sweep(tmp_path, options[0], "--workers", 2)
    wait_for(lambda: len(list(tmp_path.glob("models/*/*/progress.csv"))) == 2, process)
    table, _, _ = rows(tmp_path, *options)
    assert table["env_id=starpilot"]["running"] == "1"
    assert not commands(tmp_path, *options, "--only-missing")  # what is running is not to be started again
    process.send_signal(signal.SIGTERM)
    first, *each, last = process.communicate()[0].splitlines()
    assert first == "2 runs, 2 at a time; logs in logs/my_grid/"
    wanted = r"2 runs: 0 done, 0 failed, 2 stopped, 0 not started; [1-9]\d\.0 % in all; run the same command again .*"
    assert re.fullmatch(wanted, last)
    assert sorted(line.split(" is ")[1] for line in each) == ["stopped, 1 of 2", "stopped, 2 of 2"]
    assert process.returncode == 75
    _, summary, _ = rows(tmp_path, *options)
    assert "0 done" in summary and "2 stopped" in summary
    assert re.search(r"[\d.]+ % in all", last)[0] in summary

    process = start_sweep(tmp_path, options[0], "--workers", 2)
    assert "2 runs: 2 done" in process.communicate()[0] and process.returncode == 0
    for log in (tmp_path / "logs" / "my_grid").iterdir():
        assert "stopped by SIGTERM" in log.read_text() and log.read_text().splitlines()[-1].startswith("done: ")
    table, summary, code = rows(tmp_path, *options)
    assert code == 0 and summary == (
        "2 configurations, 2 runs: 2 done, 0 running, 0 stopped, 0 not started; 100.0 % in all"
    )
    (final,) = tmp_path.glob("models/starpilot/*/final/model_*.pt")
    test_return = torch.load(final, weights_only=True)["test_return"]
    assert table["env_id=starpilot"]["test return"] == f"{test_return:.2f}"
    assert table["env_id=starpilot"]["final test"] == f"{test_return:.2f}"  # of one seed
    assert table["env_id=starpilot"]["normalised"] == f"{(test_return - 2.5) / 61.5:.2f}"

    # Without --xpid the script finds the same folder, and what is finished is left out of a new list.
    words = shlex.split(commands(tmp_path, *options)[0])
    again = run_main(ppo_procgen, words[2 : words.index("--xpid")], tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert commands(tmp_path, *options, "--only-missing", "--num-trials", 2) == commands(
        tmp_path, *options, "--start-index", 1
    )
    _, summary, code = rows(tmp_path, write_grid(tmp_path, {**grid, "total_timesteps": [1280]}, name="longer"))
    assert code == 3 and "2 stopped" in summary and "50.0 %" in summary

    result = run_sweep(tmp_path, *options, "--only-missing", "--action", "local")
    assert result.returncode == 0 and "nothing to start" in result.stdout

    # What is offered is not finished for the script either: a file of the user's is no final checkpoint.
    final.rename(final.with_name("model_best.pt"))
    (line,) = commands(tmp_path, *options, "--only-missing")
    again = run_main(ppo_procgen, shlex.split(line)[2:], tmp_path)
    assert again.returncode == 0 and "is finished" not in again.stdout
    assert not commands(tmp_path, *options, "--only-missing")

    # The collection from these runs; another script's are left out, as they are by the script.
    (run,) = tmp_path.glob("models/bossfight/*/")
    shutil.copytree(run, run.with_name("another"))
    (run.with_name("another") / "ppo_procgen.py").rename(run.with_name("another") / "ppo_mine_procgen.py")
    for path in run.with_name("another").glob("*/*.pt"):
        torch.save({**torch.load(path, weights_only=True), "script": "ppo_mine_procgen.py"}, path)
    grid = {"env_id": ["bossfight"], "ratio": [1.0, 0.75], "total_timesteps": [50], "num_envs": [2]}
    grid = write_grid(tmp_path, grid, "collect_procgen.py", "collecting")
    _, summary, code = rows(tmp_path, grid)
    assert code == 3 and "2 not started" in summary
    for line in commands(tmp_path, grid):
        assert run_main(collect_procgen, shlex.split(line)[2:], tmp_path).returncode == 0
    table, _, code = rows(tmp_path, grid)
    (metadata,) = tmp_path.glob("models/bossfight/*/test_dataset/0.75/metadata.json")
    mean = json.loads(metadata.read_text())["return_mean"]
    assert code == 0 and table["ratio=0.75"]["final test"] == f"{mean:.2f}"
    assert not commands(tmp_path, grid, "--only-missing")
    for content in ('{"steps": ', "[1]"):
        metadata.write_text(content)
        table, _, code = rows(tmp_path, grid)
        assert code == 3 and [row["damaged"] for row in table.values()] == ["0", "1"]


NOTE_ENVIRONMENT = """
import os, sys, time
class Args:
    number: int = 0
with open("noted.txt", "a") as file:
    print(sys.argv[2], *map(os.environ.get, ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")), file=file)
time.sleep(0.3)
print("a last word", sys.argv[2], flush=True)
sys.exit(5 if sys.argv[2] == "2" else 0)
"""


def test_runs_here_share_cores_and_gpus_and_a_failure_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    grid = write_grid(tmp_path, {"number": list(range(6))}, write_script(tmp_path, NOTE_ENVIRONMENT))
    process = start_sweep(tmp_path, grid, "--workers", 2, "--gpus", "3,5", "--job-name", "here")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "my_grid_3 failed with exit code 5: logs/here/my_grid_3.log: a last word 2" in output
    assert output.splitlines()[-1] == "6 runs: 5 done, 1 failed, 0 stopped, 0 not started"
    assert len(re.findall(r"^my_grid_[124567] is done, \d of 6$", output, re.MULTILINE)) == 5
    noted = sorted(line.split() for line in (tmp_path / "noted.txt").read_text().splitlines())
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [words[:2] for words in noted] == [[str(number), threads] for number in range(6)]
    assert {words[2] for words in noted} == {"3", "5"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own number stays
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    start_sweep(tmp_path, grid, "--workers", 2).communicate()
    noted = [line.split() for line in (tmp_path / "noted.txt").read_text().splitlines()][6:]
    assert {words[1] for words in noted} == {"7"} and {words[2] for words in noted} == {"4", "6"}


STOPPABLE = """
import os, signal, sys, time
class Args:
    handles: bool = True
    number: int = 0
if "--handles" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print("saved", flush=True), os._exit(75)))
open("started", "a").write("x")
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_runs_here_ready_or_not(tmp_path, signum):
    """Also what is still importing, and dies of the signal. A terminal's Ctrl-C goes to all processes of a group."""
    script = write_script(tmp_path, STOPPABLE)
    grid = write_grid(tmp_path, {"number": [0, 1, 2], "handles": [True, False]}, script)
    process = start_sweep(tmp_path, grid, "--workers", 3)
    wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text() == "xxx", process)
    os.killpg(process.pid, signum)
    output = process.communicate()[0]
    assert process.returncode == 75
    assert output.splitlines()[-1].startswith("6 runs: 0 done, 0 failed, 3 stopped, 3 not started")
    logs = sorted(log.read_text() for log in tmp_path.glob("logs/*/*.log"))
    assert len(logs) == 3 and ["saved" in log for log in logs].count(True) == 2
    assert (tmp_path / "started").read_text() == "xxx"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_burst_of_signals_changes_nothing_in_the_exit_code(tmp_path, signum):
    grid = write_grid(tmp_path, {"number": [0, 1], "handles": [True]}, write_script(tmp_path, STOPPABLE))
    process = start_sweep(tmp_path, grid, "--workers", 2)
    wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text() == "xx", process)
    while process.poll() is None:  # also while Python ends
        process.send_signal(signum)
        time.sleep(0.0005)
    assert process.returncode == 75
    assert "2 runs: 0 done, 0 failed, 2 stopped" in process.communicate()[0]


def test_a_lost_terminal_stops_the_commands_too(tmp_path):
    """Its commands would run on, and a second sweep would start them again."""
    grid = write_grid(tmp_path, {"number": [0, 1], "handles": [True]}, write_script(tmp_path, STOPPABLE))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        command = [sys.executable, str(PROJECT / "sweep.py"), "--grid-config", grid, "--action", "local"]
        os.execv(sys.executable, [*command, "--workers", "2"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() or (tmp_path / "started").read_text() != "xx":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert [log.read_text().count("saved") for log in tmp_path.glob("logs/*/*.log")] == [1, 1]


def test_nohup_outlives_the_terminal(tmp_path):
    script = "import time\nclass Args:\n    number: int = 0\nopen('started', 'w'); time.sleep(1)"
    grid = write_grid(tmp_path, {"number": [0]}, write_script(tmp_path, script))
    command = f"nohup {sys.executable} {PROJECT}/sweep.py --grid-config {grid} --action local"
    process = subprocess.Popen(shlex.split(command), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_for((tmp_path / "started").exists, process)
    process.send_signal(signal.SIGHUP)
    assert "1 runs: 1 done" in process.communicate()[0] and process.returncode == 0


def test_a_reader_that_has_gone_does_not_end_the_sweep(tmp_path):
    """Ctrl-C ends the tee behind it first."""
    grid = write_grid(tmp_path, {"number": [0, 1], "handles": [True]}, write_script(tmp_path, STOPPABLE))
    process = start_sweep(tmp_path, grid, "--workers", 2)
    wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text() == "xx", process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    assert [log.read_text().count("saved") for log in tmp_path.glob("logs/*/*.log")] == [1, 1]


def test_a_run_in_use_is_not_started_and_not_counted_as_failed(tmp_path):
    """One is locked, as by a training; another's process is still importing, and has no lock yet."""
    script = "import sys, time\nif '--hidden-size' not in sys.argv:\n    time.sleep(60)\n"
    script = write_script(tmp_path, trainers_arguments() + script, "ppo_procgen.py")
    grid = write_grid(tmp_path, {"env_id": ["maze", "miner"], "total_timesteps": [32768]}, script)
    locked, importing = commands(tmp_path, grid, "--python", sys.executable)
    folder = tmp_path / "models" / "maze" / xpids([locked])[0]
    folder.mkdir(parents=True)
    with (
        filelock.FileLock(folder / ".lock"),
        subprocess.Popen(shlex.split(importing), cwd=tmp_path) as process,
    ):
        wait_for(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().count(b"ppo_procgen.py"), process)
        table, _, _ = rows(tmp_path, grid)
        assert [row["running"] for row in table.values()] == ["1", "1"]
        assert not commands(tmp_path, grid, "--only-missing")
        started = start_sweep(tmp_path, grid)
        output = started.communicate()[0]
        process.kill()
    assert started.returncode == 75 and not list(tmp_path.glob("logs/*/*.log"))
    assert output.count("is in use by another process") == 2
    wanted = "2 runs: 0 done, 0 failed, 0 stopped, 2 in use, 0 not started; run the same command again"
    assert output.splitlines()[-1].startswith(wanted)


def test_a_run_that_another_process_took_first_is_in_use(tmp_path):
    """The lock was taken between the look at it and the script's own."""
    locks = "import fcntl, os, subprocess, sys, time\n"
    locks += "folder = f'models/maze/{sys.argv[-1]}'\nos.makedirs(folder)\nfile = open(f'{folder}/.lock', 'w')\n"
    locks += (
        "fcntl.flock(file, fcntl.LOCK_EX)\nsubprocess.Popen(['sleep', '30'], pass_fds=[file.fileno()])\nsys.exit(1)\n"
    )
    script = write_script(tmp_path, trainers_arguments() + locks, "ppo_procgen.py")
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]}, script)
    process = start_sweep(tmp_path, grid)
    assert "0 failed, 0 stopped, 1 in use" in process.communicate()[0] and process.returncode == 75


def test_a_killed_command_is_explained(tmp_path):
    script = "import os\nclass Args:\n    number: int = 0\nos.kill(os.getpid(), 9)"
    grid = write_grid(tmp_path, {"number": [0]}, write_script(tmp_path, script))
    process = start_sweep(tmp_path, grid)
    assert "exit code -9 (killed, usually because memory ran out" in process.communicate()[0]
    assert process.returncode == 1


def test_commands_run_with_the_interpreter_of_the_sweep_and_all_gpus(tmp_path, monkeypatch):
    """Outside an active environment `python` may be another one, without PyTorch."""
    (tmp_path / "bin").mkdir()
    write_script(tmp_path / "bin", "#!/bin/sh\nexit 9\n", "python").chmod(0o755)
    listed = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5b)\nGPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-8f3c)"
    write_script(tmp_path / "bin", f"#!/bin/sh\n[ $1 = -L ] && echo '{listed}'\n", "nvidia-smi").chmod(0o755)
    script = "import os, sys, time\nclass Args:\n    number: int = 0\n"
    script += "print(sys.executable, os.environ.get('CUDA_VISIBLE_DEVICES'), file=open('noted.txt', 'a'))\n"
    script += "time.sleep(0.5)"
    grid = write_grid(tmp_path, {"number": [0, 1, 2, 3]}, write_script(tmp_path, script))
    command = [sys.executable, PROJECT / "sweep.py", "--grid-config", grid, "--action", "local", "--workers", "2"]
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    noted = sorted((tmp_path / "noted.txt").read_text().splitlines())
    assert noted == [f"{sys.executable} {gpu}" for gpu in (0, 0, 1, 1)]
    (tmp_path / "noted.txt").unlink()
    subprocess.run(command, cwd=tmp_path, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert (tmp_path / "noted.txt").read_text() == f"{sys.executable} \n" * 4  # none are wanted


def fake_run(folder, seed, steps, train, tests, final=True, env_id="maze"):
    """The traces of a finished run that status reads. Returned is its folder."""
    run = folder / "models" / env_id / f"{env_id}-easy-200-ppo-lr0.0005-epoch3-mb8-v0.5-ha0.01_{seed}"
    (run / "final").mkdir(parents=True)
    (run / "rolling").mkdir()
    (run / "rolling" / "model.pt").touch()
    if final:
        (run / "final" / f"model_{tests[-1]:.2f}.pt").touch()
    with open(run / "progress.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["iteration", "global_step", "charts/episodic_return", "charts/test_return"])
        for i, test_return in enumerate(tests, 1):
            writer.writerow([i, steps * i // len(tests), train, test_return])
    return run


def test_status_shows_means_and_sample_deviations_over_seeds(tmp_path):
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    fake_run(tmp_path, 0, 32768, 8.0, [5.0, 6.0])
    table, summary, _ = rows(tmp_path, grid)
    assert table["my_grid"]["final test"] == "6.00" and "deviation" not in summary  # one seed has none
    fake_run(tmp_path, 1, 32768, 9.0, [5.0, 9.0])
    fake_run(tmp_path, 2, 16384, 4.0, [2.0] + [math.nan] * 2000, final=False)  # its test is far from the end
    with filelock.FileLock(fake_run(tmp_path, 3, 16384, 6.0, [4.0], final=False) / ".lock"):
        table, summary, code = rows(tmp_path, grid, "--num-trials", 5, "--csv", "deep/table.csv")
    expected = ["2", "1", "1", "1", "0", "60.0 %", "6.75", "5.25", "8.50 +- 0.71", "7.50 +- 2.12", "0.50"]
    assert list(table["my_grid"].values())[1:] == expected and code == 3
    summary, deviation = summary.rsplit("; ", 1)
    assert summary == "1 configurations, 5 runs: 2 done, 1 running, 1 stopped, 1 not started; 60.0 % in all"
    assert deviation == "+- is the sample standard deviation over seeds"
    (row,) = csv.DictReader(open(tmp_path / "deep" / "table.csv"))
    wanted = {"configuration": "my_grid", "done": "2", "not_started": "1", "progress": "0.6", "train_return": "6.75"}
    wanted |= {"final_test_return": "7.5", "normalised": "0.5"}
    assert wanted.items() <= row.items() and float(row["final_test_return_deviation"]) == pytest.approx(4.5**0.5)


def status_lines(folder, *arguments):
    return run_sweep(folder, *arguments, "--action", "status").stdout.splitlines()


def test_status_ends_with_the_interquartile_mean_of_each_method(tmp_path):
    grid = {"env_id": ["maze", "heist"], "total_timesteps": [32768]}  # their ranges: 5 to 10, and 3.5 to 10
    grid = write_grid(tmp_path, grid)
    for seed, test in enumerate([5.0, 6.0, 7.0, 10.0]):
        fake_run(tmp_path, seed, 32768, 8.0, [test])
    lines = status_lines(tmp_path, grid, "--num-trials", 4)
    assert lines[-1].startswith("interquartile mean of normalised test returns: 0.30 (95 % interval 0.")  # 0.2 and 0.4
    assert lines[-1].endswith("; 1 game, 4 runs)")
    fake_run(tmp_path, 0, 32768, 8.0, [3.5], env_id="heist")
    assert "0.20 (one seed: no interval; 2 games, 5 runs)" in status_lines(tmp_path, grid, "--num-trials", 4)[-1]
    one_seed = status_lines(tmp_path, write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]}))
    assert one_seed[-1].startswith("1 configurations")


def test_the_bootstrap_is_stratified_and_covers_the_spread_of_seeds():
    """Games that differ are no uncertainty; seeds that differ are."""
    assert (
        sweep.interquartile_mean({"a": [0.0] * 4, "b": [1.0] * 4})
        == "0.50 (95 % interval 0.50 to 0.50; 2 games, 8 runs)"
    )
    values = list(np.random.default_rng(0).normal(0.5, 0.1, 400))
    mean, low, high = map(float, re.findall(r"\d\.\d\d", sweep.interquartile_mean({"a": values})))
    assert low < mean < high and high - low == pytest.approx(4 * 0.1 / 20 * 1.1, abs=0.011)


def test_of_nine_runs_the_middle_five_count():
    """As scipy's trim_mean(x, 0.25) has it."""
    assert sweep.interquartile_mean({"a": [1.0, 0.0, 0.9, 0.0, 0.3, 0.2, 1.0, 0.1, 0.0]}).startswith("0.30 ")


def test_status_puts_the_seeds_of_a_named_configuration_together(tmp_path):
    table, _, _ = rows(tmp_path, write_grid(tmp_path, {"xpid": ["a", "b"], "env_id": ["maze"]}), "--num-trials", 3)
    assert [row["not started"] for row in table.values()] == ["3", "3"] and list(table) == ["xpid=a", "xpid=b"]


HEADER = "iteration,global_step,charts/episodic_return,charts/test_return\n"


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"a,b\n1,2\n", f"{HEADER}1,2,x,3\n", f"{HEADER}1,16384,3\n", HEADER * 2]
    + [f"{HEADER}1,{'2' * 200_000},3,4,5\n", None],
)
def test_a_damaged_table_is_a_row_that_says_so(tmp_path, content):
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    fake_run(tmp_path, 0, 32768, 8.0, [5.0])
    table = fake_run(tmp_path, 1, 32768, 8.0, [5.0]) / "progress.csv"
    table.unlink()
    if content is None:
        table.mkdir()  # it cannot be read
    else:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    cells, summary, code = rows(tmp_path, grid, "--num-trials", 2)
    assert code == 3 and (cells["my_grid"]["done"], cells["my_grid"]["damaged"]) == ("1", "1")
    assert "1 done" in summary and "1 damaged" in summary
    assert "_1: damaged (" in run_sweep(tmp_path, grid, "--num-trials", 2, "--action", "status", "--verbose").stdout


@pytest.mark.parametrize("content", ["", HEADER, f"{HEADER}1,16384,3", None])
def test_a_finished_run_whose_table_was_lost_is_done(tmp_path, content):
    """Its script says so too. It was offered by --only-missing for ever."""
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    table = fake_run(tmp_path, 0, 32768, 8.0, [5.25]) / "progress.csv"
    table.unlink()
    if content is not None:
        table.write_text(content)
    cells, _, code = rows(tmp_path, grid)
    assert code == 0 and (cells["my_grid"]["done"], cells["my_grid"]["final test"]) == ("1", "5.25")
    assert not commands(tmp_path, grid, "--only-missing")


@pytest.mark.parametrize("end", ["\n", "\n\n", " \n", "3,327", "3,32768,9.0,7.0"])
def test_blank_and_unfinished_lines_at_the_end_of_a_table_are_left_out(tmp_path, end):
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [65536]})
    with open(fake_run(tmp_path, 0, 32768, 8.0, [5.0, 6.0], final=False) / "progress.csv", "a") as file:
        file.write(end)
    cells, _, _ = rows(tmp_path, grid)
    assert list(cells["my_grid"].values())[3:] == ["1", "0", "0", "50.0 %", "8.00", "6.00", "-", "-", "-"]


SACCT = r"""#!/bin/sh
echo "7_1|OUT_OF_MEMORY|$PWD|x|sbatch --parsable slurm/generated/x/array_1.sbatch"
echo "7_[2]|CANCELLED by 1000|$PWD|x|sbatch $PWD/slurm/generated/x/array_1.sbatch"
echo "8_1|TIMEOUT|$PWD|x|sbatch --array=1 array_2.sbatch"
echo "9_1|FAILED|/elsewhere|x|sbatch slurm/generated/x/array_2.sbatch"
echo "12|FAILED|$PWD|other|sbatch other.sh a|b"
"""
SQUEUE = r"""#!/bin/sh
echo "8_2-3%4|PENDING (Resources)|$PWD|x|$PWD/slurm/generated/x/array_2.sbatch"
echo "11_1|RUNNING (None)|$PWD|gone|$PWD/slurm/generated/gone/array.sbatch"
"""


def test_verbose_shows_the_state_of_the_last_slurm_task(tmp_path, monkeypatch):
    """In the formats that sacct and squeue document; test_slurm.py asks real ones."""
    grid = write_grid(tmp_path, {"env_id": list(sweep.GAMES[:7]), "total_timesteps": [32768]})
    options = ["--action", "slurm", "--job-name", "x", "--runs-per-task", 2, "--max-array-size", 3]
    assert run_sweep(tmp_path, grid, *options).returncode == 0
    (tmp_path / "bin").mkdir()
    for name, content in (("sacct", SACCT), ("squeue", SQUEUE)):
        write_script(tmp_path / "bin", content, name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    lines = status_lines(tmp_path, grid, "--verbose")
    shown = [line.split("; ", 1)[1] for line in lines if "Slurm task" in line]
    out_of_memory, cancelled = "Slurm task 7_1 OUT_OF_MEMORY; no log", "Slurm task 7_2 CANCELLED by 1000; no log"
    timeout, pending = "Slurm task 8_1 TIMEOUT; no log", "Slurm task 8_2 PENDING (Resources); no log"
    assert shown == [out_of_memory] * 2 + [cancelled] * 2 + [timeout] * 2 + [pending]


def test_verbose_shows_the_newest_log_of_what_is_unfinished_and_its_last_line(tmp_path):
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    fake_run(tmp_path, 0, 32768, 8.0, [5.0])
    _, first, second = commands(tmp_path, grid, "--num-trials", 3, "--python", "/another/python")
    for i, (name, lines) in enumerate(
        {
            "logs/x/1.log": [f"== {first}", "an older log"],
            "slurm/generated/x/logs/7_1.log": ["== host", f"== {first}", "out of memory", "", "== exit code 1"],
            "slurm/generated/x/logs/7_2.log": ["== command 1 writes to slurm/generated/x/logs/7_2.1.log"],
        }.items()
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        os.utime(tmp_path / name, (i, i))
    lines = status_lines(tmp_path, grid, "--num-trials", 3, "--verbose")
    shown = [line for line in lines if "; " in line and not line.startswith("1 configurations")]
    names = xpids([first, second])
    wanted = "slurm/generated/x/logs/7_1.log: out of memory"
    assert shown == [f"{names[0]}: not started; {wanted}", f"{names[1]}: not started; no log"]


# CURVES


def drawn(monkeypatch, folder, *arguments):
    """The figure of --action plot, and its table."""
    figures = []

    def keep(figure, path, **options):
        figures.append(figure)
        savefig(figure, path, **options)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    result = run_sweep(folder, *arguments, "--action", "plot", "--output", "deep/curves.png")
    assert result.returncode == 0, result.stderr
    assert (folder / "deep" / "curves.png").read_bytes().startswith(b"\x89PNG")
    return figures[0], list(csv.DictReader(open(folder / "deep" / "curves.csv")))


def test_curves_have_a_panel_for_each_game_and_are_as_long_as_the_runs(tmp_path, monkeypatch):
    nan = math.nan
    fake_run(tmp_path, 0, 3_000_000, 8.0, [5.0, nan, 6.0])
    fake_run(tmp_path, 1, 2_000_000, 9.0, [5.5, nan], final=False)
    (fake_run(tmp_path, 2, 1, 9.0, [5.5], final=False) / "progress.csv").write_text("damaged")
    fake_run(tmp_path, 0, 1_000_000, 2.0, [nan], final=False, env_id="heist")
    grid = write_grid(tmp_path, {"env_id": ["maze", "heist", "miner"], "total_timesteps": [4_000_000]})
    figure, table = drawn(monkeypatch, tmp_path, grid, "--num-trials", 3)
    maze, heist, miner = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["maze", "heist", "miner"]
    assert all(axes.get_xlim() == (0, 4) and axes.get_xlabel() for axes in figure.axes) and maze.get_ylabel()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training levels", "test levels"]
    curves = [(line.get_linestyle(), line.get_linewidth() > 1, *map(list, line.get_data())) for line in maze.lines]
    assert ("-", True, [1.0, 2.0], [8.5, 8.5]) in curves  # the mean as far as both seeds are
    assert ("-", False, [2.0, 3.0], [8.0, 8.0]) in curves  # then the one that is ahead, thin
    assert ("--", True, [1.0], [5.25]) in curves and ("--", False, [1.0, 3.0], [5.0, 6.0]) in curves
    assert len(maze.collections) == 2 and not heist.collections  # a spread takes two seeds
    assert not miner.lines
    assert [(row["configuration"], row["done"]) for row in table] == [
        ("env_id=maze", "0"), ("env_id=heist", "0"), ("env_id=miner", "0")
    ]  # fmt: skip


def test_many_configurations_are_counted_thin_and_in_columns_and_later_lines_do_not_hide_earlier_ones(
    tmp_path, monkeypatch
):
    for number, most, least in ((2, 2.7, 1.2), (16, 1.4, 0.6)):
        rates = [(i + 1) / 1e4 for i in range(number)]
        grid = {"env_id": ["maze"], "learning_rate": rates, "total_timesteps": [4_000_000]}
        for rate in rates:
            for seed in (0, 1):
                run = fake_run(tmp_path, f"{number}x{rate}x{seed}", 4_000_000, 8.0, [5.0, 6.0])
                name = f"maze-easy-200-ppo-lr{rate}-epoch3-mb8-v0.5-ha0.01_{seed}"
                shutil.rmtree(run.with_name(name), ignore_errors=True)
                run.rename(run.with_name(name))
        figure, _ = drawn(monkeypatch, tmp_path, write_grid(tmp_path, grid), "--num-trials", 2)
        widths = [line.get_linewidth() for line in figure.axes[0].lines if line.get_linestyle() == "-"]
        assert len(widths) == number and widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
        assert most > max(widths) and min(widths) > least
        (legend,) = figure.legends
        title, *lines = legend.get_title().get_text().split("\n")
        assert title == f"{number} configurations" and "beyond the last step that all seeds have reached" in lines[-1]
        assert legend._ncols > 1


def test_reference_runs_are_a_grey_band_behind_the_curves(tmp_path, monkeypatch):
    fake_run(tmp_path, 0, 4_000_000, 8.0, [5.0, 6.0])
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [4_000_000]})
    rows = ["game,levels,steps,run0,run1,run2", "maze,train,1000000,3,1,2", "maze,train,3000000,4,6,5"]
    rows += ["maze,train,5000000,90,90,90", "heist,train,1000000,50,60,70", "maze,test,1000000,0,0.5,0.2"]
    (tmp_path / "other.csv").write_text("\n".join(rows) + "\n")
    figure, _ = drawn(monkeypatch, tmp_path, grid, "--reference", "other.csv")
    (axes,) = figure.axes
    training, test = ({tuple(point) for point in band.get_paths()[0].vertices} for band in axes.collections)
    assert training == {(1.0, 1.0), (1.0, 3.0), (3.0, 4.0), (3.0, 6.0)}
    assert test == {(1.0, 0.0), (1.0, 0.5)}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training levels", "test levels", "reference, lowest to highest run"]


UNREADABLE_REFERENCES = (
    None,
    "game,steps,run0\nmaze,1,2\n",
    "game,levels,steps,run0\nmaze,train,1,x\n",
    "game,levels,steps,run0\nmaze,all,1,2\n",
    "game,levels,steps\nmaze,train,1\n",
)


@pytest.mark.parametrize("content", UNREADABLE_REFERENCES)
def test_a_reference_that_cannot_be_read_is_one_line(tmp_path, content):
    fake_run(tmp_path, 0, 4_000_000, 8.0, [5.0, 6.0])
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [4_000_000]})
    if content is not None:
        (tmp_path / "other.csv").write_text(content)
    result = run_sweep(tmp_path, grid, "--action", "plot", "--reference", "other.csv")
    assert result.returncode == 2 and not list(tmp_path.glob("*.png"))
    assert_one_line(result.stderr, "--reference other.csv", "game, levels (train or test), steps, run0")


def test_curves_of_configurations_share_a_panel_and_long_names_are_wrapped(tmp_path, monkeypatch):
    grid = {"xpid": ["a", "b" * 180], "total_timesteps": [4_000_000], "env_id": ["maze"]}
    grid = write_grid(tmp_path, grid)
    for xpid in ("a", "b" * 180):
        run = fake_run(tmp_path, 0, 4_000_000, 8.0, [5.0, 6.0])
        run.rename(run.with_name(f"xpid{xpid}_0".removeprefix("xpid")))
    figure, table = drawn(monkeypatch, tmp_path, grid)
    (axes,) = figure.axes
    colours = {line.get_color() for line in axes.lines}
    assert len(colours) == 2
    names = [text.get_text() for text in figure.legends[0].get_texts()][2:]
    assert [name.replace("\n", "") for name in names] == ["xpid=a", "xpid=" + "b" * 180]
    assert max(len(line) for name in names for line in name.split("\n")) <= 100
    assert [row["final_test_return"] for row in table] == ["6.0", "6.0"]


def test_without_matplotlib_only_the_curves_are_missing(tmp_path):
    fake_run(tmp_path, 0, 32768, 8.0, [5.0])
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    without = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    without = without.replace("; runpy", f"; sys.argv[0] = {str(PROJECT / 'sweep.py')!r}; runpy")
    for action, code in (("status", 0), ("plot", 1)):
        command = [sys.executable, "-c", without, "--grid-config", grid, "--action", action]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
    assert_one_line(result.stderr, "matplotlib", "pip install -r requirements.txt")


def test_a_picture_of_another_kind_is_refused(tmp_path):
    fake_run(tmp_path, 0, 32768, 8.0, [5.0])
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    result = run_sweep(tmp_path, grid, "--action", "plot", "--output", "curves.csv")
    assert result.returncode == 2 and not (tmp_path / "curves.csv").exists()
    assert_one_line(result.stderr, "--output curves.csv", "png")
    result = run_sweep(tmp_path, "collect", "--action", "plot")
    assert result.returncode == 2
    assert_one_line(result.stderr, "--action plot", "xpid")


@pytest.mark.parametrize("module", [ppo_procgen, collect_procgen])
def test_asking_for_the_status_does_not_get_in_the_way_of_a_run_that_starts(tmp_path, module):
    """Whoever wants the lock waits while status holds it."""
    asking = f"import fcntl, time; file = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(file, fcntl.LOCK_SH)"
    asking = [sys.executable, "-c", f"{asking}; print(flush=True); time.sleep(0.3)"]
    with subprocess.Popen(asking, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert sweep.state_of(tmp_path, done=False, started=True) == "stopped"  # it is no run that holds it
        if module is ppo_procgen:
            args = ppo_procgen.Args(model_saving_dir=str(tmp_path.parent), env_id=tmp_path.name, xpid=".")
            ppo_procgen.Run(args, SimpleNamespace(device=torch.device("cpu")), 1).lock()
        else:
            collect_procgen.lock_folder(tmp_path).release()


def test_the_status_of_a_script_without_runs_is_unknown(tmp_path):
    result = run_sweep(tmp_path, write_grid(tmp_path, {}, write_script(tmp_path)), "--action", "status")
    assert result.returncode == 2
    assert_one_line(result.stderr, "status", "dataset_saving_dir")


def test_the_status_needs_defaults_that_are_not_computed(tmp_path):
    script = PROJECT.joinpath("ppo_procgen.py").read_text().replace("int = 25_000_000", "int = int(25e6)")
    grid = write_grid(tmp_path, {"env_id": ["maze"]}, write_script(tmp_path, script))
    result = run_sweep(tmp_path, grid, "--action", "status")
    assert result.returncode == 2
    assert_one_line(result.stderr, "status", "total_timesteps")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_is_named(tmp_path, monkeypatch, code):
    """Nobody could tell which runs are running, and --only-missing would start them again."""

    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    run = fake_run(tmp_path, 0, 32768, 8.0, [5.0], final=False)
    (run / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    grid = write_grid(tmp_path, {"env_id": ["maze"], "total_timesteps": [32768]})
    result = run_sweep(tmp_path, grid, "--only-missing")
    assert result.returncode == 1 and not result.stdout
    assert_one_line(result.stderr, ".lock", "no flock", os.strerror(code), "another file system")


def test_submitting_without_sbatch_is_refused_before_a_file_is_written(tmp_path, monkeypatch):
    grid = write_grid(tmp_path, {"env_id": ["maze"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_sweep(tmp_path, grid, "--action", "slurm", "--submit")
    assert result.returncode == 2
    assert_one_line(result.stderr, "--submit needs sbatch")
    assert not (tmp_path / "slurm").exists()
