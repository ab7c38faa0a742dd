"""What collect_procgen.py promises, on the real Procgen, from checkpoints trained for a moment."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import assert_one_line, collect
from datasets import NAME, SCRIPT, episodes, metadata, verify
from PIL import Image
from procgen import ProcgenGym3Env
from runs import ROOT, run_main

import collect_procgen

KEYS = {
    "observations": "uint8",
    "actions": "int64",
    "rewards": "float32",
    "dones": "bool",
    "truncations": "bool",
    "log_probs": "float32",
    "level_complete": "bool",
    "level_seed": "int64",
}


# A DATASET ON DISK


def test_the_agent_is_the_same_text_in_both_scripts():
    texts = []
    for script in ("ppo_procgen.py", "collect_procgen.py"):
        text = (ROOT / script).read_text()
        texts.append(text[text.index("def layer_init(") : text.index("\n\n\n", text.index("class Agent("))])
    assert texts[0] == texts[1] and "def get_action_and_value" in texts[0]


def test_names_keys_shapes_and_dtypes(dataset):
    for index, (path, episode) in episodes(dataset).items():
        found, length, level_seed, episode_return = NAME.fullmatch(path.name).groups()
        length = int(length)
        assert {key: str(value.dtype) for key, value in episode.items()} == KEYS
        assert episode["observations"].shape == (length + 1, 3, 64, 64)
        assert episode["actions"].shape == episode["rewards"].shape == (length, 1)
        assert episode["dones"].shape == episode["truncations"].shape == episode["log_probs"].shape == (length,)
        assert episode["level_complete"].shape == episode["level_seed"].shape == ()
        assert int(found) == index and int(level_seed) == episode["level_seed"]
        assert float(episode_return) == pytest.approx(episode["rewards"].sum(), abs=0.005)
        assert episode["dones"][-1] and episode["dones"].sum() == 1
        assert np.array_equal(episode["observations"][-1], episode["observations"][-2])
        assert len(np.unique(episode["observations"][0])) > 10


def test_metadata(dataset, starpilot):
    found, state = metadata(dataset), torch.load(starpilot, weights_only=True)
    returns = [episode["rewards"].sum() for _, episode in episodes(dataset).values()]
    lengths = [len(episode["dones"]) for _, episode in episodes(dataset).values()]
    assert (found["format"], found["complete"], found["episodes"], found["steps"]) == (2, True, 12, sum(lengths))
    assert found["return_mean"] == pytest.approx(np.mean(returns))
    assert found["return_std"] == pytest.approx(np.std(returns))
    assert (found["return_min"], found["return_max"]) == pytest.approx((min(returns), max(returns)))
    for key in ("xpid", "iteration", "global_step", "test_return"):
        assert found[key] == state[key]
    settings = found["env_id"], found["distribution_mode"], found["num_levels"], found["start_level"]
    assert settings == ("starpilot", "easy", 200, 0)
    assert len(found["action_names"]) == 15 and found["action_names"][4] == "nothing"
    assert len(found["checkpoint_sha256"]) == 64 and found["versions"]["procgen"].startswith("procgen")


def test_frames_rewards_and_ends_equal_an_independent_replay(dataset):
    for _, episode in episodes(dataset).values():
        seed = int(episode["level_seed"])
        game = ProcgenGym3Env(1, "starpilot", num_levels=1, start_level=seed, distribution_mode="easy", rand_seed=9)
        for t, action in enumerate(episode["actions"][:, 0]):
            assert np.array_equal(game.observe()[1]["rgb"][0], episode["observations"][t].transpose(1, 2, 0))
            game.act(np.array([action]))
            reward, _, first = game.observe()
            assert reward[0] == episode["rewards"][t, 0] and first[0] == episode["dones"][t]


def test_log_probs_are_those_of_the_policy(dataset, starpilot):
    args, state = collect_procgen.Args(), collect_procgen.load_checkpoint(starpilot)
    agent = collect_procgen.load_agent(args, state, starpilot)
    assert not agent.training  # as a fork's dropout wants it
    for _, episode in list(episodes(dataset).values())[:3]:
        frames = torch.from_numpy(episode["observations"][:-1].transpose(0, 2, 3, 1).copy())
        with torch.no_grad():
            log_probs = agent(frames)[0].log_softmax(1)
        expected = log_probs.gather(1, torch.from_numpy(episode["actions"]))[:, 0]
        np.testing.assert_allclose(episode["log_probs"], expected, atol=1e-4)
        assert len(np.unique(episode["actions"])) > 5


def test_episodes_under_way_are_finished_when_the_budget_ends(starpilot, tmp_path):
    """A budget of one step starts one episode in each game, and every one of them is kept to its end."""
    assert collect(tmp_path / "d", starpilot, "--total-timesteps", "1", num_envs=6).returncode == 0
    lengths = [len(episode["dones"]) for _, episode in episodes(tmp_path / "d").values()]
    assert len(lengths) == 6 and len(set(lengths)) > 1 and metadata(tmp_path / "d")["complete"]


def test_the_budget_is_reached(starpilot, tmp_path):
    assert collect(tmp_path / "d", starpilot, "--total-timesteps", "900").returncode == 0
    steps = metadata(tmp_path / "d")["steps"]
    assert 900 <= steps < 900 + 4 * 1000 and metadata(tmp_path / "d")["episodes"] > 4


def test_a_number_of_episodes_is_a_quota_per_game(starpilot, tmp_path):
    """With seven episodes of three games, the first game plays three, the others two, told by their levels."""
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "7", num_envs=3).returncode == 0
    expected = []
    (segment,) = metadata(tmp_path / "d")["segments"]
    games = ProcgenGym3Env(3, "starpilot", num_levels=200, distribution_mode="easy", rand_seed=segment["seed"])
    for t in range(3):
        expected += [info["level_seed"] for info, quota in zip(games.get_info(), (3, 2, 2)) if t < quota]
        games.act(np.full(3, -1))  # a reset
    assert sorted(episode["level_seed"] for _, episode in episodes(tmp_path / "d").values()) == sorted(expected)
    assert collect(tmp_path / "few", starpilot, "--num-episodes", "2", num_envs=4).returncode == 0
    assert len(episodes(tmp_path / "few")) == 2


def test_the_same_seed_gives_the_same_bytes(dataset, starpilot, tmp_path):
    assert collect(tmp_path / "same", starpilot, "--num-episodes", "12").returncode == 0
    assert collect(tmp_path / "other", starpilot, "--num-episodes", "12", "--seed", "1").returncode == 0
    same, other, ours = episodes(tmp_path / "same"), episodes(tmp_path / "other"), episodes(dataset)
    assert [path.read_bytes() for path, _ in same.values()] == [path.read_bytes() for path, _ in ours.values()]
    assert [path.read_bytes() for path, _ in other.values()] != [path.read_bytes() for path, _ in ours.values()]
    names = [[path.name.split("_")[1:] for path, _ in found.values()] for found in (same, ours)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "env_id, mode",
    [("jumper", "memory"), ("jumper", "hard"), ("coinrun", "easy"), ("maze", "easy"), ("leaper", "easy")],
)
def test_procgen_ends_an_episode_at_the_time_limit(env_id, mode):
    """Where it is not dangerous to do nothing."""
    games = ProcgenGym3Env(2, env_id, distribution_mode=mode, rand_seed=0, num_threads=0)
    lengths, longest = np.zeros(2, int), 0
    for _ in range(2100):
        games.act(np.full(2, 4))
        lengths += 1
        ended = games.observe()[2]
        longest = max(longest, lengths[ended].max(initial=0))
        lengths[ended] = 0
    games.close()
    assert longest == collect_procgen.time_limit(env_id, mode)


def test_a_time_limit_is_a_truncation(trained, tmp_path):
    assert collect(tmp_path / "d", trained("maze"), "--num-episodes", "2", num_envs=2).returncode == 0
    cut = 0
    for _, episode in episodes(tmp_path / "d").values():
        expected = len(episode["dones"]) == 500 and not episode["level_complete"]
        assert episode["truncations"][-1] == expected and not episode["truncations"][:-1].any()
        cut += expected
    assert 0 < cut
    assert verify(tmp_path / "d").returncode == 0


def test_a_preview_is_drawn(dataset):
    """A row for each of eight episodes, from the first to the last frame that the policy saw."""
    sheet = np.asarray(Image.open(dataset / "preview.png"))
    assert sheet.shape == (8 * 64, 8 * 64, 3)
    for row, index in ((0, 1), (7, 12)):
        frames = episodes(dataset)[index][1]["observations"].transpose(0, 2, 3, 1)
        assert np.array_equal(sheet[row * 64 : row * 64 + 64, :64], frames[0])
        assert np.array_equal(sheet[row * 64 : row * 64 + 64, -64:], frames[-1])


def test_default_folder_is_named_after_game_run_and_checkpoint(starpilot, tmp_path):
    options = "--num-episodes 1 --num-envs 1 --no-cuda".split()
    assert run_main(collect_procgen, ["--checkpoint", str(starpilot), *options], tmp_path).returncode == 0
    xpid = torch.load(starpilot, weights_only=True)["xpid"]
    assert len(episodes(tmp_path / "datasets" / "starpilot" / xpid / starpilot.stem)) == 1


# EVALUATION


def test_an_evaluation_plays_what_a_collection_would_and_writes_nothing(dataset, starpilot, tmp_path):
    options = "--no-save-dataset --num-episodes 12 --num-envs 4 --no-cuda".split()
    output = run_main(collect_procgen, ["--checkpoint", str(starpilot), *options], tmp_path).stdout
    found = metadata(dataset)
    assert f"episodes            12, {found['steps']:,} steps" in output
    assert f"mean return         {found['return_mean']:.2f} +-" in output
    assert not list(tmp_path.iterdir())


def test_a_summary_is_that_of_the_episodes(capsys):
    summary = [(10.0, 5, True, 3), (0.0, 15, False, 3), (4.0, 1000, False, 8)]
    collect_procgen.print_summary({"env_id": "coinrun", "distribution_mode": "easy"}, summary, 99.6)
    assert capsys.readouterr().out.splitlines() == [
        "episodes            3, 1,020 steps, 100 steps/s",
        "mean return         4.67 +- 2.91 (standard error)",
        "median, min, max    4.00, 0.00, 10.00",
        "normalised return   -0.067 (0 = a return of 5, 1 = 10)",
        "mean length         340.0",
        "levels completed    33.3 %",
        "levels seen         2",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_job_with_gpus_that_pytorch_cannot_use_is_an_error(starpilot, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    options = ["--checkpoint", str(starpilot), "--num-episodes", "1", "--no-save-dataset"]
    process = run_main(collect_procgen, options, tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "this job has GPUs, but PyTorch can use none of them; --no-cuda")
    assert run_main(collect_procgen, [*options, "--no-cuda"], tmp_path).returncode == 0


def test_levels_can_be_chosen(starpilot, tmp_path):
    options = ("--num-episodes", "6", "--start-level", "200", "--num-levels", "0")
    assert collect(tmp_path / "d", starpilot, *options).returncode == 0
    assert all(episode["level_seed"] >= 200 for _, episode in episodes(tmp_path / "d").values())


def test_a_copy_speaks_under_its_own_name(tmp_path):
    shutil.copy(ROOT / "collect_procgen.py", tmp_path / "collect_mine_procgen.py")
    command = [sys.executable, "collect_mine_procgen.py", "--ratio", "2", "--env-id", "miner"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("collect_mine_procgen.py: error: --ratio")


def test_what_a_fork_of_the_collector_plays_is_not_mixed_with_other_episodes(starpilot, tmp_path, monkeypatch):
    """By its own name, and by the value of an argument of its own."""

    @dataclass
    class Args(collect_procgen.Args):
        temperature: float = 1.0

    folder, plain = tmp_path / "d", collect_procgen.Args
    assert collect(folder, starpilot, "--num-episodes", "2").returncode == 0
    monkeypatch.setattr(collect_procgen, "Args", Args)
    process = collect(folder, starpilot, "--num-episodes", "4", "--temperature", "0.3")
    assert process.returncode == 2
    assert_one_line(process.stderr, "whose --temperature is None, not 0.3")
    monkeypatch.setattr(collect_procgen, "Args", plain)
    monkeypatch.setattr(collect_procgen, "SCRIPT", "collect_mine_procgen.py")
    process = collect(folder, starpilot, "--num-episodes", "4")
    assert process.returncode == 2
    assert_one_line(process.stderr, "whose collector is collect_procgen.py, not collect_mine_procgen.py")
    assert len(episodes(folder)) == 2


def test_nothing_but_episodes_stands_in_their_folder_while_a_collection_runs(starpilot, tmp_path):
    """gen_dgrl's loader lists {dataset}/{env_name} and sorts it by the number after the last underscore."""
    folder = tmp_path / "d"
    command = [*SCRIPT, "--checkpoint", str(starpilot), "--dataset-saving-dir", str(folder), "--num-envs", "4"]
    command += ["--no-cuda", "--num-episodes", "16", "--save-interval", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen = 0
    while process.poll() is None:
        names = [entry.name for entry in os.scandir(folder / "starpilot")] if (folder / "starpilot").is_dir() else []
        sorted(names, key=lambda name: float(name.split("_")[-1].removesuffix(".npz")))
        assert all(NAME.fullmatch(name) for name in names)
        seen += len(names)
        time.sleep(0.001)
    assert process.returncode == 0 and seen and len(episodes(folder)) == 16
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == [".lock", "0_00000000.npz"]
    assert names[-4:] == ["README.md", "metadata.json", "preview.png", "starpilot"]
