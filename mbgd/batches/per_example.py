"""One number for each training example: given as such, or an attribute of the dataset, or a function of it."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbgd.errors import UsageError

Given = Sequence[float] | NDArray[Any] | Tensor | str | Callable[[Any], Any]
"""Numbers; or the name of the dataset's attribute that holds them; or a function that makes them of the dataset."""

WAYS = "Give a list or an array, the name of an attribute of the dataset, or a function of the dataset."


def numbers_of(dataset: Any, given: Given, name: str) -> NDArray[Any]:
    """The numbers, shape (number of examples,), in their own dtype; UsageError, which begins with `name`, otherwise."""
    values: Any = given
    if isinstance(given, str):
        name, kind = f"{name}={given}", type(dataset).__name__
        if not hasattr(dataset, given):
            raise UsageError(f"{name}: {kind} has no attribute of this name. {WAYS}")
        values = getattr(dataset, given)
    elif callable(given):
        values = given(dataset)
    numbers = _as_array(values)
    if numbers.dtype.kind not in "biuf":
        raise UsageError(f"{name}: got a {type(values).__name__} without a real number per example. {WAYS}")
    if numbers.shape != (len(dataset),):
        raise UsageError(
            f"{name}: got shape {numbers.shape} for {len(dataset)} training examples; there must be one number for "
            f"each, shape ({len(dataset)},). {WAYS}"
        )
    return numbers


def _as_array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype is torch.bfloat16 else values)
    try:
        return np.asarray(values)
    except ValueError:  # lists of uneven length
        return np.empty(0, dtype=object)


def sha256_of(numbers: NDArray[Any]) -> str:
    """A short hash of all the numbers."""
    return hashlib.sha256(np.ascontiguousarray(numbers).data).hexdigest()[:16]


def some(numbers: NDArray[Any], is_wrong: NDArray[np.bool_]) -> str:
    """The first number that is wrong, and of which example."""
    first = int(np.flatnonzero(is_wrong)[0])
    return f"{numbers[first]} for example {first}"
