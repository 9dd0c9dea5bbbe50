"""Stop training once an evaluation metric no longer improves."""

from collections.abc import Mapping
from typing import Any

from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checkpoints.task_state import TaskState
from mbgd.config import Direction
from mbgd.config.field_types import converted
from mbgd.errors import UsageError
from mbgd.text.suggestions import did_you_mean


class EarlyStopping:
    """Stops after `patience` evaluations in a row in which `metric` has not improved by more than `min_delta`.

    The metric is exact and the same on every worker, so the stop step is the same for any number of workers. The best
    value and the count are kept in the checkpoints. NaN is no improvement.
    """

    name = "early_stopping"

    def __init__(
        self,
        metric: str = "eval/loss",
        patience: int = 5,
        min_delta: float = 0.0,
        direction: str = "minimize",
        load_best: bool = False,
    ) -> None:
        """direction: minimize or maximize. load_best: the run ends with the weights of its best evaluation.

        UsageError for values out of range.
        """
        if not isinstance(patience, int) or patience < 1:
            raise UsageError(f"patience={patience}; it is a number of evaluations, at least 1.")
        if not min_delta >= 0:
            raise UsageError(f"min_delta={min_delta}; it must be at least 0.")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        is_lowest = converted(f"direction={direction}", direction, Direction) is Direction.minimize
        self._sign = 1.0 if is_lowest else -1.0
        self.load_best = load_best
        self._best: float | None = None
        self._num_without = 0
        self._task: TaskState | None = None
        self._of_best: Snapshot | None = None
        """Weights, buffers and extra state at the best evaluation, if they are wanted."""

    def before_training(self, trainer: Any) -> None:
        """UsageError if no evaluation gives the metric."""
        names = trainer.evaluations.names
        if self.metric not in names:
            known = f"evaluations give {', '.join(names)}" if names else "there is no evaluation dataset"
            raise UsageError(f"metric={self.metric}: {known}.{did_you_mean(self.metric, names)}")
        if self.load_best and self.metric in trainer.observers.names_of_other_weights:
            raise UsageError(
                f"load_best with metric={self.metric}, which other weights than the model's give. Take a metric of the "
                "model's own, or keep that checkpoint by checkpoint.best."
            )
        self._task = TaskState(trainer.setup.task, trainer.setup.buffers)

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether to stop."""
        value = self._sign * metrics[self.metric]
        if value == value and (self._best is None or value < self._best - self.min_delta):
            self._best, self._num_without = value, 0
            if self.load_best:
                assert self._task is not None
                self._of_best = self._task.snapshot(step)
        else:
            self._num_without += 1
        return self._num_without >= self.patience

    def at_end(self) -> int | None:
        if self._of_best is None:
            return None
        assert self._task is not None
        self._task.restore(self._of_best)
        return self._of_best.step

    def state_dict(self) -> dict[str, Any]:
        state = {"best": self._best, "num_without": self._num_without}
        if (best := self._of_best) is None:
            return state
        return {**state, "of_best": {"step": best.step, "tensors": best.tensors, "values": best.values}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._num_without = state["best"], state["num_without"]
        self._of_best = Snapshot(**state["of_best"]) if "of_best" in state else None
