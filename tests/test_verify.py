"""What collect_procgen.py --verify finds: it blames what was changed, and nothing else."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line, wait_for
from datasets import SCRIPT, add_one_at, change_chunk, contents, episodes, metadata, rewrite, rows, verify
from runs import run_main

import collect_procgen
import ppo_procgen


@pytest.fixture
def copied(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    return tmp_path / "d"


@pytest.fixture
def recorded(recording, tmp_path):
    shutil.copytree(recording, tmp_path / "r")
    return tmp_path / "r"


def test_a_whole_dataset_is_verified(dataset, recording, starpilot):
    for folder, drawn in ((dataset, 12), (recording, 0)):
        process = verify(folder)
        assert process.returncode == 0, process.stdout
        assert f"12 episodes, {drawn} of them drawn: all played again and equal, bit for bit" in process.stdout
        assert "with --checkpoint the log_probs and the origin are checked, too" in process.stdout
        process = verify(folder, "--checkpoint", str(starpilot))
        assert process.returncode == 0 and f"all log_probs are those of {starpilot}" in process.stdout


# EPISODES


def flip_a_bit(folder):
    frames = episodes(folder)[3][1]["observations"]
    frames[2, 1, 30, 30] ^= 1
    return rewrite(folder, 3, observations=frames), ": observations is not"


def change_an_action(folder):
    actions = episodes(folder)[4][1]["actions"]
    actions[5:10] = (actions[5:10] + 7) % 15
    return rewrite(folder, 4, actions=actions), ": actions is not"


def change_a_reward(folder):
    rewards = episodes(folder)[5][1]["rewards"]
    rewards[0], rewards[1] = rewards[0] + 1, rewards[1] - 1
    return rewrite(folder, 5, rewards=rewards), ": rewards is not"


def change_a_type(folder):
    return rewrite(folder, 6, log_probs=episodes(folder)[6][1]["log_probs"][:, None]), ": log_probs is not"


def truncate(folder):
    path = episodes(folder)[7][0]
    path.write_bytes(path.read_bytes()[:-100])
    return path, "damaged"


def drop_a_key(folder):
    path, episode = episodes(folder)[8]
    del episode["log_probs"]
    np.savez_compressed(path, **episode)
    return path, ": log_probs is not"


def rename(folder):
    path = episodes(folder)[9][0]
    new = path.with_name(re.sub(r"_(\d+)_(-?\d+\.\d\d)\.npz", r"_\g<1>_99.00.npz", path.name))
    return path.rename(new), "by the recording it is 9_"


def swap(folder):
    """The content of one episode under the name of another."""
    path, other = episodes(folder)[10][0], episodes(folder)[11][0]
    shutil.copy(other, path)
    return path, "level_seed, log_probs, observations, rewards"


EPISODE_FAULTS = [flip_a_bit, change_an_action, change_a_reward, change_a_type, drop_a_key, rename, swap, truncate]


def test_every_fault_in_an_episode_is_found_and_nothing_else(copied):
    faults = [spoil(copied) for spoil in EPISODE_FAULTS]
    process = verify(copied)
    assert process.returncode == 1
    for path, reason in faults:
        (line,) = [line for line in process.stdout.splitlines() if path.name in line]
        assert reason in line
    assert f"12 episodes, 12 of them drawn: {len(faults)} faults" in process.stdout


def test_an_episode_that_another_program_packed_is_the_same_episode(copied):
    rewrite(copied, 3)
    process = verify(copied)
    assert process.returncode == 0, process.stdout


def test_a_missing_episode_is_noticed(copied):
    episodes(copied)[2][0].unlink()
    process = verify(copied)
    assert process.returncode == 1 and "1 episodes are not drawn, the first is number 2" in process.stdout
    assert "1 faults" in process.stdout


def test_a_copy_in_the_place_of_a_deleted_episode_is_noticed(copied):
    (path, _), (other, _) = episodes(copied)[2], episodes(copied)[5]
    path.unlink()
    shutil.copy(other, other.with_name(re.sub(r"_5_", "_2_", other.name, count=1)))
    process = verify(copied)
    assert process.returncode == 1 and "by the recording it is 2_" in process.stdout


def test_strangers_among_the_episodes_are_noticed(copied):
    path = episodes(copied)[2][0]
    shutil.copy(path, path.with_name("19990101T000000" + path.name[15:]))
    shutil.copy(path, path.with_name("19990101T000000_13_5_5_0.00.npz"))
    (path.parent / "notes").write_text("mine")
    (copied / "miner").mkdir()
    shutil.copy(path, copied / "miner")
    process = verify(copied)
    assert process.returncode == 1 and "4 faults" in process.stdout
    for reason in (
        "is there twice",
        "_13_5_5_0.00.npz is not one of the 12",
        "notes is not one of",
        "outside starpilot/",
    ):
        assert reason in process.stdout


def test_episodes_that_were_moved_elsewhere_cannot_be_verified(dataset, tmp_path):
    shutil.copytree(dataset / "starpilot", tmp_path / "moved")
    process = verify(tmp_path / "moved")
    assert process.returncode == 1
    assert_one_line(process.stderr, "without its recording nothing can be played again")


def test_the_folder_of_the_episodes_is_not_the_dataset(dataset):
    process = verify(dataset / "starpilot")
    assert process.returncode == 1
    assert_one_line(process.stderr, f"give the folder above, {dataset}")


# METADATA


def change_metadata(folder, **changes):
    found = {**metadata(folder), **changes}
    (folder / "metadata.json").write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("key", ["return_mean", "return_std", "steps", "return_max", "episodes"])
def test_changed_counts_are_noticed(key, copied):
    found = change_metadata(copied, **{key: metadata(copied)[key] + 1})
    process = verify(copied)
    assert process.returncode == 1 and f"metadata.json: {key} is {found[key]}" in process.stdout
    assert "1 faults" in process.stdout


@pytest.mark.parametrize("changes", [{"num_levels": 0}, {"start_level": 3}, {"distribution_mode": "hard"}])
@pytest.mark.parametrize("folder", ["copied", "recorded"])
def test_changed_levels_are_noticed(changes, folder, request):
    """Also if they are changed in the arguments as well: they decide what is played."""
    folder = request.getfixturevalue(folder)
    change_metadata(folder, **changes)
    process = verify(folder)
    assert process.returncode == 1
    assert_one_line(process.stderr, f"{next(iter(changes))} (args has another)")
    change_metadata(folder, **changes, args={**metadata(folder)["args"], **changes})
    process = verify(folder)
    assert process.returncode == 1
    assert_one_line(process.stderr, "played again, it gives other")


@pytest.mark.parametrize("key", ["xpid", "iteration", "global_step", "test_return", "script_sha256"])
def test_another_origin_than_the_checkpoints_is_noticed(key, copied, starpilot):
    change_metadata(copied, **{key: "x" if "s" in key[:2] or key == "xpid" else 3})
    process = verify(copied, "--checkpoint", str(starpilot))
    assert process.returncode == 1
    assert_one_line(process.stderr, f"metadata.json does not fit the checkpoint: {key} is")


def segment_of(folder, **changes):
    (segment,) = metadata(folder)["segments"]
    return {"segments": [{**segment, **changes}]}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: segment_of(f, seed=5), "other checksums than recorded, first at step 0"),
        (lambda f: segment_of(f, rows=5), "segment 0 has"),
        (lambda f: segment_of(f, num_episodes=13), "step"),
        (lambda f: segment_of(f, num_episodes=11), "step"),
        (lambda f: segment_of(f, num_envs=8), "is damaged"),
        (lambda f: {"segments": []}, "does not belong to this recording"),
    ],
)
def test_changed_segments_are_noticed(change, message, recorded):
    change_metadata(recorded, **change(recorded))
    process = verify(recorded)
    assert process.returncode == 1 and message in process.stdout + process.stderr


def test_steps_after_the_end_are_noticed(recorded):
    length = len(rows(recorded)["actions"])
    change_chunk(recorded, **dict.fromkeys(collect_procgen.ROW, lambda array: np.concatenate([array, array[-1:]])))
    change_chunk(recorded, actions=pause(length, slice(None)))
    change_metadata(recorded, **segment_of(recorded, rows=length + 1))
    process = verify(recorded)
    assert process.returncode == 1
    assert_one_line(process.stderr, f"step {length} of the recording does not play the environments that it should")


def test_a_recording_that_was_cut_short_with_its_metadata_is_noticed(recorded):
    change_chunk(recorded, **dict.fromkeys(collect_procgen.ROW, lambda array: array[:60]))
    counted = ("episodes", "steps", "return_mean", "return_std", "return_min", "return_max", "log_probs_sha256")
    found = {key: value for key, value in metadata(recorded).items() if key not in counted}
    (recorded / "metadata.json").write_text(json.dumps({**found, **segment_of(recorded, rows=60)}))
    process = verify(recorded)
    assert process.returncode == 1
    assert "segment 0 ends before its max_steps or num_episodes" in process.stdout and "1 faults" in process.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"env_id": "starpilo"},
        {"env_id": ["starpilot"]},
        {"distribution_mode": "memory"},
        {"start_level": -5},
        {"num_levels": 2**31},
        {"segments": [{}]},
        {"segments": [{"seed": 1, "num_envs": -3, "rows": 1}]},
        {"segments": [{"seed": 1, "num_envs": 10**9, "rows": 1}]},
        {"segments": [{"seed": -1, "num_envs": 4, "rows": 1}]},
        {"segments": [{"seed": 1, "num_envs": True, "rows": 1}]},
        {"segments": [{"seed": 1, "num_envs": 4, "rows": 1, "max_steps": 0.5}]},
        {"segments": {"seed": 1}},
        {"args": 1},
        {"versions": None},
        {"complete": 1},
        {"format": 3},
        {"args": {"epsilon": "x"}},
    ],
)
def test_metadata_that_no_script_writes_are_one_line(change, copied):
    change_metadata(copied, **change)
    process = verify(copied)
    assert process.returncode == 1
    assert_one_line(process.stderr, "metadata.json cannot be read")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{", "\x00"])
def test_metadata_that_are_no_metadata_are_one_line(text, copied):
    (copied / "metadata.json").write_text(text)
    process = verify(copied)
    assert process.returncode == 1
    assert_one_line(process.stderr, "metadata.json cannot be read")


def test_an_unfinished_dataset_is_exit_code_1(copied):
    change_metadata(copied, complete=False)
    process = verify(copied)
    assert process.returncode == 1 and "but it is unfinished" in process.stdout and "faults" not in process.stdout


# RECORDINGS


def pause(row, env):
    def change(actions):
        actions[row, env] = 255
        return actions

    return change


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: change_chunk(r, rewards=add_one_at(7)), "other rewards than recorded, first at step 7"),
        (lambda r: change_chunk(r, checksums=add_one_at(3)), "other checksums than recorded, first at step 3"),
        (lambda r: change_chunk(r, dones=np.logical_not), "than recorded, first at step 0"),
        (lambda r: change_chunk(r, actions=lambda x: (x + 1) % 15), "step"),
        (lambda r: change_chunk(r, actions=lambda x: x + 20), "0_00000000.npz is damaged"),
        (lambda r: change_chunk(r, actions=pause(4, 2)), "step 4 of the recording does not play the environments"),
        (lambda r: change_chunk(r, actions=lambda x: x.astype(np.int64)), "0_00000000.npz is damaged"),
        (lambda r: change_chunk(r, rewards=lambda x: x.astype(np.float64)), "0_00000000.npz is damaged"),
        (lambda r: change_chunk(r, log_probs=lambda x: x[:, :, None]), "0_00000000.npz is damaged"),
        (lambda r: change_chunk(r, log_probs=lambda x: x * np.float32(np.nan)), "0_00000000.npz is damaged"),
        (lambda r: add_a_key(r), "0_00000000.npz is damaged"),
        (lambda r: change_chunk(r, log_probs=np.zeros_like), "metadata.json: log_probs_sha256 is"),
        (lambda r: (r / "0_00000000.npz").write_bytes(b"no chunk"), "0_00000000.npz is damaged"),
        (lambda r: (r / "0_00000000.npz").unlink(), "segment 0 has 0 steps"),
        (lambda r: shutil.copy(r / "0_00000000.npz", r / "0_00000009.npz"), "0_00000009.npz does not follow"),
        (lambda r: shutil.copy(r / "0_00000000.npz", r / "1_00000000.npz"), "does not belong to this recording"),
        (lambda r: shutil.copy(r / "0_00000000.npz", r / "0_0_copy.npz"), "does not belong to this recording"),
    ],
)
def test_a_spoilt_recording_does_not_verify(spoil, message, recorded):
    spoil(recorded)
    process = verify(recorded)
    assert process.returncode == 1 and message in process.stdout + process.stderr, process
    assert "Traceback" not in process.stderr


def add_a_key(folder):
    path = folder / "0_00000000.npz"
    np.savez_compressed(path, **np.load(path), more=np.zeros(3))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The recording of three iterations of a training, in as many files."""
    folder = tmp_path_factory.mktemp("rollouts")
    options = "--env-id leaper --num-envs 2 --num-steps 128 --num-minibatches 2 --update-epochs 1 --num-eval-episodes 1"
    options += " --log-interval 1 --save-dataset --no-cuda --total-timesteps 768"
    assert run_main(ppo_procgen, options.split(), folder).returncode == 0
    return next(folder.glob("models/leaper/*/rollouts"))


