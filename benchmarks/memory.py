"""Memory of a host by number of workers and trainer: `python benchmarks/memory.py [--parameters N] [--workers N ...]`.

An MLP with AdamW in fp32, so that parameters, gradients and each of two moments have the same size, P. Memory is the
sum of the workers' proportional set sizes (Pss in /proc/PID/smaps_rollup), in which a page that n processes map counts
1/n for each; less that of the same trainer with a small model. Given in P: after the last step, at the end, where mbgd
has given the optimizer its whole state back, and at the peak, looked at 100 times a second. The hand-written loops are
DistributedDataParallel over gloo, with AdamW or with torch's ZeroRedundancyOptimizer.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import torch
import torch.nn.functional as F
from data_memory import pss
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import mbgd
from mbgd.data import InMemory

from machine import as_worker, publish

INPUTS, OUTPUTS, MINIBATCH, NUM_STEPS = 64, 10, 32, 4
SMALL = 10_000
MBGD: dict[str, dict[str, Any]] = {
    "mbgd": {},
    "mbgd, sharding=none": {"sharding": "none"},
    "mbgd, averaging=ddp": {"averaging": mbgd.Averaging(mbgd.AveragingName.ddp), "sharding": "none"},
    "mbgd, averaging=ddp sharding=optimizer": {
        "averaging": mbgd.Averaging(mbgd.AveragingName.ddp),
        "sharding": "optimizer",
    },
}
TRAINERS = (*MBGD, "DDP", "DDP, ZeRO-1")
SECONDS_BETWEEN_LOOKS = 0.01


@dataclass(frozen=True)
class Look:
    """A moment at which memory is looked at."""

    rested: list[Event]
    """For each worker, whether it has come there."""
    seen: Event


def make_model(num_parameters: int) -> nn.Module:
    """Two hidden layers of one width, so that one matrix has nearly all parameters."""
    width = round(num_parameters**0.5)
    torch.manual_seed(0)
    sizes = (INPUTS, width, width, OUTPUTS)
    layers = [nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[2], sizes[3]))


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(MINIBATCH * NUM_STEPS, INPUTS, generator=generator)
    return inputs, torch.randint(OUTPUTS, (len(inputs),), generator=generator)


def train(rank: int, num_workers: int, port: int, trainer: str, num_parameters: int, looks: list[Look]) -> None:
    """Train; all memory is held while it is looked at, after the last step and at the end."""
    with as_worker(rank, num_workers, port) as workers:

        def rest(look: Look) -> None:
            workers.barrier()
            look.rested[rank].set()
            look.seen.wait()

        model = make_model(num_parameters)
        if trainer in MBGD:
            kept = by_mbgd(model, workers, MBGD[trainer], partial(rest, looks[0]))
        else:
            zero = ZeroRedundancyOptimizer if trainer.endswith("1") else None
            kept = by_hand(model, workers, zero, partial(rest, looks[0]))
        rest(looks[1])
        del kept


class RestsAtTheEnd:
    """A tracker that lets memory be looked at after the last step."""

    def __init__(self, rest: Callable[[], None]) -> None:
        self._rest = rest

    def progress(self, step: int) -> None:
        if step == NUM_STEPS:
            self._rest()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def close(self, ending: object) -> None:
        pass


def by_mbgd(model: nn.Module, workers: mbgd.Workers, options: dict[str, Any], rest: Callable[[], None]) -> object:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    settings = mbgd.Settings(
        steps=NUM_STEPS, batch=mbgd.Batch(MINIBATCH), noise_scale=mbgd.NoiseScale(every_steps=None), **options
    )
    trainer = mbgd.Trainer(
        model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=InMemory(*examples())), settings, workers
    )
    trainer.fit(RestsAtTheEnd(rest))
    return trainer


def by_hand(
    model: nn.Module, workers: mbgd.Workers, zero: type[ZeroRedundancyOptimizer] | None, rest: Callable[[], None]
) -> object:
    wrapped = DistributedDataParallel(model) if workers.num_workers > 1 else model
    adamw = torch.optim.AdamW
    optimizer = (
        adamw(wrapped.parameters(), fused=True)
        if zero is None or workers.num_workers == 1
        else zero(wrapped.parameters(), optimizer_class=adamw, fused=True)
    )
    inputs, targets = examples()
    size = MINIBATCH // workers.num_workers
    for step in range(NUM_STEPS):
        mine = slice(step * MINIBATCH + workers.rank * size, step * MINIBATCH + (workers.rank + 1) * size)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs[mine]), targets[mine]).backward()
        optimizer.step()
    rest()
    return wrapped, optimizer


def measure(trainer: str, num_workers: int, num_parameters: int) -> tuple[int, int, int]:
    """Bytes of all workers after the last step, at the end, and at the peak."""
    context = multiprocessing.get_context("spawn")
    looks = [Look([context.Event() for _ in range(num_workers)], context.Event()) for _ in range(2)]
    port = 20000 + (os.getpid() + time.monotonic_ns()) % 20000
    processes = [
        context.Process(target=train, args=(rank, num_workers, port, trainer, num_parameters, looks))
        for rank in range(num_workers)
    ]
    for process in processes:
        process.start()
    peak, found = 0, []
    for look in looks:
        while not all(event.is_set() for event in look.rested) and all(process.is_alive() for process in processes):
            peak = max(peak, sum(map(pss, processes)))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        found.append(sum(map(pss, processes)))
        look.seen.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found[0], found[1], max(peak, *found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    size = 4 * sum(p.numel() for p in make_model(arguments.parameters).parameters())
    lines = [
        f"P = {size / 2**20:,.0f} MiB: the parameters in fp32. Of the host, all workers together, in P:",
        "",
        f"{'':<40}{'workers':>8}{'at rest':>10}{'at the end':>12}{'peak':>8}",
    ]
    for trainer in TRAINERS:
        for num_workers in arguments.workers:
            small, large = (measure(trainer, num_workers, number) for number in (SMALL, arguments.parameters))
            rest, end, peak = ((one - other) / size for one, other in zip(large, small, strict=True))
            lines.append(f"{trainer:<40}{num_workers:>8}{rest:>10.2f}{end:>12.2f}{peak:>8.2f}")
            print(lines[-1], flush=True)
    publish("memory", "\n".join(lines))


if __name__ == "__main__":
    main()
