"""A Slurm cluster of one node on the loopback interface, its state in one folder, for the tests of sweep.py.

It needs Debian's packages slurm-wlm and munge, and root, as slurmd starts the jobs. With slurmdbd,
mariadb-server-core and mariadb-client-core it has accounting too, for sacct and a user's limits. As a script it runs
the cluster until it is stopped: python tests/slurm_cluster.py FOLDER prints the SLURM_CONF that sbatch and squeue need.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "setpriv")
ACCOUNTING_PROGRAMS = ("mariadbd", "mariadb-install-db", "my_print_defaults", "slurmdbd", "sacct", "sacctmgr")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize=900
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=3600
KillWait=20
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes={host} PriorityTier=2 MaxTime=INFINITE State=UP
"""
ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=limits
JobAcctGatherType=jobacct_gather/linux
"""
DATABASE_CONFIG = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


def why_not() -> str | None:
    """What keeps the cluster from running here, if anything does."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=search_path())]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)}"
    return "Slurm's daemons are started by root only" if os.getuid() else None


def why_no_accounting() -> str | None:
    """What keeps sacct from working on the cluster, if anything does."""
    missing = [program for program in ACCOUNTING_PROGRAMS if not shutil.which(program, path=search_path())]
    return f"Slurm's accounting is not installed: no {', '.join(missing)}" if missing else None


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"


class Cluster:
    """Started in folder; stop() ends its daemons. Commands need self.environment."""

    def __init__(self, folder: Path, cpus: int = os.cpu_count()):
        folder.chmod(0o700)
        self.folder, self.daemons, self.is_up = folder, [], False
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for one in (a, b, c):
                one.bind(("127.0.0.1", 0))
            ports = [one.getsockname()[1] for one in (a, b, c)]
        host = socket.gethostname().split(".")[0]
        config = CONFIG.format(host=host, ports=ports, folder=folder, cpus=cpus)
        if not why_no_accounting():
            config += ACCOUNTING.format(port=ports[2], folder=folder)
            (folder / "slurmdbd.conf").write_text(DATABASE_CONFIG.format(folder=folder, host=host, port=ports[2]))
            (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "slurm.conf").write_text(config)
        (folder / "ctld").mkdir()
        (folder / "slurmd").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = {name: folder / f"munge.{name}" for name in ("socket", "log", "pid", "seed")}
        munge = ["munged", "--foreground", "--force", f"--socket={files['socket']}", f"--key-file={folder}/munge.key"]
        munge += [f"--log-file={files['log']}", f"--pid-file={files['pid']}", f"--seed-file={files['seed']}"]
        try:
            self.start(munge)
            self.wait(files["socket"].exists)
            if not why_no_accounting():
                self.start_accounting()
            self.start(["slurmctld", "-D", "-i"])
            self.start(["slurmd", "-D", "-N", host])
            self.wait(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T", check=False))
            self.is_up = True
        except BaseException:
            self.stop()
            raise

    def start_accounting(self) -> None:
        """A database server, slurmdbd and an account for the user of the tests."""
        data, database = self.folder / "data", self.folder / "mysqld.sock"
        options = ["--no-defaults", f"--datadir={data}"]
        self.run("mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db")
        self.start(["mariadbd", *options, "--user=root", "--skip-networking", f"--socket={database}"])
        self.wait(database.exists)
        # slurmdbd's library of MySQL finds the socket by this variable.
        self.start(["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(database))
        manager = ["sacctmgr", "--immediate"]
        self.wait(lambda: "test" in self.run(*manager, "add", "cluster", "test", check=False))
        self.run(*manager, "add", "account", "lab", "cluster=test")
        self.run(*manager, "add", "user", "root", "account=lab")

    def start(self, command: list, **environment) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as log:
            command = ["setpriv", "--pdeathsig", "TERM", *command]  # they end with this process, however it ends
            self.daemons.append(
                subprocess.Popen(command, stdout=log, stderr=log, env={**self.environment, **environment})
            )

    def stop(self) -> None:
        if self.is_up:
            self.run("scancel", "--user=root", check=False)
            self.wait(lambda: not self.run("squeue", "-h", check=False))
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command, check=True, cwd=None) -> str:
        """A command's output."""
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=cwd)
        assert not check or result.returncode == 0, result.stderr
        return result.stdout

    def wait(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(path.read_text()[-1000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)

    def jobs(self) -> dict:
        """State, exit code and restarts of every task, such as {"1_2": {"JobState": "COMPLETED", ...}}."""
        tasks = {}
        for line in self.run("scontrol", "show", "job", "--oneliner").splitlines():
            job = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if "ArrayTaskId" in job:
                tasks[f"{job['ArrayJobId']}_{job['ArrayTaskId']}"] = job
        return tasks


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    cluster = Cluster(Path(sys.argv[1]))
    print(f"export SLURM_CONF={cluster.folder / 'slurm.conf'}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    cluster.stop()