@pytest.mark.parametrize(
    "number, message", [(0, "does not follow"), (1, "does not follow"), (2, "has 256 steps, not 384")]
)
def test_the_recording_of_a_training_that_lacks_a_file_does_not_verify(number, message, rollouts, tmp_path):
    shutil.copytree(rollouts, tmp_path / "r")
    sorted((tmp_path / "r").glob("*.npz"))[number].unlink()
    process = verify(tmp_path / "r")
    assert process.returncode == 1
    assert_one_line(process.stderr, message)


def test_changed_log_probs_of_a_training_are_noticed(rollouts, tmp_path):
    shutil.copytree(rollouts, tmp_path / "r")
    assert verify(tmp_path / "r").returncode == 0
    change_chunk(tmp_path / "r", log_probs=lambda x: x - 1)
    process = verify(tmp_path / "r")
    assert process.returncode == 1 and "metadata.json: log_probs_sha256 is" in process.stdout
    change_chunk(tmp_path / "r", log_probs=lambda x: x + 1, actions=pause(9, 1))
    process = verify(tmp_path / "r")
    assert process.returncode == 1
    assert_one_line(process.stderr, "step 9 of the recording does not play the environments that it should")


def test_changed_log_probs_are_those_of_another_network(recorded, starpilot):
    change_chunk(recorded, log_probs=lambda x: np.where(x < 0, x - np.float32(0.01), x))
    process = verify(recorded, "--checkpoint", str(starpilot))
    assert process.returncode == 1 and "log_probs are up to 0.01 from those of the policy" in process.stdout


