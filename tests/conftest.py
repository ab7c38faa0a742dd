"""What the test files share. ppo_procgen comes before PyTorch, as it sets how long OpenMP's threads spin."""

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import collect_procgen
import ppo_procgen

ppo_procgen.torch.set_num_threads(1)  # as fast at the sizes of the tests, and other processes find a core
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that a test starts
# Of this process, which plays the script a hundred times, the answers stay the same, and take a third of a second.
ppo_procgen.describe_script = functools.cache(ppo_procgen.describe_script)
collect_procgen.versions = functools.cache(collect_procgen.versions)


def run_main(module, arguments, folder):
    """Run a script's main() in folder with these arguments, in this process; return it like a finished one."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    handlers = {signum: signal.getsignal(signum) for signum in ppo_procgen.STOP_SIGNALS}
    folder_before, argv_before, hook_before = Path.cwd(), sys.argv, threading.excepthook
    os.chdir(folder)
    sys.argv = [module.__name__ + ".py", *arguments]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = module.main() or 0
    except SystemExit as exit:
        code = exit.code
    finally:
        os.chdir(folder_before)
        sys.argv, threading.excepthook = argv_before, hook_before
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function from a game to a checkpoint after two small iterations, trained when it is first asked for."""
    checkpoints = {}

    def checkpoint(env_id):
        if env_id not in checkpoints:
            folder = tmp_path_factory.mktemp(env_id)
            sizes = (
                "--num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 128 --num-eval-episodes 2".split()
            )
            process = run_main(ppo_procgen, ["--env-id", env_id, *sizes, "--no-cuda"], folder)
            assert process.returncode == 0, process.stderr
            (checkpoints[env_id],) = folder.glob(f"models/{env_id}/*/final/*.pt")
        return checkpoints[env_id]

    return checkpoint


def collect(folder, checkpoint, *more, num_envs=4):
    command = ["--checkpoint", str(checkpoint), "--dataset-saving-dir", str(folder), "--no-cuda"]
    return run_main(collect_procgen, [*command, "--num-envs", str(num_envs), *more], folder.parent)


@pytest.fixture(scope="session")
def starpilot(trained):
    return trained("starpilot")


@pytest.fixture(scope="session")
def miner(trained):
    return trained("miner")


@pytest.fixture(scope="module")
def recording(starpilot, tmp_path_factory):
    """The twelve episodes of `dataset` without their frames."""
    folder = tmp_path_factory.mktemp("recording") / "r"
    assert collect(folder, starpilot, "--num-episodes", "12", "--no-frames").returncode == 0
    return folder


@pytest.fixture(scope="module")
def dataset(starpilot, tmp_path_factory):
    """Twelve episodes of starpilot from four games."""
    folder = tmp_path_factory.mktemp("dataset") / "starpilot"
    process = collect(folder, starpilot, "--num-episodes", "12")
    assert process.returncode == 0, process.stderr
    return folder


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def assert_one_line(stderr, *parts):
    assert len(stderr.strip().splitlines()) == 1, stderr
    for part in parts:
        assert part in stderr
