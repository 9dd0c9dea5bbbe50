"""The cost of tracking: `python benchmarks/tracking.py`.

The same training with a tracker that does nothing, and with JSON lines, the terminal's progress bar (on its own
terminal) and W&B offline, all logging every 50 steps; interleaved rounds in one process, so that a noisy machine slows
all equally. W&B's process starts before the rounds; its effect on the first step is measured separately.
Ratio < 1: tracking makes training slower.
"""

import argparse
import contextlib
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import mbgd
from mbgd.data import InMemory
from mbgd.tracking import Ending, NoTracker, Outcome, Trackers
from mbgd.tracking.follower import Follower
from mbgd.tracking.json_lines import JsonLines
from mbgd.tracking.progress_bar import ProgressBar
from mbgd.tracking.wandb_sink import remember_run_id

from machine import publish
from step import ADAMW, WORKS, Work, make_data, make_model

CONFIG = """
tracking:
  wandb: {mode: offline, project: benchmark, entity: null, group: null, name: null, tags: [], log_checkpoints: false,
          init_timeout_seconds: 30, finish_seconds: 20}
"""
LENGTHEN = 5
"""A round has this multiple of the steps in benchmarks/step.py, so that lines are logged."""


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard output is a terminal that somebody reads."""
    ours, theirs = pty.openpty()

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 65536):
                pass

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(theirs, "w") as file, contextlib.redirect_stdout(file):
        yield


def seconds(work: Work, tracker: mbgd.tracking.Tracker) -> float:
    """Seconds of one training run, without building the trainer."""
    model = make_model(work)
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        ADAMW(model.parameters(), fused=True),
        mbgd.Data(train=InMemory(*make_data(work))),
        mbgd.Settings(steps=work.steps * LENGTHEN, batch=mbgd.Batch(size=work.minibatch)),
    )
    start = time.perf_counter()
    trainer.fit(tracker)
    return time.perf_counter() - start


def measure(work: Work) -> str:
    """One row of the result."""
    with tempfile.TemporaryDirectory() as name, terminal():
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG)
        (folder / "run.json").write_text('{"script": "benchmark", "code": {}}')
        (folder / "metrics.jsonl").touch()
        remember_run_id(folder, None)
        follower = Follower("wandb", folder, finish_seconds=20)
        trackers = [JsonLines(folder / "metrics.jsonl"), ProgressBar(work.steps * LENGTHEN), follower]
        while not list(folder.glob("wandb/offline-run-*/*.wandb")):
            time.sleep(0.1)
        off, on = [], []
        for _ in range(work.rounds + 1):  # the first round warms up
            off.append(seconds(work, NoTracker()))
            on.append(seconds(work, Trackers(trackers)))
        Trackers(trackers).close(Ending(Outcome.finished))
    ratios = [a / b for a, b in zip(off[1:], on[1:], strict=True)]
    examples = work.steps * LENGTHEN * work.minibatch
    without, tracked = (examples / statistics.median(times[1:]) for times in (off, on))
    return (
        f"{work.name:<38}{without:>12,.0f}/s{tracked:>12,.0f}/s"
        f"{statistics.median(ratios):>8.3f}{f'({min(ratios):.2f}–{max(ratios):.2f})':>15}"
    )


def first_step(*overrides: str) -> float:
    """Seconds from the command to the first logged step."""
    train = Path(__file__).parent.parent / "train.py"
    command = [sys.executable, str(train), "steps=1", "data.evaluation=null", "tracking.report=false", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with subprocess.Popen([*command, "run.dir=out"], cwd=folder, stdout=subprocess.DEVNULL) as process:
            path = Path(folder, "out/metrics.jsonl")
            while not (path.exists() and path.stat().st_size):
                time.sleep(0.005)
            found = time.perf_counter() - start
            process.wait()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5, help="rounds of the start's measurement; 0: leave it out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"{'':<38}{'without':>14}{'tracked':>14}{'ratio':>8}{'(range)':>15}"]
    lines += [measure(work) for work in WORKS]
    if arguments.starts:
        default, wandb = [], []
        for _ in range(arguments.starts + 1):
            default.append(first_step())
            wandb.append(first_step("tracking=wandb", "tracking.wandb.mode=offline"))
        lines += [
            "",
            "Seconds from `python train.py` to its first logged step, medians of interleaved rounds:",
            f"tracking=default {statistics.median(default[1:]):.2f} s, "
            f"tracking=wandb {statistics.median(wandb[1:]):.2f} s",
        ]
    publish("tracking", "Examples per second, medians of interleaved rounds.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
