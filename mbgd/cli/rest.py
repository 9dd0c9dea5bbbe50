"""The launcher's part of recovery=continue: a worker that is killed is taken out, and the rest go on.

A worker that ends by itself with an error ends the run, as ever: the others would run into the same error.
"""

import os
import signal
import sys
from typing import Any

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.subprocess_handler import get_subprocess_handler

from mbgd.workers.membership import SEAT, Roster, common_store
from mbgd.workers.store import STORE


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

    def goes_on(self) -> bool:
        """Whether the workers train, and go on without lost ones."""
        return self._roster.goes_on()

    def look(self, num_spare: int) -> int:
        """Take out lost workers, and let new ones in; returns how many were started in place of lost ones.

        num_spare: how many may be. The last that train are not taken out: with them the run is lost.
        """
        for seat in self._roster.silent():
            self._end(seat)
        codes = {seat: self._poll(rank) for seat, rank in self._places.items()}
        if 0 in codes.values():
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

    def newcomers(self) -> set[int]:
        """Process ids of workers that have not joined the others."""
        members = self._roster.generation.seats
        handlers = self._processes.subprocess_handlers
        return {handlers[rank].proc.pid for seat, rank in self._places.items() if seat not in members}

    def ended(self) -> Any:
        """torch's result, once all have ended or one has failed; None before."""
        return self._processes.wait(0)

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
        rank = self._places.pop(seat)
        process = self._processes.subprocess_handlers.pop(rank).proc
        self._processes._running_local_ranks.discard(rank)
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        rest = f"{num_left} workers go on" if num_left > 1 else "1 worker goes on"
        print(
            f"lost        process {process.pid} ended by {how}; {rest}",
            file=sys.stderr,
            flush=True,
        )
        return rank

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
