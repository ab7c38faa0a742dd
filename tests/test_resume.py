"""A run of ppo_procgen.py goes on where it was stopped: after signals, kills and errors, longer, elsewhere, forked."""

import csv
import errno
import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from check_resume import MOMENTS, differences, launch, read_run, run_disturbed, run_undisturbed
from conftest import assert_one_line, wait_for
from runs import ROOT, run_main

import collect_procgen
import ppo_procgen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run with --save-dataset that nothing disturbed: its content, and the counts of check_resume."""
    folder = tmp_path_factory.mktemp("undisturbed")
    counts = run_undisturbed(ROOT / "ppo_procgen.py", RECORDED, folder)
    return read_run(folder), counts


RECORDED = ["--save-dataset", "--no-cuda"]


def test_a_run_that_was_stopped_or_killed_ends_like_one_that_was_not(undisturbed, tmp_path):
    """In a rollout, an update or a write: weights, optimizer, games, generators, table, recording are the same."""
    expected, counts = undisturbed

    def check(i):
        wrong = run_disturbed(ROOT / "ppo_procgen.py", RECORDED, tmp_path / str(i), counts, MOMENTS[i])
        return wrong or differences(read_run(tmp_path / str(i)), expected)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(check, range(len(MOMENTS)))) == [[] for _ in MOMENTS]
    assert {"recording actions", "progress.csv", "rolling/model.pt"} < expected.keys()


def test_check_resume_names_what_a_fork_forgot(tmp_path):
    """A fork that mixes the mean of its past frames into every frame, with and without that mean in TrainState."""
    source = (ROOT / "ppo_procgen.py").read_text()
    rollout = "                obs[step] = state.next_obs\n"
    mixed = (
        "                state.past = state.past * 0.9 + state.next_obs.float() * 0.1\n"
        "                obs[step] = (state.next_obs * 0.5 + state.past * 0.5).to(torch.uint8)\n"
    )
    new = "        self.test_return = math.nan"
    fork = source.replace(new, "        self.past = torch.zeros((args.num_envs, 64, 64, 3), device=device)\n" + new)
    fork = fork.replace(rollout, mixed)
    saving = '            "next_done": self.next_done,\n'
    kept = fork.replace(saving, saving + '            "past": self.past,\n')
    loading = '        self.next_done = saved["next_done"].to(self.device)\n'
    kept = kept.replace(loading, loading + '        self.past = saved["past"].to(self.device)\n')
    moment = ("act", 0.7, signal.SIGKILL)

    def check(name, text):
        script = tmp_path / f"{name}_procgen.py"
        script.write_text(text)
        counts = run_undisturbed(script, ["--no-cuda"], tmp_path / f"{name}_undisturbed")
        assert not run_disturbed(script, ["--no-cuda"], tmp_path / name, counts, moment)
        return differences(read_run(tmp_path / name), read_run(tmp_path / f"{name}_undisturbed"))

    with ThreadPoolExecutor(2) as pool:
        forgotten, kept = pool.map(check, ("forgetful", "careful"), (fork, kept))
    assert any("model_state_dict" in name for name in forgotten)
    assert kept == []


def stop_at_once(monkeypatch):
    """Let the next run be stopped after it has restored its state, before its first step."""

    def stop():
        raise ppo_procgen.Stopped("a test")

    monkeypatch.setattr(ppo_procgen, "stop_if_asked", stop)


def test_a_resumed_run_has_every_piece_of_its_state(dodgeball, tmp_path, monkeypatch):
    """Of a run that was saved with an episode that ended in the last step of its rollout."""
    folder = tmp_path / "run"
    shutil.copytree(dodgeball, folder)
    (run,) = folder.glob("models/dodgeball/*")
    before = runs.load(run / "rolling" / "model.pt")
    assert before["next_done"].any() and before["last_level_complete"]
    stop_at_once(monkeypatch)
    assert run_main(ppo_procgen, [*runs.DODGEBALL, "--resume", "--total-timesteps", "640"], folder).returncode == 75
    before["args"] |= {"resume": True, "total_timesteps": 640}
    assert not differences(runs.load(run / "rolling" / "model.pt"), before)


def test_files_that_others_are_writing_in_a_run_are_left_alone(uninterrupted, tmp_path):
    """A collection's, in test_dataset/; those of the run itself are leftovers, as its lock is held."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = runs.run_dir(tmp_path / "run")
    theirs, ours = run / "test_dataset" / "0.75" / ".x.npz.tmp", run / "checkpoint" / ".model_3_1.00.pt.tmp"
    theirs.parent.mkdir(parents=True)
    for path in (theirs, ours):
        path.write_bytes(b"half")
    assert runs.train(tmp_path / "run", "--resume").returncode == 0
    assert theirs.exists() and not ours.exists()


