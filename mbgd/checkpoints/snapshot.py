"""A run's whole state in the host's memory: what checkpoints are written from and trainers restored from."""

import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By file (model, optimizer), then by name."""


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after so many steps, in memory of its own."""

    step: int
    tensors: Tensors
    values: Mapping[str, Any] = field(default_factory=dict)
    """What JSON can hold."""


class SnapshotMemory:
    """Memory for snapshots that is used again once a snapshot's tensor is gone.

    Fresh memory costs several times the copy itself, for the system hands it out zeroed, page by page.
    """

    def __init__(self, device: torch.device) -> None:
        """device: of the tensors; memory for a GPU's is pinned, so that it copies there without the processor."""
        self._device, self._pinned = device, device.type == "cuda"
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def snapshot(self, step: int, tensors: Tensors, values: Mapping[str, Any]) -> Snapshot:
        """A snapshot whose tensors are copies of `tensors`."""
        copies = {file: {name: self._copy(t) for name, t in of_file.items()} for file, of_file in tensors.items()}
        if self._pinned:
            torch.cuda.synchronize(self._device)  # no later step writes into what is being copied
        return Snapshot(step, copies, values)

    def _copy(self, tensor: Tensor) -> Tensor:
        free = self._free[tensor.shape, tensor.dtype]
        memory = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        lent = memory.detach()  # each tensor by itself: somebody may hold one, and the snapshot no longer
        weakref.finalize(lent, self._free[tensor.shape, tensor.dtype].append, memory).atexit = False
        return lent.copy_(tensor.detach(), non_blocking=True)
