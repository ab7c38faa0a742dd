"""The README names no flag that does not exist, and its programs read what the scripts write."""

import csv
import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from runs import run_main

import collect_procgen
import ppo_procgen
import sweep

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SCRIPTS = {"ppo_procgen.py": ppo_procgen, "collect_procgen.py": collect_procgen, "sweep.py": sweep}
FLAGS = {name: {field.name for field in dataclasses.fields(module.Args)} for name, module in SCRIPTS.items()}
ELSEWHERE = {"--dataset", "--env_name", "--capture-video", "--seed", "--python", "--help", "--device", "--json"}
ELSEWHERE |= {"--logdir", "--flag", "--no-flag", "--nv"}  # other programs', and placeholders


def commands():
    """(script, its words) of every command line of the README, code or text."""
    joined = README.replace("\\\n", " ")
    for line in re.findall(r"python ((?:ppo|collect)_procgen\.py|sweep\.py)([^\n`|]*)", joined):
        yield line[0], shlex.split(line[1], comments=True)


def test_every_command_names_flags_of_its_script():
    found = list(commands())
    assert len(found) > 20
    for script, words in found:
        for word in words:
            if word.startswith("--"):
                name = word.split("=")[0].removeprefix("--").replace("-", "_")
                assert {name, name.removeprefix("no_")} & FLAGS[script], f"{script} has no {word}"


def test_every_flag_in_the_text_exists():
    known = set().union(*FLAGS.values())
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - ELSEWHERE:
        name = flag.removeprefix("--").replace("-", "_")
        assert {name, name.removeprefix("no_")} & known, flag


def block(text):
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if text in code]
    return found


@pytest.fixture(scope="module")
def collected(trained, tmp_path_factory):
    """The same five episodes with frames and as a recording."""
    root = tmp_path_factory.mktemp("readme")
    for name, *more in (("frames",), ("recording", "--no-frames")):
        options = ["--num-episodes", "5", "--num-envs", "4", "--no-cuda", "--dataset-saving-dir", name, *more]
        assert run_main(collect_procgen, ["--checkpoint", str(trained("bossfight")), *options], root).returncode == 0
    return root


def test_its_loaders_read_a_dataset_and_a_recording_alike(collected):
    names = {"folder": collected / "frames"}
    exec(block("def episodes(folder)"), names)
    assert len(names["data"]) == 5 and all(
        end[-1] != x["truncations"][-1] for end, x in zip(names["terminals"], names["data"])
    )
    steps = list(names["replay"](collected / "recording"))
    _, frames, actions, rewards, dones, _ = (np.concatenate(x) for x in zip(*steps))
    assert dones.sum() == 5 and len(actions) == sum(len(x["actions"]) for x in names["data"])
    assert rewards.sum() == pytest.approx(sum(x["rewards"].sum() for x in names["data"]))
    drawn = sorted(frame.transpose(2, 0, 1).tobytes() for frame in frames)
    assert drawn == sorted(frame.tobytes() for x in names["data"] for frame in x["observations"][:-1])
    played, found = {}, []
    for games, _, actions, _, dones, _ in steps:
        for game, action, done in zip(games, actions, dones):
            played.setdefault(game, []).append(int(action))
            found += [played.pop(game)] if done else []
    assert sorted(found) == sorted(x["actions"][:, 0].tolist() for x in names["data"])


def test_a_checkpoint_is_loaded_as_it_says(trained):
    code = block('state = torch.load("models/').replace("models/.../final/model_9.50.pt", str(trained("bossfight")))
    names = {"frames": ppo_procgen.torch.zeros((3, 64, 64, 3), dtype=ppo_procgen.torch.uint8)}
    exec("import torch\nfrom types import SimpleNamespace\nfrom ppo_procgen import Agent\n" + code, names)
    assert names["action"].shape == names["value"].shape == (3,)


def test_its_learning_table_is_that_of_the_reference_runs():
    rows = re.findall(r"^\| (\w+)(, `--bfloat16`)? \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    runs = Path(__file__).resolve().parent / "reference_runs"
    assert len(rows) == len(list(runs.glob("*.csv")))
    for game, flag, *numbers in rows:
        (path,) = runs.glob(f"{game}-*{'-bfloat16True' if flag else '0.01'}_0.csv")
        with open(path) as file:
            last = list(csv.DictReader(file))[-1]
        returns = [f"{float(last[name]):.2f}" for name in ("charts/episodic_return", "charts/test_return")]
        assert numbers == [f"{int(last['global_step']):,}", *returns]
