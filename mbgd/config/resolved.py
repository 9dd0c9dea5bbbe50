"""Settings whose durations are whole numbers of steps."""

from dataclasses import fields, replace
from typing import Any, TypeVar, get_type_hints

from mbgd.config.duration import Duration, Plan, in_steps
from mbgd.config.field_types import Typed

T = TypeVar("T", bound=Typed)


def resolved(settings: T, plan: Plan) -> T:
    """The settings with every duration, also in their sections, in whole steps of this plan."""
    changed: dict[str, Any] = {}
    hints = get_type_hints(type(settings))
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if isinstance(value, Typed):
            changed[field.name] = resolved(value, plan)
        elif value is not None and is_duration(hints[field.name]):
            changed[field.name] = in_steps(value, plan)
    return replace(settings, **changed)  # type: ignore[type-var]


def is_duration(hint: Any) -> bool:
    """Whether a field of this type holds a duration."""
    return bool(hint in (Duration, Duration | None))
