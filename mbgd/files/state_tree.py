"""Nested state as JSON and named tensors, and back: the form in which checkpoints hold an object's state.

JSON's own values and lists are stored as they are; everything else as {kind: content}, a tensor as {"tensor": name}
with the order of its dimensions in memory, if that is not the usual one.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from mbgd.errors import UsageError

SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "Size": torch.Size,
    "set": set,
    "frozenset": frozenset,
}
MAPPINGS: dict[str, Callable[[Any], Any]] = {"dict": dict, "OrderedDict": OrderedDict}
NUMPY_KINDS = "biufc"
"""numpy's letters for booleans, integers, floats and complex numbers."""


class Flattening:
    """Turns nested values into JSON; `tensors` collects their tensors, not copied."""

    def __init__(self, forbidden: Mapping[int, str] | None = None) -> None:
        """forbidden: objects that must not occur: id → a description for the error."""
        self.tensors: dict[str, Tensor] = {}
        self._forbidden = forbidden or {}
        self.names: dict[int, str] = {}
        """Tensor id → name. A tensor that occurs twice has one name, and is restored as one tensor."""
        self._kept: list[Any] = []  # keeps the tensors alive, so that no id is reused
        self._inside: set[int] = set()

    def __call__(self, value: Any, path: str) -> Any:
        """JSON for `value`; UsageError with the path of a value that cannot be stored."""
        kind = type(value)
        if id(value) in self._forbidden:
            raise _refusal(path, self._forbidden[id(value)])
        if kind is Tensor or kind is nn.Parameter:
            return self._tensor(value, path)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is complex:
            return {"complex": [self(value.real, path), self(value.imag, path)]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if isinstance(value, numpy.generic) and value.dtype.kind in NUMPY_KINDS and value.dtype.itemsize <= 16:
            return {"numpy": [value.dtype.str, value.tobytes().hex()]}
        if kind is numpy.ndarray and value.dtype.kind in NUMPY_KINDS:
            return {"array": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
        return self._container(value, path)

    def _tensor(self, tensor: Tensor, path: str) -> Any:
        name = self.names.get(id(tensor))
        if name is None:
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
                raise _refusal(path, f"a tensor of layout {tensor.layout} and type {tensor.dtype} on {tensor.device}")
            name, number = path, 2
            while name in self.tensors:
                name, number = f"{path}#{number}", number + 1
            self.names[id(tensor)] = name
            self._kept.append(tensor)
            # safetensors has no complex128.
            self.tensors[name] = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        node: dict[str, Any] = {"tensor": name}
        if tensor.is_complex():
            node["complex"] = True
        if order := _order(tensor):
            node["order"] = order
        return node

    def _container(self, value: Any, path: str) -> Any:
        if id(value) in self._inside:
            raise _refusal(path, "a container that holds itself")
        self._inside.add(id(value))
        try:
            if type(value) is list:
                return self._items(value, path)
            if type(value) is deque:
                return {"deque": [value.maxlen, self._items(value, path)]}
            for name, kind in SEQUENCES.items():
                if type(value) is kind:
                    return {name: self._items(value, path)}
            for name, kind in MAPPINGS.items():
                if type(value) is kind:
                    return {name: [[self._key(key, path), self(one, f"{path}.{key}")] for key, one in value.items()]}
        finally:
            self._inside.discard(id(value))
        raise _refusal(path, f"of type {type(value).__module__}.{type(value).__qualname__}")

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self(value, f"{path}.{index}") for index, value in enumerate(values)]

    def _key(self, key: Any, path: str) -> Any:
        if isinstance(key, Tensor):
            raise _refusal(path, "a dict with a tensor as key")
        return self(key, f"{path} (key {key!r})")


def _order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest; None for a tensor in the usual order, or with gaps.

    The results of matrix products may depend on it in the last bit; Q of torch.linalg.qr is stored by columns.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return order if tensor.permute(order).is_contiguous() else None


def in_order(tensor: Tensor, order: list[int], device: torch.device) -> Tensor:
    """A copy of the tensor whose dimensions lie in memory in this order, from the slowest to the fastest."""
    permuted = tensor.permute(order)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return torch.empty(permuted.shape, dtype=tensor.dtype, device=device).copy_(permuted).permute(inverse)


def unflatten(tree: Any, tensor: Callable[[str, bool], Any]) -> Any:
    """The value of a tree.

    tensor: (name, is complex) → the tensor, the same object at each call; complex ones are stored as pairs of reals.
    An invalid tree raises any of Python's errors (KeyError, TypeError, ValueError …).
    """
    if isinstance(tree, list):
        return [unflatten(one, tensor) for one in tree]
    if not isinstance(tree, Mapping):
        return tree
    if "tensor" in tree:
        return tensor(tree["tensor"], bool(tree.get("complex")))
    ((kind, content),) = tree.items()
    if kind in SEQUENCES:
        return SEQUENCES[kind](unflatten(content, tensor))
    if kind in MAPPINGS:
        return MAPPINGS[kind]((unflatten(key, tensor), unflatten(one, tensor)) for key, one in content)
    if kind == "deque":
        return deque(unflatten(content[1], tensor), maxlen=content[0])
    if kind == "numpy":
        return numpy.frombuffer(bytes.fromhex(content[1]), _numpy_type(content[0]))[0]
    if kind == "array":
        values = numpy.frombuffer(bytes.fromhex(content[2]), _numpy_type(content[0]))
        return values.reshape(content[1]).copy()
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(*(unflatten(part, tensor) for part in content))
    if kind == "bytes":
        return bytes.fromhex(content)
    raise ValueError(f"{kind!r} is no kind of value")


def _numpy_type(name: str) -> numpy.dtype[Any]:
    dtype = numpy.dtype(name)
    if dtype.kind not in NUMPY_KINDS:
        raise ValueError(f"{name!r} is no type of numbers")
    return dtype


def _refusal(path: str, what: str) -> UsageError:
    return UsageError(
        f"{path} is {what}, which a checkpoint cannot hold: tensors, numbers, texts, None, and lists, tuples, sets, "
        "deques and dicts of them. Keep it out of the state, or store it as one of these."
    )
