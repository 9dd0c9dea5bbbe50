"""Learning-rate schedules: functions of the step alone, giving a factor for the optimizer's learning rate."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from mbgd.config.field_types import converted
from mbgd.errors import UsageError


class Schedule(ABC):
    """A factor that rises linearly over the first `warmup_steps` steps and then follows the schedule's shape."""

    depends_on_length: ClassVar[bool] = True
    """Whether a step's factor may depend on `num_steps`; then a run cannot be extended and keep its first steps. Not
    inherited: each class that does not depend on it must set False itself."""

    def __init__(self, *, num_steps: int, warmup_steps: int = 0) -> None:
        """num_steps: optimizer steps of the whole run; warmup_steps: how many of them warm up."""
        converted(f"schedule.warmup_steps={warmup_steps}", warmup_steps, int)
        if warmup_steps < 0 or 0 < num_steps < warmup_steps:
            raise UsageError(
                f"schedule.warmup_steps={warmup_steps} in a run of {num_steps} steps; it must be from 0 to {num_steps}."
            )
        self.num_steps, self.warmup_steps = num_steps, warmup_steps

    def __call__(self, step: int) -> float:
        """The factor in step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    def progress(self, step: int) -> float:
        """The fraction of the run after the warm-up that is done: 0 to 1."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))

    @abstractmethod
    def after_warmup(self, step: int) -> float: ...


def _check_factor(name: str, factor: float) -> None:
    if not 0 <= converted(f"schedule.{name}={factor}", factor, float) < math.inf:
        raise UsageError(f"schedule.{name}={factor}; it must be a finite number ≥ 0.")


class Constant(Schedule):
    """Factor 1."""

    depends_on_length = False

    def after_warmup(self, step: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from 1 down to `final_factor` (Loshchilov & Hutter 2017, without restarts)."""

    def __init__(self, *, num_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> None:
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps)
        _check_factor("final_factor", final_factor)
        self.final_factor = final_factor

    def after_warmup(self, step: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.progress(step)))
        return self.final_factor + (1.0 - self.final_factor) * cosine


class Linear(Schedule):
    """A straight line from 1 down to `final_factor`."""

    def __init__(self, *, num_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> None:
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps)
        _check_factor("final_factor", final_factor)
        self.final_factor = final_factor

    def after_warmup(self, step: int) -> float:
        return 1.0 + (self.final_factor - 1.0) * self.progress(step)


class Step(Schedule):
    """Multiplied by `decay` every `every_steps` steps."""

    depends_on_length = False

    def __init__(self, *, num_steps: int, every_steps: int, warmup_steps: int = 0, decay: float = 0.1) -> None:
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps)
        converted(f"schedule.every_steps={every_steps}", every_steps, int)
        _check_factor("decay", decay)
        if every_steps < 1:
            raise UsageError(f"schedule.every_steps={every_steps}; it must be ≥ 1.")
        self.every_steps, self.decay = every_steps, decay

    def after_warmup(self, step: int) -> float:
        return float(self.decay ** (step // self.every_steps))
