"""The whole state of a run as a list of parts: a checkpoint is a loop over them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mbgd.checkpoints.snapshot import Snapshot, SnapshotMemory
from mbgd.checks.finite import not_finite
from mbgd.errors import UsageError
from mbgd.text.listing import shown


class Part(Protocol):
    """One part of the state: the model, the optimizer, a moving average."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Its tensors, not copied: file in the checkpoint → name → tensor."""

    def values(self) -> Mapping[str, Any]:
        """The rest of its state by name, as JSON can hold it."""

    def mismatches(self, snapshot: Snapshot) -> list[str]:
        """Why a snapshot cannot be restored, one text for each reason."""

    def restore(self, snapshot: Snapshot) -> None:
        """Restore what fits, as copies: no memory is shared with the snapshot afterwards."""


class Parts:
    """All parts of one run."""

    def __init__(self, parts: Sequence[Part], parameters: Mapping[str, Tensor], device: torch.device) -> None:
        """parameters: trained parameters by name; they and the optimizer's state must be finite to be saved."""
        self._parts, self._parameters = parts, parameters
        self._memory = SnapshotMemory(device)

    def snapshot(self, step: int) -> Snapshot:
        """The state after `step` steps, in memory of its own; UsageError where it is not finite."""
        tensors: dict[str, Mapping[str, Tensor]] = {}
        values: dict[str, Any] = {}
        for part in self._parts:
            tensors.update(part.tensors())
            values.update(part.values())
        of_optimizer = {f"optimizer.{name}": tensor for name, tensor in tensors.get("optimizer", {}).items()}
        if spoilt := not_finite({**self._parameters, **of_optimizer}):
            raise UsageError(f"the state after step {step} is not finite, so it is not saved: {shown(spoilt)}")
        return self._memory.snapshot(step, tensors=tensors, values=values)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore every part; UsageError, with nothing changed, where the snapshot does not fit."""
        if found := [mismatch for part in self._parts for mismatch in part.mismatches(snapshot)]:
            raise UsageError("the checkpoint does not fit this run:\n" + "\n".join(f"  - {one}" for one in found))
        for part in self._parts:
            part.restore(snapshot)
