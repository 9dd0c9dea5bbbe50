"""The cost of averaging=reproducible against ddp on the same plan: `python benchmarks/averaging.py`.

DDP uses gloo, reproducible averaging uses shared memory. Two workers train the same minibatches, cut into the same
micro-batches, in interleaved rounds in the same processes. Memory is the peak of fresh processes minus DDP's peak, in
multiples of the gradient's size. Bytes are those that one worker sends per step between hosts, computed from the plan.

With `--weights`, instead: a step whose objective gives weights, which are summed over the workers, against a step whose
objective computes them and keeps them, for the smallest model, in every averaging; see averaging_weights.txt.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, pairwise
from typing import Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

import mbgd
from mbgd import averaging as averagings
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.averaging.reproducible import nodes_of_workers
from mbgd.config import AveragingName
from mbgd.data import InMemory
from mbgd.models import CNN, MLP
from mbgd.tracking import NoTracker

from machine import as_worker, publish

NUM_WORKERS = 2
MINIBATCH = 128


@dataclass(frozen=True)
class Work:
    name: str
    make_model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    steps: int


WORKS = (
    Work("MLP 64-128-10", partial(MLP, (64,), 10, hidden=(128,)), (64,), 200),
    Work("6.4 M-parameter MLP", partial(MLP, (784,), 10, hidden=(2160, 2160)), (784,), 15),
    Work("cnn on 28 × 28", partial(CNN, (1, 28, 28), 10), (1, 28, 28), 10),
)


def cross_entropy(model: nn.Module, batch: Any, *, gives_weights: bool) -> mbgd.PerExample:
    """Targets below 0 are left out, though there are none."""
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs), targets, reduction="none", ignore_index=-1)
    weights = (targets >= 0).to(losses.dtype)
    return mbgd.PerExample(losses, weights if gives_weights else None)


def trainer(
    work: Work,
    averaging: AveragingName,
    num_micro_batches: int,
    workers: mbgd.Workers,
    objective: Any = None,
) -> mbgd.Trainer:
    torch.use_deterministic_algorithms(False)  # the reproducible one switches them on
    torch.manual_seed(0)
    model = work.make_model()
    data = InMemory(torch.randn(4 * MINIBATCH, *work.input_shape), torch.randint(10, (4 * MINIBATCH,)))
    return mbgd.Trainer(
        model,
        objective or mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
        mbgd.Data(train=data),
        mbgd.Settings(
            steps=work.steps,
            batch=mbgd.Batch(MINIBATCH, MINIBATCH // num_micro_batches),
            averaging=mbgd.Averaging(averaging),
        ),
        workers,
    )


def measure_time(workers: mbgd.Workers, work: Work, num_micro_batches: int, rounds: int, results: list[float]) -> None:
    for _ in range(rounds + 1):  # the first round warms up
        for averaging in (AveragingName.ddp, AveragingName.reproducible):
            made = trainer(work, averaging, num_micro_batches, workers)
            workers.barrier()
            start = time.perf_counter()
            made.fit()
            workers.barrier()
            if workers.is_main:
                results.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Way:
    name: str
    averaging: AveragingName
    shares_memory: bool = True


WAYS = (
    Way("ddp, gloo", AveragingName.ddp),
    Way("shared_memory", AveragingName.shared_memory),
    Way("reproducible, shared memory", AveragingName.reproducible),
    Way("reproducible, gloo", AveragingName.reproducible, shares_memory=False),
)


def refuse(workers: mbgd.Workers) -> HostMemory:
    raise CannotShareError("this benchmark sends messages")


class StepTimes(NoTracker):
    """Seconds between the ends of successive steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def progress(self, step: int) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in pairwise(self.ends)]


def measure_weights(
    workers: mbgd.Workers, work: Work, num_micro_batches: int, way: Way, rounds: int, results: list[list[list[float]]]
) -> None:
    if not way.shares_memory:
        averagings.HostMemory = refuse
    for number in range(rounds + 1):  # the first round warms up
        seconds: dict[bool, list[float]] = {}
        for gives_weights in (False, True) if number % 2 else (True, False):
            objective = partial(cross_entropy, gives_weights=gives_weights)
            made = trainer(work, way.averaging, num_micro_batches, workers, objective)
            times = StepTimes()
            workers.barrier()
            made.fit(times)
            seconds[gives_weights] = times.seconds()
        if workers.is_main:
            results.append([seconds[False], seconds[True]])


