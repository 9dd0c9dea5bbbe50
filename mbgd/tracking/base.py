"""The interface of trackers, which get a run's metrics, progress and end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from mbgd.errors import Preempted, optional, warn
from mbgd.files.observed import Write

Metrics = Mapping[str, float | str]
"""Values by names such as train/loss; texts are fingerprints."""


class Outcome(Enum):
    finished = "finished"
    failed = "failed"
    preempted = "preempted"


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    outcome: Outcome
    message: str = ""
    """Why, if it is not finished."""


class Tracker(Protocol):
    """Gets a run's progress and metrics; calls must return at once, because training waits for them.

    One that also has `observed(name, step, values)` gets what the observer `name` writes after `step` steps.
    """

    def progress(self, step: int) -> None:
        """Called after every step; step: number of optimizer steps completed."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics by names such as train/loss, after `step` optimizer steps."""

    def close(self, ending: Ending) -> None:
        """The last call; it may take a while, but must end."""


class NoTracker:
    """Does nothing."""

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self, ending: Ending) -> None:
        pass


def writer(tracker: Tracker) -> Write:
    """The tracker's method `observed`; one that does nothing if it has none."""
    return getattr(tracker, "observed", _ignore)


def _ignore(name: str, step: int, values: Mapping[str, Any]) -> None:
    pass


class Trackers:
    """Calls several trackers. One that fails, even while it opens, is left out with a warning, and training goes on."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = [(type(tracker).__name__, tracker) for tracker in trackers]
        self.closed: list[str] = []
        """Names of those that have closed without an error: what they write is there."""

    def open(self, name: str, opened: Callable[[], Tracker]) -> None:
        """Add the tracker that `opened` returns; name: its name in warnings."""
        with optional(f"{name} could not be opened", "Training goes on without it."):
            self._trackers.append((name, opened()))

    def progress(self, step: int) -> None:
        self._tell(lambda tracker: tracker.progress(step))

    def log(self, step: int, metrics: Metrics) -> None:
        self._tell(lambda tracker: tracker.log(step, metrics))

    def observed(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: writer(tracker)(name, step, values))

    def close(self, ending: Ending) -> None:
        for name, tracker in self._trackers:
            with optional(f"{name} could not be closed", "Training is not affected."):
                tracker.close(ending)
                self.closed.append(name)

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for named in tuple(self._trackers):
            name, tracker = named
            try:
                call(tracker)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._trackers.remove(named)
                warn(f"{name} failed", error, "It is left out from now on. Training goes on.")


@contextmanager
def told_of_its_end(tracker: Tracker) -> Iterator[None]:
    """Close the tracker with how the code inside ended."""
    ending = Ending(Outcome.finished)
    try:
        yield
    except Preempted as stopped:
        ending = Ending(Outcome.preempted, str(stopped))
        raise
    except BaseException as error:
        ending = Ending(Outcome.failed, f"{type(error).__name__}: {error}")
        raise
    finally:
        tracker.close(ending)
