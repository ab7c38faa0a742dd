"""The README names no flag that does not exist, and its programs read what the scripts write."""

import csv
import dataclasses
import re
import shlex

import numpy as np
import pytest
import recipes
from procgen import ProcgenGym3Env
from runs import ROOT, run_main

import collect_procgen
import ppo_procgen
import sweep

README = "".join((ROOT / folder / "README.md").read_text() for folder in (".", "slurm", "tests"))
SCRIPTS = {"ppo_procgen.py": ppo_procgen, "collect_procgen.py": collect_procgen, "sweep.py": sweep}
FLAGS = {name: {field.name for field in dataclasses.fields(module.Args)} for name, module in SCRIPTS.items()}
ELSEWHERE = {"--dataset", "--env_name", "--capture-video", "--seed", "--python", "--help", "--device", "--json"}
ELSEWHERE |= {
    "--dataset_size",
    "--logdir",
    "--flag",
    "--no-flag",
    "--nv",
    "--repo-type",
}  # other programs', and placeholders


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
    names = {}
    exec(block("def episodes(folder").replace("datasets/first", str(collected / "frames")), names)
    data = list(names["episodes"](collected / "frames"))
    assert len(data) == 5
    assert all(end[-1] != x["truncations"][-1] for end, x in zip(recipes.terminals_of(data), data))
    from_files = {(int(x["level_seed"]), len(x["actions"])): x for x in data}
    played = {(int(x["level_seed"]), len(x["actions"])): x for x in recipes.draw_episodes(collected / "recording")}
    assert played.keys() == from_files.keys() and len(played) == 5
    for key, episode in played.items():
        assert episode.keys() == from_files[key].keys()
        assert all(np.array_equal(array, from_files[key][name]) for name, array in episode.items())


def test_its_windows_lie_within_episodes_of_the_levels_that_are_asked_for(collected):
    names = {}
    exec(block("def episodes(folder").replace("datasets/first", str(collected / "frames")), names)
    data = list(names["episodes"](collected / "frames"))
    some = sorted(int(x["level_seed"]) for x in data)[1:4]
    chosen = [x for x in data if x["level_seed"] in some]
    found = list(names["windows"](names["episodes"](collected / "frames", some), length=16))
    assert len(found) == sum(len(x["actions"]) // 16 for x in chosen) > 0
    starts = {x["observations"][t].tobytes(): (x, t) for x in chosen for t in range(0, len(x["actions"]), 16)}
    for window in found:
        episode, t = starts[window["frames"][0].transpose(2, 0, 1).tobytes()]
        assert np.array_equal(window["frames"].transpose(0, 3, 1, 2), episode["observations"][t : t + 16])
        assert np.array_equal(window["rewards"], episode["rewards"][t : t + 16, 0])
    assert [set(names[part]) for part in ("TRAIN", "VALIDATION")] == [set(range(200)), set(range(200, 250))]


# THE ACTIONS

ACTION_ROWS = re.findall(r"^\| ([\w, ]+) \| ((?:\[[\d ]+\] ?)+) \|", README, re.MULTILINE)
ACTION_GROUPS = {game: groups for games, groups in ACTION_ROWS for game in games.split(", ")}


@pytest.mark.parametrize("env_id", collect_procgen.ENV_NAMES)
def test_its_table_of_actions_is_true(env_id):
    """From the same state, the actions that it calls the same give the same; the others are not always the same."""
    groups = [{int(x) for x in group.split()} for group in re.findall(r"\[([\d ]+)\]", ACTION_GROUPS[env_id])]
    assert sorted(action for group in groups for action in group) == list(range(15))
    same = actions_that_are_the_same(env_id, num_states=25)
    for group in groups:
        assert all(same[i, j] for i in group for j in group)
    assert not all(same[min(groups[0]), min(group)] for group in groups[1:])


def actions_that_are_the_same(env_id, num_states):
    """(15, 15) bool: whether two actions gave the same frames, rewards and ends, at once and in the next four steps."""
    world, tries = (
        ProcgenGym3Env(num, env_id, distribution_mode="easy", rand_seed=0, num_threads=0) for num in (1, 15)
    )
    rng = np.random.default_rng(0)
    same = np.ones((15, 15), bool)
    for _ in range(num_states):
        for _ in range(rng.integers(1, 40)):
            world.act(np.array([7 if rng.random() < 0.5 else rng.integers(15)], np.int32))
        tries.set_state(world.get_state() * 15)
        actions = np.arange(15, dtype=np.int32)
        for _ in range(5):
            tries.act(actions)
            rewards, frames, first = tries.observe()
            seen = [(frame.tobytes(), reward, end) for frame, reward, end in zip(frames["rgb"], rewards, first)]
            same &= np.array([[one == other for other in seen] for one in seen])
            actions = np.full(15, 4, np.int32)
    world.close()
    tries.close()
    return same


def test_a_checkpoint_is_loaded_as_it_says(trained):
    code = block('state = torch.load("models/').replace("models/.../final/model_9.50.pt", str(trained("bossfight")))
    names = {"frames": ppo_procgen.torch.zeros((3, 64, 64, 3), dtype=ppo_procgen.torch.uint8)}
    exec(code, names)
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
