"""What the test files share."""

import os
import shutil
import signal
import time

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the scripts would leave it ignored

import check_resume
import pytest
import runs
from runs import run_main

import collect_procgen
import ppo_procgen

# The files as they are begun, the longest first, so that no process is left alone with one at the end. Others follow.
ORDER = "slurm resume ppo_procgen continued replay checkpoints collect_procgen verify sweep fork".split()


def pytest_xdist_auto_num_workers(config):
    """A process for each core, 4 at most, as each loads and trains anew; one for Slurm's tests, which often wait."""
    with_slurm = shutil.which("slurmctld") and "test_slurm" not in str(config.getoption("ignore"))
    return min(4, len(os.sched_getaffinity(0))) + bool(with_slurm)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.stem, len(ORDER)))


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
def recording(starpilot, tmp_path_factory):
    """The twelve episodes of `dataset` without their frames."""
    folder = tmp_path_factory.mktemp("recording") / "r"
    assert collect(folder, starpilot, "--num-episodes", "12", "--no-frames").returncode == 0
    return folder


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A folder with a run of six iterations that nothing disturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = check_resume.launch([runs.SCRIPT[1], *runs.SMALL], folder)
    assert process.code == 0, process.printed
    (folder / "printed").write_text(process.printed)
    return folder


@pytest.fixture(scope="session")
def dodgeball(tmp_path_factory):
    """A folder with two of the three iterations."""
    folder = tmp_path_factory.mktemp("dodgeball")
    process = run_main(ppo_procgen, runs.DODGEBALL, folder)
    assert process.returncode == 0, process.stderr
    return folder
