"""A step of the digits MLP by parts, in a hand-written loop and in the trainer: `python benchmarks/step_parts.py`.

The hand-written loop has one worker and no exchange. Both use a fused optimizer and the trainer's clock, whose parts a
run logs as time/…; `rest` is the time between steps and at the start and end of training. Medians of interleaved
rounds.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.multiprocessing
import torch.nn.functional as F

from mbgd.measuring.clock import PARTS, HostStopwatch
from mbgd.tracking import NoTracker

from machine import as_worker, publish
from step import OPTIMIZERS, WORKS, Work, by_trainer, make_data, make_model

WORK, BOTH_FUSED = WORKS[0], OPTIMIZERS[2]


def by_hand(work: Work) -> dict[str, float]:
    """Seconds of each part, over all of the work."""
    inputs, targets = make_data(work)
    model = make_model(work)
    optimizer = BOTH_FUSED.by_hand(model.parameters())
    stopwatch = HostStopwatch()
    step = 0
    while step < work.steps:
        order = torch.randperm(work.num_examples)
        for indices in order.split(work.minibatch)[: work.steps - step]:
            batch, classes = inputs[indices], targets[indices]
            stopwatch.lap("data_wait")
            optimizer.zero_grad()
            F.cross_entropy(model(batch), classes).backward()
            stopwatch.lap("forward_backward")
            optimizer.step()
            stopwatch.lap("optimizer")
            step += 1
    return stopwatch.seconds()


class Logged(NoTracker):
    """Keeps what is logged; each value tells of the steps since the one before, the first of the first step alone."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        for name, value in metrics.items():
            if not isinstance(value, str):
                self.values[name].append(value)


def measure(rank: int, num_workers: int, port: int, rounds: int, results: list[dict[str, float]]) -> None:
    with as_worker(rank, num_workers, port) as workers:
        for _ in range(rounds + 1):  # the first round warms up
            fit = by_trainer(WORK, workers, BOTH_FUSED)
            logged = Logged()
            workers.barrier()
            start = time.perf_counter()
            fit(logged)
            seconds = (time.perf_counter() - start) / WORK.steps
            parts = {part: statistics.mean(logged.values[f"time/{part}_seconds"][1:]) for part in PARTS}
            if workers.is_main:
                results.append({**parts, "rest": max(0.0, seconds - sum(parts.values()))})
                if num_workers == 1:
                    results.append({part: total / WORK.steps for part, total in by_hand(WORK).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    measured: dict[str, list[dict[str, float]]] = {}
    with torch.multiprocessing.Manager() as manager:
        for num_workers in (1, 2):
            results = manager.list()
            port = 20000 + os.getpid() % 20000 + num_workers
            torch.multiprocessing.spawn(measure, (num_workers, port, rounds, results), num_workers)
            if num_workers == 1:
                measured["by hand"] = list(results)[3::2]
                measured["trainer, 1 worker"] = list(results)[2::2]
            else:
                measured["trainer, 2 workers"] = list(results)[1:]
    parts = (*PARTS, "rest")
    lines = [f"{'':<20}" + "".join(f"{part:>18}" for part in (*parts, "sum"))]
    for name, results in measured.items():
        medians = [1e6 * statistics.median(result.get(part, 0.0) for result in results) for part in parts]
        lines.append(f"{name:<20}" + "".join(f"{median:>15.0f} µs" for median in (*medians, sum(medians))))
    publish("step_parts", f"{WORK.name}, SGD. One step, medians of rounds in turn.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
