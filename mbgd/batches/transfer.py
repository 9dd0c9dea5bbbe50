"""Copies batches from host memory to the device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch (a tensor, or tuples, lists and mappings of tensors) with floating tensors cast to `dtype`."""
    return _each_tensor(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


class Transfer:
    """Copies batches to the device; to a GPU on a stream of its own, while the previous step still runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any) -> Any:
        """The batch on the device; with a GPU the host does not wait for the copy.

        The tensors must be in their final dtype already: a copy that also converts blocks the host.
        """
        if self._stream is None:
            return _each_tensor(batch, lambda tensor: tensor.to(self._device))
        with torch.cuda.stream(self._stream):
            moved = _each_tensor(batch, self._copy)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # Memory of a freed batch must not be reused by the next copy before the step has finished with it.
        _each_tensor(moved, lambda tensor: tensor.record_stream(current))
        return moved

    def _copy(self, tensor: Tensor) -> Tensor:
        # Only copies from pinned memory overlap with computation.
        return tensor if tensor.is_cuda else tensor.pin_memory().to(self._device, non_blocking=True)


def _each_tensor(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with `function` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _each_tensor(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each_tensor(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_each_tensor(value, function) for value in batch)
    return batch
