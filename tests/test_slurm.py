"""The specification of sweep.py's sbatch files, tried on a real Slurm, which slurm_cluster.py starts."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import filelock
import pytest
import slurm_cluster
import torch
from conftest import assert_one_line
from test_sweep import PROJECT, TINY, commands, rows, run_sweep, trainers_arguments, write_grid, write_script

import sweep

SIGNALLED = """
import os, signal, sys, time
class Args:
    name: str = ""
    seconds: float = 60
name, seconds = sys.argv[2], float(sys.argv[4])
signal.signal(signal.SIGUSR2, lambda *_: (open(name, "a").write("USR2 "), os._exit(75)))
signal.signal(signal.SIGTERM, lambda *_: (open(name, "a").write("TERM "), time.sleep(1), os._exit(75)))
started = os.path.exists(name)
open(name, "a").write("start ")
time.sleep(1 if started else seconds)
open(name, "a").write("end ")
"""
AT_ONCE = """
import os, signal, sys, time
class Args:
    number: int = 0
signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))
open("started" + sys.argv[2], "a").write("x")
time.sleep(0 if os.path.getsize("started" + sys.argv[2]) > 1 else 60)
"""
EXITING = """
import sys
class Args:
    code: int = 0
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm_cluster.why_not():
        assert not os.environ.get("CI"), f"CI must run the tests on Slurm. {reason}"
        pytest.skip(reason)
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    yield cluster
    del os.environ["SLURM_CONF"]
    cluster.stop()


def submit(folder, grid, *options):
    """Submit a sweep and return its job ids."""
    options = ["--action", "slurm", "--python", sys.executable, "--cpus-per-task", 1, *options, "--submit"]
    result = run_sweep(folder, grid, *options)
    assert result.returncode == 0, result.stderr
    return re.findall(r"as job (\d+)", result.stdout)


FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def ended(cluster, job):
    """Wait until a job's tasks have ended. Returns their states and exit codes by task index."""

    def tasks():
        return [task for task in cluster.jobs().values() if task["ArrayJobId"] == job]

    def all_final():
        return {task["JobState"] for task in tasks()} <= FINAL

    def stay_final():  # a task on its way into the queue may look ended for a moment
        return all_final() and not time.sleep(1) and all_final()

    cluster.wait(stay_final, 240)
    return {int(task["ArrayTaskId"]): (task["JobState"], task["ExitCode"]) for task in tasks()}


def wait_for_requeue(cluster, task):
    cluster.wait(lambda: cluster.jobs()[task]["Reason"] == "BeginTime")


def start_requeued(cluster, task):
    """Let a requeued task start at once; Slurm makes it wait for two minutes."""
    wait_for_requeue(cluster, task)
    time.sleep(2)  # slurmd refuses to start a job in the second in which it ended

    def started():
        cluster.run("scontrol", "update", f"JobId={task}", "StartTime=now", check=False)
        return cluster.jobs()[task]["Reason"] != "BeginTime"

    cluster.wait(started)


def test_a_sweep_runs_to_its_end(cluster, tmp_path):
    (job,) = submit(tmp_path, "smoke", "--job-name", "end_to_end", "--max-parallel", 2)
    assert set(ended(cluster, job).values()) == {("COMPLETED", "0:0")}
    for command in commands(tmp_path, "smoke"):
        words = shlex.split(command)
        run = tmp_path / "models" / words[words.index("--env-id") + 1] / words[-1]
        assert [len(list(run.glob(names))) for names in ("rolling/*.pt", "final/*.pt", "checkpoint/*.pt")] == [1, 1, 3]
        assert len((run / "progress.csv").read_text().splitlines()) == 5
    _, summary, code = rows(tmp_path, "smoke")
    assert code == 0 and summary.startswith("4 configurations, 4 runs: 4 done")
    log = (tmp_path / "slurm/generated/end_to_end/logs" / f"{job}_2.log").read_text()
    for part in (
        f"task {job}_2",
        "host ",
        "GPU ",
        "restart 0",
        commands(tmp_path, "smoke")[1].split(" ", 1)[1],
        "done: ",
    ):
        assert part in log
    assert not commands(tmp_path, "smoke", "--only-missing")


