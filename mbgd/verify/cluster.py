"""A check of the cluster before a run: each worker's versions, speed of computation and all-reduce, and clock."""

import platform
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mbgd.runs.conditions import processor
from mbgd.workers.group import Workers

STRAGGLER = 1.3
"""A worker slower than the median by more than this factor is named."""

MATRIX, MATRIX_ON_GPU = 384, 4096
MOST_REPEATS = 50
MOST_SKEW_SECONDS = 1.0
NUM_CLOCK_LOOKS = 5


def look(workers: Workers, num_bytes: int, seconds: float) -> dict[str, Any]:
    """Facts about the workers and warnings, the same on every worker.

    num_bytes: of the model's gradients, the size of the measured all-reduce. seconds: about the most that it may take.
    """
    mine = {
        "host": socket.gethostname(),
        "device": processor(workers.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul_flops": _matmul_flops(workers, seconds / 4),
        "clock_skew_seconds": 0.0,
    }
    skews = _clock_skews(workers)
    exchange = _all_reduce(workers, num_bytes, seconds / 4)
    of_workers = workers.gather_values(mine)
    for one, skew in zip(of_workers, skews, strict=True):
        one["clock_skew_seconds"] = skew
    return {"workers": of_workers, "all_reduce": exchange, "warnings": warnings(of_workers)}


def warnings(of_workers: list[dict[str, Any]]) -> list[str]:
    """Differences between workers: slow ones, other versions, clocks that differ."""
    found = []
    rates = [one["matmul_flops"] for one in of_workers]
    median = statistics.median(rates)
    for rank, one in enumerate(of_workers):
        if one["matmul_flops"] * STRAGGLER < median:
            found.append(
                f"worker {rank} on {one['host']} is a straggler: it computes {median / one['matmul_flops']:.1f} times "
                "as slowly as the median. All wait for it in every step."
            )
        if abs(one["clock_skew_seconds"]) > MOST_SKEW_SECONDS:
            found.append(f"the clock of worker {rank} on {one['host']} is {one['clock_skew_seconds']:+.1f} s off.")
    for key in ("torch", "python", "threads", "device"):
        values = [str(one[key]) for one in of_workers]
        if len(set(values)) > 1:
            usual = statistics.mode(values)
            others = [f"{value} on worker {rank}" for rank, value in enumerate(values) if value != usual]
            found.append(f"{key}: {usual}, but {', '.join(others)}. Bits and speed may differ.")
    return found


def _matmul_flops(workers: Workers, seconds: float) -> float:
    """Floating-point operations per second of a matrix product; the best of several measurements."""
    size = MATRIX_ON_GPU if workers.device.type == "cuda" else MATRIX
    a = torch.ones(size, size, device=workers.device)
    best = _best_of(lambda: torch.mm(a, a), workers, MOST_REPEATS, seconds)
    return 2 * size**3 / best


def _best_of(work: Callable[[], Any], workers: Workers, most: int, seconds: float) -> float:
    best, end = float("inf"), time.monotonic() + seconds
    work()
    for _ in range(most):
        _wait(workers)
        start = time.perf_counter()
        work()
        _wait(workers)
        best = min(best, time.perf_counter() - start)
        if time.monotonic() > end:
            break
    return max(best, 1e-9)


def _wait(workers: Workers) -> None:
    if workers.device.type == "cuda":
        torch.cuda.synchronize(workers.device)


def _all_reduce(workers: Workers, num_bytes: int, seconds: float) -> dict[str, float] | None:
    """Time and bus bandwidth of an all-reduce of the gradients' size; None with one worker."""
    if workers.num_workers == 1:
        return None
    values = torch.zeros(max(1, num_bytes // 4), device=workers.device)
    workers.sum_(values)
    start = time.perf_counter()
    workers.sum_(values)
    _wait(workers)
    # Every worker must make the same number of exchanges.
    once = workers.max_(torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=workers.device)).item()
    repeats = max(1, min(MOST_REPEATS, int(seconds / max(once, 1e-6))))
    took = []
    for _ in range(repeats):
        workers.barrier()
        start = time.perf_counter()
        workers.sum_(values)
        _wait(workers)
        took.append(time.perf_counter() - start)
    median = statistics.median(took)
    moved = values.nbytes * 2 * (workers.num_workers - 1) / workers.num_workers
    return {"bytes": values.nbytes, "seconds": median, "bytes_per_second": moved / median}


def _clock_skews(workers: Workers) -> list[float]:
    """Each worker's clock minus the main worker's, in seconds; accurate up to the time of a message."""
    skews = [0.0]
    for rank in range(1, workers.num_workers):
        skews.append(_skew(workers, rank))
    return [float(skew) for skew in workers.broadcast(skews)]


def _skew(workers: Workers, rank: int) -> float:
    """The other clock against the middle of the fastest of several round trips; valid on the main worker only."""
    looks = []
    time_there = torch.zeros(1, dtype=torch.float64, device=workers.device)
    for _ in range(NUM_CLOCK_LOOKS):
        if workers.is_main:
            start = time.time()
            dist.send(time_there, dst=rank)
            dist.recv(time_there, src=rank)
            stop = time.time()
            looks.append((stop - start, time_there.item() - (start + stop) / 2))
        elif workers.rank == rank:
            dist.recv(time_there, src=0)
            time_there.fill_(time.time())
            dist.send(time_there, dst=0)
    return min(looks)[1] if looks else 0.0
