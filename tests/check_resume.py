"""Checks that a training script resumes exactly: for your own forks of ppo_procgen.py.

    python tests/check_resume.py my_procgen.py                               # at tiny sizes, some minutes
    python tests/check_resume.py my_procgen.py --env-id miner --my-coef 0.1  # with arguments of yours

Runs the script once undisturbed, then again and again with SIGTERM or SIGKILL in the middle of something (a rollout, an
update, a write) followed by --resume, and compares everything in the run folders: weights, optimizer, environments,
random generators, progress.csv, the recording. Prints what differs. Exit codes: 0 nothing differs, 1 something does.
"""

import csv
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the scripts do, before PyTorch is loaded
import numpy as np
import torch
from gym_notices.notices import notices as gym_notices

gym_notices.clear()
import procgen
from tqdm import tqdm

# Every run has a process of its own, forked from one that has loaded what takes seconds: PyTorch, what its optimizers
# import, and Procgen's images, which come with the first game (without threads, as these would not survive a fork).
paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # where that process finds this file
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["check_resume", "torch._dynamo", "torch.utils.tensorboard", "tyro", "filelock"])
procgen.ProcgenGym3Env(1, "coinrun", num_threads=0)
# Starting a process also collects the exit codes of those that have ended, which other threads may be waiting for.
STARTING = threading.Lock()

# Six iterations of 32 steps: saved after 2, 4 and 6, archived after 1, 2, 3, 4 and 6. Episodes of bossfight are short.
SIZES = {"num-envs": 4, "num-steps": 8, "num-minibatches": 2, "total-timesteps": 192, "update-epochs": 1}
SIZES |= {"log-interval": 2, "archive-interval": 3, "num-eval-episodes": 2, "env-id": "bossfight"}
# What is counted, and when a process is stopped: at this share of all calls of the undisturbed run.
MOMENTS = (
    ("act", 0.15, signal.SIGKILL),  # a step of the environments
    ("act", 0.7, signal.SIGTERM),
    ("backward", 0.4, signal.SIGKILL),
    ("backward", 0.95, signal.SIGTERM),
    ("replace", 0.0, signal.SIGKILL),  # the renaming of a finished file: the first one,
    ("replace", 0.5, signal.SIGKILL),
    ("replace", 0.8, signal.SIGKILL),
    ("replace", 1.0, signal.SIGKILL),  # and the last
)


def command(script: Path, arguments: list) -> list:
    left_alone = {argument.split("=")[0].lstrip("-").replace("_", "-") for argument in arguments}
    source = script.read_text()  # a fork may do without an argument
    left_alone |= {name for name in SIZES if not re.search(rf"^ +{name.replace('-', '_')}:", source, re.MULTILINE)}
    sizes = [word for name, value in SIZES.items() if name not in left_alone for word in (f"--{name}", str(value))]
    return [str(script.resolve()), *sizes, *arguments, "--resume"]


