"""Batches of any nesting: tensors in mappings, lists, tuples, named tuples and dataclasses."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def parts_of(value: Any) -> Sequence[Any] | None:
    """What a container holds, in order; None: it is no container."""
    if isinstance(value, Tensor | PackedSequence):  # a tuple, but its sizes stay on the host
        return None
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return None


def moves_itself(value: Any) -> bool:
    """Whether a value that is no container has a method `to`, as tensors and other libraries' batches have."""
    return callable(getattr(value, "to", None)) and not isinstance(value, type)


def with_parts(container: Any, parts: Sequence[Any]) -> Any:
    """A container like this one that holds other parts; a mapping becomes a dict."""
    if isinstance(container, Mapping):
        return dict(zip(container, parts, strict=True))
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return type(container)(*parts)
    if isinstance(container, list | tuple):
        return type(container)(parts)
    made = copy.copy(container)
    for field, part in zip(fields(container), parts, strict=True):
        object.__setattr__(made, field.name, part)  # also where the dataclass is frozen
    return made


def each_leaf(batch: Any, function: Callable[[Any], Any]) -> Any:
    """The batch with `function` applied to each value that is no container."""
    parts = parts_of(batch)
    if parts is None:
        return function(batch)
    return with_parts(batch, [each_leaf(part, function) for part in parts])


def each_tensor(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with `function` applied to each of its tensors."""
    return each_leaf(batch, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def leaves_of(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(where it is, such as a.b[0], and the value) of each value that is no container."""
    parts = parts_of(batch)
    if parts is None:
        yield name.lstrip("."), batch
        return
    if isinstance(batch, Mapping):
        places = [f".{key}" for key in batch]
    elif is_dataclass(batch):
        places = [f".{field.name}" for field in fields(batch)]
    else:
        places = [f".{field}" for field in getattr(batch, "_fields", ())] or [f"[{i}]" for i in range(len(parts))]
    for place, part in zip(places, parts, strict=True):
        yield from leaves_of(part, f"{name}{place}")
