"""Notices losses and gradients that are not finite, and weights that are negative or all 0.

On a CPU a value is checked in the step that computes it. On a GPU that would wait for the device, so the number of the
first wrong step is kept on the device, and read at steps that log, evaluate or save.
"""

import math
from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor

NEVER = 2**62


class Wrong(Enum):
    """What can be wrong with a step, the most informative first."""

    layers = "workers computed different BatchNorm layers"
    negative_weights = "a weight was negative"
    no_weight = "all weights were 0"
    loss = "the loss was not finite"
    gradient = "the gradient was not finite"
    buffers = "micro-batches made different values of an integer buffer"


class Watch:
    """Remembers the first step in which something was wrong."""

    def __init__(self, device: torch.device, *, waits: bool | None = None) -> None:
        """waits: whether values are read at once; None: only on a CPU, where reading does not wait."""
        self._waits = device.type == "cpu" if waits is None else waits
        self._first: dict[Wrong, Tensor] = (
            {} if self._waits else {wrong: torch.full((), NEVER, dtype=torch.int64, device=device) for wrong in Wrong}
        )
        self._found: dict[Wrong, int] = {}

    def check_finite(self, wrong: Wrong, step: int, value: Tensor) -> None:
        """`value`, shape (), must be finite in step number `step`."""
        if not self._waits:
            self._keep(wrong, step, value.isfinite())
        elif not math.isfinite(value.item()):
            self._found.setdefault(wrong, step)

    def check_losses(self, step: int, losses: Tensor) -> None:
        """All losses, in any shape, must be finite."""
        total = losses.detach().sum()
        if not self._waits:
            self._keep(Wrong.loss, step, total.isfinite())
        elif not math.isfinite(total.item()) and not losses.isfinite().all():  # a sum may overflow
            self._found.setdefault(Wrong.loss, step)

    def check_true(self, wrong: Wrong, step: int, value: Tensor) -> None:
        """`value`, bool, shape (), must be true."""
        if not self._waits:
            self._keep(wrong, step, value)
        elif not value.item():
            self._found.setdefault(wrong, step)

    def check_sums(self, step: int, sums: Tensor, *, loss: bool) -> None:
        """sums: `PerExample.sums` over the minibatch. No weight may be negative, nor all be 0. loss: check it, too."""
        if self._waits:
            total, weight, _, num_negative, *_ = sums.tolist()
            rules = {Wrong.negative_weights: num_negative == 0, Wrong.no_weight: weight != 0}
            rules[Wrong.loss] = not loss or math.isfinite(total)
            for wrong, is_right in rules.items():
                if not is_right:
                    self._found.setdefault(wrong, step)
            return
        self._keep(Wrong.negative_weights, step, sums[3] == 0)
        self._keep(Wrong.no_weight, step, sums[1] != 0)
        if loss:
            self._keep(Wrong.loss, step, sums[0].isfinite())

    def indicator(self) -> Tensor:
        """1 if something was wrong, otherwise 0: float64, shape (1,), on the device."""
        if self._waits:
            return torch.tensor([float(bool(self._found))], dtype=torch.float64)
        return (torch.stack(list(self._first.values())) < NEVER).any().double().view(1)

    def _keep(self, wrong: Wrong, step: int, is_right: Tensor) -> None:
        self._first[wrong] = torch.where(is_right, self._first[wrong], self._first[wrong].clamp(max=step))

    def found(self) -> bool:
        """Whether something was wrong, as far as the host knows without waiting for the device."""
        return bool(self._found)

    def read(self) -> tuple[int, Wrong] | None:
        """The first wrong step, counted from 0, and what was wrong in it; waits for the device."""
        if self._first:
            steps = torch.stack(list(self._first.values())).tolist()
            self._found = {wrong: step for wrong, step in zip(self._first, steps, strict=True) if step < NEVER}
        order = list(Wrong)
        found = [(step, order.index(wrong)) for wrong, step in self._found.items()]
        if not found:
            return None
        step, number = min(found)
        return step, order[number]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a value that is not finite; waits for each device once."""
    found: set[str] = set()
    for device in {tensor.device for tensor in tensors.values()}:  # torch keeps some optimizer state on the host
        found.update(_not_finite({name: t for name, t in tensors.items() if t.device == device}))
    return [name for name in tensors if name in found]


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """tensors: on one device."""
    floating = {n: t.detach() for n, t in tensors.items() if t.numel() and (t.is_floating_point() or t.is_complex())}
    if not floating:
        return []
    # The largest absolute value is nan or infinite if any value is; unlike a sum, it cannot overflow.
    largest = torch.stack([norm.double() for norm in torch._foreach_norm(list(floating.values()), math.inf)])
    return [name for name, finite in zip(floating, largest.isfinite().tolist(), strict=True) if not finite]