def run_and_count(words: list, folder: Path, output: Path, what: str, fatal_call: int, signum: int) -> None:
    """Run a script in this process, and print how often each of what is counted was called.

    On a certain call of what is counted, the process gets a signal.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started the fork server may have blocked some
    os.chdir(folder)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # as fast at these sizes, and several run side by side
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and a killed one would leave it behind
    counts = {}

    def counted(name, original):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            if (name, counts[name]) == (what, fatal_call):
                os.kill(os.getpid(), signum)
            return original(*args, **kwargs)

        return call

    os.replace = counted("replace", os.replace)
    torch.Tensor.backward = counted("backward", torch.Tensor.backward)
    procgen.ProcgenGym3Env.act = counted("act", procgen.ProcgenGym3Env.act)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    print(json.dumps(counts), flush=True)


def launch(words: list, folder: Path, what="", fatal_call=0, signum=0) -> SimpleNamespace:
    """Run a script in folder, to its end or its signal. Returns its exit code and what it printed."""
    folder.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        process = PROCESSES.Process(target=run_and_count, args=(words, folder, output.name, what, fatal_call, signum))
        with STARTING:
            process.start()
        multiprocessing.connection.wait([process.sentinel])
        with STARTING:
            process.join()
        return SimpleNamespace(code=process.exitcode, printed=output.read())


def run_undisturbed(script: Path, arguments: list, folder: Path) -> dict:
    """Run a script to its end in folder. Returns how often each of what is counted was called."""
    run = launch(command(script, arguments), folder)
    if run.code:
        sys.exit(f"{script} failed undisturbed:\n{run.printed}")
    return json.loads(run.printed.splitlines()[-1])


def run_disturbed(script: Path, arguments: list, folder: Path, counts: dict, moment: tuple) -> list:
    """Run a script in folder, end it at a moment, resume it to its end. Returns what went wrong."""
    what, share, signum = moment
    words = command(script, arguments)
    run = launch(words, folder, what, max(1, round(share * counts[what])), signum)
    expected = 75 if signum == signal.SIGTERM else -signum
    if run.code != expected:
        return [f"the exit code was {run.code}, not {expected}: {run.printed[-1000:]}"]
    run = launch(words, folder)
    return [f"the resumed run failed with {run.code}: {run.printed[-1000:]}"] if run.code else []


def differences(one, other, name="") -> list:
    """Names of what differs between two trees of dicts, sequences, tensors and plain values."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{name}.{key} is in one only" for key in one.keys() ^ other.keys()]
        return missing + [
            x for key in one.keys() & other.keys() for x in differences(one[key], other[key], f"{name}.{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [x for i, pair in enumerate(zip(one, other)) for x in differences(*pair, f"{name}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and (one == other or (one != one and other != other))
    return [] if same else [name]


def read_run(folder: Path) -> dict:
    """Everything in a run folder, but for clocks and the boundaries of a recording's chunks."""
    (run,) = folder.glob("models/*/*/")
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock" and "tfevents" not in path.name]
    content = {str(path.relative_to(run)): None for path in files if path.suffix != ".npz"}
    for path in files:
        name = str(path.relative_to(run))
        if path.suffix == ".pt":
            content[name] = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            content[name] = json.loads(path.read_text())
        elif path.suffix == ".csv":
            with open(path) as file:
                rows = list(csv.DictReader(file))
            content[name] = [{key: value for key, value in row.items() if key != "charts/SPS"} for row in rows]
    chunks = [dict(np.load(path)) for path in sorted(files) if path.suffix == ".npz"]
    for key in chunks[0] if chunks else ():
        content[f"recording {key}"] = np.concatenate([chunk[key] for chunk in chunks]).tolist()
    return content


def place_of_difference(line: str) -> tuple:
    """Sorts failures first, then the earliest row of progress.csv that differs, then the rest by name."""
    if not line.startswith("differs: "):
        return 0, 0, line
    row = re.match(r"differs: progress\.csv\[(\d+)\]", line)
    return (1, int(row[1]), line) if row else (2, 0, line)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    script, arguments, failed = Path(sys.argv[1]), sys.argv[2:], 0
    with tempfile.TemporaryDirectory() as folder:
        counts = run_undisturbed(script, arguments, Path(folder, "undisturbed"))
        expected = read_run(Path(folder, "undisturbed"))
        print(f"undisturbed: {counts['act']} environment steps, {counts['backward']} backward passes", flush=True)

        def check(moment):
            where = Path(folder, str(MOMENTS.index(moment)))
            wrong = run_disturbed(script, arguments, where, counts, moment)
            return wrong or [f"differs: {name[1:]}" for name in differences(read_run(where), expected)]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = pool.map(check, MOMENTS)
        everything = set()
        for moment, wrong in zip(MOMENTS, results):
            failed += bool(wrong)
            everything.update(wrong)
            print(
                f"{moment[2].name} at {moment[1]:.0%} of {moment[0]}: {'FAILED' if wrong else 'the same'}", flush=True
            )
    if not failed:
        print("every continuation is exact")
        return 0
    print(f"{failed} of {len(MOMENTS)} continuations differ:")
    lines = sorted(everything, key=place_of_difference)
    for line in lines[:20]:
        print(f"    {line}")
    if len(lines) > 20:
        print(f"    and {len(lines) - 20} more")
    print(
        "The usual cause is state that is not in TrainState, or is used through a local variable instead of state.name."
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
