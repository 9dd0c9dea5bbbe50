"""What a step came to, and who is told of it."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mbgd.batches.plan import Minibatch
from mbgd.task.objective import Totals


@dataclass(frozen=True)
class Norms:
    """Euclidean norms in one step, each of shape (), on the device."""

    gradient: Tensor
    """Of the mean gradient, before clipping."""
    change: tuple[Tensor, Tensor] | None
    """Of the parameters before the update, and of what it added to them; known where it is wanted."""

    def values(self) -> dict[str, float]:
        """What is logged of them; this waits for the device."""
        assert self.change is not None
        gradient, parameters, update = torch.stack([self.gradient, *self.change]).tolist()
        values = {"gradient_norm": gradient, "parameter_norm": parameters}
        return {**values, "update_ratio": update / parameters} if parameters else values


class Done(NamedTuple):
    """What a step came to, the same on every worker; tensors are on the device."""

    step: int
    """Counted from 0."""
    minibatch: Minibatch
    weight: int | Tensor
    """Σ w_i over the minibatch."""
    totals: Totals | None
    """Sums of losses and metrics, in steps in which they are added up."""
    norms: Norms | None


class Observer(Protocol):
    """Is told of every step; must do the same on every worker, so it decides from what all of them know alike."""

    def after_update(self, done: Done) -> None:
        """The parameters are those after the step."""