def test_another_build_of_procgen_is_reported_as_such(copied):
    found = metadata(copied)
    change_metadata(copied, versions={**found["versions"], "procgen": "procgen-from-elsewhere 0.10.7"})
    flip_a_bit(copied)
    process = verify(copied)
    assert process.returncode == 0 and "procgen-from-elsewhere 0.10.7 draws other frames" in process.stdout
    change_an_action(copied)
    change_a_reward(copied)
    process = verify(copied)
    assert process.returncode == 1 and "2 faults" in process.stdout


# THE PROCESS


def test_a_verification_is_one_process_and_ctrl_c_ends_it_in_a_line(dataset):
    """So there is nothing that a SIGKILL of it could leave behind."""
    command = [*SCRIPT, "--verify", str(dataset)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environments = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libenv.so" in environments.read_text(), process)
    children = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert not any(children)
    assert process.returncode == 75 and "stopped by SIGINT" in stdout and stderr == "", stderr


def test_a_verification_writes_nothing(copied):
    before = contents(copied), sorted(os.listdir(copied)), (copied / "metadata.json").read_bytes()
    flip_a_bit(copied)
    changed = contents(copied)
    assert verify(copied).returncode == 1
    assert (changed, *before[1:]) == (
        contents(copied),
        sorted(os.listdir(copied)),
        (copied / "metadata.json").read_bytes(),
    )
