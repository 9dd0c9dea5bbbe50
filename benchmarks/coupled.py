"""What the two passes of a coupled objective cost, against the same loss of each micro-batch alone.

`python benchmarks/coupled.py`. The CNN on images of 28 × 28 pixels, InfoNCE on two random crops of each, minibatches of
256. The loss of a micro-batch alone is another, wrong loss; it costs one forward and one backward. plain torch is a
loop in one process, with one forward and one backward of the whole minibatch. Times are the processor's, of a worker
with one thread: other load on the machine and waiting do not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from torch import nn

import mbgd
from mbgd.models import CNN
from mbgd.step.done import Done
from mbgd.workers.group import Workers

from machine import as_worker, publish

SIZE, STEPS, ROUNDS = 256, 5, 3
CUTS: list[tuple[int, int | None]] = [(1, None), (1, 64), (2, None), (2, 32)]
"""Workers, and examples of a micro-batch."""


def made() -> tuple[nn.Module, mbgd.InfoNCE]:
    torch.manual_seed(0)
    return CNN((1, 28, 28), 64), mbgd.InfoNCE(augment=mbgd.RandomCrops())


class Alone:
    """The loss of a micro-batch alone, as an ordinary objective."""

    def __init__(self, objective: mbgd.InfoNCE) -> None:
        self.objective = objective

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        return self.objective.losses(*self.objective.encode(model, batch))


def images() -> mbgd.InMemory:
    inputs = torch.randn(SIZE * (STEPS + 1), 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return mbgd.InMemory(inputs, torch.zeros(len(inputs)))


class Times:
    """Notes the time used when each step is done."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def after_update(self, done: Done) -> None:
        self.at.append(time.process_time())


def of_mbgd(workers: Workers, objective: Callable[[mbgd.InfoNCE], Any], size: int | None) -> float:
    """Processor seconds of a step."""
    model, pair = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings = mbgd.Settings(steps=STEPS, batch=mbgd.Batch(size=SIZE, micro_batch_size=size))
    times = Times()
    data = mbgd.Data(train=images())
    mbgd.Trainer(model, objective(pair), optimizer, data, settings, workers, observers=[times]).fit()
    return (times.at[-1] - times.at[0]) / (STEPS - 1)


def of_plain_torch() -> float:
    model, pair = made()
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.01), images()
    start = 0.0
    for step in range(STEPS):
        batch = data.gather(torch.arange(SIZE) + step * SIZE)
        loss = pair.losses(*pair.encode(model, batch)).losses.mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        start = start or time.process_time()
    return (time.process_time() - start) / (STEPS - 1)


def measure(workers: Workers, size: int | None, *, with_plain: bool) -> list[float]:
    """Medians: two passes, each micro-batch alone, plain torch (0 if not asked for)."""
    rounds = []
    for _ in range(ROUNDS):  # in turn, so that a change of the machine's speed meets all
        both, alone = of_mbgd(workers, lambda pair: pair, size), of_mbgd(workers, Alone, size)
        rounds.append([both, alone, of_plain_torch() if with_plain else 0.0])
    return [statistics.median(one) for one in zip(*rounds, strict=True)]


def work(rank: int, num_workers: int, port: int, size: int | None, results: Any) -> None:
    with as_worker(rank, num_workers, port) as workers:
        found = measure(workers, size, with_plain=num_workers == 1)
    if rank == 0:
        results.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=29571)
    port = parser.parse_args().port
    lines = [f"{'workers':>7}{'micro-batch':>13}{'coupled':>12}{'each alone':>12}{'ratio':>8}{'plain torch':>13}"]
    for number, (num_workers, size) in enumerate(CUTS):
        results = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(work, (num_workers, port + number, size, results), nprocs=num_workers)
        both, alone, plain = results.get()
        whole = f"{1e3 * plain:10.1f} ms" if plain else ""
        cut = size or SIZE // num_workers
        row = f"{num_workers:7}{cut:13}{1e3 * both:9.1f} ms{1e3 * alone:9.1f} ms{both / alone:8.2f}{whole}"
        print(row, flush=True)
        lines.append(row)
    publish("coupled", "\n".join(lines))


if __name__ == "__main__":
    main()
