"""Runs of the scripts in this process or another, and what to compare of them.

The scripts come before PyTorch, as they set how long OpenMP's threads spin.
"""

import contextlib
import csv
import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import collect_procgen
import ppo_procgen

# isort: split
import torch
from check_resume import differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

torch.set_num_threads(1)  # as fast at the sizes of the tests, and other processes find a core
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that a test starts
# Of this process, which plays the script a hundred times, the answers stay the same, and take a third of a second.
ppo_procgen.describe_script = functools.cache(ppo_procgen.describe_script)
collect_procgen.versions = functools.cache(collect_procgen.versions)


def run_main(module, arguments, folder):
    """Run a script's main() in folder with these arguments, in this process; return it like a finished one."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    handlers = {signum: signal.getsignal(signum) for signum in ppo_procgen.STOP_SIGNALS}
    folder_before, argv_before = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = [module.__name__ + ".py", *arguments]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = module.main() or 0
    except SystemExit as exit:
        code = exit.code
    finally:
        os.chdir(folder_before)
        sys.argv = argv_before
        ppo_procgen.signals_received.clear()
        collect_procgen.signals_received.clear()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


# SMALL TRAININGS

SCRIPT = [sys.executable, str(ROOT / "ppo_procgen.py")]
XPID = "bossfight-easy-200-ppo-lr0.0005-epoch1-mb2-v0.5-ha0.01-num_envs4-num_steps16_0"
# Six iterations of 64 steps. Saved after 2, 4 and 6; archived after 1, 2, 3, 4 and 6. Episodes of bossfight are short.
SMALL = "--env-id bossfight --num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 1 --no-cuda".split()
SMALL += "--total-timesteps 384 --log-interval 2 --archive-interval 3 --num-eval-episodes 2".split()
# Three iterations of 160 steps, with no default that has a part in them. With this seed, episodes end within the first
# rollout and in the last step of the second one.
DODGEBALL = "--env-id dodgeball --distribution-mode hard --seed 8 --start-level 10 --num-levels 40".split()
DODGEBALL += "--num-envs 8 --num-steps 20 --total-timesteps 320 --num-minibatches 2 --update-epochs 2".split()
DODGEBALL += "--learning-rate 0.001 --gamma 0.9 --norm-reward-gamma 0.7 --gae-lambda 0.8 --clip-coef 0.01".split()
DODGEBALL += "--ent-coef 0.05 --vf-coef 0.7".split()
DODGEBALL += (
    "--max-grad-norm 0.05 --adam-eps 0.001 --hidden-size 64 --num-eval-episodes 1 --archive-interval 100".split()
)
DODGEBALL += ["--no-cuda", "--save-dataset"]


def train(folder, *more):
    """Run the script in folder, in this process, which has PyTorch and Procgen's images loaded already."""
    return run_main(ppo_procgen, [*SMALL, *more], folder)


def run_dir(folder, xpid=XPID):
    return folder / "models" / "bossfight" / xpid


def load(path):
    return torch.load(path, weights_only=True)


def final(folder, xpid=XPID):
    (path,) = run_dir(folder, xpid).glob("final/*.pt")
    return load(path)


def progress(folder, xpid=XPID):
    """progress.csv as a list of dicts, without the speed, which is a matter of the clock."""
    with open(run_dir(folder, xpid) / "progress.csv") as file:
        return [{key: value for key, value in row.items() if key != "charts/SPS"} for row in csv.DictReader(file)]


def same(a, b):
    return not differences(a, b)


def assert_same_run(folder, reference, xpid=XPID):
    """The run in folder has left what the reference has: the same names, states and numbers, and nothing else."""

    def names(root):
        return {str(path.relative_to(root)) for path in root.rglob("*") if "tfevents" not in path.name}

    assert names(run_dir(folder, xpid)) == names(run_dir(reference))
    for path in run_dir(reference).rglob("*.pt"):
        ours, theirs = load(run_dir(folder, xpid) / path.relative_to(run_dir(reference))), load(path)
        for state in (ours, theirs):
            state.pop("args"), state.pop("xpid"), state.pop("machine", None)
        assert not differences(ours, theirs), path.name
    assert progress(folder, xpid) == progress(reference)
    ours, theirs = scalars(folder, xpid), scalars(reference)
    assert ours.keys() == theirs.keys()
    for tag in ours.keys() - {"charts/SPS"}:
        assert ours[tag] == theirs[tag], tag


def scalars(folder, xpid=XPID):
    """TensorBoard's scalars as it would show them: {tag: [(step, value), ...]}."""
    accumulator = EventAccumulator(str(run_dir(folder, xpid)), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}
