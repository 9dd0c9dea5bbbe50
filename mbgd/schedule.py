"""Learning-rate schedules: functions of the step alone, giving a factor for the optimizer's learning rate."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Self, get_args

from mbgd.config.duration import Duration, Plan, in_steps, problem
from mbgd.config.field_types import converted
from mbgd.errors import UsageError
from mbgd.text.suggestions import did_you_mean


class Schedule(ABC):
    """A factor that rises linearly over the first `warmup_steps` steps and then follows the schedule's shape."""

    depends_on_length: ClassVar[bool] = True
    """Whether a step's factor may depend on `num_steps`; then a run cannot be extended and keep its first steps. Not
    inherited: each class that does not depend on it must set False itself."""

    num_steps: int
    warmup_steps: int
    _in_other_units: Mapping[str, str] = MappingProxyType({})
    """Attribute → duration in epochs or examples, which the trainer makes whole steps: `in_steps`."""

    def __init__(self, *, num_steps: Duration, warmup_steps: Duration = 0) -> None:
        """num_steps: optimizer steps of the whole run; warmup_steps: how many of them warm up."""
        self._take(num_steps=num_steps, warmup_steps=warmup_steps)
        if not self._in_other_units:
            self.check()

    def _take(self, **durations: Duration | None) -> None:
        """Make each an attribute, once it is a whole number of steps. Subclasses call it before `__init__` above."""
        for name, duration in durations.items():
            given = f"schedule.{name}"
            value = converted(f"{given}={duration}", duration, Duration | None)
            if isinstance(value, str):
                if malformed := problem(given, value):
                    raise UsageError(malformed)
                self._in_other_units = {**self._in_other_units, name: value}
            else:
                setattr(self, name, value)

    def in_steps(self, plan: Plan) -> Self:
        """This schedule with its durations in whole steps of a plan."""
        if not self._in_other_units:
            return self
        twin = copy.copy(self)
        for name, text in self._in_other_units.items():
            setattr(twin, name, in_steps(text, plan))
        twin._in_other_units = {}
        twin.check()
        return twin

    def check(self) -> None:
        """UsageError where the numbers of steps break a rule. Subclasses add rules of their own."""
        if self.warmup_steps < 0 or 0 < self.num_steps < self.warmup_steps:
            of_run = f"in a run of {self.num_steps} steps; it must be from 0 to {self.num_steps}"
            raise UsageError(f"schedule.warmup_steps={self.warmup_steps} {of_run}.")

    def __call__(self, step: int) -> float:
        """The factor in step number `step`, counted from 0."""
        if self._in_other_units:
            name, text = next(iter(self._in_other_units.items()))
            raise UsageError(
                f"{type(self).__name__}({name}={text!r}): how many steps that is depends on the run. The trainer knows "
                f"it; elsewhere use a number of steps, or the result of in_steps(plan)."
            )
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    def progress(self, step: int) -> float:
        """The fraction of the run after the warm-up that is done: 0 to 1."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))

    @abstractmethod
    def after_warmup(self, step: int) -> float: ...


def _check_number(name: str, number: float) -> None:
    if not 0 <= converted(f"schedule.{name}={number}", number, float) < math.inf:
        raise UsageError(f"schedule.{name}={number}; it must be a finite number ≥ 0.")


def _check_at_least_one(name: str, steps: int) -> None:
    if steps < 1:
        raise UsageError(f"schedule.{name}={steps}; it must be ≥ 1.")


class Constant(Schedule):
    """Factor 1."""

    depends_on_length = False

    def after_warmup(self, step: int) -> float:
        return 1.0


class _Decaying(Schedule):
    """A schedule from 1 down to `final_factor`, which is reached after the last step."""

    def __init__(self, *, num_steps: Duration, warmup_steps: Duration = 0, final_factor: float = 0.0) -> None:
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps)
        _check_number("final_factor", final_factor)
        self.final_factor = final_factor

    def between(self, fraction: float) -> float:
        """The factor at a fraction of the way from `final_factor`, 0, up to 1."""
        return self.final_factor + (1.0 - self.final_factor) * fraction


class Cosine(_Decaying):
    """Half a cosine from 1 down to `final_factor` (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""

    def after_warmup(self, step: int) -> float:
        return self.between(_half_cosine(self.progress(step)))


class Linear(_Decaying):
    """A straight line from 1 down to `final_factor`."""

    def after_warmup(self, step: int) -> float:
        return 1.0 + (self.final_factor - 1.0) * self.progress(step)


class Polynomial(_Decaying):
    """(1 − progress)^power, from 1 down to `final_factor` (Chen et al. 2017, arXiv:1606.00915, with power 0.9)."""

    def __init__(
        self, *, num_steps: Duration, warmup_steps: Duration = 0, power: float = 0.9, final_factor: float = 0.0
    ) -> None:
        _check_number("power", power)
        self.power = power
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps, final_factor=final_factor)

    def after_warmup(self, step: int) -> float:
        return self.between((1.0 - self.progress(step)) ** self.power)


DecayShape = Literal["linear", "sqrt"]


