"""Runs a function on real workers: processes that form a gloo group, started from a warm fork server."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from mbgd.workers.group import start_workers

# torch._dynamo: making an optimizer imports it, which takes a second.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "mbgd.trainer", "mbgd.data"]
)


def run_workers(
    function: Callable[..., Any],
    num_workers: int,
    *arguments: Any,
    timeout_seconds: float = 120,
    backend: str = "gloo",
    device: str = "auto",
) -> list[Any]:
    """`function(workers, *arguments)` on each of `num_workers` workers; what they return, in rank order.

    `function` must be defined at the top of a module. An exception on any worker is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
            _work,
            args=(function, num_workers, free_port(), folder, arguments, backend, device),
            nprocs=num_workers,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout_seconds
        while not processes.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} took longer than {timeout_seconds} s on {num_workers} workers")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(num_workers)]


@contextmanager
def started(
    function: Callable[..., None], num_workers: int, *arguments: Any
) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """Processes, by rank, that run `function(rank, num_workers, port, *arguments)`, for tests in which some get lost.

    Those that still run at the end are killed.
    """
    context, port = multiprocessing.get_context("forkserver"), free_port()
    processes: list[multiprocessing.process.BaseProcess] = [
        context.Process(target=function, args=(rank, num_workers, port, *arguments)) for rank in range(num_workers)
    ]
    with running(processes):
        yield processes


@contextmanager
def running(processes: Sequence[multiprocessing.process.BaseProcess]) -> Iterator[None]:
    """Start the processes; those that still run at the end are killed."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def eventually(found: Callable[[], Any], seconds: float = 30) -> Any:
    """What the function gives, once that is something."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return result


def _work(
    rank: int,
    function: Callable[..., Any],
    num_workers: int,
    port: int,
    folder: str,
    arguments: Any,
    backend: str,
    device: str,
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    with start_workers(backend, timeout_seconds=60, device=device) as workers:
        result = function(workers, *arguments)
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))


def environment(rank: int, num_workers: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
