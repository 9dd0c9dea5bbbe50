"""A real SLURM of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MessageTimeout=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
SECONDS_TO_CLEAN_UP = 15
"""SLURM lets a job that is queued again wait for two minutes. If it is made to start while its nodes still report the
end of the start before, srun hangs, or the job ends with "credential revoked" (seen with 22.05)."""
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")


class Slurm:
    """The cluster; `environment` points SLURM's commands to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kill the node's daemon and everything that it has started."""
        # A job's processes have no other mark; slurmstepd's own children are in sessions of their own.
        steps = [pid for pid, text in _environments() if b"SLURMD_NODENAME=" + name.encode() in text.split(b"\0")]
        self.stop(name)
        for pid in [*_children_named("slurmstepd", name), *steps]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, name: str) -> None:
        self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED."""
        return dict(one.split("=", 1) for one in self.call("scontrol", "show", "job", job).split() if "=" in one)[
            "JobState"
        ]

    def start_again(self, job: str) -> None:
        """Wait until the job that is queued again runs, sooner than SLURM by itself would start it."""
        time.sleep(SECONDS_TO_CLEAN_UP)
        deadline = time.monotonic() + 120
        while self.state(job) != "RUNNING":
            assert time.monotonic() < deadline, self.call("squeue", "--all")
            with suppress(AssertionError):  # it has just started by itself
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.2)

    def num_idle(self) -> int:
        """Number of nodes that are ready and without a job."""
        command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return int(done.stdout.strip() or "0") if done.returncode == 0 else 0

    def end(self) -> None:
        with suppress(Exception):
            self.call("scancel", "--user=root")
            time.sleep(1)
        for node in ("n1", "n2"):
            if node in self._daemons:
                self.lose_node(node)
        for name in list(self._daemons):
            self.stop(name)


def _environments() -> Iterator[tuple[int, bytes]]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes()


def _children_named(name: str, node: str) -> list[int]:
    """Processes of this name that the node's daemon has started; a daemon's name is in their environment or not."""
    return [pid for pid, text in _environments() if _name(pid) == name and f"SLURMD_NODENAME={node}".encode() in text]


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Skips where SLURM is not installed, or its daemons may not start: apt install slurm-wlm munge, as root."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(
            f"a SLURM cluster needs root and Debian's slurm-wlm and munge; missing: {', '.join(missing) or 'root'}"
        )
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (folder / "state").mkdir(parents=True)
    for name in ("spool-n1", "spool-n2"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    values = {"host": host, "folder": folder, "port": ports[0], "port_1": ports[1], "port_2": ports[2]}
    (folder / "slurm.conf").write_text(CONF.format(**values))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    slurm = Slurm(folder)
    try:
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed", "log")]
        slurm.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        deadline = time.monotonic() + 30
        while not (folder / "munge.socket").exists():
            assert time.monotonic() < deadline, (folder / "munged.out").read_text()
            time.sleep(0.05)
        slurm.start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            slurm.start_node(node)
        while slurm.num_idle() < 2:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)
        yield slurm
    finally:
        slurm.end()
