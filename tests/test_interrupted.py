"""Collections that were stopped, killed, extended or met a full disk end like those that were not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor

import check_resume
import numpy as np
import pytest
import torch
from conftest import assert_one_line, collect, wait_for
from datasets import SCRIPT, contents, die_within, episodes, metadata, verify

import collect_procgen
import ppo_procgen
from collect_procgen import Agent


@pytest.mark.parametrize("frames", ["--frames", "--no-frames"])
@pytest.mark.parametrize("env_id", ["starpilot", "dodgeball"])
def test_a_collection_that_was_killed_again_and_again_ends_like_one_that_was_not(
    env_id, frames, trained, tmp_path, monkeypatch
):
    options = [trained(env_id), "--num-episodes", "4", frames]
    assert collect(tmp_path / "whole", *options).returncode == 0
    moments = (("act", 1, "60"), ("replace", 1, "60"), ("act", 150, "60"))  # nothing is saved but the start,
    moments += (("act", 60, "0.05"), ("replace", 9, "0.05"), ("act", 150, "0.05"))  # and something at every moment
    for name, call, interval in moments:
        command = [tmp_path / "killed", *options, "--save-interval", interval]
        if die_within(monkeypatch, name, call, collect, *command) is None:
            assert metadata_or_nothing(tmp_path / "killed").get("complete") is not True
        for path in (tmp_path / "killed").glob("*/*.npz"):  # as if it had been killed a while ago
            path.rename(path.with_name("20200101T000000" + path.name[15:]))
    assert collect(tmp_path / "killed", *options).returncode == 0
    assert metadata(tmp_path / "killed")["episodes_sha256"] == metadata(tmp_path / "whole")["episodes_sha256"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert verify(tmp_path / "killed").returncode == 0  # which notices two files of one episode
    assert not list((tmp_path / "killed").glob(".*.tmp")) and not (tmp_path / "killed" / "state.pt").exists()


def metadata_or_nothing(folder):
    return metadata(folder) if (folder / "metadata.json").exists() else {}


def test_a_collection_that_was_stopped_by_any_signal_ends_like_one_that_was_not(dataset, starpilot, tmp_path):
    options = ["--num-episodes", "12", "--num-envs", "4", "--no-cuda", "--save-interval", "0.2"]

    def stop(signum):
        folder = tmp_path / signum.name
        command = [SCRIPT[1], "--checkpoint", str(starpilot), "--dataset-saving-dir", str(folder), *options]
        return folder, check_resume.launch(command, tmp_path, "act", 600, signum).code

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGKILL)
    with ThreadPoolExecutor(2) as pool:
        stopped = dict(zip(signals, pool.map(stop, signals)))
    for signum, (folder, code) in stopped.items():
        assert code == (-signum if signum == signal.SIGKILL else 75)
        assert 3 <= len(episodes(folder)) < 12  # opens every file
        assert metadata(folder)["complete"] is False
        assert collect(folder, starpilot, *options).returncode == 0
        assert contents(folder) == contents(dataset)
        assert metadata(folder)["episodes_sha256"] == metadata(dataset)["episodes_sha256"]


def test_an_unfinished_dataset_is_finished_by_the_command_that_began_it(starpilot, tmp_path, monkeypatch):
    options = [tmp_path / "d", starpilot, "--num-episodes", "9"]
    assert die_within(monkeypatch, "act", 80, collect, *options) is None
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "20")
    assert process.returncode == 2
    assert_one_line(process.stderr, "was begun with --num-episodes 9, not 20", "unfinished")
    assert collect(*options).returncode == 0


def test_a_complete_dataset_needs_no_disk_that_can_be_written(dataset, starpilot, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "d")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("something is opened"))  # root may write everywhere
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("a folder is made"))
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "12")
    assert process.returncode == 0 and "is complete with 12 episodes" in process.stdout


def test_a_complete_dataset_is_left_alone_and_can_be_extended(dataset, starpilot, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(dataset, folder)
    names = sorted(path.name for path in folder.rglob("*"))
    process = collect(folder, starpilot, "--num-episodes", "12")
    assert process.returncode == 0 and "is complete" in process.stdout
    assert sorted(path.name for path in folder.rglob("*")) == names
    process = collect(folder, starpilot, "--num-episodes", "15")
    assert process.returncode == 0 and "had 12 episodes; these are new:\nepisodes            3, " in process.stdout
    assert sorted(episodes(folder)) == list(range(1, 16)) and len(metadata(folder)["segments"]) == 2
    assert verify(folder).returncode == 0


def test_a_dataset_of_a_gpu_stays_one_when_a_cpu_extends_it(dataset, starpilot, tmp_path):
    """Its log-probabilities are less precise, which --verify --checkpoint has to know."""
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / "metadata.json").write_text(json.dumps({**metadata(dataset), "device": "cuda"}))
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "13").returncode == 0
    assert metadata(tmp_path / "d")["device"] == "cuda" and metadata(dataset)["device"] == "cpu"


def test_games_and_actions_of_an_extension_have_fresh_seeds(starpilot, tmp_path, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    for number, *more in (("2",), ("4",), ("6", "--seed", "5")):
        options = ["--num-episodes", number, "--no-frames", *more]
        assert collect(tmp_path / "r", starpilot, *options, num_envs=2).returncode == 0
    streams = [stream for segment in metadata(tmp_path / "r")["segments"] for stream in segment["streams"]]
    assert len(seeds) == 3 and len(streams) == 6
    assert len({*seeds, *(stream["seed"] for stream in streams)}) == 9


@pytest.mark.parametrize("change", ["--num-levels=100", "--start-level=5", "--distribution-mode=hard", "checkpoint"])
def test_another_dataset_is_refused(change, dataset, starpilot, tmp_path):
    if change == "checkpoint":
        other = tmp_path / "other.pt"
        torch.save({**torch.load(starpilot, weights_only=True), "iteration": 99}, other)
        process = collect(dataset, other, "--num-episodes", "20")
    else:
        process = collect(dataset, starpilot, "--num-episodes", "20", change)
    assert process.returncode == 2
    assert_one_line(process.stderr, str(dataset))
    assert len(episodes(dataset)) == 12


def test_a_dataset_drawn_by_another_build_is_not_continued(dataset, starpilot, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    found = metadata(tmp_path / "d")
    found["versions"]["procgen"] = "procgen-from-elsewhere 0.10.7"
    (tmp_path / "d" / "metadata.json").write_text(json.dumps(found))
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "20")
    assert process.returncode == 2
    assert_one_line(process.stderr, "procgen-from-elsewhere")
    assert metadata(tmp_path / "d") == found


def test_two_collections_into_one_folder(starpilot, tmp_path):
    folder = tmp_path / "d"
    command = [*SCRIPT, "--checkpoint", str(starpilot), "--dataset-saving-dir", str(folder), "--no-cuda"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / "metadata.json").exists(), first)
    second = collect(folder, starpilot, num_envs=64)
    first.kill()
    first.wait()
    assert second.returncode == 1
    assert_one_line(second.stderr, str(folder), "in use")


@pytest.mark.parametrize("total", [300, 600])  # the budget ends with a step of the second half, and of the first
def test_when_the_state_is_saved_has_no_part_in_the_episodes(total, starpilot, tmp_path):
    """A save reads what one half's step gave before the other half acts: at the budget's end it must not matter."""
    for name, interval in (("often", "0.000000001"), ("once", "60")):
        options = ["--total-timesteps", str(total), "--save-interval", interval, "--no-frames"]
        assert collect(tmp_path / name, starpilot, *options, num_envs=16).returncode == 0
    assert metadata(tmp_path / "often")["episodes_sha256"] == metadata(tmp_path / "once")["episodes_sha256"]


def test_the_budget_counts_what_was_played_when_a_half_acted_last():
    half = types.SimpleNamespace(observed=np.zeros((2, 64, 64, 3), np.uint8), games=types.SimpleNamespace(num=2))
    player = collect_procgen.Policy(Agent(ppo_procgen.Args()), [np.full(2, 9), np.full(2, 9)], 6, torch.device("cpu"))
    for number in (0, 1, 0):  # six steps: the budget is reached
        player.choose(half, number)
    player.learn(half, 1, [{"game": 0}])  # this half had acted when four were taken
    player.learn(half, 0, [{"game": 1}])
    assert [quota.tolist() for quota in player.quota] == [[9, 0], [8, 9]]


def test_a_full_disk_is_one_line_and_no_partial_file(starpilot, tmp_path):
    limit, (soft, hard) = 8_000, resource.getrlimit(resource.RLIMIT_FSIZE)
    # Bytes of a file: as on a full disk, the system call fails in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        process = collect(tmp_path / "d", starpilot, "--num-episodes", "12")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert process.returncode == 1
    assert_one_line(process.stderr, str(tmp_path / "d"), "could not be written")
    assert metadata(tmp_path / "d")["complete"] is False
    assert all(path.stat().st_size < limit for path in (tmp_path / "d").glob("*/*.npz"))
    assert not list((tmp_path / "d").glob(".*.tmp"))
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "12").returncode == 0
    assert verify(tmp_path / "d").returncode == 0