def measure_memory(
    workers: mbgd.Workers, work: Work, num_micro_batches: int, averaging: AveragingName, results: list[float]
) -> None:
    trainer(work, averaging, num_micro_batches, workers).fit()
    if workers.is_main:
        results.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def on_worker(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with as_worker(rank, NUM_WORKERS, port) as workers:
        function(workers, *arguments)


def bytes_sent(num_leaves: int, num_workers: int) -> float:
    """What one worker sends in a step at most, in sizes of the gradient."""
    slice_ = 1 / num_workers
    most_nodes = max(len(nodes) for nodes in nodes_of_workers(num_leaves, num_workers))
    return (most_nodes + 1) * slice_ * (num_workers - 1)  # all-to-all of its nodes, all-gather of its slice


Run = Callable[..., list[Any]]
"""Calls a function on all workers with these arguments and a list; returns the list."""


def costs_of_weights(run: Run, rounds: int) -> str:
    lines = [
        f"{'averaging':<30}{'micro-batches':>14}{'without':>12}{'with':>12}{'without / with':>16}"
        f"{'(of rounds)':>14}{'of medians':>12}"
    ]
    work = WORKS[0]
    for way in WAYS:
        for num_micro_batches in (NUM_WORKERS, 8):
            times = run(measure_weights, work, num_micro_batches, way, rounds)[1:]
            without, given = (list(chain(*of_kind)) for of_kind in zip(*times, strict=True))
            ratios = [fast(a) / fast(b) for a, b in times]
            lines.append(
                f"{way.name:<30}{num_micro_batches:>14}"
                f"{fast(without) * 1e3:>9.2f} ms{fast(given) * 1e3:>9.2f} ms{fast(without) / fast(given):>16.2f}"
                f"{f'({min(ratios):.2f}–{max(ratios):.2f})':>14}"
                f"{statistics.median(without) / statistics.median(given):>12.2f}"
            )
    return (
        f"{work.name}, {NUM_WORKERS} workers, minibatch {MINIBATCH}: a step with and without weights, the tenth "
        f"percentile of all steps of {rounds} interleaved rounds, and of each round; the ratio of medians beside it.\n"
        f"Load average of the machine at the end: {os.getloadavg()[1]:.1f}.\n\n" + "\n".join(lines)
    )


def fast(seconds: list[float]) -> float:
    """The tenth percentile: other programs on the machine slow some steps."""
    return sorted(seconds)[len(seconds) // 10]


def costs_of_reproducible(run: Run, rounds: int) -> str:
    times_table = [
        f"{'':<22}{'micro-batches':>14}{'ddp':>12}{'reproducible':>14}{'rep / ddp':>11}{'(range)':>14}{'memory':>14}"
    ]
    for work in WORKS:
        gradient_bytes = sum(p.numel() * p.element_size() for p in work.make_model().parameters())
        for num_micro_batches in (NUM_WORKERS, 8):
            times = run(measure_time, work, num_micro_batches, rounds)
            ddp, reproducible = times[2::2], times[3::2]
            ratios = [b / a for a, b in zip(ddp, reproducible, strict=True)]
            peaks = [
                run(measure_memory, work, num_micro_batches, averaging)[0]
                for averaging in (AveragingName.ddp, AveragingName.reproducible)
            ]
            extra = f"{(peaks[1] - peaks[0]) / gradient_bytes:+.1f} gradients"
            times_table.append(
                f"{work.name:<22}{num_micro_batches:>14}"
                f"{statistics.median(ddp) / work.steps * 1e3:>9.2f} ms"
                f"{statistics.median(reproducible) / work.steps * 1e3:>11.2f} ms"
                f"{statistics.median(ratios):>11.2f}{f'({min(ratios):.2f}–{max(ratios):.2f})':>14}"
                f"{extra if gradient_bytes > 2**23 else '–':>16}"
            )
    bytes_table = [f"{'workers':<10}{'ring all-reduce':>16}{'reproducible, 8 micro-batches':>32}"]
    for num_workers in (2, 3, 4, 5, 8):
        ring = 2 * (num_workers - 1) / num_workers
        bytes_table.append(f"{num_workers:<10}{ring:>16.2f}{bytes_sent(8, num_workers):>32.2f}")
    return (
        f"Seconds per step on {NUM_WORKERS} workers, minibatch {MINIBATCH}; medians of interleaved rounds.\n\n"
        + "\n".join(times_table)
        + "\n\nSent by a worker per step, in sizes of the gradient.\n\n"
        + "\n".join(bytes_table)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--weights", action="store_true")
    arguments = parser.parse_args()
    ports = count(20000 + os.getpid() % 20000)
    with torch.multiprocessing.Manager() as manager:

        def run(function: Callable[..., None], *of_function: Any) -> list[Any]:
            results = manager.list()
            torch.multiprocessing.spawn(on_worker, (next(ports), function, (*of_function, results)), NUM_WORKERS)
            return list(results)

        if arguments.weights:
            publish("averaging_weights", costs_of_weights(run, arguments.rounds))
        else:
            publish("averaging", costs_of_reproducible(run, arguments.rounds))


if __name__ == "__main__":
    main()
