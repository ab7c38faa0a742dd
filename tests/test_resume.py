"""A run of ppo_procgen.py goes on where it was stopped: after signals, kills and errors, longer, elsewhere, forked."""

import errno
import math
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gym
import numpy as np
import pytest
import runs
import torch
from check_resume import MOMENTS, differences, launch, read_run, run_disturbed, run_undisturbed
from conftest import assert_one_line, wait_for
from runs import ROOT, run_main

import ppo_procgen
from ppo_procgen import Args, ProcgenVectorEnv


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
    """A fork that mixes the mean of its past frames into every frame, and keeps that mean outside of carry."""
    source = (ROOT / "ppo_procgen.py").read_text()
    rollout = "                obs[step], dones[step] = carry.next_obs, carry.next_done\n"
    mixed = "                past = (past * 0.9 + carry.next_obs.float() * 0.1)\n" + rollout.replace(
        "= carry.next_obs", "= (carry.next_obs * 0.5 + past * 0.5).to(torch.uint8)"
    )
    fork = source.replace(
        "    test = None  #", "    past = torch.zeros((args.num_envs, 64, 64, 3), device=device)\n    test = None  #"
    )
    fork = fork.replace(rollout, mixed)
    kept = fork.replace("    past = torch.zeros(", "    carry.past = torch.zeros(").replace(
        "past = (past * 0.9", "carry.past = (carry.past * 0.9"
    )
    kept = kept.replace("+ past * 0.5", "+ carry.past * 0.5")
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
    assert before["carry"]["next_done"]["numpy"].any() and before["carry"]["level_complete"]
    stop_at_once(monkeypatch)
    assert run_main(ppo_procgen, [*runs.DODGEBALL, "--resume", "--total-timesteps", "640"], folder).returncode == 75
    before["args"] |= {"resume": True, "total_timesteps": 640}
    assert not differences(runs.load(run / "rolling" / "model.pt"), before)


def restored(tmp_path, x, fresh):
    """What a new process makes of x: freeze, a file, thaw into what that process has made afresh."""
    torch.save(ppo_procgen.freeze(x), tmp_path / "state.pt")
    return ppo_procgen.thaw(torch.load(tmp_path / "state.pt", weights_only=True), fresh)


def test_a_random_generator_of_a_wrapper_is_saved_and_restored(tmp_path):
    wrapper = SimpleNamespace(rng=np.random.default_rng(7), steps=3)
    wrapper.rng.integers(10, size=5)
    other = restored(tmp_path, wrapper, SimpleNamespace(rng=np.random.default_rng(0), steps=0))
    assert np.array_equal(other.rng.random(4), wrapper.rng.random(4)) and other.steps == 3


def test_the_global_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    generators = ppo_procgen.RandomGenerators(torch.device("cpu"))
    torch.save(ppo_procgen.freeze(generators), tmp_path / "state.pt")
    drawn = draw()
    assert all(map(operator.ne, draw(), drawn))
    ppo_procgen.thaw(torch.load(tmp_path / "state.pt", weights_only=True), generators)
    assert draw() == drawn


def test_what_lies_in_lists_tuples_and_dicts_is_restored_in_its_own_way(tmp_path):
    def carry():
        return SimpleNamespace(
            frames=[deque(maxlen=2) for _ in range(2)],
            networks={"rnd": torch.nn.Linear(2, 2)},
            generators=(np.random.default_rng(1), torch.nn.Linear(2, 2)),
            visits=Counter({"start": 1}),
            seen=defaultdict(int),
        )

    before, fresh = carry(), carry()
    before.frames[1].extend([1, 2, 3])
    before.generators[0].random(5)
    del before.visits["start"]
    before.visits.update({np.int64(7): 2})  # of a level seed
    before.seen[3, "left"] += 1
    network = fresh.networks["rnd"]
    after = restored(tmp_path, before, fresh)
    assert after.frames == before.frames and after.frames[0].maxlen == 2
    assert after.networks["rnd"] is network and runs.same(network.state_dict(), before.networks["rnd"].state_dict())
    assert after.generators[0].random() == before.generators[0].random()
    assert runs.same(after.generators[1].state_dict(), before.generators[1].state_dict())
    assert after.visits == before.visits and after.seen == before.seen and after.seen["new"] == 0


def test_a_learnt_tensor_stays_the_one_that_its_optimizer_holds(tmp_path):
    def carry():
        alpha = torch.nn.Parameter(torch.zeros(1))
        return SimpleNamespace(alpha=alpha, optimizer=torch.optim.Adam([alpha]))

    before, fresh = carry(), carry()
    before.alpha.data.fill_(2.0)
    after = restored(tmp_path, before, fresh)
    assert after.alpha.item() == 2.0 and after.alpha.requires_grad
    assert after.alpha is after.optimizer.param_groups[0]["params"][0]


