"""Durations: numbers of optimizer steps, given in steps, epochs or examples.

`500`, "500 steps", "0.1 epochs" and "3M examples" are durations. Epochs and examples become whole steps once the plan
is known: `in_steps`.
"""

import re
from fractions import Fraction
from typing import NamedTuple, Protocol

from mbgd.errors import UsageError

Duration = int | str
"""A whole number of optimizer steps, or a text with a number and a unit."""

UNITS = ("steps", "epochs", "examples")
PREFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
FORMS = 'a whole number of steps, or a text such as "500 steps", "0.1 epochs", "12k examples" or "3M examples"'
_TEXT = re.compile(rf"(\d+\.?\d*|\.\d+)(e\d\d?)? ?([{''.join(PREFIXES)}]?)(?: ?(step|epoch|example)s?)?", re.ASCII)


class Plan(Protocol):
    """The members of `batches.plan.Plan` that say how many examples a number of steps sees."""

    @property
    def minibatch_size(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def examples_per_epoch(self) -> int: ...

    def examples_seen(self, steps: int) -> int: ...


class Amount(NamedTuple):
    number: Fraction
    unit: str
    """One of `UNITS`."""


def problem(name: str, duration: Duration) -> str:
    """What is wrong with the form of a duration; empty if nothing. name: of the setting, for the text."""
    try:
        _amount(duration)
    except ValueError as error:
        return f"{name}={duration}; {error}"
    return ""


def check_duration(name: str, duration: Duration, *, least: int = 0) -> None:
    """UsageError unless it has the form and is at least `least` steps, 0 or 1. name: of the setting."""
    if found := problem(name, duration):
        raise UsageError(found)
    if isinstance(duration, bool) or _amount(duration).number < 0 or (least and is_less_than_one_step(duration)):
        raise UsageError(f"{name}={duration}; it must be at least {least}. It takes {FORMS}.")


def is_less_than_one_step(duration: Duration) -> bool:
    """Whether a duration of the right form is 0 or less. Any other one is at least one step."""
    return _amount(duration).number <= 0


def in_steps(duration: Duration, plan: Plan) -> int:
    """The whole number of steps of a duration; UsageError if its text does not have the form.

    Epochs are rounded to the nearest step. Examples become the number of steps after which the number of examples seen
    is nearest; an epoch's last minibatch may be short. Half a step is rounded up, and a duration above 0 is at least
    one step.
    """
    try:
        number, unit = _amount(duration)
    except ValueError as error:
        raise UsageError(f"the duration {duration!r}: {error}") from None
    if unit == "steps":
        return int(number)
    if unit == "epochs":
        steps = int(number * plan.steps_per_epoch + Fraction(1, 2))
    else:
        epochs, rest = divmod(number, plan.examples_per_epoch)
        steps = int(epochs) * plan.steps_per_epoch + int(rest // plan.minibatch_size)
        too_few, too_many = number - plan.examples_seen(steps), plan.examples_seen(steps + 1) - number
        steps += too_many <= too_few
    return max(steps, 1) if number > 0 else steps


def whole(duration: Duration) -> int:
    """The steps of a duration that is a whole number already, because `resolved` has seen to it."""
    assert isinstance(duration, int), duration
    return duration


def _amount(duration: Duration) -> Amount:
    """ValueError with the rule if the text does not have the form."""
    if isinstance(duration, int):
        return Amount(Fraction(duration), "steps")
    found = _TEXT.fullmatch(duration.strip())
    if found is None:
        raise ValueError(f"it takes {FORMS}.")
    digits, exponent, prefix, unit = found.groups()
    amount = Amount(Fraction(digits + (exponent or "")) * PREFIXES[prefix], f"{unit or 'step'}s")
    if amount.unit == "steps" and amount.number.denominator != 1:
        raise ValueError('a number of steps is whole. Parts of an epoch are written as in "0.1 epochs".')
    return amount
