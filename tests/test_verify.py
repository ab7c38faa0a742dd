"""What collect_procgen.py --verify finds."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line, collect, wait_for
from datasets import SCRIPT, episodes, metadata, rewrite, verify


def flip_a_bit(folder):
    path, episode = episodes(folder)[3]
    frames = episode["observations"]
    frames[2, 1, 30, 30] ^= 1
    return rewrite(folder, 3, observations=frames), "other observations, first at step 2"


def change_an_action(folder):
    actions = episodes(folder)[4][1]["actions"]
    actions[5:10] = (actions[5:10] + 7) % 15
    return rewrite(folder, 4, actions=actions), "replay"


def change_a_reward(folder):
    rewards = episodes(folder)[5][1]["rewards"]
    rewards[0], rewards[1] = rewards[0] + 1, rewards[1] - 1
    return rewrite(folder, 5, rewards=rewards), "other rewards, first at step 0"


def rename(folder):
    path = episodes(folder)[6][0]
    new = path.with_name(re.sub(r"_(\d+)_(-?\d+\.\d\d)\.npz", r"_\g<1>_99.00.npz", path.name))
    return path.rename(new), "name"


def truncate(folder):
    path = episodes(folder)[7][0]
    path.write_bytes(path.read_bytes()[:-100])
    return path, "damaged"


def drop_a_key(folder):
    path, episode = episodes(folder)[8]
    del episode["log_probs"]
    np.savez_compressed(path, **episode)
    return path, "log_probs"


def test_a_whole_dataset_is_verified_and_every_fault_is_found(dataset, tmp_path):
    process = verify(dataset)
    assert process.returncode == 0 and "12 episodes checked, 0 failed" in process.stdout, process
    assert not multiprocessing.active_children()  # its workers have ended before it
    folder = tmp_path / "d"
    shutil.copytree(dataset, folder)
    faults = [spoil(folder) for spoil in (flip_a_bit, change_an_action, change_a_reward, rename, drop_a_key, truncate)]
    process = verify(folder)
    assert process.returncode == 1
    for path, reason in faults:
        (line,) = [line for line in process.stdout.splitlines() if path.name in line]
        assert reason in line
    assert "12 episodes checked, 6 failed" in process.stdout


def test_a_missing_episode_is_noticed(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    episodes(tmp_path / "d")[2][0].unlink()
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and "11" in process.stdout


def test_a_deleted_episode_and_a_copy_in_its_place_are_noticed(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    (path, _), (other, _) = episodes(tmp_path / "d")[2], episodes(tmp_path / "d")[5]
    path.unlink()
    shutil.copy(other, other.with_name(re.sub(r"_5_", "_13_", other.name, count=1)))
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and "episode 2 is missing" in process.stdout
    other.with_name(re.sub(r"_5_", "_13_", other.name, count=1)).rename(re.sub(r"_5_", "_2_", str(other), count=1))
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and "metadata.json: episodes_sha256 is" in process.stdout


@pytest.mark.parametrize("key", ["return_mean", "steps", "return_max"])
def test_changed_metadata_are_noticed(key, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    found = metadata(tmp_path / "d")
    (tmp_path / "d" / "metadata.json").write_text(json.dumps({**found, key: found[key] + 1}))
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and f"metadata.json: {key} is {found[key] + 1}" in process.stdout


@pytest.mark.parametrize(
    "change",
    [{"env_id": "starpilo"}, {"distribution_mode": "memory"}, {"episodes": None}, {"segments": [{}]}, {"args": 1}],
)
def test_metadata_that_no_script_writes_are_one_line(change, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    found = {key: value for key, value in {**metadata(dataset), **change}.items() if value is not None}
    (tmp_path / "d" / "metadata.json").write_text(json.dumps(found))
    process = verify(tmp_path / "d")
    assert process.returncode == 1
    assert_one_line(process.stderr, "metadata.json cannot be read")


def test_a_dataset_without_its_episodes_does_not_verify(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    for path in (tmp_path / "d").glob("*/*.npz"):
        path.unlink()
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and "episodes is 12 there, 0 by what was played" in process.stdout, process.stderr


def test_a_users_folder_is_left_as_it_is(starpilot, tmp_path):
    (tmp_path / "home").mkdir()
    for name in (".notes.tmp", "x.npz"):
        (tmp_path / "home" / name).write_text("mine")
    process = collect(tmp_path / "home", starpilot)
    assert process.returncode == 2
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [".notes.tmp", "x.npz"]


def test_only_the_culprit_fails_if_a_state_makes_procgen_give_up(trained, tmp_path):
    assert collect(tmp_path / "d", trained("dodgeball"), "--num-episodes", "4").returncode == 0
    state = episodes(tmp_path / "d")[3][1]["initial_state"]
    path = rewrite(tmp_path / "d", 3, initial_state=state[: len(state) // 2])
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and "4 episodes checked, 1 failed" in process.stdout, process.stdout
    assert f"{path}: the replay makes Procgen end its process" in process.stdout


def test_ctrl_c_ends_a_verification_in_a_line(dataset):
    command = [*SCRIPT, "--verify", str(dataset)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: threads_have_children(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGINT" in stdout and "Traceback" not in stderr, stderr


def threads_have_children(pid):
    return any(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/children"))


def test_an_episode_that_is_there_twice_is_noticed(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    path = episodes(tmp_path / "d")[2][0]
    shutil.copy(path, path.with_name("19990101T000000" + path.name[15:]))
    process = verify(tmp_path / "d")
    assert process.returncode == 1 and "same index" in process.stdout


def test_another_build_of_procgen_is_reported_as_such(dataset, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(dataset, folder)
    found = metadata(folder)
    found["versions"]["procgen"] = "procgen-from-elsewhere 0.10.7"
    (folder / "metadata.json").write_text(json.dumps(found))
    flip_a_bit(folder)
    process = verify(folder)
    assert process.returncode == 0 and "procgen-from-elsewhere" in process.stdout
    change_an_action(folder)
    change_a_reward(folder)
    assert verify(folder).returncode == 1


@pytest.mark.parametrize("env_id", ["dodgeball", "miner"])
def test_games_whose_seed_is_not_enough_store_their_initial_state(env_id, trained, tmp_path):
    assert collect(tmp_path / "d", trained(env_id), "--num-episodes", "4").returncode == 0
    for _, episode in episodes(tmp_path / "d").values():
        assert episode["initial_state"].dtype == np.uint8 and len(episode["initial_state"]) > 1000
    process = verify(tmp_path / "d")
    assert process.returncode == 0, process.stdout
