"""Nodes with a `_target_`: whether it takes the keys that they give, and what is wrong with values that it refuses."""

import inspect
import pkgutil
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from mbgd.suggestions import nearest

OF_HYDRA = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")
GROUPS_WITH_OWN = ("model", "objective", "optimizer", "schedule")
"""Groups of the configuration whose choice `own` has no keys but `_target_`."""


def find(node: Mapping[str, Any]) -> Any:
    """The target; None where there is none, which Hydra explains."""
    try:
        return pkgutil.resolve_name(node["_target_"])
    except Exception:  # importing a module of the user's can raise anything
        return None


def unknown_keys(name: str, node: Any, num_positional: int = 0, added: Collection[str] = ()) -> Iterator[str]:
    """A problem for each target, of the node or of nodes inside it, that is given keys which it does not take.

    num_positional: how many arguments it gets by position; added: keywords that it gets beside the node's.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from unknown_keys(f"{name}.{key}", value)
        taken = _taken(node, num_positional) if "_target_" in node else None
        if taken is not None:
            yield from _not_taken(name, node, taken, added)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from unknown_keys(f"{name}[{number}]", value)


def _taken(node: Mapping[str, Any], num_positional: int) -> list[str] | None:
    """Keywords that the target takes; None where it takes any, or cannot be asked."""
    try:
        parameters = list(inspect.signature(find(node)).parameters.values())
    except (TypeError, ValueError):  # no target, or one written in C
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    num_positional = max(num_positional, len(node.get("_args_") or ()))
    by_position = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    given = {one.name for one in by_position[:num_positional]} | {
        one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)
    }
    return [one.name for one in parameters if one.name not in given]


def _not_taken(name: str, node: Mapping[str, Any], taken: list[str], added: Collection[str]) -> Iterator[str]:
    target = node["_target_"]
    for key in added:
        if key not in taken:
            yield f"{name}: {target} takes no {key}, which every {name} is given. Let it have a parameter {key}."
    unknown = [str(key) for key in node if key not in taken and key not in OF_HYDRA]
    if not unknown:
        return
    valid = [key for key in taken if key not in added]
    near = dict.fromkeys(f"{name}.{one}" for key in unknown for one in nearest(key, valid, most=1))
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    remedy = " ".join(f"~{name}.{key}" for key in unknown)
    if name in GROUPS_WITH_OWN:
        remedy += f", or, to begin without the group's keys, {name}=own {name}._target_={target}"
    yield (
        f"{name}: {target} does not take {', '.join(unknown)}; it takes {', '.join(valid) or 'nothing'}."
        f"{meant} To leave out what it does not take: {remedy}."
    )


def misfits(name: str, node: Mapping[str, Any]) -> list[str]:
    """Values of another kind than the target's annotations say; annotations need not be right, so this is to be asked
    only once it has refused the values.

    node: the target and its keywords.
    """
    target = find(node)
    try:
        hints = get_type_hints(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    except Exception:  # annotations may name anything
        return []
    found = []
    for key, value in node.items():
        kinds = _kinds(hints[key]) if key in hints else None
        kind = _kind(value)
        is_tensor = kinds is not None and "a tensor" in kinds and kind in ("a number", "a list")
        if kinds is not None and kind not in kinds and not is_tensor:
            wanted = " or ".join(sorted(kinds - {"null", "a tensor"} or kinds))
            example = f", such as {name}.{key}=[{value}]" if kind == "a number" and kinds == {"a list"} else ""
            found.append(f"{name}.{key}={'null' if value is None else value} is {kind}; it takes {wanted}{example}")
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a text"
    return "a number" if isinstance(value, int | float) else "a dict" if isinstance(value, Mapping) else "a list"


_KINDS: dict[Any, set[str]] = {
    type(None): {"null"},
    Tensor: {"a tensor"},
    **{kind: {"a number"} for kind in (int, float, bool, complex)},
    **{kind: {"a text"} for kind in (str, Path)},
}


def _kinds(annotation: Any) -> set[str] | None:
    """The kinds of plain values that an annotation allows; None where it may be any."""
    origin = get_origin(annotation) or annotation
    if origin in (Union, types.UnionType):
        parts = [_kinds(one) for one in get_args(annotation)]
        return None if None in parts else set().union(*(part for part in parts if part is not None))
    if origin is Literal:
        return {_kind(one) for one in get_args(annotation)}
    if origin in _KINDS:
        return _KINDS[origin]
    if not isinstance(origin, type) or issubclass(origin, Enum):
        return None
    if issubclass(origin, Mapping):
        return {"a dict"}
    return {"a list"} if origin in (list, tuple) or origin.__module__ == Iterable.__module__ else None
