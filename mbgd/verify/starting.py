"""A tool's workers: torchrun's, or else processes that this one starts, without a port."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from mbgd.workers.parent import PARENT
from mbgd.workers.store import STORE, make_store

SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_FOLLOW = 10.0
"""How long the others may take to end once one has failed."""

USAGE_ERROR = 2


def is_a_worker() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return "RANK" in os.environ


def start(arguments: Sequence[str], num_workers: int) -> int:
    """Run `python -m mbgd ARGUMENTS` on `num_workers` workers of this host; returns the main worker's exit code.

    The main worker's output is this process's. Output of another worker is shown only if it failed differently.
    """
    store, threads = make_store(), max(1, (os.cpu_count() or 1) // num_workers)
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        said: list[IO[bytes]] = []
        try:
            for rank in range(num_workers):
                environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **_place(rank, num_workers, store)}
                errors = stack.enter_context(tempfile.TemporaryFile())
                output = None if rank == 0 else errors
                said.append(errors)
                command = [sys.executable, "-m", "mbgd", *arguments]
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=errors))
            codes = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        _show(said, codes)
    return codes[0] or max((abs(code) for code in codes), default=0)


def _place(rank: int, num_workers: int, store: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        STORE: store,
        PARENT: str(os.getpid()),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes by rank. Once a worker has failed, the others get SECONDS_TO_FOLLOW to end."""
    deadline = None
    while True:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            return [code for code in codes if code is not None]
        if deadline is None and any(codes):
            deadline = time.monotonic() + SECONDS_TO_FOLLOW
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
            return [process.wait() for process in processes]
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _show(said: Sequence[IO[bytes]], codes: Sequence[int]) -> None:
    """Print the main worker's errors, and those of others that failed with another exit code and message."""
    shown: set[str] = set()
    for rank, (file, code) in enumerate(zip(said, codes, strict=True)):
        file.seek(0)
        text = file.read().decode(errors="replace").strip()
        if text and text not in shown and (rank == 0 or code not in (0, codes[0])):
            print(text if rank == 0 else f"worker {rank}: {text}", file=sys.stderr)
        shown.add(text)
