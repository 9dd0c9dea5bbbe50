"""The trainer's steps against a hand-written loop on the same workloads: `python benchmarks/step.py`.

The hand-written loop is what an experienced user writes: DistributedDataParallel (none on one worker), tensors in
memory sliced by index, mean loss, torch's default optimizer; one thread per worker. The trainer's optimizers are those
of conf/optimizer, which are fused; in one row the hand-written loop's optimizer is fused too. On 2 workers the
hand-written loop averages over gloo, the trainer by averaging=auto: shared memory. Interleaved rounds in the same
processes, so that a noisy machine slows both equally. Ratio > 1: the trainer is faster.

On 2 workers the hand-written loop also runs without DDP and without any exchange: the machine's limit for two
processes.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mbgd
from mbgd.data import InMemory
from mbgd.models import CNN, MLP

from machine import as_worker, publish


@dataclass(frozen=True)
class Work:
    name: str
    make_model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    minibatch: int
    num_examples: int
    steps: int
    rounds: int


WORKS = (
    Work("digits MLP 64-128-10, minibatch 64", partial(MLP, (64,), 10, hidden=(128,)), (64,), 64, 1437, 400, 15),
    Work("6.4 M MLP, minibatch 128", partial(MLP, (784,), 10, hidden=(2160, 2160)), (784,), 128, 4096, 48, 3),
    Work("cnn on 28 × 28, minibatch 128", partial(CNN, (1, 28, 28), 10), (1, 28, 28), 128, 2048, 48, 3),
)


@dataclass(frozen=True)
class Optimizers:
    name: str
    by_hand: Callable[..., torch.optim.Optimizer]
    by_trainer: Callable[..., torch.optim.Optimizer]


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-4)
OPTIMIZERS = (
    Optimizers("SGD", SGD, partial(SGD, fused=True)),
    Optimizers("AdamW", ADAMW, partial(ADAMW, fused=True)),
    Optimizers("SGD, both fused", partial(SGD, fused=True), partial(SGD, fused=True)),
)


def make_model(work: Work) -> nn.Module:
    torch.manual_seed(0)
    return work.make_model()


def make_data(work: Work) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(work.num_examples, *work.input_shape, generator=generator)
    return inputs, torch.randint(10, (work.num_examples,), generator=generator)


def by_hand(work: Work, workers: mbgd.Workers, optimizers: Optimizers, *, exchange: bool = True) -> Callable[[], None]:
    """A hand-written training loop of `work.steps` steps."""
    inputs, targets = make_data(work)
    model = make_model(work)
    optimizer = optimizers.by_hand(model.parameters())
    if workers.num_workers > 1 and exchange:
        model = DistributedDataParallel(model)
    size = work.minibatch // workers.num_workers

    def loop() -> None:
        step = 0
        while step < work.steps:
            order = torch.randperm(work.num_examples)
            mine = order[workers.rank :: workers.num_workers]
            for start in range(0, len(mine) - size + 1, size):
                indices = mine[start : start + size]
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs[indices]), targets[indices])
                loss.backward()
                optimizer.step()
                step += 1
                if step % 50 == 0:
                    loss.item()
                if step == work.steps:
                    return

    return loop


def by_trainer(work: Work, workers: mbgd.Workers, optimizers: Optimizers) -> Callable[..., object]:
    """The same with mbgd."""
    model = make_model(work)
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        optimizers.by_trainer(model.parameters()),
        mbgd.Data(train=InMemory(*make_data(work))),
        mbgd.Settings(steps=work.steps, batch=mbgd.Batch(size=work.minibatch)),
        workers,
    )
    return trainer.fit


def measure(rank: int, num_workers: int, port: int, work: Work, optimizers: Optimizers, results: list[float]) -> None:
    with as_worker(rank, num_workers, port) as workers:
        for _ in range(work.rounds + 1):  # the first round warms up
            for make in (by_hand, by_trainer, partial(by_hand, exchange=False)):
                loop = make(work, workers, optimizers)
                workers.barrier()
                start = time.perf_counter()
                loop()
                if workers.num_workers > 1:
                    dist.barrier()
                if workers.is_main:
                    results.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    lines = [
        f"{'':<36}{'workers':>8}{'optimizer':>18}{'by hand':>12}{'trainer':>12}{'ratio':>8}{'(range)':>16}"
        f"{'no exchange':>13}"
    ]
    with torch.multiprocessing.Manager() as manager:
        for work in WORKS:
            for num_workers in arguments.workers:
                for optimizers in OPTIMIZERS:
                    times = manager.list()
                    port = 20000 + os.getpid() % 20000 + len(lines)
                    torch.multiprocessing.spawn(measure, (num_workers, port, work, optimizers, times), num_workers)
                    hand, ours, apart = (list(times)[number::3] for number in (3, 4, 5))
                    ratios = [a / b for a, b in zip(hand, ours, strict=True)]
                    examples = work.steps * work.minibatch
                    lines.append(
                        f"{work.name:<36}{num_workers:>8}{optimizers.name:>18}"
                        f"{examples / statistics.median(hand):>10,.0f}/s{examples / statistics.median(ours):>10,.0f}/s"
                        f"{statistics.median(ratios):>8.2f}{f'({min(ratios):.2f}–{max(ratios):.2f})':>16}"
                        + (f"{examples / statistics.median(apart):>11,.0f}/s" if num_workers > 1 else "")
                    )
    publish("step", "Examples per second, medians of interleaved rounds.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
