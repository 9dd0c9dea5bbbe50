"""Reproducible averaging on up to 16,384 workers, by a model of messages and bytes: `python benchmarks/scale.py`.

A message costs α and a byte β, for the worker that sends it, and with more workers than cores they take turns. Both are
fitted to exchanges between 2 workers here, and checked against 4 and 8. Three ways: between all (every worker sends
every other its slice), in rounds (averaging/rounds.py), and ring all-reduce, whose order of addition depends on the
number of workers. Then the messages, bytes and seconds of a step of 100 million float32 parameters.

Start-up: what one worker of 16,384 computes before its first step, and what it reads from all others.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import mbgd
from mbgd import averaging as averagings
from mbgd.averaging import rounds as rounds_of_averaging
from mbgd.averaging.bucket_exchange import BucketExchange
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.averaging.rounds import rounds
from mbgd.averaging.tree import worker_nodes
from mbgd.batches.plan import Plan
from mbgd.workers.group import Workers
from mbgd.workers.messages import message, value_of

from machine import as_worker, publish

SIZES = (1_000, 100_000, 2_000_000)
"""Elements of a bucket, float32."""
MEASURED = (2, 4, 8)
WORKERS = (2, 8, 64, 512, 1024, 4096, 16_384)
BUCKETS, BUCKET_BYTES = 16, 25_000_000  # DDP's
WAYS = ("between all", "in rounds", "ring")


@dataclass(frozen=True)
class Cost:
    """What one worker sends for one bucket."""

    messages: int
    num_bytes: float


def cost(way: str, num_workers: int, num_bytes: float) -> Cost:
    """With as many micro-batches as workers."""
    if way != "in rounds":
        return Cost(2 * (num_workers - 1), 2 * num_bytes * (num_workers - 1) / num_workers)
    schedule = list(rounds(num_workers, num_workers, 0, 10**9))
    others = [(len(one.members) - 1, len(one.held[0]), one.parts[0]) for one in schedule]
    messages = sum(number * (nodes + 1) for number, nodes, _ in others)
    sent = sum(number * (nodes + 1) * (part.stop - part.start) for number, nodes, part in others)
    return Cost(messages, num_bytes * sent / 10**9)


def measure(rank: int, num_workers: int, port: int, num_rounds: int, results: list[tuple[int, list[float]]]) -> None:
    """For each size: seconds of each way, of the slowest worker, in interleaved rounds."""
    with as_worker(rank, num_workers, port) as workers:
        for size in SIZES:
            buffer = torch.zeros(size)
            ways = [
                *(exchange(buffer, workers, in_rounds=way) for way in (False, True)),
                partial(dist.all_reduce, buffer),
            ]
            for number in range(num_rounds + 1):  # the first round warms up
                seconds = torch.zeros(len(ways))
                for way, function in enumerate(ways):
                    workers.barrier()
                    start = time.perf_counter()
                    function()
                    seconds[way] = time.perf_counter() - start
                workers.max_(seconds)
                if workers.is_main and number:
                    results.append((size, seconds.tolist()))


def exchange(buffer: torch.Tensor, workers: Workers, *, in_rounds: bool) -> Callable[[], object]:
    sizes = rounds_of_averaging.group_sizes
    if not in_rounds:
        rounds_of_averaging.group_sizes = lambda num_leaves, num_workers: [num_workers]
    made = BucketExchange(buffer, workers.num_workers, workers)
    rounds_of_averaging.group_sizes = sizes

    def run() -> None:
        made.start(buffer, [buffer])
        while made.advance():
            pass

    return run


def fit(points: Sequence[tuple[Cost, float]]) -> tuple[float, float]:
    """(α, β) with the smallest relative errors, neither below 0."""
    rows = np.array([[one.messages / seconds, one.num_bytes / seconds] for one, seconds in points])
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    return max(float(alpha), 0.0), max(float(beta), 0.0)


def turns(num_workers: int) -> float:
    return max(1.0, num_workers / (os.cpu_count() or 1))


def check_of_model(measured: dict[tuple[int, int], list[float]]) -> tuple[str, dict[str, tuple[float, float]]]:
    fitted = {}
    for way, name in enumerate(WAYS):
        points = [(cost(name, 2, 4 * size), measured[2, size][way]) for size in SIZES]
        fitted[name] = fit(points)
    lines = [f"{'workers':<9}{'bucket':>10}" + "".join(f"{name + ', measured':>24}{'model':>9}" for name in WAYS)]
    for num_workers in MEASURED:
        for size in SIZES:
            line = f"{num_workers:<9}{4 * size / 1e6:>7.3f} MB"
            for way, name in enumerate(WAYS):
                one, (alpha, beta) = cost(name, num_workers, 4 * size), fitted[name]
                model = turns(num_workers) * (alpha * one.messages + beta * one.num_bytes)
                line += f"{measured[num_workers, size][way] * 1e3:>21.2f} ms{model * 1e3:>6.2f} ms"
            lines.append(line)
    constants = "\n".join(
        f"{name}: α = {alpha * 1e6:.0f} µs a message, β = {beta * 1e9:.2f} ns a byte"
        for name, (alpha, beta) in fitted.items()
    )
    return constants + "\n\n" + "\n".join(lines), fitted


def at_scale(alpha: float, beta: float) -> str:
    """Of a step, every worker on a core or device of its own."""
    lines = [f"{'workers':<9}" + "".join(f"{name + ': messages':>24}{'GB':>7}{'s':>9}" for name in WAYS)]
    for num_workers in WORKERS:
        line = f"{num_workers:<9}"
        for name in WAYS:
            one = cost(name, num_workers, BUCKET_BYTES)
            messages, num_bytes = BUCKETS * one.messages, BUCKETS * one.num_bytes
            line += f"{messages:>24,}{num_bytes / 1e9:>7.2f}{alpha * messages + beta * num_bytes:>9.3f}"
        lines.append(line)
    return "\n".join(lines)


def values_gathered(rank: int, port: int, results: list[list[Any]]) -> None:
    """Everything that a worker gathers from all others until the end of the first step, workers on several hosts."""
    with as_worker(rank, 2, port) as workers:

        def refuse(workers: Workers) -> HostMemory:
            raise CannotShareError("this benchmark sends messages")

        averagings.HostMemory = refuse
        gather, values = Workers.gather_values, []

        def gather_values(workers: Workers, value: Any) -> list[Any]:
            values.append(value)
            return gather(workers, value)

        Workers.gather_values = gather_values
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
        trainer = mbgd.Trainer(
            model,
            mbgd.MeanSquaredError(),
            torch.optim.SGD(model.parameters(), lr=0.01),
            mbgd.Data(train=mbgd.InMemory(torch.randn(64, 8), torch.randn(64, 8))),
            mbgd.Settings(steps=1, batch=mbgd.Batch(16), averaging=mbgd.Averaging(mbgd.AveragingName.reproducible)),
            workers,
        )
        trainer.fit()
        if workers.is_main:
            results.extend(values)


def start_up(num_workers: int, values: Sequence[Any]) -> str:
    size = 8 * num_workers
    plan = Plan(num_examples=100 * size + 5, minibatch_size=size, num_workers=num_workers, micro_batch_size=1)
    worker = Workers(rank=num_workers - 3, num_workers=num_workers)
    minibatch, buffer = plan.minibatch(plan.steps_per_epoch - 1), torch.zeros(BUCKET_BYTES // 4)
    messages = [message(value) for value in values]

    def read_all() -> None:
        for one in messages:
            for _ in range(num_workers):
                value_of(one)

    parts: dict[str, Callable[[], object]] = {
        "plan and this worker's shard": lambda: plan.shard(minibatch, worker.rank),
        "this worker's nodes": lambda: worker_nodes(size, num_workers, worker.rank),
        f"rounds of {BUCKETS} buckets": lambda: [
            list(rounds(size, num_workers, worker.rank, len(buffer))) for _ in range(BUCKETS)
        ],
        "one bucket's exchange, with its memory": lambda: BucketExchange(buffer, size, worker),
        f"reading {len(values)} values ({sum(map(len, messages))} bytes) from every worker": read_all,
    }
    lines, total = [], 0.0
    for name, function in parts.items():
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        total += seconds
        lines.append(f"{name:<64}{seconds:>9.4f} s")
    return "\n".join([*lines, f"{'all':<64}{total:>9.4f} s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    ports = count(20000 + os.getpid() % 20000)
    with torch.multiprocessing.Manager() as manager:
        measured = {}
        for num_workers in MEASURED:
            times = manager.list()
            torch.multiprocessing.spawn(measure, (num_workers, next(ports), arguments.rounds, times), num_workers)
            for size in SIZES:
                of_size = [seconds for other, seconds in times if other == size]
                measured[num_workers, size] = [min(of_way) for of_way in zip(*of_size, strict=True)]
        values = manager.list()
        torch.multiprocessing.spawn(values_gathered, (next(ports), values), 2)
        values = list(values)
    checked, fitted = check_of_model(measured)
    alpha, beta = fitted["in rounds"]
    publish(
        "scale",
        f"One bucket, one node per worker: the fastest of {arguments.rounds} interleaved rounds, and the model fitted "
        f"to 2 workers.\nLoad average of the machine at the end: {os.getloadavg()[1]:.1f}.\n\n{checked}\n\n"
        f"A step of 100 million float32 parameters in {BUCKETS} buckets, with this α and β (in rounds).\n\n"
        f"{at_scale(alpha, beta)}\n\n"
        "The same with α = 10 µs and β = 0.04 ns (25 GB/s), assumed for a network between GPUs.\n\n"
        f"{at_scale(10e-6, 0.04e-9)}\n\n"
        f"Start-up of one worker of {max(WORKERS):,}.\n\n{start_up(max(WORKERS), values)}",
    )


if __name__ == "__main__":
    main()
