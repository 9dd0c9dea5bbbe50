"""A run's whole state in the host's memory, which checkpoints are written from and trainers are restored from."""

import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Mapping[str, Tensor]]
"""File (model, optimizer, objective) → name → tensor."""


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after `step` steps, in memory of its own."""

    step: int
    tensors: Tensors
    values: Mapping[str, Any] = field(default_factory=dict)
    """The state that is not tensors, as JSON can hold it."""


class SnapshotMemory:
    """Memory for snapshots, reused once a snapshot's tensor is garbage.

    Fresh memory costs several times the copy itself, because the system zeroes it page by page.
    """

    def __init__(self, device: torch.device) -> None:
        """device: where the tensors are. For a GPU the memory is pinned, so that it copies without the processor."""
        self._device, self._pinned = device, device.type == "cuda"
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def snapshot(self, step: int, tensors: Tensors, values: Mapping[str, Any]) -> Snapshot:
        """A snapshot whose tensors are copies of `tensors`."""
        copies = {file: {name: self._copy(t) for name, t in of_file.items()} for file, of_file in tensors.items()}
        if self._pinned:
            torch.cuda.synchronize(self._device)  # so that no later step writes to a tensor while it is copied
        return Snapshot(step, copies, values)

    def _copy(self, tensor: Tensor) -> Tensor:
        free = self._free[tensor.shape, tensor.dtype]
        memory = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        lent = memory.detach()  # each tensor by itself: one may be in use after the snapshot is gone
        weakref.finalize(lent, self._free[tensor.shape, tensor.dtype].append, memory).atexit = False
        return lent.copy_(tensor.detach(), non_blocking=True)