def test_a_signal_saves_and_exits_75(uninterrupted, tmp_path):
    def stop(signum):
        command = [runs.SCRIPT[1], *runs.SMALL, "--resume", "--log-interval", "100"]  # so that only the signal saves
        return launch(command, tmp_path / signum.name, "backward", 7, signum)

    with ThreadPoolExecutor(2) as pool:
        stopped = dict(zip(ppo_procgen.STOP_SIGNALS, pool.map(stop, ppo_procgen.STOP_SIGNALS)))
    assert len(stopped) == 4
    for signum, run in stopped.items():
        assert run.code == 75 and f"stopped by {signum.name}" in run.printed
        folder = tmp_path / signum.name
        assert runs.load(runs.run_dir(folder) / "rolling" / "model.pt")["iteration"] == len(runs.progress(folder)) == 3
        assert not differences(read_run(folder), read_run(tmp_path / "SIGTERM"))
    assert runs.train(folder, "--resume").returncode == 0
    runs.assert_same_run(folder, uninterrupted)


def test_what_a_killed_run_has_logged_beyond_its_last_save_is_dropped(uninterrupted, tmp_path):
    """Killed in iteration 4, it goes on from iteration 2: the third is in the table and in TensorBoard once."""
    command = [runs.SCRIPT[1], *runs.SMALL, "--resume"]
    assert launch(command, tmp_path, "backward", 7, signal.SIGKILL).code == -signal.SIGKILL
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 2
    assert len(runs.progress(tmp_path)) == 3
    assert runs.train(tmp_path, "--resume").returncode == 0
    runs.assert_same_run(tmp_path, uninterrupted)


def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    process = runs.train(uninterrupted, "--resume")
    assert process.returncode == 0 and "is finished" in process.stdout
    assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == before


def test_a_run_can_be_made_longer_and_has_no_final_checkpoint_meanwhile(uninterrupted, tmp_path, monkeypatch):
    assert (
        runs.train(tmp_path, "--total-timesteps", "200", "--archive-interval", "100").returncode == 0
    )  # three iterations
    own = runs.run_dir(tmp_path) / "final" / "model_keep_me.pt"
    own.write_bytes(b"a copy of the user's")
    (end,) = runs.run_dir(tmp_path).glob("final/model_*.??.pt")
    with monkeypatch.context() as patch:
        stop_at_once(patch)
        assert runs.train(tmp_path, "--resume").returncode == 75
    assert list(runs.run_dir(tmp_path).glob("final/*")) == [own]
    assert runs.load(runs.run_dir(tmp_path) / "checkpoint" / end.name.replace("model_", "model_3_"))["iteration"] == 3
    assert runs.train(tmp_path, "--resume").returncode == 0
    own.unlink()
    runs.assert_same_run(tmp_path, uninterrupted)


def test_a_larger_total_can_be_taken_back(uninterrupted, tmp_path, monkeypatch):
    """The run has gone beyond the new total: it ends where it is, with a final checkpoint of that."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at_once(patch)
        assert runs.train(tmp_path / "run", "--resume", "--total-timesteps", "1000000").returncode == 75
    assert not list(runs.run_dir(tmp_path / "run").glob("final/*"))
    process = runs.train(tmp_path / "run", "--resume", "--total-timesteps", "320")
    assert process.returncode == 0, process.stderr
    assert runs.same(runs.final(tmp_path / "run")["model_state_dict"], runs.final(uninterrupted)["model_state_dict"])
    assert runs.final(tmp_path / "run")["test_return"] == runs.final(uninterrupted)["test_return"]
    assert "is finished after iteration 6" in runs.train(tmp_path / "run", "--resume").stdout


def test_resuming_with_other_arguments_names_them(uninterrupted):
    other = "--xpid", runs.XPID, "--learning-rate", "0.001", "--num-levels", "0", "--log-interval", "7"
    process = runs.train(uninterrupted, "--resume", *other)
    assert process.returncode == 2
    assert_one_line(process.stderr, "--learning-rate was 0.0005, is 0.001", "--num-levels was 200, is 0")
    assert "log-interval" not in process.stderr


def test_an_annealed_run_cannot_be_made_longer(tmp_path):
    short = ("--anneal-lr", "--total-timesteps", "128", "--xpid", "x")
    assert runs.train(tmp_path, *short).returncode == 0
    assert [float(row["charts/learning_rate"]) for row in runs.progress(tmp_path, "x")] == [0.0005, 0.00025]
    process = runs.train(tmp_path, "--anneal-lr", "--xpid", "x", "--resume")
    assert process.returncode == 2
    assert_one_line(process.stderr, "--total-timesteps was 128, is 384")


def test_an_existing_run_is_never_overwritten(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in runs.run_dir(uninterrupted).rglob("*.pt")}
    process = runs.train(uninterrupted)
    assert process.returncode == 2
    assert_one_line(process.stderr, runs.XPID, "--resume", "--xpid")
    assert {path: path.stat().st_mtime_ns for path in runs.run_dir(uninterrupted).rglob("*.pt")} == before


def test_a_lost_rolling_checkpoint_is_an_error(uninterrupted, tmp_path):
    """To start from scratch would overwrite what the run has left."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    (runs.run_dir(tmp_path / "copy") / "rolling" / "model.pt").unlink()
    process = runs.train(tmp_path / "copy", "--resume")
    assert process.returncode == 2
    assert_one_line(process.stderr, "rolling/model.pt, which is missing")
    assert runs.final(tmp_path / "copy")["iteration"] == 6