def test_a_task_that_is_warned_is_requeued_and_ends_in_the_same_weights(cluster, tmp_path):
    grid = write_grid(tmp_path, {**TINY, "env_id": ["leaper"], "total_timesteps": [640], "log_interval": [1000]})
    (words,) = [shlex.split(line)[2:] for line in commands(tmp_path, grid)]
    (tmp_path / "uninterrupted").mkdir()
    script = [sys.executable, PROJECT / "ppo_procgen.py", *words]
    subprocess.run(script, cwd=tmp_path / "uninterrupted", check=True, capture_output=True)

    (job,) = submit(tmp_path, grid, "--job-name", "warned")
    cluster.wait(lambda: len(list(tmp_path.glob("models/leaper/*/progress.csv"))))
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_1")
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")}
    assert cluster.jobs()[f"{job}_1"]["Restarts"] == "1"
    log = (tmp_path / "slurm/generated/warned/logs" / f"{job}_1.log").read_text()
    assert (
        "restart 0" in log and "stopped by SIGUSR2" in log and "restart 1" in log and "resumed after iteration" in log
    )
    # Which signal came, and why the task ends.
    assert re.search(r"^== .* \| SIGUSR2: two minutes to the time limit, or someone sent the signal", log, re.MULTILINE)
    assert "== to be requeued, as not everything is finished (restart 0 of at most 100)" in log
    (whole,), (resumed,) = (
        folder.glob("models/leaper/*/final/*.pt") for folder in (tmp_path / "uninterrupted", tmp_path)
    )
    whole, resumed = (torch.load(path, weights_only=True)["model_state_dict"] for path in (whole, resumed))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_failing_command_fails_with_its_code_while_the_others_finish(cluster, tmp_path):
    """An interpreter of several words changes nothing."""
    grid = write_grid(tmp_path, {"code": [3, 0]}, write_script(tmp_path, EXITING))
    (job,) = submit(tmp_path, grid, "--python", f"nice -n 5 {sys.executable}")
    assert ended(cluster, job) == {1: ("FAILED", "3:0"), 2: ("COMPLETED", "0:0")}


@pytest.mark.parametrize("runs_per_task, num_jobs", [(1, 4), (3, 2)])
def test_chunked_and_packed_arrays_run_each_line_once(cluster, tmp_path, runs_per_task, num_jobs):
    grid = write_grid(tmp_path, {"number": list(range(8))}, write_script(tmp_path))
    jobs = submit(tmp_path, grid, "--max-array-size", 3, "--runs-per-task", runs_per_task)
    assert len(jobs) == num_jobs
    for job in jobs:
        assert set(ended(cluster, job).values()) == {("COMPLETED", "0:0")}
    noted = [float(json.loads(line)[1]) for line in (tmp_path / "noted.txt").read_text().splitlines()]
    assert sorted(noted) == list(range(8))
    assert len(list((tmp_path / "slurm/generated/my_grid/logs").iterdir())) == 1 + (8 if runs_per_task == 1 else 3 + 8)


TIMED = """
import os, sys, time
class Args:
    number: int = 0
with open("noted.txt", "a") as file:
    print("start", sys.argv[2], os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"], file=file)
time.sleep(0.5 + int(sys.argv[2]))
with open("noted.txt", "a") as file:
    print("end", sys.argv[2], file=file)
sys.exit(6 if sys.argv[2] == "0" else 0)
"""


def test_a_task_runs_as_many_commands_at_a_time_as_it_is_told(cluster, tmp_path):
    """The others follow, also after one that fails, and take the core and the GPU that are free."""
    grid = write_grid(tmp_path, {"number": [3, 0, 1, 2]}, write_script(tmp_path, TIMED))
    options = ["--runs-per-task", 4, "--side-by-side", 2, "--cpus-per-task", 2]
    (job,) = submit(tmp_path, grid, *options, "--setup", "export CUDA_VISIBLE_DEVICES=3,5")
    assert ended(cluster, job) == {1: ("FAILED", "6:0")}
    lines = (tmp_path / "noted.txt").read_text().splitlines()
    active, most = 0, 0
    for line in lines:
        active += 1 if line.startswith("start") else -1
        most = max(most, active)
    assert most == 2 and len(lines) == 8 and active == 0
    assert [line for line in lines if line.startswith("start")][2:] == ["start 1 1 5", "start 2 1 5"]
    assert {line for line in lines[:2]} == {"start 3 1 3", "start 0 1 5"}


