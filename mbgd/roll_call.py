"""Who is missing after an exchange between workers has failed, so that the error can name them."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

SHARE = 0.1
"""Of the time that an exchange may take, for calling the roll."""
LOOKS_PER_CALL = 4


@dataclass(frozen=True)
class Missing:
    """Ranks by what is wrong with them."""

    lost: list[int]
    """Ended, stopped or cut off."""
    busy: list[int]
    """Running, but not in an exchange that failed."""


class RollCall:
    """Called by every worker whose exchange fails; answered, from a thread, by every worker that runs.

    The thread is needed because the others' exchanges need not fail: one that waits for a worker that waits for a dead
    one sees nothing of it. It looks a few times in as many seconds as a call takes.
    """

    def __init__(self, store: Store, rank: int, num_workers: int, timeout_seconds: float) -> None:
        """store: of this round of the run; timeout_seconds: of an exchange together with the call after it."""
        self._store, self._rank, self._num_workers = store, rank, num_workers
        self.seconds = min(max(SHARE * timeout_seconds, 1.0), 30.0)
        self._is_over = threading.Event()
        self._answering = threading.Thread(target=self._answer, daemon=True)
        self._answering.start()

    def missing(self) -> Missing:
        """Call, and wait for answers; takes all of `seconds` where one is missing."""
        alive: set[int] = set()
        failed: set[int] = set()

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone
                self._store.set("roll", "")
                self._store.set(f"failed/{self._rank}", "")
                while len(failed) < self._num_workers:
                    for rank in range(self._num_workers):
                        if self._store.check([f"failed/{rank}"]):
                            failed.add(rank)
                        if rank in failed or self._store.check([f"alive/{rank}"]):
                            alive.add(rank)
                    time.sleep(self.seconds / LOOKS_PER_CALL / 4)

        # In a thread, for the store does not answer if its keeper has stopped: without torchrun, the main worker.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self.seconds)
        if not alive:
            return Missing(lost=[0], busy=[])
        ranks = range(self._num_workers)
        return Missing([rank for rank in ranks if rank not in alive], [rank for rank in ranks if rank not in failed])

    def end(self) -> None:
        self._is_over.set()
        self._answering.join(self.seconds)

    def _answer(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            while not self._is_over.wait(self.seconds / LOOKS_PER_CALL):
                if self._store.check(["roll"]):
                    self._store.set(f"alive/{self._rank}", "")
                    return


def describe(missing: Missing, timeout_seconds: float, reason: str) -> str:
    """reason: what the failed exchange said."""
    reason = reason.splitlines()[0]
    if missing.lost:
        return (
            f"{_workers(missing.lost)} not answer any more: ended, stopped or cut off. Look at the end of what was "
            f"printed there; the exchange failed with: {reason}"
        )
    if missing.busy:
        return (
            f"{_workers(missing.busy)} not come to an exchange, though still running: probably busy for longer than "
            f"backend.timeout_seconds={timeout_seconds:g}. Find out with what (py-spy dump), or allow more; the "
            f"exchange failed with: {reason}"
        )
    return (
        f"an exchange between workers failed although all of them still answer: {reason}. The network may have been "
        "cut for a while."
    )


def _workers(ranks: list[int]) -> str:
    return f"worker {ranks[0]} does" if len(ranks) == 1 else f"workers {', '.join(map(str, ranks))} do"
