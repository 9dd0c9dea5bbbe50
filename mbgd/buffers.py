"""Buffers that a forward in training mode moves, such as BatchNorm's running statistics.

Rule: every micro-batch starts from the buffers as they were before the step; after it a floating buffer is the
mean of what the micro-batches made of it, and an integer buffer (`num_batches_tracked`) what one micro-batch made
of it. So buffers, like parameters, do not depend on which worker computed what.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MovingBuffers:
    """The floating buffers of a model that move, as one vector."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """names: of the buffers that move, floating or not."""
        buffers = dict(model.named_buffers())
        self._all = [buffers[name] for name in names]
        self._floating = [buffer for buffer in self._all if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def num_values(self) -> int:
        return sum(buffer.numel() for buffer in self._floating)

    def start_step(self) -> None:
        self._before = [buffer.clone() for buffer in self._all]

    def start_micro_batch(self) -> None:
        if self._all:
            torch._foreach_copy_(self._all, self._before)

    def values(self) -> Tensor:
        """What the micro-batch made of the floating buffers: float64, one dimension."""
        return torch.cat([buffer.flatten().double() for buffer in self._floating])

    def set_to(self, values: Tensor) -> None:
        """Give the floating buffers these values, in the layout of `values()`."""
        parts = torch.split(values, [buffer.numel() for buffer in self._floating])
        for buffer, part in zip(self._floating, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