class WSD(_Decaying):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): factor 1 until the last `decay_steps` steps, then down
    to `final_factor`.

    decay_steps: None: a fifth of the run. decay_shape: linear, or sqrt for 1 − √(fraction of the decay that is done);
    both, and the fifth, from Hägele et al. 2024, arXiv:2405.18392.
    """

    decay_steps: int | None

    def __init__(
        self,
        *,
        num_steps: Duration,
        warmup_steps: Duration = 0,
        decay_steps: Duration | None = None,
        decay_shape: DecayShape = "sqrt",
        final_factor: float = 0.0,
    ) -> None:
        if decay_shape not in get_args(DecayShape):
            meant = did_you_mean(str(decay_shape), get_args(DecayShape))
            raise UsageError(f"schedule.decay_shape={decay_shape}; it is one of linear, sqrt.{meant}")
        self.decay_shape = decay_shape
        self._take(decay_steps=decay_steps)
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps, final_factor=final_factor)

    def check(self) -> None:
        super().check()
        if self.decay_steps is not None and not 0 <= self.decay_steps <= max(0, self.num_steps - self.warmup_steps):
            raise UsageError(
                f"schedule.decay_steps={self.decay_steps} in a run of {self.num_steps} steps, {self.warmup_steps} of "
                "them warm-up; the decay must be ≥ 0 and fit into the rest."
            )

    def after_warmup(self, step: int) -> float:
        longest = max(0, self.num_steps - self.warmup_steps)
        decay_steps = min(self.num_steps // 5, longest) if self.decay_steps is None else self.decay_steps
        num_done = step - (self.num_steps - decay_steps)
        if num_done <= 0:
            return 1.0
        done = min(1.0, num_done / max(1, decay_steps))
        return self.between(1.0 - (math.sqrt(done) if self.decay_shape == "sqrt" else done))


class InverseSquareRoot(Schedule):
    """√(w / n) in step n, counted from 1, after w = `warmup_steps` steps of warm-up (Vaswani et al. 2017,
    arXiv:1706.03762, as a factor that is 1 at the end of the warm-up)."""

    depends_on_length = False

    def after_warmup(self, step: int) -> float:
        return math.sqrt(max(1, self.warmup_steps) / (step + 1))


class CosineRestarts(_Decaying):
    """Half a cosine from 1 down to `final_factor`, again and again (SGDR: Loshchilov & Hutter 2017, arXiv:1608.03983).

    The first cycle after the warm-up has `cycle_steps` steps, each further one `growth` times as many.
    """

    depends_on_length = False

    cycle_steps: int

    def __init__(
        self,
        *,
        num_steps: Duration,
        cycle_steps: Duration,
        warmup_steps: Duration = 0,
        growth: int = 1,
        final_factor: float = 0.0,
    ) -> None:
        _check_at_least_one("growth", converted(f"schedule.growth={growth}", growth, int))
        self.growth = growth
        self._take(cycle_steps=cycle_steps)
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps, final_factor=final_factor)

    def check(self) -> None:
        super().check()
        _check_at_least_one("cycle_steps", self.cycle_steps)

    def after_warmup(self, step: int) -> float:
        num_done, length = step - self.warmup_steps, self.cycle_steps
        if self.growth == 1:
            num_done %= length
        while num_done >= length:  # at most as often as a number can be doubled
            num_done, length = num_done - length, length * self.growth
        return self.between(_half_cosine(num_done / length))


class OneCycle(Schedule):
    """One cycle (Smith 2018, arXiv:1803.09820; the learning rate alone): from `start_factor` up to 1 in step number
    `peak_steps`, counted from 1, and down to `final_factor` in the last step, each along half a cosine.

    The shape and the defaults are those of torch's OneCycleLR. peak_steps: None: 3 tenths of the run.
    """

    peak_steps: int | None

    def __init__(
        self,
        *,
        num_steps: Duration,
        peak_steps: Duration | None = None,
        start_factor: float = 0.04,
        final_factor: float = 4e-6,
    ) -> None:
        _check_number("start_factor", start_factor)
        _check_number("final_factor", final_factor)
        self.start_factor, self.final_factor = start_factor, final_factor
        self._take(peak_steps=peak_steps)
        super().__init__(num_steps=num_steps)

    def check(self) -> None:
        super().check()
        if self.peak_steps is not None and not 1 <= self.peak_steps <= max(1, self.num_steps):
            of_run = f"in a run of {self.num_steps} steps; it must be from 1 to {self.num_steps}"
            raise UsageError(f"schedule.peak_steps={self.peak_steps} {of_run}.")

    def after_warmup(self, step: int) -> float:
        last = self.num_steps - 1.0
        peak = (0.3 * self.num_steps if self.peak_steps is None else self.peak_steps) - 1.0
        if step < peak:
            return 1.0 + (self.start_factor - 1.0) * _half_cosine(step / peak)
        done = min(1.0, (step - peak) / ((last - peak) or 1.0))
        return self.final_factor + (1.0 - self.final_factor) * _half_cosine(done)


class Step(Schedule):
    """Multiplied by `decay` every `every_steps` steps."""

    depends_on_length = False

    every_steps: int

    def __init__(
        self, *, num_steps: Duration, every_steps: Duration, warmup_steps: Duration = 0, decay: float = 0.1
    ) -> None:
        _check_number("decay", decay)
        self.decay = decay
        self._take(every_steps=every_steps)
        super().__init__(num_steps=num_steps, warmup_steps=warmup_steps)

    def check(self) -> None:
        super().check()
        _check_at_least_one("every_steps", self.every_steps)

    def after_warmup(self, step: int) -> float:
        return float(self.decay ** (step // self.every_steps))


def _half_cosine(done: float) -> float:
    """From 1 at 0 down to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
