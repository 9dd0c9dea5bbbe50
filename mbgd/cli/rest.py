"""The launcher's part of recovery=continue: a worker that is killed is taken out, and the rest go on.

A worker that ends by itself with an error ends the run, as ever: the others would run into the same error.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.subprocess_handler import get_subprocess_handler

from mbgd.workers.membership import SEAT, Roster, common_store
from mbgd.workers.preemption import EXIT_CODE as PREEMPTED
from mbgd.workers.preemption import SIGNALS
from mbgd.workers.store import STORE

SECONDS_BETWEEN_LOOKS = 0.1
"""As torch's agent does."""


class Rest:
    """The worker processes of one start, fewer or more as they are lost and replaced."""

    def __init__(self, processes: Any, run_id: str, num_restarts: int) -> None:
        """processes: torch's SubprocessContext, from which lost ones are taken out."""
        self._processes = processes
        store = PrefixStore(run_id, FileStore(os.environ[STORE]))
        self._roster = Roster(common_store(store, num_restarts), len(processes.subprocess_handlers))
        self._places = {seat: seat for seat in self._roster.generation.seats}
        """Seat → local rank, of the workers that train or are about to."""
        self._next_seat = len(self._places)
        self._seen: dict[int, int | None] = {}
        """Seat → exit code at the last look."""

    def goes_on(self) -> bool:
        """Whether the workers train, and go on without lost ones."""
        return self._roster.goes_on()

    def look(self, num_spare: int) -> int:
        """Take out lost workers, and let new ones in; returns how many were started in place of lost ones.

        num_spare: how many may be. The last that train are not taken out: with them the run is lost. A signal that
        comes meanwhile waits: half of this would leave the others without an answer.
        """
        with signals_held():
            return self._look(num_spare)

    def stop(self, number: signal.Signals, seconds: float) -> None:
        """Pass a signal on, and wait until all workers have ended; those that save still go on without lost ones.

        New ones that have not joined the others have nothing to save, and are ended at once.
        """
        members = self._roster.generation.seats
        for seat in [seat for seat in self._places if seat not in members]:
            self._forget(seat)
        for handler in self._processes.subprocess_handlers.values():
            if handler.proc.poll() is None:
                handler.close(death_sig=number)
        deadline = time.monotonic() + seconds
        while any(self._poll(rank) is None for rank in self._places.values()) and time.monotonic() < deadline:
            self.look(0)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _look(self, num_spare: int) -> int:
        for seat in self._roster.silent():
            self._end(seat)
        codes = self._seen = {seat: self._poll(rank) for seat, rank in self._places.items()}
        if {0, PREEMPTED} & {*codes.values()}:  # its results, or the state at which all stop, are saved
            self._roster.complete()
        members = self._roster.generation.seats
        # A worker that has not joined yet harms nobody, whatever it ends with.
        lost = {seat: code for seat, code in codes.items() if code and (code < 0 or seat not in members)}
        seats = [seat for seat in members if seat not in lost]
        if not seats:
            return 0
        come = [seat for seat in self._places if seat not in (*seats, *lost) and self._roster.has_come(seat)]
        free = [self._take_out(seat, code, len(seats)) for seat, code in lost.items()]
        if [*seats, *come] != members:
            self._roster.publish([*seats, *come])
        started = free[:num_spare]
        for rank in started:
            self._start(rank)
        return len(started)

    def ended(self) -> Any:
        """torch's result, once all have ended or one has failed; None before.

        As of the last look: torch would end the run for a worker that is lost after it.
        """
        codes = [self._seen[seat] for seat in self._places if seat in self._seen]
        return self._processes.wait(0) if any(codes) or None not in codes else None

    def _poll(self, rank: int) -> int | None:
        code: int | None = self._processes.subprocess_handlers[rank].proc.poll()
        return code

    def _end(self, seat: int) -> None:
        """Kill a worker that does not answer the others: it must not come back once they have gone on."""
        if seat in self._places:
            process = self._processes.subprocess_handlers[self._places[seat]].proc
            process.kill()  # does nothing where it has ended
            process.wait()

    def _take_out(self, seat: int, code: int, num_left: int) -> int:
        """Forget a lost worker, with num_left that train; returns its local rank."""
        rank, pid = self._forget(seat)
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        rest = f"{num_left} workers go on" if num_left > 1 else "1 worker goes on"
        print(
            f"lost        process {pid} ended by {how}; {rest}",
            file=sys.stderr,
            flush=True,
        )
        return rank

    def _forget(self, seat: int) -> tuple[int, int]:
        """End a worker and the processes that it has started; returns its local rank and its process id."""
        rank = self._places.pop(seat)
        process = self._processes.subprocess_handlers.pop(rank).proc
        self._processes._running_local_ranks.discard(rank)
        with suppress(ProcessLookupError):
            # Loader processes notice its end after seconds, and until then hold its connections to the others open.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return rank, process.pid

    def _start(self, rank: int) -> None:
        """Start a worker in place of a lost one; it joins the others when it is ready."""
        processes, seat = self._processes, self._next_seat
        processes.subprocess_handlers[rank] = get_subprocess_handler(
            entrypoint=processes.entrypoint,
            args=processes.args[rank],
            env={**processes.envs[rank], SEAT: str(seat)},
            stdout=processes.stdouts[rank],
            stderr=processes.stderrs[rank],
            local_rank_id=rank,
            numa_options=None,
        )
        processes._running_local_ranks.add(rank)
        self._places[seat], self._next_seat = rank, seat + 1


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals that have a handler, and come inside, are handled at its end."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {int(number): signal.getsignal(number) for number in SIGNALS}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for name in held:
            signal.signal(name, note)
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
