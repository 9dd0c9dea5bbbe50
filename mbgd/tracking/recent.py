"""What trackers were told after the newest step, so that another worker's can be told the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from mbgd.checkpoints.handover import Told
from mbgd.tracking.base import Ending, Metrics, Trackers


class Recent:
    """Passes everything on to trackers, and remembers what it was told after the newest step.

    Each worker has one: if the main worker is lost, the next one's has what the lost one may not have written yet.
    """

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers
        self.told: list[Told] = []

    def progress(self, step: int) -> None:
        self._trackers.progress(step)

    def log(self, step: int, metrics: Metrics) -> None:
        self._remember("log", step, [dict(metrics)])
        self._trackers.log(step, metrics)

    def observed(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self._remember("observed", step, [name, dict(values)])
        self._trackers.observed(name, step, values)

    def close(self, ending: Ending) -> None:
        self._trackers.close(ending)

    def catch_up(self, told: Sequence[Told]) -> None:
        """Pass on what another worker's was told after its newest step and this one was not."""
        if told and self.told and self.told[0][1] == told[0][1]:
            told = told[len(self.told) :]
        for method, step, given in told:
            if method == "log":
                self.log(step, *given)
            else:
                name, values = given
                self.observed(name, step, values)

    def _remember(self, method: str, step: int, given: Any) -> None:
        if self.told and self.told[0][1] != step:
            self.told.clear()
        self.told.append((method, step, given))