def test_a_second_process_on_the_same_run_fails(tmp_path, monkeypatch):
    endless = ("--total-timesteps", "1000000")
    first = subprocess.Popen([*runs.SCRIPT, *runs.SMALL, *endless], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for((runs.run_dir(tmp_path) / "rolling" / "model.pt").exists, first)
        second = runs.train(tmp_path, "--resume", *endless)
        assert second.returncode == 1
        assert_one_line(second.stderr, runs.XPID, "in use by another process for 1 s")
        # On a cluster the holder may be about to end: wait, then ask to be run again.
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setattr(ppo_procgen, "LOCK_PATIENCE", 2)
        waiting = runs.train(tmp_path, "--resume", *endless)
        assert waiting.returncode == 75
        assert_one_line(waiting.stderr, "in use by another process for 2 s")
    finally:
        first.kill()
        first.wait()
    # The lock has died with its holder: this one gets as far as the arguments that differ.
    assert runs.train(tmp_path, "--resume", *endless, "--seed", "9", "--xpid", runs.XPID).returncode == 2


def test_a_new_run_can_start_from_a_checkpoint(uninterrupted, tmp_path):
    (source,) = runs.run_dir(uninterrupted).glob("final/*.pt")
    # A learning rate too small to move a float32 weight other than 0: what ends is what was loaded.
    new = ("--checkpoint", str(source), "--learning-rate", "1e-30", "--xpid", "new", "--total-timesteps", "64")
    assert runs.train(tmp_path, *new).returncode == 0
    started = runs.final(tmp_path, "new")
    torch.testing.assert_close(started["model_state_dict"], runs.load(source)["model_state_dict"], rtol=0, atol=1e-25)
    steps = {int(moments["step"]) for moments in started["optimizer_state_dict"]["state"].values()}
    assert steps == {6 * 2 + 2}  # Adam goes on counting
    assert started["optimizer_state_dict"]["param_groups"][0]["lr"] == 1e-30
    assert started["iteration"] == 1


def test_a_new_run_can_start_from_weights_alone(uninterrupted, tmp_path):
    (source,) = runs.run_dir(uninterrupted).glob("final/*.pt")
    state = runs.load(source)
    del state["optimizer_state_dict"]
    torch.save(state, tmp_path / "weights.pt")
    new = ("--checkpoint", "weights.pt", "--learning-rate", "1e-30", "--xpid", "new", "--total-timesteps", "64")
    process = runs.train(tmp_path, *new)
    assert process.returncode == 0, process.stderr
    assert "weights.pt holds weights only, so Adam begins afresh" in process.stdout
    started = runs.final(tmp_path, "new")
    torch.testing.assert_close(started["model_state_dict"], state["model_state_dict"], rtol=0, atol=1e-25)
    assert {int(moments["step"]) for moments in started["optimizer_state_dict"]["state"].values()} == {2}


def test_what_ends_a_run_early_saves_its_last_iteration_first(uninterrupted, tmp_path, monkeypatch):
    """An exception, a diverged update and a full disk, all in iteration 4, with nothing due to be saved."""
    gae, calls = ppo_procgen.compute_gae, []

    def broken(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyError("a mistake in a fork")
        return gae(*args)

    often = ("--log-interval", "100", "--archive-interval", "100", "--save-dataset")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(ppo_procgen, "compute_gae", broken)
        runs.train(tmp_path, *often)
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 3

    with monkeypatch.context() as patch:
        patch.setattr(ppo_procgen, "compute_gae", lambda *args: [x * math.nan for x in gae(*args)])
        process = runs.train(tmp_path, *often, "--resume")
    assert process.returncode == 1
    assert_one_line(process.stderr, "training diverged in iteration 4", "--learning-rate")
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 3

    append_to_table = ppo_procgen.Run.append_to_table

    def full(run, row):
        if row["iteration"] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.table_path))
        append_to_table(run, row)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_procgen.Run, "append_to_table", full)
        process = runs.train(tmp_path, *often, "--resume")
    assert process.returncode == 1
    assert_one_line(process.stderr, "progress.csv could not be used: No space left on device")
    assert runs.train(tmp_path, "--resume", *often).returncode == 0
    assert runs.same(runs.final(tmp_path)["model_state_dict"], runs.final(uninterrupted)["model_state_dict"])
    recorded = 0
    for path in sorted(runs.run_dir(tmp_path).glob("rollouts/*.npz")):
        assert path.name == f"0_{recorded:08d}.npz"
        recorded += len(np.load(path)["actions"])
    assert recorded == 6 * 16


