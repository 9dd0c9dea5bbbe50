"""Hosts as PID namespaces: workers of two of them see nothing of each other's processes, and so share no memory.

They have one network, so no device and no link is made. Needs root.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mbgd.workers.group import start_workers
from mbgd.workers.parent import PR_SET_PDEATHSIG

from processes import environment, running

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18

needs_hosts = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces takes root")


def run_on_hosts(
    function: Callable[..., Any], hosts: Sequence[int], *arguments: Any, timeout_seconds: float = 120
) -> list[Any]:
    """`function(workers, *arguments)` on each worker of hosts with that many workers; what they return, by rank.

    `function` must be defined at the top of a module. An exception on any worker is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        with hosts_started(_work, hosts, function, folder, arguments) as processes:
            deadline = time.monotonic() + timeout_seconds
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            results = sorted(Path(folder).glob("error-*")) or sorted(Path(folder).glob("result-*"))
        if any(path.name.startswith("error") for path in results) or len(results) < sum(hosts):
            pytest.fail("\n".join(f"{path.name}: {path.read_text()}" for path in results if "error" in path.name))
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(sum(hosts))]


def _work(
    rank: int, num_workers: int, port: int, function: Callable[..., Any], folder: str, arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", timeout_seconds=60) as workers:
            result = function(workers, *arguments)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())


@contextmanager
def hosts_started(
    function: Callable[..., None], hosts: Sequence[int], *arguments: Any
) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """A process for each host, whose workers run `function(rank, num_workers, port, *arguments)`.

    The store in which they meet is this process's, as under torchrun, which has it in a process of its own. Those that
    still run at the end are killed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    processes: list[multiprocessing.process.BaseProcess] = [
        context.Process(target=_host, args=(sum(hosts[:number]), size, sum(hosts), store.port, function, arguments))
        for number, size in enumerate(hosts)
    ]
    with running(processes):
        yield processes


def _host(
    first_rank: int, size: int, num_workers: int, port: int, function: Callable[..., None], arguments: Sequence[Any]
) -> None:
    """Start the workers in namespaces of their own, and wait for them. With this process they end, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "unshare")
    init = os.fork()
    if init:
        os.waitpid(init, 0)
        return
    # The first process of the namespace: when it ends, the kernel kills the others.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) or libc.mount(b"proc", b"/proc", b"proc", 0, None):
        os._exit(1)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    workers = []
    for rank in range(first_rank, first_rank + size):
        worker = os.fork()
        if not worker:
            function(rank, num_workers, port, *arguments)
            os._exit(0)
        workers.append(worker)
    for worker in workers:
        os.waitpid(worker, 0)
    os._exit(0)
