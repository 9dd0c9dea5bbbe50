"""Stop training once an evaluation metric no longer improves."""

from collections.abc import Mapping
from typing import Any

from mbgd.config import Direction
from mbgd.config.field_types import converted
from mbgd.errors import UsageError
from mbgd.text.suggestions import did_you_mean


class EarlyStopping:
    """Stops after `patience` evaluations in a row in which `metric` has not improved by more than `min_delta`.

    The metric is exact and the same on every worker, so the stop step is the same for any number of workers. The best
    value and the count are kept in the checkpoints. NaN is no improvement.
    """

    def __init__(
        self, metric: str = "eval/loss", patience: int = 5, min_delta: float = 0.0, direction: str = "minimize"
    ) -> None:
        """direction: minimize or maximize. UsageError for values out of range."""
        if not isinstance(patience, int) or patience < 1:
            raise UsageError(f"patience={patience}; it is a number of evaluations, at least 1.")
        if not min_delta >= 0:
            raise UsageError(f"min_delta={min_delta}; it must be at least 0.")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        is_lowest = converted(f"direction={direction}", direction, Direction) is Direction.minimize
        self._sign = 1.0 if is_lowest else -1.0
        self._best: float | None = None
        self._num_without = 0

    def before_training(self, trainer: Any) -> None:
        """UsageError if no evaluation gives the metric."""
        names = trainer.evaluations.names
        if self.metric not in names:
            known = f"evaluations give {', '.join(names)}" if names else "there is no evaluation dataset"
            raise UsageError(f"metric={self.metric}: {known}.{did_you_mean(self.metric, names)}")

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether to stop."""
        value = self._sign * metrics[self.metric]
        if value == value and (self._best is None or value < self._best - self.min_delta):
            self._best, self._num_without = value, 0
        else:
            self._num_without += 1
        return self._num_without >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "num_without": self._num_without}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._num_without = state["best"], state["num_without"]
