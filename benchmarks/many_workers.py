"""A step on many workers of one host, also with more workers than cores: `python benchmarks/many_workers.py`.

A model of 33 parameters computes little. With more workers than cores, a step takes as long as all workers'
computation in sequence; the barrier alone shows the cost of synchronization.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from typing import Any

import torch
import torch.multiprocessing

import mbgd
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.config import AveragingName
from mbgd.data import InMemory

from machine import as_worker, publish

NUM_WORKERS = (1, 2, 4, 8, 16, 32)
MINIBATCH = 64
SECONDS_PER_ROUND = 0.5
LEAST_STEPS = 500
"""So that what each `fit` does once, such as comparing the replicas, hardly counts."""


def measure_steps(workers: mbgd.Workers, rounds: int, results: list[float]) -> None:
    """Seconds a step, of each round."""
    num_steps = LEAST_STEPS
    for number in range(rounds + 1):
        torch.manual_seed(0)
        model = torch.nn.Linear(32, 1)
        data = InMemory(torch.randn(4 * MINIBATCH, 32), torch.randn(4 * MINIBATCH, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
        averaging = mbgd.Averaging(AveragingName.shared_memory)
        settings = mbgd.Settings(steps=num_steps, batch=mbgd.Batch(MINIBATCH), averaging=averaging)
        trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, mbgd.Data(train=data), settings, workers)
        workers.barrier()
        start = time.perf_counter()
        trainer.fit()
        workers.barrier()
        seconds = (time.perf_counter() - start) / num_steps
        if number == 0:  # warms up, and tells how many steps a round takes
            num_steps = max(workers.gather_values(max(LEAST_STEPS, int(SECONDS_PER_ROUND / seconds))))
        elif workers.is_main:
            results.append(seconds)


def measure_barriers(workers: mbgd.Workers, rounds: int, results: list[float]) -> None:
    """Seconds a barrier, of each round, where all workers come at once."""
    memory, num_barriers = HostMemory(workers), 200
    for _ in range(rounds):
        memory.barrier()
        start = time.perf_counter()
        for _ in range(num_barriers):
            memory.barrier()
        if workers.is_main:
            results.append((time.perf_counter() - start) / num_barriers)


def on_worker(rank: int, num_workers: int, port: int, function: Any, rounds: int, results: list[float]) -> None:
    with as_worker(rank, num_workers, port) as workers:
        function(workers, rounds, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=NUM_WORKERS)
    arguments, load = parser.parse_args(), os.getloadavg()[0]
    # So that a worker starts in a tenth of a second.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "mbgd.trainer", "mbgd.data"])
    ports = itertools.count(20000 + os.getpid() % 20000)
    table = [f"{'workers':<10}{'step':>10}{'(range)':>18}{'barrier alone':>16}{'(range)':>18}"]
    with torch.multiprocessing.Manager() as manager:
        for num_workers in arguments.workers:
            row = f"{num_workers:<10}"
            for function, unit, name, width in (
                (measure_steps, 1e3, "ms", 10),
                (measure_barriers, 1e6, "µs", 16),
            ):
                if function is measure_barriers and num_workers == 1:
                    continue
                results = manager.list()
                torch.multiprocessing.start_processes(
                    on_worker,
                    (num_workers, next(ports), function, arguments.rounds, results),
                    num_workers,
                    start_method="forkserver",
                )
                times = [seconds * unit for seconds in results]
                row += f"{f'{statistics.median(times):.2f} {name}':>{width}}"
                row += f"{f'({min(times):.2f}–{max(times):.2f})':>18}"
            table.append(row)
            print(row, flush=True)
    publish(
        "many_workers",
        f"33 parameters, minibatch {MINIBATCH}, averaging=shared_memory; medians of {arguments.rounds} rounds. "
        f"Other processes that ran at the start: {load:.1f} on average.\n\n" + "\n".join(table),
    )


if __name__ == "__main__":
    main()
