"""Hosts with addresses of their own on one network, as network namespaces, and launch/multinode.sh on them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ADDRESS = "10.77.0.{}"
SLOW_LOADING = """
import time
from pathlib import Path
from mbgd.data import InMemory, digits

class Slow(InMemory):
    def __init__(self, seconds, fast):
        examples = digits("train")
        super().__init__(examples.inputs, examples.targets)
        self.seconds, self.fast = seconds, Path(fast)

    def gather(self, indices):
        if not self.fast.exists():
            time.sleep(self.seconds)
        return super().gather(indices)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network(num_hosts: int) -> Iterator[list[str]]:
    """The names of network namespaces with addresses 10.77.0.1, 10.77.0.2 …, whose device is main0."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    switch, *names = [f"mbgd{os.getpid()}{which}" for which in "sabcdefgh"[: num_hosts + 1]]
    if subprocess.run(["ip", "netns", "add", switch], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, start=1):
            ip("netns", "add", name)
            port = ["type", "veth", "peer", "name", f"port{number}", "netns", switch]
            ip("link", "add", "main0", "netns", name, *port)
            ip("-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", "main0")
            for device in ("lo", "main0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@dataclass
class Cluster:
    """A run on several hosts, with one worker on each. The first host is MAIN_HOST."""

    folder: Path
    hosts: list[str]
    settings: list[str]
    """Overrides of all hosts, beside run.dir."""
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, host: str) -> None:
        """Start this host, perhaps again."""
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "MAIN_HOST": ADDRESS.format(1),
            "RUN_ID": "cut",
            "WORKERS": "1",
            **self.environment,
        }
        # Hosts do not see each other's processes either.
        apart = ["ip", "netns", "exec", host, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = [*apart, str(ROOT / "launch/multinode.sh"), *self.settings, f"run.dir={self.run}"]
        with (self.folder / f"{host}.log").open("a") as log:
            self.processes[host] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def kill(self, host: str) -> None:
        """End all processes of this host by SIGKILL, at once."""
        os.killpg(self.processes[host].pid, signal.SIGKILL)
        self.processes[host].wait()

    def end(self) -> None:
        for host, process in self.processes.items():
            if process.poll() is None:
                self.kill(host)

    def log(self, host: str) -> str:
        return (self.folder / f"{host}.log").read_text()

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl so far."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if condition():
                return
            time.sleep(0.1)
        logs = "\n".join(f"{host}: {self.log(host)[-3000:]}" for host in self.processes)
        pytest.fail(f"{what}: it did not come to that; {self.metrics()[-1:]}\n{logs}")


def weights_sha256(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["weights_sha256"])
