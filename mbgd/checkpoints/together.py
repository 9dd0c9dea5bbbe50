"""Checkpoints of a state that lies in pieces on all workers: whoever takes one gets the pieces of all others."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from mbgd.checkpoints.keeper import Keeper, Take
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.errors import UsageError
from mbgd.workers.group import Workers


class InPieces(Protocol):
    """A state that lies in pieces on all workers."""

    def gather(self, takers: Collection[int]) -> None:
        """Put it together on the workers `takers`, until `drop`; every worker calls this."""

    def drop(self) -> None:
        """Forget what lies on other workers."""


class TakenTogether:
    """The checkpoints that this worker keeps; at steps at which any worker may take one, all meet.

    They exchange who takes one, and then send their pieces. A worker that takes one says so when it asks for the
    snapshot, the others once they know that they do not, so that each exchanges exactly once.
    """

    def __init__(self, kept: Keeper, workers: Workers, pieces: InPieces) -> None:
        """Every worker makes one."""
        self._kept, self._workers, self._pieces = kept, workers, pieces
        self._every_steps = {n for of_worker in workers.gather_values(kept.every_steps()) for n in of_worker}

    def check(self, problems: Sequence[str]) -> None:
        self._kept.check(problems)

    def every_steps(self) -> list[int]:
        return self._kept.every_steps()

    def due_by_time(self) -> bool:
        return self._kept.due_by_time()

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        if evaluation or is_time or any(step % every == 0 for every in self._every_steps):
            with self._meeting(take) as taken:
                self._kept.after_step(step, evaluation, taken, is_time=is_time)
        else:
            self._kept.after_step(step, evaluation, _not_announced, is_time=is_time)

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        with self._meeting(take) as taken:
            return self._kept.at_end(step, evaluation, taken)

    def alone(self, step: int, take: Take) -> None:
        self._kept.alone(step, _others_are_not_here)

    def newest_step(self) -> int | None:
        return self._kept.newest_step()

    def settle(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_on_disk: bool) -> None:
        if is_on_disk:
            self._kept.settle(step, evaluation, take, is_on_disk=True)
            return
        with self._meeting(take) as taken:
            self._kept.settle(step, evaluation, taken, is_on_disk=False)

    @contextmanager
    def _meeting(self, take: Take) -> Iterator[Take]:
        """In this context each worker may take a snapshot; however often it asks, it is one."""
        taken: list[Snapshot | Exception] = []

        def take_once() -> Snapshot:
            if not taken:
                taken.append(self._taken(take))
            if isinstance(taken[0], Exception):
                raise taken[0]
            return taken[0]

        try:
            yield take_once
        except UsageError:
            if not taken:  # this worker refuses to take one, and the others may
                self._meet(takes=False)
            raise
        if not taken:
            self._meet(takes=False)

    def _taken(self, take: Take) -> Snapshot | Exception:
        self._meet(takes=True)
        try:
            return take()
        except Exception as error:
            return error
        finally:
            self._pieces.drop()

    def _meet(self, *, takes: bool) -> None:
        takers = [rank for rank, one in enumerate(self._workers.gather_values(takes)) if one]
        if takers:
            self._pieces.gather(takers)


def _not_announced() -> Snapshot:
    raise UsageError(
        "the optimizer's state lies in pieces on all workers, which did not know that a checkpoint is taken at this "
        "step. A keeper of your own must name its steps in every_steps(); sharding=none needs no other workers."
    )


def _others_are_not_here() -> Snapshot:
    raise UsageError(
        "the optimizer's state lies in pieces on all workers (sharding=optimizer, without shared memory), and this "
        "worker may have been the only one to stop here"
    )