def test_a_signal_ends_the_command_that_runs_and_starts_no_other(cluster, tmp_path):
    grid = write_grid(tmp_path, {"name": ["a", "b"], "seconds": [60]}, write_script(tmp_path, SIGNALLED))
    (job,) = submit(tmp_path, grid, "--runs-per-task", 2, "--side-by-side", 1)
    cluster.wait((tmp_path / "a").exists)
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_1")
    wait_for_requeue(cluster, f"{job}_1")
    assert (tmp_path / "a").read_text() == "start USR2 " and not (tmp_path / "b").exists()
    (tmp_path / "b").touch()  # then it is short
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")}
    assert (tmp_path / "b").read_text() == "start end "


def test_a_killed_command_is_explained(cluster, tmp_path):
    script = "import os\nclass Args:\n    code: int = 0\nos.kill(os.getpid(), 9)"
    (job,) = submit(tmp_path, write_grid(tmp_path, {"code": [0]}, write_script(tmp_path, script)))
    assert ended(cluster, job) == {1: ("FAILED", "137:0")}
    last = (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_1.log").read_text().splitlines()[-1]
    assert "exit code 137 of command 1: killed, usually because memory ran out; raise --mem" in last


def test_a_packed_task_passes_signals_on_and_fails_with_the_code_of_a_command(cluster, tmp_path):
    script = write_script(tmp_path, SIGNALLED)
    grid = write_grid(tmp_path, {"name": ["a", "b"], "seconds": [60]}, script, "packed")
    (job,) = submit(tmp_path, grid, "--runs-per-task", 2)
    cluster.wait(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_1")
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")}
    assert [(tmp_path / name).read_text() for name in "ab"] == ["start USR2 start end "] * 2

    (job,) = submit(
        tmp_path, write_grid(tmp_path, {"code": [0, 7]}, write_script(tmp_path, EXITING)), "--runs-per-task", 2
    )
    assert ended(cluster, job) == {1: ("FAILED", "7:0")}


def test_a_command_that_ends_with_the_signal_is_requeued(cluster, tmp_path):
    """Signal and end come together: here bash's wait, interrupted by a trap, returned 255."""
    grid = write_grid(tmp_path, {"number": list(range(8))}, write_script(tmp_path, AT_ONCE))
    (job,) = submit(tmp_path, grid, "--runs-per-task", 4)
    cluster.wait(lambda: len(list(tmp_path.glob("started*"))) == 8)
    for task in (1, 2):
        cluster.run("scancel", "--signal=USR2", "--full", f"{job}_{task}")
    for task in (1, 2):
        start_requeued(cluster, f"{job}_{task}")
    assert set(ended(cluster, job).values()) == {("COMPLETED", "0:0")}


def test_of_a_packed_task_the_stopped_command_goes_on_and_the_failed_one_decides(cluster, tmp_path):
    script = "import os, sys\nclass Args:\n    code: int = 0\ncode = int(sys.argv[2])\n"
    script += "stop = code == 0 and not os.path.exists('stopped')\nopen('stopped', 'w') if stop else None\n"
    script = write_script(tmp_path, script + "sys.exit(75 if stop else code)\n")
    (job,) = submit(tmp_path, write_grid(tmp_path, {"code": [0, 4]}, script), "--runs-per-task", 2)
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("FAILED", "4:0")}
    logs = tmp_path / "slurm/generated/my_grid/logs"
    for name in (f"{job}_1.log", f"{job}_1.1.log", f"{job}_1.2.log"):
        assert [f"task {job}_1 | host " in line and "restart 1" in line for line in open(logs / name)].count(True) == 1


def test_a_task_without_a_command_fails(cluster, tmp_path):
    grid = write_grid(tmp_path, {"code": [0]}, write_script(tmp_path, EXITING))
    (job,) = submit(tmp_path, grid, "--sbatch-arg", "array=1-2")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0"), 2: ("FAILED", "1:0")}


def test_setup_may_set_shell_options(cluster, tmp_path):
    grid = write_grid(tmp_path, {"code": [3, 0]}, write_script(tmp_path, EXITING))
    (job,) = submit(tmp_path, grid, "--runs-per-task", 2, "--setup", "set -euo pipefail")
    assert ended(cluster, job) == {1: ("FAILED", "3:0")}
    log = (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_1.log").read_text()
    assert "exit code 3 of command 1" in log and "exit code 0 of command 2" in log and "setup" not in log


@pytest.mark.parametrize("line", ["source nothing/activate", "exit 9", "cd /nowhere"])
def test_a_setup_line_that_fails_ends_the_task_and_is_named(cluster, tmp_path, line):
    grid = write_grid(tmp_path, {"code": [0]}, write_script(tmp_path, EXITING))
    (job,) = submit(tmp_path, grid, "--setup", "export A=1", "--setup", line, "--setup", "export B=1")
    assert {index: state for index, (state, _) in ended(cluster, job).items()} == {1: "FAILED"}
    first, *_, last = (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_1.log").read_text().splitlines()
    assert f"task {job}_1 | host " in first
    assert re.fullmatch(rf"== setup failed with exit code \d+: {line}", last)


def test_a_signal_during_setup_is_not_lost(cluster, tmp_path):
    grid = write_grid(tmp_path, {"code": [0]}, write_script(tmp_path, EXITING))
    setup = f"[[ ${{SLURM_RESTART_COUNT:-0}} == 1 ]] || {{ touch {tmp_path}/setting_up; sleep 3; }}"
    (job,) = submit(tmp_path, grid, "--setup", setup)
    cluster.wait((tmp_path / "setting_up").exists)
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_1")
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")}


ENVIRONMENT = """
import os, sys
class Args:
    number: int = 0
names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_TAGS")
with open("noted" + sys.argv[2], "a") as file:
    print(*map(os.environ.get, names), file=file)
"""


def test_threads_gpus_and_tags_are_those_of_the_task(cluster, tmp_path, monkeypatch):
    """Without --cpus-per-task Slurm gives a task one core here, however many the node, or a job that submits, has."""
    for name, value in {"OMP_NUM_THREADS": "9", "SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script = write_script(tmp_path, ENVIRONMENT)
    subprocess.run(
        "git init -q && git add . && git -c user.name=a -c user.email=b commit -qm c", shell=True, cwd=tmp_path
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    gpus = ["--setup", "export CUDA_VISIBLE_DEVICES=3,5"]
    for name, numbers, options, expected in (
        ("plain", [0], [], ["1 None plain"]),
        ("two", [0], ["--cpus-per-task", 2, *gpus], ["2 3,5 two"]),
        ("own", [0], ["--setup", "export OMP_NUM_THREADS=7", "--setup", "export WANDB_TAGS=mine"], ["7 None mine,own"]),
        (
            "packed",
            [0, 1, 2],
            ["--cpus-per-task", 2, "--runs-per-task", 3, *gpus],
            [f"1 {x} packed" for x in (3, 5, 3)],
        ),
    ):
        grid = write_grid(tmp_path, {"number": numbers}, script)
        options = ["--action", "slurm", "--python", sys.executable, "--job-name", name, *options, "--submit"]
        result = run_sweep(tmp_path, grid, *options)
        assert result.returncode == 0, result.stderr
        (job,) = re.findall(r"as job (\d+)", result.stdout)
        assert set(ended(cluster, job).values()) == {("COMPLETED", "0:0")}
        noted = [(tmp_path / f"noted{number}").read_text().split("\n")[-2] for number in numbers]
        assert noted == [f"{line},{commit.strip()}" for line in expected]
        assert "restart 0 of" in (tmp_path / "slurm/generated" / name / "logs" / f"{job}_1.log").read_text()


IMPORTING = """
import os, time
class Args:
    code: int = 0
if not os.path.exists("importing"):
    open("importing", "w").close()
    time.sleep(60)
"""


def test_a_signal_before_a_script_is_ready_is_a_stop(cluster, tmp_path):
    grid = write_grid(tmp_path, {"code": [0]}, write_script(tmp_path, IMPORTING))
    (job,) = submit(tmp_path, grid)
    cluster.wait((tmp_path / "importing").exists)
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_1")
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")}
    assert "exit code 140" in (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_1.log").read_text()


def test_a_run_that_is_in_use_is_tried_again(cluster, tmp_path):
    """A job that was submitted twice, or whose node died, ends in a requeue, not in a failure."""
    script = PROJECT.joinpath("ppo_procgen.py").read_text().replace("LOCK_PATIENCE = 600", "LOCK_PATIENCE = 1")
    grid = {**TINY, "num_eval_episodes": [1], "total_timesteps": [64], "xpid": ["x"]}
    grid = write_grid(tmp_path, grid, write_script(tmp_path, script, "ppo_procgen.py"))
    (tmp_path / "models/coinrun/x_0").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "models/coinrun/x_0/.lock"):
        (job,) = submit(tmp_path, grid)
        wait_for_requeue(cluster, f"{job}_1")
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")}
    log = (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_1.log").read_text()
    assert "in use by another process" in log and "exit code 75" in log and "done: " in log


def test_restarts_are_capped(cluster, tmp_path):
    grid = write_grid(tmp_path, {"code": [75]}, write_script(tmp_path, EXITING))
    (job,) = submit(tmp_path, grid, "--max-restarts", 1)
    start_requeued(cluster, f"{job}_1")
    assert ended(cluster, job) == {1: ("FAILED", "75:0")}
    assert cluster.jobs()[f"{job}_1"]["Restarts"] == "1"


def test_a_requeue_that_is_refused_says_how_to_go_on(cluster, tmp_path):
    grid = write_grid(tmp_path, {"code": [0, 75]}, write_script(tmp_path, EXITING))
    (job,) = submit(tmp_path, grid, "--sbatch-arg", "no-requeue")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0"), 2: ("FAILED", "75:0")}
    last = (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_2.log").read_text().splitlines()[-1]
    assert last == "== not requeued; to continue: sbatch --array=2 slurm/generated/my_grid/array.sbatch"


def test_a_cancelled_task_stays_cancelled_and_a_preempted_one_comes_back(cluster, tmp_path):
    grid = write_grid(
        tmp_path, {"name": ["cancelled", "preempted"], "seconds": [60]}, write_script(tmp_path, SIGNALLED)
    )
    (job,) = submit(tmp_path, grid)
    cluster.wait(lambda: (tmp_path / "preempted").exists() and (tmp_path / "cancelled").exists())
    cluster.run("scancel", f"{job}_1")
    cluster.wait(lambda: cluster.jobs()[f"{job}_1"]["JobState"] == "CANCELLED")
    cluster.run(
        "sbatch", "--partition=high", f"--cpus-per-task={os.cpu_count()}", "--output=/dev/null", "--wrap", "sleep 1"
    )
    start_requeued(cluster, f"{job}_2")
    assert {index: state for index, (state, _) in ended(cluster, job).items()} == {1: "CANCELLED", 2: "COMPLETED"}
    log = (tmp_path / "slurm/generated/my_grid/logs" / f"{job}_1.log").read_text()
    assert "exit code 75" in log and "requeue" not in log
    assert "SIGTERM: the task is cancelled or preempted, or its time is up" in log
    assert (tmp_path / "preempted").read_text().split()[-2:] == ["start", "end"]


def test_a_collection_waits_for_a_training_that_is_requeued_and_for_one_that_fails(cluster, tmp_path):
    """With afterany. With afterok a failed task would make it wait for ever."""
    once = "import os, sys\nclass Args:\n    code: int = 0\n"
    once += "sys.exit(0 if os.path.exists('once') else open('once', 'w').close() or 75)"
    first = write_grid(tmp_path, {"code": [0]}, write_script(tmp_path, once, "once.py"), "first")
    fails = write_grid(tmp_path, {"code": [1]}, write_script(tmp_path, EXITING), "fails")
    after = write_grid(tmp_path, {"code": [0]}, tmp_path / "note.py", "after")
    (first_job,), (failing_job,) = submit(tmp_path, first), submit(tmp_path, fails)
    (job,) = submit(tmp_path, after, "--dependency", f"afterany:{first_job}:{failing_job}")
    (never,) = submit(tmp_path, after, "--job-name", "never", "--dependency", f"afterok:{failing_job}")
    wait_for_requeue(cluster, f"{first_job}_1")
    assert ended(cluster, failing_job) == {1: ("FAILED", "1:0")}
    waiting = [task for task in cluster.jobs().values() if task["ArrayJobId"] == job]
    assert [(task["JobState"], task["Reason"]) for task in waiting] == [("PENDING", "Dependency")]
    start_requeued(cluster, f"{first_job}_1")
    assert ended(cluster, job) == {1: ("COMPLETED", "0:0")} == ended(cluster, first_job)
    cluster.wait(lambda: "DependencyNeverSatisfied" in cluster.run("squeue", "-h", "-j", never, "-o", "%r"))
    cluster.run("scancel", never)


@pytest.fixture
def accounting(cluster):
    if reason := slurm_cluster.why_no_accounting():
        assert not os.environ.get("CI"), f"CI must run the tests of Slurm's accounting. {reason}"
        pytest.skip(reason)
    return cluster


def test_status_shows_why_runs_stopped(accounting, tmp_path):
    """Of a run with two tasks the last one counts. One task waits, and has no log; another sweep's are not ours."""
    script = trainers_arguments() + "import sys, time\n"
    script += "print('a last line', flush=True)\nsys.exit(4) if 'maze' in sys.argv else time.sleep(300)\n"
    script = write_script(tmp_path, script, "ppo_procgen.py")
    (tmp_path / "another").mkdir()
    grid = write_grid(tmp_path, {"env_id": ["maze", "miner", "ninja"]}, script)
    options = ["--max-parallel", 1, "--max-array-size", 10]
    (another,) = submit(tmp_path / "another", grid, *options)
    accounting.run("scancel", another)
    (first,) = submit(tmp_path, grid, *options)
    ended_tasks = f"{first}_1"
    accounting.wait(lambda: accounting.jobs().get(ended_tasks, {}).get("JobState") == "FAILED")
    accounting.wait(lambda: accounting.jobs().get(f"{first}_2", {}).get("JobState") == "RUNNING")

    def shown():
        lines = run_sweep(tmp_path, grid, "--action", "status", "--verbose").stdout.splitlines()
        return [line.split(": ", 1)[1] for line in lines if line.startswith(("maze-", "miner-", "ninja-"))]

    log = f"slurm/generated/my_grid/logs/{first}"
    failed = f"not started; Slurm task {first}_1 FAILED; {log}_1.log: a last line"
    accounting.wait(lambda: shown()[0] == failed)
    assert shown()[1] == f"running; Slurm task {first}_2 RUNNING; {log}_2.log: a last line"
    assert shown()[2] == f"not started; Slurm task {first}_3 PENDING (JobArrayTaskLimit); no log"
    accounting.run("scancel", first)
    accounting.wait(lambda: "CANCELLED by 0" in shown()[1] and "CANCELLED by 0" in shown()[2])
    again = accounting.run("sbatch", "--parsable", "--array=1", "slurm/generated/my_grid/array.sbatch", cwd=tmp_path)
    ended(accounting, again.strip())
    accounting.wait(lambda: shown()[0].startswith(f"not started; Slurm task {again.strip()}_1 FAILED"))


def test_a_full_queue_is_explained(accounting, tmp_path):
    grid = write_grid(tmp_path, {"code": [0, 1, 2, 3]}, write_script(tmp_path, EXITING))
    user = ["sacctmgr", "--immediate", "modify", "user", "root", "set"]
    accounting.run(*user, "MaxSubmitJobs=3")
    try:
        options = ["--action", "slurm", "--max-array-size", 3, "--python", sys.executable]
        hold = ["--sbatch-arg", "hold"]
        result = run_sweep(tmp_path, grid, *options, *hold, "--submit")
        (job,) = re.findall(r"as job (\d+)", result.stdout)
        accounting.run("scancel", job)
    finally:
        accounting.run(*user, "MaxSubmitJobs=-1")
    assert result.returncode == 1
    second = "slurm/generated/my_grid/array_2.sbatch"
    assert_one_line(result.stderr, f"sbatch {second} failed", "MaxSubmitJobs", "wait until some have ended")
    assert result.stderr.strip().endswith(f"To submit what is left: sbatch {second}")


def test_names_the_largest_array(cluster, tmp_path):
    assert sweep.ask_max_array_size() == 900