def test_a_step_that_cannot_be_recorded_ends_the_run_with_what_was_recorded_before(tmp_path, monkeypatch):
    step, steps = ppo_procgen.Recorder.step, []

    def skipping(recorder, actions):
        steps.append(actions)
        result = step(recorder, actions)
        if len(steps) == 2 * 16 + 5:  # in the third iteration
            recorder.rows.pop()
        return result

    monkeypatch.setattr(ppo_procgen.Recorder, "step", skipping)
    process = runs.train(tmp_path, "--save-dataset", "--log-interval", "100")
    assert process.returncode == 1
    assert_one_line(process.stderr, "a wrapper repeats or skips steps")
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 2
    (path,) = runs.run_dir(tmp_path).glob("rollouts/*.npz")
    assert path.name == "0_00000000.npz" and len(np.load(path)["actions"]) == 2 * 16


def test_a_reader_that_has_gone_is_not_a_full_disk(tmp_path):
    command = " ".join([*runs.SCRIPT, *runs.SMALL, "--log-interval", "1", "| head -1"])
    process = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(process.stderr, "stdout was closed", "--resume")
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] >= 0


def test_a_moved_run_is_resumed_where_it_is(uninterrupted, tmp_path):
    assert runs.train(tmp_path, "--total-timesteps", "128", "--archive-interval", "100").returncode == 0
    (tmp_path / "elsewhere" / "bossfight").mkdir(parents=True)
    runs.run_dir(tmp_path).rename(tmp_path / "elsewhere" / "bossfight" / "renamed")
    moved = ("--model-saving-dir", "elsewhere", "--xpid", "renamed", "--resume")
    assert runs.train(tmp_path, *moved).returncode == 0
    (path,) = tmp_path.glob("elsewhere/bossfight/renamed/final/*.pt")
    assert runs.same(runs.load(path)["model_state_dict"], runs.final(uninterrupted)["model_state_dict"])
    assert not (tmp_path / "models" / "bossfight" / "renamed").exists()


def test_an_annealed_run_that_was_killed_ends_like_one_that_was_not(tmp_path):
    arguments = ["--anneal-lr", "--no-cuda"]
    script, moment = ROOT / "ppo_procgen.py", ("backward", 0.6, signal.SIGKILL)
    counts = run_undisturbed(script, arguments, tmp_path / "undisturbed")
    assert run_disturbed(script, arguments, tmp_path / "killed", counts, moment) == []
    assert differences(read_run(tmp_path / "killed"), read_run(tmp_path / "undisturbed")) == []


# WHAT IS DAMAGED, MISSING OR FOREIGN