def test_what_a_wrapper_was_given_is_not_its_state(tmp_path):
    """The arguments of the process that goes on count, not those of the one before."""
    before = SimpleNamespace(args=Args(log_interval=5), device=torch.device("cpu"), space=gym.spaces.Discrete(2), n=1)
    given = SimpleNamespace(args=Args(log_interval=1), device=torch.device("cpu"), space=gym.spaces.Discrete(2), n=0)
    after = restored(tmp_path, before, given)
    assert after.n == 1 and after.args.log_interval == 1 and after.device is given.device


def test_keys_that_could_not_be_read_again_are_refused():
    with pytest.raises(TypeError, match=r"state\.visits has keys of type \w*Path"):
        ppo_procgen.freeze(SimpleNamespace(visits={Path("x"): 1}).visits, ".visits")


def test_a_wrapper_beside_the_recorder_is_saved_and_a_run_may_stop_recording(tmp_path):
    class Inner(gym.Wrapper):
        def __init__(self, envs):
            super().__init__(envs)
            self.bonus = 0.0

    def make(recorded):
        envs = Inner(ProcgenVectorEnv(2, "bossfight", "easy", 0, 200, 0))
        return ppo_procgen.RecordGames(envs) if recorded else envs

    before = make(recorded=True)
    before.env.bonus = 3.0
    before.reset()
    before.step(np.array([3, 5]))
    frames = before.unwrapped.games.observe()[1]["rgb"]
    recording, plain = (restored(tmp_path, before, make(recorded)) for recorded in (True, False))
    for inner in (recording.env, plain):
        assert inner.bonus == 3.0 and np.array_equal(inner.unwrapped.games.observe()[1]["rgb"], frames)
    checksum = zlib.crc32(frames)
    before.step(np.array([0, 0]))
    assert before.take_steps()["checksums"][1] == checksum


def test_a_wrapper_that_takes_other_steps_than_the_policy_cannot_be_recorded():
    run = SimpleNamespace()
    with pytest.raises(ValueError, match="--save-dataset does not fit"):
        ppo_procgen.Run.record(run, {"actions": np.zeros((32, 4))}, torch.zeros(16, 4))


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
    assert len(stopped) == 3
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


LATE = """
import os, runpy, signal, sys
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.SIGTERM):
        kill(pid, signum)
sys.late = Late()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_signal_while_python_ends_does_not_make_a_finished_run_a_failed_one(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    command = [sys.executable, "late.py", runs.SCRIPT[1], *runs.SMALL, "--total-timesteps", "64"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and "done: " in process.stdout, process.stderr


def test_a_signal_while_pytorch_is_loading_exits_75(tmp_path):
    process = subprocess.Popen([*runs.SCRIPT, *runs.SMALL], cwd=tmp_path)

    def handled():
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
        return int(caught, 16) >> (signal.SIGUSR2 - 1) & 1

    wait_for(handled, process)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 75


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
    assert_one_line(process.stderr, "rolling/model.pt back, which is missing")
    assert runs.final(tmp_path / "copy")["iteration"] == 6


def test_a_second_process_on_the_same_run_fails(tmp_path, monkeypatch):
    endless = ("--total-timesteps", "1000000")
    first = subprocess.Popen([*runs.SCRIPT, *runs.SMALL, *endless], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for((runs.run_dir(tmp_path) / "rolling" / "model.pt").exists, first)
        second = runs.train(tmp_path, "--resume", *endless)
        assert second.returncode == 1
        assert_one_line(second.stderr, runs.XPID, "in use by another process")
        # On a cluster the holder may be about to end: wait, then ask to be run again.
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setattr(ppo_procgen, "LOCK_PATIENCE", 2)
        waiting = runs.train(tmp_path, "--resume", *endless)
        assert waiting.returncode == 75
        assert_one_line(waiting.stderr, "in use by another process, 2 s long")
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

    write_table = ppo_procgen.Run.write_table

    def full(run):
        if len(run.rows) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.table))
        write_table(run)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_procgen.Run, "write_table", full)
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


def test_a_reader_that_has_gone_is_not_a_full_disk(tmp_path):
    command = " ".join([*runs.SCRIPT, *runs.SMALL, "--log-interval", "1", "| head -1"])
    process = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(process.stderr, "whoever read the output has gone", "--resume")
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
