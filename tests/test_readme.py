"""The README names no flag that does not exist, and its programs read what the scripts write."""

import csv
import dataclasses
import re
import shlex

import numpy as np
import pytest
from runs import ROOT, run_main

import collect_procgen
import ppo_procgen
import sweep

README = (ROOT / "README.md").read_text()
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


RUNS = ROOT / "tests" / "reference_runs"
PLUS_MINUS = r"([\d.]+) \+- ([\d.]+)"
# Game; training return at 0.5 and 1 million steps, each beside the published ones; means over 1,000 episodes.
ROW = rf"^\| (\w+) \| ([\d.]+) \| ([\d., ]+) \| ([\d.]+) \| ([\d., ]+) \| {PLUS_MINUS} \| {PLUS_MINUS} \|"
LEARNED = re.findall(ROW, README, re.MULTILINE)


def test_its_learning_table_is_that_of_the_reference_runs():
    with open(RUNS / "published.csv") as file:
        published = {(row["game"], int(row["steps"])): row for row in csv.DictReader(file)}
    assert len(LEARNED) == len(list(RUNS.glob("*_0.csv"))) == len(list(RUNS.glob("*.pt"))) >= 3
    for game, *numbers in LEARNED:
        (path,) = RUNS.glob(f"{game}-*_0.csv")
        with open(path) as file:
            curve = [(int(row["global_step"]), float(row["charts/episodic_return"])) for row in csv.DictReader(file)]
        expected = []
        for steps in (500_000, 1_000_000):
            returns = [value for step, value in curve if abs(step - steps) <= 50_000]
            expected.append(f"{sum(returns) / len(returns):.2f}")
            expected.append(", ".join(published[game, steps][run] for run in ("run0", "run1", "run2")))
        assert numbers[:4] == expected


@pytest.mark.parametrize("row", LEARNED, ids=lambda row: row[0])
def test_an_agent_in_the_repository_plays_as_well_as_the_readme_says(row, tmp_path):
    (path,) = RUNS.glob(f"{row[0]}-*.pt")
    assert path.stat().st_size < 2_600_000
    options = ["--checkpoint", str(path), "--num-episodes", "64", "--num-envs", "64", "--no-save-dataset", "--no-cuda"]
    process = run_main(collect_procgen, options, tmp_path)
    assert process.returncode == 0, process.stderr
    found = re.search(rf"^mean return +{PLUS_MINUS}", process.stdout, re.MULTILINE)
    mean, error = map(float, found.groups())
    wanted, wanted_error = map(float, row[5:7])
    assert abs(mean - wanted) < 4 * (error**2 + wanted_error**2) ** 0.5


def test_the_first_command_of_the_start_section_works_and_ci_runs_the_second(tmp_path):
    """Their first two parts, the installation, are the same: .ci/run runs the second command as it stands."""
    commands = re.findall(r"^    (python3 -m venv .*)$", README, re.M)
    parts = [command.split(" && ") for command in commands]
    assert len(commands) == 2 and parts[0][:2] == parts[1][:2]
    assert ".venv/bin/python -m pytest tests" == parts[1][2]
    python, script, *words = shlex.split(parts[0][2])
    assert (python, script) == (".venv/bin/python", "ppo_procgen.py")
    smallest = ["--num-envs", "4", "--num-steps", "16", "--total-timesteps", "64", "--num-minibatches", "2"]
    process = run_main(ppo_procgen, [*words, *smallest, "--no-cuda"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert len(list(tmp_path.glob("models/starpilot/*/final/*.pt"))) == 1
