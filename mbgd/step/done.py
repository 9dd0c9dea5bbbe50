"""The results of a step and of a run, and the observers that get a step's."""

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
    """Norms of the parameters before the update and of the update itself; None if not asked for."""
    before_hooks: Tensor | None = None
    """Of the mean gradient before users' hooks on parameters have changed it; None where there are none."""

    def values(self) -> dict[str, float]:
        """The norms by name, for the log; this waits for the device."""
        assert self.change is not None
        gradient, parameters, update = torch.stack([self.gradient, *self.change]).tolist()
        values = {"gradient_norm": gradient, "parameter_norm": parameters}
        return {**values, "update_ratio": update / parameters} if parameters else values


class Done(NamedTuple):
    """The result of a step, the same on every worker; tensors are on the device."""

    step: int
    """Counted from 0."""
    minibatch: Minibatch
    weight: int | Tensor
    """Σ w_i over the minibatch."""
    totals: Totals | None
    """Sums of losses and metrics; None in steps that do not add them up."""
    norms: Norms | None
    seconds_by_rank: Tensor | None = None
    """Each worker's own time per micro-batch before the last logged step, see speeds.py; None if not logged."""
    num_tokens: Tensor | None = None
    """Number of tokens whose weight is not 0; None where the objective gives one loss per example."""


class Observer(Protocol):
    """Called after every step. It must do the same on every worker, so it decides only from values that all share."""

    def after_update(self, done: Done) -> None:
        """Called with the parameters already updated."""


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    metrics: dict[str, float]
    """The last value of each metric, by names such as train/loss and eval/accuracy."""
    steps: int
    examples_seen: int
    examples_per_second: float
    num_skipped_steps: int
    """Steps without an update because gradients overflowed in fp16."""
    stopped_by: str = ""
    """The observer that stopped training before its last step; empty if none did."""
    weights_step: int | None = None
    """The step whose weights the model has at the end, if that is not the last."""
