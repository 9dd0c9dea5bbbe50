"""Finds the missing workers after a failed exchange, so that the error can name them."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from torch.distributed.distributed_c10d import Store

from mbgd.workers.flight_recorder import Exchanges

SHARE = 0.1
"""Share of an exchange's timeout that the roll call takes."""
LOOKS_PER_CALL = 4
MOST_NAMED = 8
"""Ranks that are named where many workers are in the same exchange."""


@dataclass(frozen=True)
class Begun:
    """The exchange that a worker has begun last."""

    number: int
    """All workers number them alike."""
    what: str
    """Such as "all_reduce of Float [1000]"; empty if unknown."""


@dataclass(frozen=True)
class Missing:
    """Ranks of the missing workers, by cause."""

    lost: list[int]
    """Ended, stopped or cut off."""
    busy: list[int]
    """Running, but not in an exchange that failed."""
    begun: dict[int, Begun] = field(default_factory=dict)
    """By rank, of the workers that answer and know it."""


class RollCall:
    """A worker whose exchange fails calls the roll; every running worker answers, from a thread.

    The thread is needed because other workers' exchanges need not fail: one that waits for a worker that itself waits
    for a dead worker sees no error. The thread looks for a call LOOKS_PER_CALL times in the time that a call takes.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_workers: int,
        timeout_seconds: float,
        *,
        exchanges: Callable[..., Exchanges | None],
        ends_unheard: bool,
    ) -> None:
        """store: of this round of the run; timeout_seconds: for an exchange together with the roll call after it.

        exchanges(named=…): gives this worker's exchanges (flight_recorder.py). ends_unheard: a failed exchange ends
        the process without an exception, as nccl's does, so the roll is called while the worker still waits for the
        exchange.
        """
        self._store, self._rank, self._num_workers = store, rank, num_workers
        self._exchanges, self._timeout_seconds = exchanges, timeout_seconds
        self.seconds = _seconds(timeout_seconds)
        self._stuck = Stuck(timeout_seconds - 3 * self.seconds) if ends_unheard else None
        self._is_over = threading.Event()
        self._answering = threading.Thread(target=self._answer, daemon=True)
        self._answering.start()

    def missing(self) -> Missing:
        """Call the roll and wait for the answers; takes all of `seconds` if one is missing."""
        alive: set[int] = set()
        failed: set[int] = set()
        begun: dict[int, Begun] = {}
        is_over = threading.Event()

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone
                self._answer_call()
                self._store.set("roll", "")
                self._store.set(f"failed/{self._rank}", "")
                while len(failed) < self._num_workers and not is_over.is_set():
                    for rank in range(self._num_workers):
                        if self._store.check([f"failed/{rank}"]):
                            failed.add(rank)
                        if rank not in begun and self._store.check([f"alive/{rank}"]):
                            alive.add(rank)
                            number, _, what = self._store.get(f"alive/{rank}").decode().partition(" ")
                            begun[rank] = Begun(int(number), what)
                        if rank in failed:
                            alive.add(rank)
                    time.sleep(self.seconds / LOOKS_PER_CALL / 4)

        # In a thread: the store does not answer if the process that serves it has stopped (without torchrun, the main
        # worker).
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self.seconds)
        # A thread that is in the store's C++ when Python ends would abort the process.
        is_over.set()
        asking.join(self.seconds / LOOKS_PER_CALL)
        if not alive:
            return Missing(lost=[0], busy=[])
        ranks = range(self._num_workers)
        known = {rank: one for rank, one in sorted(begun.items()) if one.number >= 0}
        return Missing(
            [rank for rank in ranks if rank not in alive], [rank for rank in ranks if rank not in failed], known
        )

    def end(self) -> None:
        self._is_over.set()
        self._answering.join(self.seconds)

    def _answer(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            while not self._is_over.wait(self.seconds / LOOKS_PER_CALL):
                if self._store.check(["roll"]):
                    self._answer_call()
                    return
                if self._stuck is not None and self._stuck.now(self._exchanges(named=False)):
                    why = f"it has not ended for {self._stuck.seconds:.0f} s"
                    told = describe(self.missing(), self._timeout_seconds, why)
                    print(f"warning on worker {self._rank}: {told}", file=sys.stderr, flush=True)
                    return

    def _answer_call(self) -> None:
        mine = self._exchanges(named=True)
        self._store.set(f"alive/{self._rank}", "-1" if mine is None else f"{mine.begun} {mine.last}")


def seconds_before_roll_call(timeout_seconds: float) -> float:
    """How long an exchange may wait, so that it takes no longer than the timeout together with the roll call."""
    return max(timeout_seconds - _seconds(timeout_seconds), 1.0)


def _seconds(timeout_seconds: float) -> float:
    return min(max(SHARE * timeout_seconds, 1.0), 30.0)


class Stuck:
    """Whether the same exchange has been pending for longer than `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: Exchanges | None = None
        self._since = 0.0

    def now(self, exchanges: Exchanges | None) -> bool:
        """Call it regularly."""
        now = time.monotonic()
        if exchanges is None or exchanges.done >= exchanges.begun or exchanges != self._last:
            self._last, self._since = exchanges, now
            return False
        return now - self._since > self.seconds


def describe(missing: Missing, timeout_seconds: float, reason: str) -> str:
    """The error's text; reason: the failed exchange's own error message."""
    reason = reason.splitlines()[0]
    if missing.lost:
        return (
            f"{_workers(missing.lost)} not answer any more: ended, stopped or cut off. Look at the end of the output "
            f"there; the exchange failed with: {reason}"
        )
    if missing.busy:
        return (
            f"{_workers(missing.busy)} not come to an exchange, though still running: probably busy for longer than "
            f"backend.timeout_seconds={timeout_seconds:g}. Find out with what (py-spy dump), or allow more; "
            f"{_exchanges(missing.begun)}the exchange failed with: {reason}"
        )
    if different := _exchanges(missing.begun):
        return (
            f"the workers are not in the same exchange, so none can end; {different}look for code that only some "
            "workers run, such as a collective of your own under `if rank == 0`; the exchange failed with: "
            f"{reason}"
        )
    return (
        f"an exchange between workers failed although all of them still answer: {reason}. The network may have been "
        "cut for a while."
    )


def _workers(ranks: list[int]) -> str:
    return f"worker {ranks[0]} does" if len(ranks) == 1 else f"workers {', '.join(map(str, ranks))} do"


def _exchanges(begun: dict[int, Begun]) -> str:
    """The exchange that each worker has begun last; empty if it is the same on all."""
    ranks: dict[Begun, list[int]] = {}
    for rank, one in begun.items():
        ranks.setdefault(one, []).append(rank)
    if len(ranks) < 2:
        return ""
    last = [f"number {one.number}{one.what and f' ({one.what})'} on {_named(ranks[one])}" for one in ranks]
    return f"exchanges begun last: {'; '.join(last)}; "


def _named(ranks: list[int]) -> str:
    more = [f"{len(ranks) - MOST_NAMED} more"] if len(ranks) > MOST_NAMED else []
    return f"worker{'s' * (len(ranks) > 1)} {', '.join([*map(str, ranks[:MOST_NAMED]), *more])}"
