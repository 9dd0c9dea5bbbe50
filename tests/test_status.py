"""`mbgd status` on runs that are finished, running, preempted, crashed, and on what is no run."""

import os
import sys
import time
from pathlib import Path

import pytest

from mbgd.cli.commands import main
from mbgd.runs.status import describe

import small_runs
from own_processes import started_by_user
from processes import eventually

ROOT = Path(__file__).parent.parent


def test_a_finished_and_a_preempted_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_runs.train(tmp_path / "run", stop_at=5)
    found = describe(tmp_path / "run")
    assert found["state"] == "preempted: the same command resumes it"
    assert found["step"] == "5 of 8 (62%)"
    assert found["checkpoint"].startswith("step 5, ")
    small_runs.train(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(["status", str(tmp_path / "run")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    said = capsys.readouterr().out
    for line in ("state       finished", "step        8 of 8 (100%)", "checkpoint  step 8, ", "workers     1\n"):
        assert line in said
    assert "last error" not in said


def test_what_is_no_run_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_a_running_and_a_crashed_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["epochs=null", "steps=200000", "log_every_steps=10", "checkpoint.every_steps=50", f"run.dir={run}"]
    command = [sys.executable, str(ROOT / "train.py"), "workers=2", *settings]
    with started_by_user(command, tmp_path) as process:
        deadline = time.monotonic() + 60
        while not any((run / "checkpoints").glob("step-*")):  # each for a moment: new ones replace it
            assert process.poll() is None
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        found = describe(run)
        assert found["state"].startswith("running: process ")
        assert found["workers"] == f"2 on {os.uname().nodename} (2)"
        assert "steps/s" in found["rate"]
        assert " of 200,000 (" in found["step"]
        assert found["left"]
        assert "times the median's time" in found["slowest"]
    # All are killed; the kernel may still be ending them.
    found = eventually(lambda: None if (now := describe(run))["state"].startswith("running") else now)
    assert found["state"].startswith("ended without a word")
    assert "left" not in found
    with (run / "logs/worker-1.log").open("a") as log:  # as run_or_explain writes it
        log.write("Traceback (most recent call last):\n  File …\nRuntimeError: it broke here\n")
    with (run / "logs/worker-0.log").open("a") as log:
        log.write("mbgd.errors.WorkersLost: worker 1 does not answer any more\n")
    cause = describe(run)["last error"]
    assert cause.startswith(f"worker 1 on {os.uname().nodename}, started ")
    assert cause.endswith(": RuntimeError: it broke here")
