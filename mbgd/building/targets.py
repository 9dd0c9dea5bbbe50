"""Nodes with a `_target_`: which keys it does not take, and why it refuses values."""

import inspect
import pkgutil
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from mbgd.text.suggestions import nearest

OF_HYDRA = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")
GROUPS_WITH_OWN = ("model", "objective", "optimizer", "schedule")
"""Groups of the configuration whose choice `own` has only the key `_target_`."""


def find(node: Mapping[str, Any]) -> Any:
    """The target; None if it cannot be found, which Hydra explains."""
    try:
        return pkgutil.resolve_name(node["_target_"])
    except Exception:  # importing a module of the user's can raise anything
        return None


def takes(target: Any, keyword: str) -> bool:
    """Whether a function has a parameter of this name; torch's optimizers have none."""
    try:
        return keyword in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


def mistakes(name: str, node: Any, num_positional: int = 0, added: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with the keywords of the node and of nodes inside it, by their targets' signatures.

    num_positional: number of positional arguments; added: keywords that the target gets beside the node's.
    """
    if isinstance(node, Mapping):
        if node.get("_recursive_", True):  # otherwise the target handles the inner nodes itself
            for key, value in node.items():
                yield from mistakes(f"{name}.{key}", value)
        if "_target_" in node:
            yield from _mistakes(name, node, num_positional, added)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from mistakes(f"{name}[{number}]", value)


def _mistakes(name: str, node: Mapping[str, Any], num_positional: int, added: Collection[str]) -> Iterator[str]:
    try:
        # A wrapper may take other keywords than what it wraps.
        parameters = list(inspect.signature(find(node), follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # no target, or one written in C
        return
    num_positional = max(num_positional, len(node.get("_args_") or ()))
    by_position = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    free = [one for one in parameters if one not in by_position[:num_positional]]
    taken = [one.name for one in free if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        yield from _not_taken(name, node, taken, added)
    needed = [one.name for one in free if one.name in taken and one.default is one.empty]
    if missing := [key for key in needed if key not in (*node, *added)] if not node.get("_partial_") else []:
        give = " ".join(f"+{name}.{key}=…" for key in missing)
        yield f"{name}: {node['_target_']} needs {', '.join(missing)}. Give it {give}."


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


def mismatches(name: str, node: Mapping[str, Any]) -> list[str]:
    """Values that do not fit the target's annotations. Annotations can be wrong, so call this only after the target has
    refused the values.

    node: the target and its keywords.
    """
    target = find(node)
    try:
        hints = get_type_hints(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    except Exception:  # annotations may name anything
        return []
    found = []
    for key, value in node.items():
        if key in hints and not _fits(hints[key], value):
            example = (
                f", such as {name}.{key}=[{value}]"
                if isinstance(value, int | float) and _fits(hints[key], [value])
                else ""
            )
            shown = "null" if value is None else value
            found.append(f"{name}.{key}={shown}; it takes {_words(hints[key])}{example}")
    return found


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a plain value may fit an annotation; true for annotations that are not known here."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is Tensor:
        return isinstance(value, int | float | list)
    if origin in (int, float, bool, complex):
        return isinstance(value, int | float)
    if origin in (str, Path):
        return isinstance(value, str)
    if origin is type(None):
        return value is None
    if _is_list(origin):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(inner, one) for one in value)
    return True


def _is_list(origin: Any) -> bool:
    return origin in (list, tuple, Sequence, Iterable, Collection)


def _words(annotation: Any) -> str:
    """An annotation in words, without tensors, which the configuration cannot give."""
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in arguments if one not in (type(None), Tensor)))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if _is_list(origin):
        return f"a list of {_words(arguments[0]).split()[-1]}s" if arguments else "a list"
    if origin in (int, float, bool, complex):
        return "a number"
    return "a text" if origin in (str, Path) else getattr(origin, "__name__", str(origin))
