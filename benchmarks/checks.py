"""The cost of checking the state: `python benchmarks/checks.py [--before COMMIT] [--rounds N]`.

Steps of this tree against those of another commit, in alternating processes, so that a noisy machine slows both
equally; and the time of one comparison of the replicas, relative to the steps of the default interval, an epoch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.multiprocessing

import mbgd

from machine import as_worker, publish
from step import ADAMW, WORKS, Work, make_data, make_model

ROOT = Path(__file__).parent.parent
BEFORE = "1530fc9"
"""The commit before replicas, buffers and values were looked at in every step."""
MIN_STEPS = 100
"""Measured in each process: with two dozen, the median of a step on two busy cores is still up to 5 % off."""
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""glibc gives the cnn's activations back to the system and fetches them anew, 180,000 to 420,000 page faults a process
by chance: ± 8 % of a step, in either tree. Kept, all processes have 125,000."""


def train(rank: int, num_workers: int, port: int, number: int, file: str) -> None:
    """Seconds of a step, and of a comparison of the state where there is one; the main worker writes them down."""
    work = WORKS[number]
    with as_worker(rank, num_workers, port) as workers:
        seconds, check_seconds = measure(work, workers)
        if workers.is_main:
            Path(file).write_text(json.dumps([seconds, check_seconds]))


def measure(work: Work, workers: mbgd.Workers) -> tuple[float, float]:
    model, num_measured = make_model(work), max(2 * work.steps, MIN_STEPS)
    settings = mbgd.Settings(
        epochs=None,
        steps=work.steps + num_measured,
        batch=mbgd.Batch(size=work.minibatch),
        log_every_steps=10**9,
        noise_scale=mbgd.NoiseScale(every_steps=None),
        evaluation=mbgd.Evaluation(every_steps=10**9),
    )
    optimizer = partial(ADAMW, fused=True)(model.parameters())
    data = mbgd.Data(train=mbgd.InMemory(*make_data(work)))
    trainer = mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers)
    times: list[float] = []

    class Timed:
        def progress(self, step: int) -> None:
            times.append(time.perf_counter())

        def log(self, step: int, metrics: object) -> None:
            pass

        def close(self, ending: object) -> None:
            pass

    trainer.fit(Timed())
    # In blocks, so that the clock itself is not what is measured; the first `work.steps` warm up.
    size = max(1, work.steps // 8)
    marks = times[work.steps :: size]
    seconds = statistics.median((b - a) / size for a, b in pairwise(marks))
    if not hasattr(trainer, "check"):
        return seconds, 0.0
    checks = []
    for _ in range(5):
        workers.barrier()
        start = time.perf_counter()
        trainer.check()
        checks.append(time.perf_counter() - start)
    return seconds, statistics.median(checks)


def run(folder: Path, number: int, num_workers: int) -> tuple[float, float]:
    """One process of the package that lies in `folder`."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out, "seconds")
        command = [sys.executable, __file__, "--work", str(number), "--workers", str(num_workers), "--file", str(file)]
        environment = os.environ | KEEP_FREED_MEMORY | {"PYTHONPATH": str(folder)}
        subprocess.run(command, env=environment, check=True)
        seconds, check_seconds = json.loads(file.read_text())
        return seconds, check_seconds


def compare(before: str, num_rounds: int) -> str:
    lines = [
        f"Seconds of a step: this tree and commit {before}, medians of {num_rounds} processes each, in turn; AdamW.",
        "glibc keeps freed memory, in both. Ratio: of the medians, and of the fastest processes, which others on the",
        "machine disturbed least; > 1: this tree is faster. A comparison: of parameters and optimizer state between",
        "the workers; share: of the time of 20,000 examples (an epoch).",
        "",
        f"{'':36}  workers     before        now   ratio  fastest   a comparison   share",
    ]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", before, "mbgd"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        for number, work in enumerate(WORKS):
            for num_workers in (1, 2):
                one = partial(run, number=number, num_workers=num_workers)
                rounds = [(one(Path(folder))[0], *one(ROOT)) for _ in range(num_rounds)]
                columns = list(zip(*rounds, strict=True))
                old, new, check = map(statistics.median, columns)
                fastest = min(columns[0]) / min(columns[1])
                share = check / (new * 20_000 / work.minibatch)
                lines.append(
                    f"{work.name:36}  {num_workers:7}  {1e6 * old:7,.0f} µs {1e6 * new:7,.0f} µs  {old / new:6.2f}"
                    f"  {fastest:7.2f}   {1e3 * check:9.2f} ms  {share:6.2%}"
                )
                print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=9, help="processes of each commit")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is None:
        publish("checks", compare(arguments.before, arguments.rounds))
        return
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.spawn(train, (arguments.workers, port, arguments.work, arguments.file), arguments.workers)


if __name__ == "__main__":
    main()