def test_an_iteration_whose_archive_a_full_disk_prevented_is_repeated_on_resume(uninterrupted, tmp_path, monkeypatch):
    write_file = ppo_procgen.write_file

    def full(path, content):
        if path.name.startswith("model_3_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_procgen, "write_file", full)
        assert runs.train(tmp_path).returncode == 1
    assert runs.load(runs.run_dir(tmp_path) / "rolling" / "model.pt")["iteration"] == 2
    assert not list(runs.run_dir(tmp_path).glob("checkpoint/model_3_*"))
    assert runs.train(tmp_path, "--resume").returncode == 0
    runs.assert_same_run(tmp_path, uninterrupted)


def flip_a_bit(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(where, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    rolling = runs.run_dir(tmp_path / "run") / "rolling" / "model.pt"
    flip_a_bit(rolling, where)
    process = runs.train(tmp_path / "run", "--resume", "--total-timesteps", "448")
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt is damaged")
    process = runs.train(tmp_path, "--checkpoint", str(rolling))
    assert process.returncode == 1
    assert_one_line(process.stderr, "rolling/model.pt is damaged")


@pytest.mark.parametrize("damage", ["first chunk removed", "truncated", "flipped bit"])
def test_a_damaged_recording_is_one_line(damage, dodgeball, tmp_path):
    shutil.copytree(dodgeball, tmp_path / "run")
    (run,) = (tmp_path / "run").glob("models/dodgeball/*")
    (chunk,) = run.glob("rollouts/*.npz")
    if damage == "first chunk removed":
        chunk.unlink()
        expected = 2, "rollouts lacks steps from 0 on, before iteration 3"
    elif damage == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:1000])
        expected = 1, f"{chunk.name} is damaged"
    else:
        flip_a_bit(chunk, 0.1)
        expected = 1, f"{chunk.name} is damaged"
    longer = [*runs.DODGEBALL, "--resume", "--total-timesteps", "480"]
    process = run_main(ppo_procgen, longer, tmp_path / "run")
    assert process.returncode == expected[0]
    assert_one_line(process.stderr, expected[1], "--no-save-dataset")
    assert run_main(ppo_procgen, [*longer, "--no-save-dataset"], tmp_path / "run").returncode == 0


@pytest.mark.parametrize("edit", ["semicolons", "another header", "a long field", "not a number"])
def test_a_table_that_cannot_be_read_is_set_aside(edit, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    table = runs.run_dir(tmp_path / "run") / "progress.csv"
    text = table.read_text()
    if edit == "semicolons":
        text = text.replace(",", ";")
    elif edit == "another header":
        text = text.replace("iteration", "Iteration", 1)
    elif edit == "a long field":
        text = text.replace("\n", ",notes\n", 1) + "6," + "x" * 200_000 + "\n"
    else:
        text = text.replace("\n3,", "\nthree,")
    table.write_text(text)
    process = runs.train(tmp_path / "run", "--resume", "--total-timesteps", "448")
    assert process.returncode == 0, process.stderr
    assert "note: " in process.stdout and "progress_unreadable_6.csv" in process.stdout
    assert table.with_name("progress_unreadable_6.csv").read_text() == text
    assert [row["iteration"] for row in runs.progress(tmp_path / "run")] == ["7"]


def test_a_last_row_that_a_kill_has_cut_is_dropped(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    table = runs.run_dir(tmp_path / "run") / "progress.csv"
    table.write_text(table.read_text() + "1")  # of a 10
    process = runs.train(tmp_path / "run", "--resume", "--total-timesteps", "448")
    assert process.returncode == 0 and "note" not in process.stdout, process.stdout + process.stderr
    assert [row["iteration"] for row in runs.progress(tmp_path / "run")] == list("1234567")


def test_a_table_of_which_nothing_is_left_is_removed(uninterrupted, tmp_path, monkeypatch):
    """As after a kill before the first rolling checkpoint: no file without a header is there meanwhile."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    table = runs.run_dir(tmp_path / "run") / "progress.csv"
    header, first = table.read_text().splitlines()[:2]
    table.write_text(f"{header}\n9{first[1:]}\n")
    stop_at_once(monkeypatch)
    assert runs.train(tmp_path / "run", "--resume", "--total-timesteps", "640").returncode == 75
    assert not table.exists()


def test_progress_is_appended_to(tmp_path, monkeypatch):
    written, write_file = [], ppo_procgen.write_file
    monkeypatch.setattr(ppo_procgen, "write_file", lambda path, x: (written.append(path.name), write_file(path, x)))
    assert runs.train(tmp_path).returncode == 0
    assert written.count("progress.csv") == 1 and len(runs.progress(tmp_path)) == 6


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_is_refused(code, tmp_path, monkeypatch):
    """A soft lock, to which filelock would change, can be held by two processes after a kill."""

    def not_implemented(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    process = runs.train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, f"{runs.XPID}/.lock cannot be locked", "flock", "--model-saving-dir")
    assert not list(tmp_path.rglob("*.pt"))


WRAPPER = """class Bonus(gym.Wrapper):
    \"\"\"Adds a bonus that grows with the steps.\"\"\"

    def __init__(self, envs):
        super().__init__(envs)
        self.steps = 0

    def step(self, actions):
        self.steps += 1
        frames, rewards, *more = self.env.step(actions)
        return frames, rewards + 0.01 * self.steps, *more
"""
STATE = """
    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, saved):
        self.steps = saved["steps"]
"""


def fork_with_wrapper(folder, wrapper):
    source = (ROOT / "ppo_procgen.py").read_text()
    last = "    return gym.wrappers.TransformReward(envs, lambda reward: np.clip(reward, -10, 10))\n"
    assert source.count(last) == 1
    source = source.replace(last, "    envs = Bonus(envs)\n" + last)
    source = source.replace("def make_envs(args: Args)", wrapper + "\n\ndef make_envs(args: Args)")
    path = folder / "ppo_bonus_procgen.py"
    path.write_text(source)
    return path


def test_a_wrapper_without_state_dict_fails_at_the_start(tmp_path):
    path = fork_with_wrapper(tmp_path, WRAPPER)
    process = subprocess.run(
        [sys.executable, path, *runs.SMALL], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 1
    assert_one_line(process.stderr, "the wrapper Bonus has no state_dict()")
    assert not (tmp_path / "models").exists()


def test_a_wrapper_with_state_dict_resumes_exactly(tmp_path):
    path = fork_with_wrapper(tmp_path, WRAPPER + STATE)
    counts = run_undisturbed(path, ["--no-cuda"], tmp_path / "undisturbed")
    assert run_disturbed(path, ["--no-cuda"], tmp_path / "killed", counts, ("act", 0.7, signal.SIGKILL)) == []
    assert differences(read_run(tmp_path / "killed"), read_run(tmp_path / "undisturbed")) == []


def test_state_that_cannot_be_read_back_fails_before_a_file_is_written(tmp_path, monkeypatch):
    state_dict = ppo_procgen.TrainState.state_dict
    monkeypatch.setattr(ppo_procgen.TrainState, "state_dict", lambda state: {**state_dict(state), "mine": Path("x")})
    process = runs.train(tmp_path)
    assert process.returncode == 1
    assert_one_line(process.stderr, "a checkpoint can't hold pathlib.PosixPath", "TrainState.state_dict")
    assert not list(tmp_path.iterdir())


def test_a_clock_that_is_set_back_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert runs.train(tmp_path).returncode == 0
    with open(runs.run_dir(tmp_path) / "progress.csv") as file:
        assert all(float(row["charts/SPS"]) > 0 for row in csv.DictReader(file))


def test_evaluations_have_no_part_in_the_speed(tmp_path, monkeypatch):
    """By a clock that ticks at each environment step and backward pass, and a thousand times in an evaluation."""
    clock, evaluate = [0], ppo_procgen.evaluate

    def tick(ticks=1):
        clock[0] += ticks

    monkeypatch.setattr(ppo_procgen, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(ppo_procgen, "stop_if_asked", tick)
    monkeypatch.setattr(ppo_procgen, "evaluate", lambda *args: (tick(1000), evaluate(*args))[1])
    assert runs.train(tmp_path, "--total-timesteps", "128").returncode == 0  # two iterations, each evaluated
    with open(runs.run_dir(tmp_path) / "progress.csv") as file:
        speeds = [float(row["charts/SPS"]) for row in csv.DictReader(file)]
    assert speeds == [64 / (16 + 2), 128 / (32 + 4)]


@pytest.mark.parametrize("script", [ppo_procgen, collect_procgen])
def test_a_script_under_nohup_does_not_stop_when_the_terminal_goes(script):
    handlers = {signum: signal.getsignal(signum) for signum in script.STOP_SIGNALS}
    try:
        for before in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, before)
            script.handle_signals()
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (before == signal.SIG_IGN)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def test_a_stop_in_the_first_iteration_says_how_far_it_was(tmp_path):
    command = [runs.SCRIPT[1], *runs.SMALL]
    run = launch(command, tmp_path, "act", 9, signal.SIGTERM)
    assert run.code == 75
    assert "nothing to save yet: the first rollout was 56 % done" in run.printed


def test_check_resume_sees_every_exit_code(tmp_path):
    """Processes that several threads start and wait for: none's exit code gets lost."""
    script = tmp_path / "trivial.py"
    script.write_text("")
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: launch([str(script)], tmp_path).code, range(80)))
    assert codes == [0] * 80
