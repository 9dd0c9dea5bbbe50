"""Messages between workers as bytes: JSON for values, raw bytes for tensors.

No pickle: reading a message runs no code, whoever sent it.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def message(value: Any) -> Tensor:
    """The value as JSON: uint8, shape (number of bytes,). TypeError for values that JSON cannot hold."""
    _check_keys(value)
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def value_of(received: Tensor) -> Any:
    """The value of a message; tuples come back as lists."""
    return json.loads(received.cpu().numpy().tobytes())


def _check_keys(value: Any) -> None:
    """TypeError for keys that JSON would silently turn into strings."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(
                f"the key {wrong[0]!r} is a {type(wrong[0]).__name__}; workers send dicts with str keys only"
            )
        for part in value.values():
            _check_keys(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_keys(part)


def bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's values as uint8, shape (number of bytes,); a view if the tensor is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def empty(shape: Sequence[int], dtype: str) -> Tensor:
    """An uninitialised CPU tensor; dtype: its name by `str`, such as torch.float32."""
    kind = getattr(torch, dtype.removeprefix("torch."))
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype of torch")
    return torch.empty(tuple(shape), dtype=kind)
