"""Seconds without a step after a worker is killed, with recovery=continue and with a restart of all workers.

`python benchmarks/recovery.py`. Each training is a fresh start of `mbgd train` on the digits, or with a model of
6.4 million parameters; a worker is killed with SIGKILL, and the time is taken between the last line of metrics.jsonl
before it and the first line of a later step. A restart resumes from a snapshot of the newest step in memory
(checkpoint.memory_every_steps=1), so it loses no more than a step either.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import publish

WORKS = {
    "digits MLP": ["epochs=1000", "batch.size=64"],
    "6.4 M MLP": ["epochs=1000", "batch.size=128", "model.hidden=[2048,2048,1024]", "evaluation.every_steps=100000"],
}
WAYS = {
    "recovery=continue": ["recovery=continue"],
    "--max-restarts=1": ["--max-restarts=1", "checkpoint.memory_every_steps=1"],
}
SECONDS = 120


def gap(work: str, way: str, num_workers: int, victim: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mbgd", "train", f"workers={num_workers}", "averaging=reproducible"]
        command += [*WORKS[work], *WAYS[way], "log_every_steps=1", "tracking.report=false", "run.dir=run"]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            metrics = Path(folder, "run/metrics.jsonl")
            wait_for(metrics, 20)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[victim]), signal.SIGKILL)
            killed = time.monotonic()
            last = newest(metrics)
            wait_for(metrics, last + 2)  # the killed worker may have shared in one more step
            return time.monotonic() - killed
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def newest(metrics: Path) -> int:
    """The step of the last whole line; 0 without one."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while newest(metrics) < step:
        assert time.monotonic() < deadline, f"no step {step} within {SECONDS} s"
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines = [f"{'':<13}{'lost':<16}{'':<20}{'seconds':>9}{'(range)':>16}"]
    for work in WORKS:
        for victim, lost in ((1, "a worker"), (0, "the main worker")):
            rounds = [{way: gap(work, way, arguments.workers, victim) for way in WAYS} for _ in range(arguments.rounds)]
            for way in WAYS:
                seconds = [one[way] for one in rounds]
                spread = f"({min(seconds):.2f}–{max(seconds):.2f})"
                lines.append(f"{work:<13}{lost:<16}{way:<20}{statistics.median(seconds):>9.2f}{spread:>16}")
    publish("recovery", f"{arguments.workers} workers, medians of rounds in turn.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
