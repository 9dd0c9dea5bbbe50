"""A micro-batch's forward and backward as a graph: recorded once, replayed on other examples of the same shape.

Every replay reads and writes the same memory. So examples are copied into inputs of the graph's own, and whatever
outlives the next replay is copied out of its outputs. How a device records is another's business: `Recorder`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mbgd.batches.nested import each_tensor, leaves_of
from mbgd.workers.messages import bytes_of

Shape = tuple[tuple[str, torch.Size, torch.dtype, tuple[int, ...]], ...]
"""Of each tensor of a batch: where it is, its shape, dtype and strides."""


class CannotRecordError(Exception):
    """Why work cannot be recorded, or a recording not be replayed, in words without a full stop."""


class Outputs(NamedTuple):
    """What a micro-batch's forward and backward come to, without a graph of autograd's."""

    losses: Tensor
    weights: Tensor | None
    gradients: tuple[Tensor | None, ...]
    """Of Σ w_i L_i, one for each parameter; None for one that took no part."""


class Recorder(Protocol):
    """A device's way to record work."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work where it will be recorded, as often as that takes.

        CannotRecordError if it does what no replay can do.
        """

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """The work's outputs, and a function that does the work again and leaves its results in their memory.

        The memory has no values before the first call.
        """


def shape_of(batch: Any, device: torch.device) -> Shape:
    """CannotRecordError for a batch that holds anything but plain tensors on the device."""
    found = []
    for place, leaf in leaves_of(batch):
        name = f"the batch{f' ({place})' if place else ''}"
        if type(leaf) is not Tensor:
            raise CannotRecordError(f"{name} has a value of type {type(leaf).__name__}; a replay gets tensors alone")
        if leaf.device != device or leaf.layout is not torch.strided or leaf.requires_grad:
            raise CannotRecordError(
                f"{name} has a tensor on another device, a sparse one, or one that requires a gradient"
            )
        found.append((place, leaf.shape, leaf.dtype, leaf.stride()))
    return tuple(found)


class Graph:
    """The recorded forward and backward of micro-batches of one shape."""

    def __init__(
        self,
        batch: Any,
        compute: Callable[[Any], Outputs],
        parameters: Mapping[str, Tensor],
        buffers: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """compute: a batch's outputs, without touching `.grad`. parameters: those that gradients are for, by name.

        buffers: all buffers by name. CannotRecordError where the batch's memory has gaps or overlaps.
        """
        self._parameters, self._buffers = dict(parameters), buffers
        self._batch = each_tensor(batch, torch.clone)
        self._inputs = [leaf for _, leaf in leaves_of(self._batch)]
        for (place, leaf), own in zip(leaves_of(batch), self._inputs, strict=True):
            if own.stride() != leaf.stride():
                raise CannotRecordError(f"the batch's tensor {place} has gaps or overlaps in memory")
        self._compute = compute
        self._moved: list[Tensor] = []
        """Buffers that the forward changes in place, as far as their `_version` tells."""
        self.equal_in: int | None = None
        """The last step in which a replay had the bits of the eager computation; None: not compared yet."""

    def compute(self) -> Outputs:
        """Eagerly, on the graph's own inputs."""
        return self._compute(self._batch)

    def record(self, recorder: Recorder) -> None:
        """CannotRecordError, or an error of the work's own, if it fails."""
        versions = {name: one._version for name, one in self._buffers().items()}
        self._outputs, self._replay = recorder.record(self.compute)
        self._moved = [one for name, one in self._buffers().items() if one._version != versions.get(name)]

    def fill(self, batch: Any) -> None:
        """Take the batch's values."""
        torch._foreach_copy_(self._inputs, [leaf for _, leaf in leaves_of(batch)])

    def replay(self) -> Outputs:
        """The outputs for the values of the last `fill`; the next replay overwrites them."""
        self._replay()
        # A replay changes memory without torch's notice; buffers.py goes by `_version`.
        torch.autograd.graph.increment_version(self._moved)
        return self._outputs

    def add_gradients(self) -> None:
        """Add the gradients of the last replay to the parameters', in memory of their own, as a backward does."""
        pairs = [
            (p, g) for p, g in zip(self._parameters.values(), self._outputs.gradients, strict=True) if g is not None
        ]
        firsts = [(p, g) for p, g in pairs if p.grad is None]
        others = [(p.grad, g) for p, g in pairs if p.grad is not None]
        if firsts:
            # With the parameter's strides, as autograd's AccumulateGrad has them.
            made = [torch.empty_like(p) for p, _ in firsts]
            torch._foreach_copy_(made, [g for _, g in firsts])
            for (parameter, _), gradient in zip(firsts, made, strict=True):
                parameter.grad = gradient
        if others:
            torch._foreach_add_([own for own, _ in others], [g for _, g in others])

    def named(self, outputs: Outputs) -> dict[str, Tensor]:
        """The outputs, and a copy of each buffer as it is now, by names for people."""
        found = {"the losses": outputs.losses}
        if outputs.weights is not None:
            found["the weights"] = outputs.weights
        gradients = zip(self._parameters, outputs.gradients, strict=True)
        found |= {f"the gradient of {name}": gradient for name, gradient in gradients if gradient is not None}
        return found | {f"the buffer {name}": one.detach().clone() for name, one in self._buffers().items()}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The name of the first tensor whose bits differ; empty if all are equal. Waits for the device."""
    if missing := sorted(one.keys() ^ other.keys()):
        return missing[0]
    return next((name for name, tensor in one.items() if not _are_equal(tensor, other[name])), "")


def first_line(error: Exception) -> str:
    """What went wrong, in one line that goes on in a sentence."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(bytes_of(one), bytes_of(other))
