"""launch/multinode.sh on two hosts with addresses of their own (network namespaces), of which one is cut off."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from own_processes import MARK, listening, marked

ROOT = Path(__file__).parent.parent
OVERRIDES = ["averaging=reproducible", "batch.size=97", "steps=60", "log_every_steps=1", "model.dropout=0.2"]
SLOW_LOADING = """
import time
from mbgd.data import InMemory, digits

class Slow(InMemory):
    def __init__(self):
        examples = digits("train")
        super().__init__(examples.inputs, examples.targets)

    def gather(self, indices):
        time.sleep(0.02)
        return super().gather(indices)
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces with addresses 10.77.0.1 and 10.77.0.2."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"mbgd{os.getpid()}{which}" for which in "ab"]
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "main0", "netns", names[0], "type", "veth", "peer", "name", "main0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "main0")
            for device in ("lo", "main0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def start(host: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "HOSTS": "1:2",
        "MAIN_HOST": "10.77.0.1",
        "RUN_ID": "cut",
        "KEY_FILE": str(folder / "key"),
        MARK: str(folder),
        "WORKERS": "1",
    }
    log = (folder / f"{host}.log").open("w")
    # Two hosts do not see each other's processes either.
    apart = ["ip", "netns", "exec", host, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = [*apart, str(ROOT / "launch/multinode.sh"), *OVERRIDES, *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_when_one_host_is_cut_off_the_other_goes_on_to_the_same_bits(tmp_path: Path, hosts: list[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *OVERRIDES, f"run.dir={whole}"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    (tmp_path / "slow.py").write_text(SLOW_LOADING)
    settings = [f"run.dir={cut}", "checkpoint.every_steps=5", "backend.timeout_seconds=6"]
    settings += ["data.train._target_=slow.Slow", "~data.train.split"]
    key = "a secret of both hosts"
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o600)
    processes = [start(host, tmp_path, *settings) for host in hosts]
    try:
        wait_for(lambda: 20 in steps(cut), tmp_path)
        ours = marked(tmp_path)
        assert listening(ours) == {"10.77.0.1", "10.77.0.2"}  # the store and gloo: on this network alone
        assert not [pid for pid in ours if key in Path(f"/proc/{pid}/cmdline").read_text()]
        ip("-n", hosts[1], "link", "set", "main0", "down")
        wait_for((cut / "summary.json").exists, tmp_path)
        assert processes[0].wait(timeout=60) == 0
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    log = (tmp_path / f"{hosts[0]}.log").read_text()
    assert "for 2 workers" in log
    assert "reproducible over gloo; not through shared memory: workers 0 and 1 are on different hosts" in log
    assert re.search("worker [01] does not answer any more", log)  # whichever rank the other host was given
    assert "for 1 worker\n" in log.split("resume      step")[1]
    hashes = [json.loads((run / "summary.json").read_text())["weights_sha256"] for run in (whole, cut)]
    assert hashes[0] == hashes[1]


def steps(run: Path) -> set[int]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return set()
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {json.loads(line)["step"] for line in lines}


def wait_for(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    pytest.fail(f"it did not come to that\n{logs}")
