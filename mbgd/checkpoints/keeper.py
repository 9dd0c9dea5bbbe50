"""Who keeps checkpoints on a worker: the calls that the trainer makes, and a worker that keeps none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mbgd.checkpoints.snapshot import Snapshot
from mbgd.errors import UsageError

Take = Callable[[], Snapshot]


class Keeper(Protocol):
    """Takes snapshots of a run when they are due."""

    def check(self, problems: Sequence[str]) -> None:
        """UsageError if there are problems: state that a checkpoint cannot hold, known after the first step."""

    def every_steps(self) -> list[int]:
        """For each N here, one may be due after every N steps; others after an evaluation or by time alone."""

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        """Take one if one is due after `step` steps.

        evaluation: metrics of an evaluation at this step; empty if there was none. is_time: a checkpoint that is due
        by time may be taken now.
        """

    def due_by_time(self) -> bool:
        """Whether `checkpoint.every_seconds` have passed since the last one."""

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        """Take one and wait until everything is written; returns whether that succeeded."""

    def alone(self, step: int, take: Take) -> None:
        """As `at_end`, where an error ends the run and this worker may be the only one that has it."""

    def newest_step(self) -> int | None:
        """Step of the newest whole checkpoint on disk; None if there is none."""

    def settle(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_on_disk: bool) -> None:
        """Once it is known whether the disk has the last state: remove the snapshots in memory, or save it there."""


class NoCheckpoints:
    """Takes none."""

    def check(self, problems: Sequence[str]) -> None:
        pass

    def every_steps(self) -> list[int]:
        return []

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        pass

    def due_by_time(self) -> bool:
        return False

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        return True

    def alone(self, step: int, take: Take) -> None:
        pass

    def newest_step(self) -> int | None:
        return None

    def settle(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_on_disk: bool) -> None:
        pass


class CheckpointsElsewhere(NoCheckpoints):
    """The main worker takes them; state that cannot be saved is refused on every worker."""

    def check(self, problems: Sequence[str]) -> None:
        refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UsageError("this run could not be saved:\n" + "\n".join(f"  - {one}" for one in problems))
