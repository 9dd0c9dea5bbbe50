"""Casts batches and copies them from host memory to the device."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mbgd.batches.nested import each_leaf, each_tensor, leaves_of, moves_itself
from mbgd.errors import UsageError


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with floating tensors cast to `dtype`; UsageError where a tensor could be neither cast nor moved.

    Other tensors keep their dtype: integers, and bytes of images.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(dtype) if leaf.is_floating_point() else leaf
        if isinstance(leaf, PackedSequence):
            return leaf.to(dtype) if leaf.data.is_floating_point() else leaf
        if not moves_itself(leaf):
            _check_holds_no_tensor(batch, leaf)
        return leaf

    return each_leaf(batch, of_leaf)


def _check_holds_no_tensor(batch: Any, leaf: Any) -> None:
    """UsageError for an object of an unknown class whose tensors would stay on the host, in any dtype."""
    held = [name for name, value in getattr(leaf, "__dict__", {}).items() if isinstance(value, Tensor)]
    if held and not isinstance(leaf, type):
        place = next(name for name, one in leaves_of(batch) if one is leaf)
        raise UsageError(
            f"a batch holds a {type(leaf).__name__}{f' ({place})' if place else ''} with tensors ({', '.join(held)}), "
            "which the trainer can neither cast nor move to the device. Use a dict, a list, a tuple or a dataclass, or "
            "give the class a method to(device) that returns the moved object."
        )


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
            return each_leaf(batch, self._moved)
        with torch.cuda.stream(self._stream):
            moved = each_tensor(batch, self._copy)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # Memory of a freed batch must not be reused by the next copy before the step has finished with it.
        each_tensor(moved, lambda tensor: tensor.record_stream(current))
        # The tensors of other objects are not known here, so they are copied on the step's own stream.
        return each_leaf(moved, self._moved)

    def _copy(self, tensor: Tensor) -> Tensor:
        # Only copies from pinned memory overlap with computation.
        return tensor if tensor.is_cuda else tensor.pin_memory().to(self._device, non_blocking=True)

    def _moved(self, leaf: Any) -> Any:
        return leaf.to(self._device) if moves_itself(leaf) else leaf
