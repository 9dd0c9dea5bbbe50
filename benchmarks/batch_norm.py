"""The cost of batch_norm=minibatch against micro_batch: `python benchmarks/batch_norm.py [--rounds N]`.

Two CPU workers train the same minibatches with either statistics, in interleaved rounds in the same processes, with
shared_memory and ddp averaging: the time of a step, and the processor time of the main worker, which other programs on
the machine change less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.multiprocessing
from torch import nn

import mbgd
from mbgd.config import AveragingName, BatchNormOver
from mbgd.models import CNN, ResNet

from machine import as_worker, publish

NUM_WORKERS = 2


@dataclass(frozen=True)
class Work:
    name: str
    make_model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    minibatch: int
    steps: int


WORKS = (
    Work("cnn on 8 × 8", partial(CNN, (1, 8, 8), 10, channels=(8, 16), hidden=32, batch_norm=True), (1, 8, 8), 64, 30),
    Work("cnn on 28 × 28", partial(CNN, (1, 28, 28), 10, batch_norm=True), (1, 28, 28), 128, 5),
    Work("resnet-20 on 8 × 8", partial(ResNet, (1, 8, 8), 10), (1, 8, 8), 64, 10),
    Work("resnet-20 on 32 × 32", partial(ResNet, (3, 32, 32), 10), (3, 32, 32), 32, 3),
)


def trainer(work: Work, averaging: AveragingName, over: BatchNormOver, workers: mbgd.Workers) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = work.make_model()
    num_examples = 4 * work.minibatch
    data = mbgd.InMemory(torch.randn(num_examples, *work.input_shape), torch.randint(10, (num_examples,)))
    return mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
        mbgd.Data(train=data),
        mbgd.Settings(
            steps=work.steps,
            batch=mbgd.Batch(work.minibatch),
            averaging=mbgd.Averaging(averaging),
            batch_norm=over,
            noise_scale=mbgd.NoiseScale(every_steps=None),
        ),
        workers,
    )


def measure(rank: int, port: int, averaging: AveragingName, rounds: int, seconds: Any) -> None:
    with as_worker(rank, NUM_WORKERS, port) as workers:
        for work in WORKS:
            for number in range(rounds + 1):  # the first round warms up
                for over in BatchNormOver:
                    made = trainer(work, averaging, over, workers)
                    workers.barrier()
                    start, cpu = time.perf_counter(), time.process_time()
                    made.fit()
                    workers.barrier()
                    if workers.is_main and number:
                        spent = time.perf_counter() - start, time.process_time() - cpu
                        seconds.append((work.name, over.value, [one / work.steps for one in spent]))


def row(work: Work, measured: list[tuple[str, str, list[float]]]) -> str:
    """Medians over the rounds."""
    of_micro, of_mini = (
        [spent for name, kind, spent in measured if (name, kind) == (work.name, over.value)] for over in BatchNormOver
    )
    ratios, cpu = (sorted(b[number] / a[number] for a, b in zip(of_micro, of_mini, strict=True)) for number in range(2))
    times = [1000 * statistics.median(wall for wall, _ in spent) for spent in (of_micro, of_mini)]
    return (
        f"{times[0]:>9.2f} ms{times[1]:>9.2f} ms{statistics.median(ratios):>8.2f}"
        f"{f'({ratios[0]:.2f}–{ratios[-1]:.2f})':>14}{statistics.median(cpu):>16.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    columns = f"{'micro_batch':>12}{'minibatch':>12}{'ratio':>8}{'(range)':>14}{'processor time':>16}"
    table = [f"{'':<22}{'averaging':<16}{columns}"]
    with torch.multiprocessing.Manager() as manager:
        for number, averaging in enumerate((AveragingName.shared_memory, AveragingName.ddp)):
            seconds = manager.list()
            port = 20000 + (os.getpid() + number) % 20000
            torch.multiprocessing.spawn(measure, (port, averaging, arguments.rounds, seconds), NUM_WORKERS)
            table += [f"{work.name:<22}{averaging.value:<16}{row(work, list(seconds))}" for work in WORKS]
    publish("batch_norm", "\n".join(["Time of a step on two CPU workers, one thread each.", *table]))


if __name__ == "__main__":
    main()
