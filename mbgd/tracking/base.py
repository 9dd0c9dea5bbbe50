"""The interface of everything that is told how a run goes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

Metrics = Mapping[str, float | str]
"""Values by names such as train/loss; texts are fingerprints."""


class Tracker(Protocol):
    """Is told of a run's progress; must return at once, for training waits."""

    def progress(self, step: int) -> None:
        """So many optimizer steps are completed; called after every step."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics by names such as train/loss, after so many optimizer steps."""

    def close(self) -> None:
        """Nothing more will come."""


class NoTracker:
    """Tells nobody."""

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self) -> None:
        pass


class Trackers:
    """Tells several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def progress(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.progress(step)

    def log(self, step: int, metrics: Metrics) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
