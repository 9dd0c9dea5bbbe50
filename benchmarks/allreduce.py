"""Sum of one float32 tensor over the CPU workers of this host: `python benchmarks/allreduce.py`.

`shared memory` is averaging=shared_memory's sum of the gradients, `gloo` is torch.distributed.all_reduce, and `copy` is
the machine's limit: each process copies that many bytes within its own memory. Interleaved rounds in the same
processes. A time is from a barrier to the end of the slowest worker.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from mbgd.averaging.host_memory.exchange import Exchange
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.shared_memory import in_order

from machine import as_worker, publish

SIZES = (4_000, 40_000, 400_000, 4_000_000, 25_000_000, 100_000_000, 400_000_000)
NAMES = ("shared memory", "gloo", "copy")
ROUND_BYTES = 50_000_000
"""Bytes summed per round: small tensors are summed repeatedly up to this total, at most 200 times."""


def measure(rank: int, num_workers: int, port: int, num_bytes: int, rounds: int, results: list[list[float]]) -> None:
    with as_worker(rank, num_workers, port) as workers:
        parameter = nn.Parameter(torch.zeros(num_bytes // 4))
        exchange = Exchange([parameter], 1, HostMemory(workers), rank=rank)
        mine, source = torch.zeros(num_bytes // 4), torch.zeros(num_bytes // 4)
        functions: list[Callable[[], object]] = [
            lambda: exchange([exchange.places[0]], [1] * num_workers, in_order),
            lambda: dist.all_reduce(mine),
            lambda: mine.copy_(source),
        ]
        repeats = max(1, min(200, ROUND_BYTES // num_bytes))
        for _ in range(rounds + 1):  # the first round warms up
            times = torch.zeros(len(functions))
            for number, function in enumerate(functions):
                workers.barrier()
                start = time.perf_counter()
                for _ in range(repeats):
                    function()
                times[number] = (time.perf_counter() - start) / repeats
            workers.max_(times)
            if workers.is_main:
                results.append(times.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--bytes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    lines = [
        f"{'workers':<9}{'bytes':>12}{'shared memory':>16}{'gloo':>12}{'copy':>12}"
        f"{'gloo / shared':>16}{'(range)':>14}{'shared / copy':>15}{'(range)':>14}"
    ]
    ports = itertools.count(20000 + os.getpid() % 20000)
    with torch.multiprocessing.Manager() as manager:
        for num_workers in arguments.workers:
            for num_bytes in arguments.bytes:
                results = manager.list()
                torch.multiprocessing.start_processes(
                    measure,
                    (num_workers, next(ports), num_bytes, arguments.rounds, results),
                    num_workers,
                    start_method="forkserver",
                )
                shared, gloo, copy = zip(*list(results)[1:], strict=True)
                faster = [b / a for a, b in zip(shared, gloo, strict=True)]
                slower = [a / b for a, b in zip(shared, copy, strict=True)]
                lines.append(
                    f"{num_workers:<9}{num_bytes:>12,}"
                    f"{milliseconds(shared):>16}{milliseconds(gloo):>12}{milliseconds(copy):>12}"
                    f"{statistics.median(faster):>16.1f}{f'({min(faster):.1f}–{max(faster):.1f})':>14}"
                    f"{statistics.median(slower):>15.1f}{f'({min(slower):.1f}–{max(slower):.1f})':>14}"
                )
                print(lines[-1], flush=True)
    publish("allreduce", "Milliseconds to add up over workers, medians of interleaved rounds.\n\n" + "\n".join(lines))


def milliseconds(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3f}"


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("forkserver")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "torch.distributed", "mbgd.trainer"]
    )
    main()
