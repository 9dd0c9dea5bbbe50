"""Whoever starts workers is killed: none of them is left, however early it happens."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mbgd.workers.parent import PARENT

from own_processes import marked, started_by_user
from processes import eventually

ROOT = Path(__file__).parent.parent
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
COMMANDS = {"torchrun": [*TORCHRUN, str(ROOT / "train.py")], "launch/local.sh": [str(ROOT / "launch/local.sh")]}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel tells nobody")


@pytest.mark.parametrize(
    ("launcher", "seconds"), [("torchrun", 0.1), ("torchrun", 2.0), ("launch/local.sh", 0.0), ("launch/local.sh", 4.0)]
)
def test_workers_end_with_torchrun_killed_in_the_first_seconds(tmp_path: Path, launcher: str, seconds: float) -> None:
    command = [*COMMANDS[launcher], "steps=1000000", "run.dir=run", "backend=gloo"]
    with started_by_user(command, tmp_path, {"WORKERS": "2"}) as process:
        eventually(lambda: len(marked(tmp_path)) >= 3, 60)  # torchrun and two workers
        time.sleep(seconds)
        process.kill()
        process.wait()
        eventually(lambda: not marked(tmp_path), 60)


def test_a_worker_whose_parent_has_ended_before_it_asks_ends_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, str(ROOT / "train.py"), "steps=0"]
    environment = os.environ | {PARENT: str(gone.pid)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "error: the process that started this worker has ended\n"
    assert not list(tmp_path.iterdir())


def test_a_wrapper_between_parent_and_worker_is_no_end(tmp_path: Path) -> None:
    check = "import os, sys; from mbgd.workers.parent import *; end_with_parent(); sys.exit(PARENT in os.environ)"
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", check]
    environment = os.environ | {PARENT: str(os.getpid()), "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0


@pytest.mark.parametrize("ignored", [True, False], ids=["nohup", "terminal"])
def test_a_closed_terminal_saves_unless_it_is_ignored(tmp_path: Path, ignored: bool) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "steps=1000000", "run.dir=run", "log_every_steps=10"]
    metrics = tmp_path / "run/metrics.jsonl"
    with started_by_user([*(["nohup"] if ignored else []), *command], tmp_path) as process:
        eventually(lambda: metrics.exists() and metrics.stat().st_size, 60)
        process.send_signal(signal.SIGHUP)
        if ignored:
            time.sleep(1)
            assert process.poll() is None
        else:
            assert process.wait(60) == 75
            assert list((tmp_path / "run/checkpoints").glob("step-*/manifest.json"))
