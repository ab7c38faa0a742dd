"""Collections that were stopped, killed, extended or met a full disk end like those that were not."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import check_resume
import numpy as np
import pytest
import torch
from conftest import assert_one_line, collect, wait_for
from datasets import SCRIPT, contents, die_within, episodes, metadata, rows, verify

import collect_procgen


def metadata_or_nothing(folder):
    return metadata(folder) if (folder / "metadata.json").exists() else {}


def recorded_episodes(folder):
    played = rows(folder) if list(folder.glob("*.npz")) else None
    return 0 if played is None else int((played["dones"] & (played["actions"] != 255)).sum())


@pytest.mark.parametrize("frames", ["--frames", "--no-frames"])
@pytest.mark.parametrize("env_id", ["starpilot", "dodgeball"])
def test_a_collection_that_was_killed_again_and_again_ends_like_one_that_was_not(
    env_id, frames, trained, tmp_path, monkeypatch
):
    options = [trained(env_id), "--num-episodes", "6", frames]
    assert collect(tmp_path / "whole", *options).returncode == 0
    killed = tmp_path / "killed"
    moments = [("act", 1, "60"), ("replace", 1, "60"), ("act", 150, "60")]  # nothing but the start is saved,
    moments += [("act", 60, "0.05"), ("replace", 9, "0.05"), ("act", 200, "0.05"), ("replace", 3, "0.05")]  # and more
    for name, call, interval in moments:
        if die_within(monkeypatch, name, call, collect, killed, *options, "--save-interval", interval) is None:
            assert metadata_or_nothing(killed).get("complete") is not True
        assert len(contents(killed)) <= recorded_episodes(killed)  # no episode is ever beyond the recording
        for path in killed.glob("*/*.npz"):  # as if it had been killed a while ago
            path.rename(path.with_name("20200101T000000" + path.name[15:]))
    assert collect(killed, *options).returncode == 0
    assert same_rows(killed, tmp_path / "whole")
    assert contents(killed) == contents(tmp_path / "whole")
    assert verify(killed).returncode == 0  # which notices two files of one episode
    assert not list(killed.glob(".*.tmp"))


def same_rows(folder, other):
    ours, theirs = rows(folder), rows(other)
    return all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_a_collection_that_was_killed_while_it_was_being_finished_is_finished(starpilot, tmp_path, monkeypatch):
    options = [starpilot, "--num-episodes", "4"]
    names, replace = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: names.append(target) or replace(source, target))
        assert collect(tmp_path / "whole", *options).returncode == 0
    assert [path.name for path in names[-3:]] == ["preview.png", "README.md", "metadata.json"]
    for before_the_last in range(4):
        folder = tmp_path / str(before_the_last)
        assert die_within(monkeypatch, "replace", len(names) - before_the_last, collect, folder, *options) is None
        assert metadata(folder)["complete"] is False
        assert collect(folder, *options).returncode == 0
        assert metadata(folder)["complete"] is True and contents(folder) == contents(tmp_path / "whole")
        assert (folder / "preview.png").read_bytes() == (tmp_path / "whole" / "preview.png").read_bytes()


def test_a_collection_that_was_stopped_by_any_signal_ends_like_one_that_was_not(dataset, starpilot, tmp_path):
    options = ["--num-episodes", "12", "--num-envs", "4", "--no-cuda", "--save-interval", "0.2"]

    def stop(signum):
        folder = tmp_path / signum.name
        command = [SCRIPT[1], "--checkpoint", str(starpilot), "--dataset-saving-dir", str(folder), *options]
        return folder, check_resume.launch(command, tmp_path, "act", 200, signum).code

    signals = (*collect_procgen.STOP_SIGNALS, signal.SIGKILL)
    assert len(signals) == 5
    with ThreadPoolExecutor(2) as pool:
        stopped = dict(zip(signals, pool.map(stop, signals)))
    for signum, (folder, code) in stopped.items():
        assert code == (-signum if signum == signal.SIGKILL else 75)
        assert 3 <= len(episodes(folder)) < 12  # opens every file
        assert metadata(folder)["complete"] is False
        assert collect(folder, starpilot, *options).returncode == 0
        assert contents(folder) == contents(dataset)


def test_an_unfinished_dataset_is_finished_as_it_was_begun_and_then_extended(starpilot, tmp_path, monkeypatch):
    options = [tmp_path / "d", starpilot, "--num-episodes", "3"]
    assert die_within(monkeypatch, "act", 80, collect, *options) is None
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "5", num_envs=2)
    assert process.returncode == 0, process.stderr
    begun, extension = metadata(tmp_path / "d")["segments"]
    assert (begun["num_envs"], begun["num_episodes"]) == (3, 3)
    assert (extension["num_envs"], extension["num_episodes"]) == (2, 2)
    assert sorted(episodes(tmp_path / "d")) == [1, 2, 3, 4, 5] and verify(tmp_path / "d").returncode == 0


def test_a_complete_dataset_needs_no_disk_that_can_be_written(dataset, starpilot, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "d")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("something is opened"))  # root may write everywhere
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("a folder is made"))
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "12")
    assert process.returncode == 0 and "is complete with 12 episodes" in process.stdout


def test_a_complete_dataset_is_left_alone_and_can_be_extended(dataset, starpilot, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(dataset, folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    process = collect(folder, starpilot, "--num-episodes", "12")
    assert process.returncode == 0 and "is complete" in process.stdout
    assert {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before
    process = collect(folder, starpilot, "--num-episodes", "15")
    assert process.returncode == 0 and "episodes            15, " in process.stdout
    assert sorted(episodes(folder)) == list(range(1, 16)) and len(metadata(folder)["segments"]) == 2
    process = verify(folder)  # all returns may be equal: a deviation of 1e-9 is as good as 0
    assert process.returncode == 0, process.stdout


def test_an_extension_that_was_killed_ends_like_one_that_was_not(dataset, starpilot, tmp_path, monkeypatch):
    options = [starpilot, "--num-episodes", "16", "--save-interval", "0.05"]
    for name in ("whole", "killed"):
        shutil.copytree(dataset, tmp_path / name)
    assert collect(tmp_path / "whole", *options).returncode == 0
    recorded = len(rows(dataset)["actions"])
    for call in (5, recorded + 5, recorded + 60):
        assert die_within(monkeypatch, "act", call, collect, tmp_path / "killed", *options) is None
    assert collect(tmp_path / "killed", *options).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert verify(tmp_path / "killed").returncode == 0


def test_a_standard_deviation_of_nearly_nothing_is_equal_to_none():
    assert collect_procgen.same_number(1.3e-09, 0.0) and not collect_procgen.same_number(1.3e-03, 0.0)
    assert not collect_procgen.same_number(10.0, 10.001)


def test_a_dataset_of_a_gpu_stays_one_when_a_cpu_extends_it(dataset, starpilot, tmp_path):
    """Its log-probabilities are less precise, which --verify --checkpoint has to know."""
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / "metadata.json").write_text(json.dumps({**metadata(dataset), "device": "cuda"}))
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "13").returncode == 0
    assert metadata(tmp_path / "d")["device"] == "cuda" and metadata(dataset)["device"] == "cpu"


def test_another_number_of_threads_is_told(starpilot, tmp_path, monkeypatch):
    options = [tmp_path / "d", starpilot, "--num-episodes", "4"]
    assert die_within(monkeypatch, "act", 80, collect, *options, "--save-interval", "0.01") is None
    assert metadata(tmp_path / "d")["threads"] == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        process = collect(*options)
    finally:
        torch.set_num_threads(1)
    assert process.returncode == 0 and process.stdout.count("note: the last digits of log_probs") == 1
    assert "threads 1 -> 2" in process.stdout and "device" not in process.stdout


def test_environments_of_an_extension_have_fresh_seeds(starpilot, tmp_path):
    for number, *more in (("2",), ("4",), ("6", "--seed", "5")):
        options = ["--num-episodes", number, "--no-frames", *more]
        assert collect(tmp_path / "r", starpilot, *options, num_envs=2).returncode == 0
    assert len({segment["seed"] for segment in metadata(tmp_path / "r")["segments"]}) == 3


def test_actions_depend_on_the_seed_of_the_segment_and_the_step_alone():
    drawn = set()
    for seed, step in ((1, 0), (1, 1), (2, 0), (2, 1), (1, 0)):
        collect_procgen.seed_torch(seed, step)
        drawn.add(tuple(torch.rand(3).tolist()))
        torch.rand(7)
    assert len(drawn) == 4


@pytest.mark.parametrize(
    "change", ["--num-levels=100", "--start-level=5", "--distribution-mode=hard", "--epsilon=0.1", "checkpoint"]
)
def test_another_dataset_is_refused(change, dataset, starpilot, tmp_path):
    if change == "checkpoint":
        other = tmp_path / "other.pt"
        torch.save({**torch.load(starpilot, weights_only=True), "iteration": 99}, other)
        process = collect(dataset, other, "--num-episodes", "20")
    else:
        process = collect(dataset, starpilot, "--num-episodes", "20", change)
    assert process.returncode == 2
    assert_one_line(process.stderr, str(dataset), "choose another folder")
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


def test_a_dataset_of_the_old_format_is_one_line(tmp_path, starpilot):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metadata.json").write_text('{"format": 1, "env_id": "starpilot"}')
    process = collect(tmp_path / "d", starpilot)
    assert process.returncode == 1
    assert_one_line(process.stderr, "it has format 1; the collect_procgen.py of commit")


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


@pytest.mark.parametrize("total", [300, 600])
def test_when_the_recording_is_saved_does_not_change_it(total, starpilot, tmp_path):
    for name, interval in (("often", "0.000000001"), ("once", "60")):
        options = ["--total-timesteps", str(total), "--save-interval", interval, "--no-frames"]
        assert collect(tmp_path / name, starpilot, *options, num_envs=16).returncode == 0
    assert len(list((tmp_path / "often").glob("*.npz"))) > 10 > len(list((tmp_path / "once").glob("*.npz")))
    assert same_rows(tmp_path / "often", tmp_path / "once")


def test_a_full_disk_is_one_line_and_no_partial_file(starpilot, tmp_path):
    limit, (soft, hard) = 8_000, resource.getrlimit(resource.RLIMIT_FSIZE)
    # Bytes of a file: as on a full disk, the system call fails in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        process = collect(tmp_path / "d", starpilot, "--num-episodes", "12")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert process.returncode == 1
    assert_one_line(process.stderr, str(tmp_path / "d"), "could not be written", "the same command continues")
    assert metadata(tmp_path / "d")["complete"] is False
    assert all(path.stat().st_size < limit for path in (tmp_path / "d").glob("*/*.npz"))
    assert not list((tmp_path / "d").glob(".*.tmp"))
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "12").returncode == 0
    assert verify(tmp_path / "d").returncode == 0


def test_when_a_write_has_failed_no_other_goes_on_beyond_the_lock(starpilot, tmp_path, monkeypatch):
    write_file, begun, done = collect_procgen.write_file, [], []

    def full(path, content, **options):
        if path.parent.name != "starpilot":
            return write_file(path, content, **options)
        begun.append(path)
        if len(begun) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        time.sleep(0.5)
        done.append(path)

    monkeypatch.setattr(collect_procgen, "write_file", full)
    monkeypatch.setattr(collect_procgen, "POOL", ThreadPoolExecutor(2))
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "2")
    assert process.returncode == 1 and "No space left" in process.stderr
    assert len(begun) == 2 and len(done) == 1


# WHAT OTHERS DID TO THE FOLDER


def add_a_strange_episode(folder):
    """As one that was copied from another dataset."""
    path = next(folder.glob("*/*.npz"))
    shutil.copy(path, path.with_name("20200101T000000_77_100_3_1.00.npz"))
    return "20200101T000000_77_100_3_1.00.npz is not one of the 12 recorded episodes; move it away"


def add_notes_among_the_episodes(folder):
    (folder / "starpilot" / "notes.txt").write_text("mine")
    return "notes.txt is not one of the 12 recorded episodes; move it away"


def rename_an_episode(folder):
    path = episodes(folder)[4][0]
    path.rename(path.with_name(path.name[:-8] + "99.00.npz"))
    return "is not episode 4 of the recording; move it away"


def add_a_chunk(folder):
    shutil.copy(folder / "0_00000000.npz", folder / "0_0_copy.npz")
    return "0_0_copy.npz does not belong to this recording; move it away"


def overlap_chunks(folder):
    shutil.copy(folder / "0_00000000.npz", folder / "0_00000003.npz")
    return "0_00000003.npz does not follow the file before it"


def remove_the_first_chunk(folder):
    (folder / "0_00000000.npz").unlink()
    return "segment 0 has 0 steps, not"


def damage_a_chunk(folder):
    path = folder / "0_00000000.npz"
    path.write_bytes(path.read_bytes()[:-100])
    return "0_00000000.npz is damaged"


@pytest.mark.parametrize(
    "spoil",
    [
        add_a_strange_episode,
        add_notes_among_the_episodes,
        rename_an_episode,
        add_a_chunk,
        overlap_chunks,
        remove_the_first_chunk,
        damage_a_chunk,
    ],
)
def test_a_folder_that_somebody_changed_is_one_line_and_left_as_it_is(spoil, dataset, starpilot, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    message = spoil(tmp_path / "d")
    before = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*.npz")}
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "20")
    assert process.returncode == 1
    assert_one_line(process.stderr, message)
    assert {path: path.read_bytes() for path in (tmp_path / "d").rglob("*.npz")} == before


def test_a_chunk_that_is_missing_in_the_middle_is_one_line_before_anything_is_played(starpilot, tmp_path, monkeypatch):
    options = [tmp_path / "r", starpilot, "--no-frames", "--save-interval", "0.001"]
    assert collect(*options, "--num-episodes", "4").returncode == 0
    sorted((tmp_path / "r").glob("*.npz"))[2].unlink()
    monkeypatch.setattr(collect_procgen, "make_envs", lambda *_, **__: pytest.fail("it plays"))
    process = collect(*options, "--num-episodes", "6")
    assert process.returncode == 1
    assert_one_line(process.stderr, "does not follow the file before it")


def test_a_damaged_older_episode_is_one_line_and_can_be_drawn_again(dataset, starpilot, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    path = episodes(tmp_path / "d")[1][0]
    path.write_bytes(path.read_bytes()[:5000])
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "14")
    assert process.returncode == 1
    assert_one_line(process.stderr, path.name, "is damaged", "delete it, and the same command draws it again")
    path.unlink()
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "14").returncode == 0
    assert contents(tmp_path / "d").items() >= contents(dataset).items() and verify(tmp_path / "d").returncode == 0


def test_a_users_folder_is_left_as_it_is(starpilot, tmp_path):
    (tmp_path / "home").mkdir()
    for name in (".notes.tmp", "x.npz"):
        (tmp_path / "home" / name).write_text("mine")
    process = collect(tmp_path / "home", starpilot)
    assert process.returncode == 2
    assert_one_line(process.stderr, "holds episodes without a metadata.json")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [".notes.tmp", "x.npz"]


def test_a_card_that_the_user_took_over_is_left_alone(starpilot, tmp_path):
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "2").returncode == 0
    card = tmp_path / "d" / "README.md"
    assert (
        "starpilot, easy mode, 200 levels from level 0" in card.read_text() and "| episodes | 2, " in card.read_text()
    )
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "3").returncode == 0
    assert "| episodes | 3, " in card.read_text()
    card.write_text("# Mine\n")
    assert collect(tmp_path / "d", starpilot, "--num-episodes", "4").returncode == 0
    assert card.read_text() == "# Mine\n"


# A POLICY WITH A MEMORY


class Recurrent(collect_procgen.Policy):
    """Its actions depend on all frames of the episode so far."""

    has_memory = True

    def __init__(self, agent, args, num_envs, device):
        super().__init__(agent, args, num_envs, device)
        self.memory = torch.zeros(num_envs)

    def act(self, frames, envs, begins, actions=None):
        self.memory[envs[begins]] = 0
        self.memory[envs] = (
            0.999 * self.memory[envs] + torch.from_numpy(frames[:, ::8, ::8].mean(axis=(1, 2, 3))).float()
        )
        self.memory[envs] += torch.randn(len(envs))  # what is sampled for the memory is the same again, too
        logits = torch.cos(self.memory[envs][:, None] * torch.arange(1, 16))
        policy = torch.distributions.Categorical(logits=logits)
        action = policy.sample() if actions is None else torch.from_numpy(actions).long()
        return action.numpy(), policy.log_prob(action).numpy()


def test_a_recurrent_policy_continues_beyond_a_time_limit_with_the_memory_that_it_had(trained, tmp_path, monkeypatch):
    checkpoint = trained("leaper")  # 500 steps at most
    monkeypatch.setattr(collect_procgen, "Policy", Recurrent)
    options = [checkpoint, "--total-timesteps", "2400", "--save-interval", "0.2"]
    assert collect(tmp_path / "whole", *options, num_envs=2).returncode == 0
    folder = tmp_path / "killed"
    for call in (700, 900):
        assert die_within(monkeypatch, "act", call, lambda: collect(folder, *options, num_envs=2)) is None
    assert len(rows(folder)["actions"]) > 500
    assert collect(folder, *options, num_envs=2).returncode == 0
    assert same_rows(folder, tmp_path / "whole") and contents(folder) == contents(tmp_path / "whole")
    process = verify(folder, "--checkpoint", str(checkpoint))
    assert process.returncode == 0 and "all log_probs are those of" in process.stdout, process.stdout
    monkeypatch.setattr(Recurrent, "has_memory", False)  # the control: with an empty memory it plays otherwise
    shutil.rmtree(folder)
    assert die_within(monkeypatch, "act", 700, lambda: collect(folder, *options, num_envs=2)) is None
    assert collect(folder, *options, num_envs=2).returncode == 0
    assert not same_rows(folder, tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_is_refused(code, starpilot, tmp_path, monkeypatch):
    def not_implemented(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    process = collect(tmp_path / "d", starpilot, "--num-episodes", "2")
    assert process.returncode == 1
    assert_one_line(process.stderr, ".lock cannot be locked", "does not support flock")
