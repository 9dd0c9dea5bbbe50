"""Converts values of settings to their fields' declared types, or refuses them by name."""

import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from mbgd.config.duration import FORMS, Duration
from mbgd.config.renamed import new_name
from mbgd.errors import UsageError
from mbgd.text.suggestions import did_you_mean


class Typed:
    """Base of frozen dataclasses whose values are converted to the declared types: an enum's value such as "ddp"
    becomes the member, numpy's numbers become Python's. UsageError, naming the field, if the field does not exist or
    its value does not fit."""

    def __new__(cls, *values: Any, **named: Any) -> Self:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in named.keys() - set(known):
            section = "" if cls.__name__ in ("Settings", "Config") else f"{cls.__name__.lower()}."
            meant = new_name(f"{section}{name}") or did_you_mean(name, known)
            raise UsageError(f"{cls.__name__}({name}={named[name]!r}): it has no such field.{meant}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            given = f"{type(self).__name__}({field.name}={value!r})"
            object.__setattr__(self, field.name, converted(given, value, hints[field.name]))


def converted(given: str, value: Any, wanted: Any) -> Any:
    """`value` as type `wanted`; UsageError, whose text begins with `given`, if it does not fit."""
    if wanted is Any:
        return value
    kind, may_be_none = _without_none(wanted)
    if value is None and may_be_none:
        return None
    if kind == Duration:
        return _duration(given, value)
    origin: Any = get_origin(kind) or kind
    if issubclass(origin, Enum):
        return _member(given, value, origin)
    if issubclass(origin, Typed):
        if isinstance(value, origin):
            return value
        raise UsageError(f"{given}: it takes mbgd.{origin.__name__}({fields(origin)[0].name}=…).")
    if origin not in WORDS:  # any other type is not checked here
        return value
    result = _plain(value, origin)
    if result is None:
        raise UsageError(f"{given}: it takes {WORDS[origin]}{' or None' if may_be_none else ''}.")
    return result


def _without_none(wanted: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed); a union of types other than `Duration` becomes object."""
    if wanted == Duration or get_origin(wanted) not in (Union, types.UnionType):
        return wanted, False
    if wanted == Duration | None:
        return Duration, True
    kinds = [one for one in get_args(wanted) if one is not type(None)]
    return kinds[0] if len(kinds) == 1 else object, len(kinds) < len(get_args(wanted))


def _duration(given: str, value: Any) -> Duration:
    """The form of a text is one of the settings' rules (rules.py)."""
    result: Duration | None = value if isinstance(value, str) else _plain(value, int)
    if result is None:
        raise UsageError(f"{given}: it takes {FORMS}.")
    return result


def _member(given: str, value: Any, choices: type[Enum]) -> Enum:
    if isinstance(value, choices):
        return value
    names = [str(one.value) for one in choices]
    if isinstance(value, str) and value in names:
        return choices(value)
    raise UsageError(f"{given}: it is one of {', '.join(names)}.{did_you_mean(str(value), names)}")


WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of texts",
    dict: "a dict with names as keys",
}


def _plain(value: Any, kind: type) -> Any:
    """`value` as a Python object of this type; None if it does not fit. True is not a number."""
    is_bool = type(value).__name__ in ("bool", "bool_")  # numpy's too
    if kind is bool:
        return bool(value) if is_bool else None
    if kind is int:
        return int(value) if isinstance(value, Integral) and not is_bool else None
    if kind is float:
        return float(value) if isinstance(value, Real) and not is_bool else None
    if kind is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if kind is list:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return list(value) if is_list and all(isinstance(one, str) for one in value) else None
    return dict(value) if isinstance(value, Mapping) and all(isinstance(one, str) for one in value) else None
