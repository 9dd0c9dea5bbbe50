"""One-line descriptions of objects, which workers compare to find out whether theirs are equal."""

import hashlib
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mbgd.batches.nested import parts_of
from mbgd.workers.messages import bytes_of

WORDS_OF_ONE_WORKER = frozenset(
    {"rank", "worker", "workers", "device", "gpu", "host", "hostname", "pid", "time", "date", "uuid"}
    | {"path", "paths", "dir", "folder", "file", "root"}
)
"""Words in the names of attributes that may differ from worker to worker, such as devices and paths."""

LONGEST_TEXT = 200
MOST_ELEMENTS = 100
MOST_BYTES = 2**20
"""The leading bytes of a tensor or array that are hashed."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def kind(value: Any) -> str:
    """The qualified name of a function, or of an object's class."""
    if isinstance(value, partial):
        return f"partial of {kind(value.func)}"
    if isinstance(value, MethodType):
        return f"{kind(value.__self__)}.{value.__name__}"
    module, name = module_of(value), _named(value).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def module_of(value: Any) -> str:
    """The name of the module that defines a function, or an object's class."""
    module = getattr(_named(value), "__module__", None) or "builtins"
    return "__main__" if module == "__mp_main__" else module  # the parent's script, in a spawned process


def _named(value: Any) -> Any:
    while isinstance(value, partial | MethodType):
        value = value.func if isinstance(value, partial) else value.__self__
    return value if isinstance(getattr(value, "__qualname__", None), str) else type(value)


def attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The plain values that configure a part: attributes, or a function's or partial's closure and arguments."""
    if isinstance(value, partial):
        given = {"args": list(value.args), **value.keywords, **dict(attributes(value.func))}
    elif isinstance(value, MethodType):
        given = dict(attributes(value.__self__))
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        given = {name: cell.cell_contents for name, cell in cells}
        given |= {"defaults": list(value.__defaults__ or ()), **(value.__kwdefaults__ or {})}
    else:
        given = _state(value)
    hidden = _OF_EVERY_MODULE if isinstance(value, nn.Module) else frozenset()
    for name, one in given.items():
        if name not in hidden and not may_differ(name) and _is_plain(one):
            yield name, one


def _state(value: Any) -> dict[str, Any]:
    """Its attributes, including those in slots."""
    state: Any = object.__getstate__(value)
    return (state[0] or {}) | state[1] if isinstance(state, tuple) else state or {}


def may_differ(name: str) -> bool:
    """Whether values under this attribute name or configuration key may differ from worker to worker."""
    return bool(WORDS_OF_ONE_WORKER & set(name.lower().split("_")))


def description(value: Any) -> str:
    """Plain values and tensors by content; other objects by kind, attributes and frozen parameters."""
    if _is_plain(value):
        return _plain(value)
    given = [f"{name}={_plain(one)}" for name, one in attributes(value)]
    if isinstance(value, nn.Module):
        given += [f"{name} frozen" for name, p in value.named_parameters(recurse=False) if not p.requires_grad]
    return f"{kind(value)}({', '.join(given)})"


def form(value: Any) -> str:
    """The dtypes and shapes of an example."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {form(one)}" for key, one in value.items()) + "}"
    if (parts := parts_of(value)) is not None:
        named = "" if isinstance(value, list | tuple) else kind(type(value))
        return f"{named}({', '.join(map(form, parts))})"
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return kind(type(value))


def content(value: Any) -> str:
    """A short hash of an example's values."""
    digest = hashlib.sha256()
    for part in _bytes(value):
        digest.update(part)
    return digest.hexdigest()[:8]


def _bytes(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = [part for item in value.items() for part in item]
    if (parts := parts_of(value)) is not None:
        for part in parts:
            yield from _bytes(part)
    elif isinstance(value, PackedSequence):
        yield from _bytes([value.data, value.batch_sizes])
    elif isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
        yield bytes_of(value)[:MOST_BYTES].cpu().numpy().data
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield np.ascontiguousarray(value).tobytes()[:MOST_BYTES]
    elif isinstance(value, bool | int | float | complex | str):
        yield repr(value).encode()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        parts = value.values() if isinstance(value, Mapping) else value
        return len(value) > MOST_ELEMENTS or all(map(_is_plain, parts))
    return value is None or isinstance(value, _PLAIN)


_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)
_ARRAYS = (Tensor, np.ndarray)
_PLAIN = (bool, int, float, complex, str, Enum, np.generic, torch.dtype, *_ARRAYS, *_FUNCTIONS)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _shortened(_elements(value))
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, _ARRAYS):
        return f"{form(value)} of content {content(value)}"
    if isinstance(value, _FUNCTIONS):
        return kind(value)
    return _shortened(repr(value))


def _elements(value: Any) -> str:
    if len(value) > MOST_ELEMENTS:
        return f"{kind(value)} of {len(value)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_plain(one)}" for key, one in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_plain, value))) + "}"
    return "[" + ", ".join(map(_plain, value)) + "]"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({content(text)})"
