"""The processes of a sweep's jobs: N at once, output into files, and nothing left running at the end."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mbgd.workers.parent import PARENT

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_STOP = 15.0
"""How long a job may take to save its state and end; torchrun's own limit is shorter."""

SECONDS_TO_DIE = 5.0
"""How long a process may take to vanish after SIGKILL."""

MARK = "MBGD_SWEEP_JOB"
"""Environment variable that every process of a job inherits. torchrun gives each worker a session of its own, so the
job's process group does not reach the workers."""

TIMED_OUT = 124
"""Exit code of a job that took too long, as in coreutils' timeout."""


@dataclass(frozen=True)
class Command:
    """How one job is started."""

    arguments: Sequence[str]
    log: Path
    environment: Mapping[str, str]


@dataclass
class _Running:
    index: int
    slot: int
    process: subprocess.Popen[bytes]
    mark: str
    started: float


def run_all(
    num_jobs: int,
    start: Callable[[int, int], Command],
    ended: Callable[[int, int, float], None],
    *,
    max_parallel: int,
    timeout_seconds: float | None,
) -> signal.Signals | None:
    """Run `num_jobs` jobs, `max_parallel` at once; returns the signal that stopped them, None if all have ended.

    start(index, slot) says how a job is started, in one of the slots 0 to max_parallel − 1; ended(index, exit code,
    seconds) is called when it is over.
    """
    waiting, slots = list(range(num_jobs)), list(range(max_parallel))
    running: list[_Running] = []
    with signals() as received:
        try:
            while (waiting or running) and not received:
                while waiting and slots:
                    index, slot = waiting.pop(0), slots.pop(0)
                    running.append(_start(index, slot, start(index, slot)))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for job in list(running):
                    seconds = time.monotonic() - job.started
                    exit_code = job.process.poll()
                    if exit_code is None and timeout_seconds is not None and seconds > timeout_seconds:
                        _stop([job])
                        exit_code = TIMED_OUT
                    if exit_code is not None:
                        _kill_what_is_left(job.mark)
                        running.remove(job)
                        slots.append(job.slot)
                        ended(job.index, exit_code, seconds)
            if received:
                print(f"{received[0].name}: {len(running)} running jobs may save their state, then end", flush=True)
        finally:
            _stop(running)
    return received[0] if received else None


def _start(index: int, slot: int, command: Command) -> _Running:
    mark = f"{os.getpid()}.{time.monotonic_ns()}.{index}"
    with command.log.open("ab") as log:
        process = subprocess.Popen(
            command.arguments,
            env={**command.environment, MARK: mark, PARENT: str(os.getpid())},  # the job ends with this process
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C on the terminal reaches only this process, which stops the jobs
        )
    return _Running(index, slot, process, mark, time.monotonic())


def _stop(running: Sequence[_Running]) -> None:
    """Ask the jobs to save and end; kill those that do not."""
    for job in running:
        with suppress(ProcessLookupError):
            job.process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for job in running:
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(max(0.0, deadline - time.monotonic()))
        _kill_what_is_left(job.mark)
        job.process.kill()
        job.process.wait()


def _kill_what_is_left(mark: str) -> None:
    """Kill every process that carries the mark: workers whose torchrun died, loader processes whose worker did."""
    deadline = time.monotonic() + SECONDS_TO_DIE
    while (pids := marked(mark)) and time.monotonic() < deadline:  # again: the list may miss one just starting
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def marked(mark: str = "") -> list[int]:
    """Ids of the processes whose environment has the mark, or any mark if it is empty; none without /proc."""
    entry = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if any(one == entry or (not mark and one.startswith(entry)) for one in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


@contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """Inside, signals are only added to the list, so that no child is lost between its start and its entry."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    noted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        noted.append(signal.SIGHUP)
    before: dict[int, Any] = {number: signal.signal(number, note) for number in noted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
