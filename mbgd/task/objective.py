"""The loss contract: an objective hands over one loss per example, never a mean. The trainer does the averaging.

    def objective(model, batch) -> PerExample

The objective calls the model, so the trainer never needs to know what a batch looks like. Where the losses of examples
look at each other, the objective is a pair of methods instead: `Coupled`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from mbgd.errors import UsageError

MetricValues = Tensor | Callable[[], Tensor]

Predictions = tuple[Tensor, Tensor]
"""Outputs and targets."""


def reads_at_once(device: torch.device) -> bool:
    """Whether reading a value there does not wait for anything."""
    return device.type == "cpu"


@dataclass(frozen=True, slots=True)
class PerExample:
    """What an objective returns: unreduced losses, with their weights and metrics."""

    losses: Tensor
    """Shape (N,) for N examples, or (N, …) with one loss per token, pixel, box or the like."""
    weights: Tensor | None = None
    """w_i ≥ 0, same shape as `losses`; 0 leaves an example (or token) out. None: all 1."""
    metrics: Mapping[str, MetricValues] = field(default_factory=dict)
    """Per-example values, same shape as `losses`, or functions that return them (called only when they are logged).
    A metric's mean is taken over the examples whose weight is not 0, each counted once. Names of the trainer's own
    metrics, such as loss and learning_rate, are taken."""
    predictions: Predictions | Callable[[], Predictions] | None = None
    """Outputs and targets, whose first dimensions are the losses' shape, or a function that returns both: the input of
    the metrics of the whole evaluation set (`Evaluation.metrics`). Used in evaluations alone."""

    def check(self, num_examples: int) -> None:
        """Raise UsageError unless the shapes follow the contract for a micro-batch of `num_examples`."""
        shape = self.losses.shape
        if not shape or shape[0] != num_examples:
            got = f"losses of shape {tuple(shape)} for {num_examples} examples" if shape else "a scalar loss"
            raise UsageError(
                f"objective returned {got}; expected one loss per example, shape ({num_examples},) or "
                f"({num_examples}, …) for tokens, pixels and the like. Use reduction='none': the trainer does the "
                "averaging."
            )
        if self.weights is not None:
            self._check_shape("weights", self.weights)

    def _check_shape(self, name: str, values: Tensor) -> None:
        if values.shape != self.losses.shape:
            raise UsageError(
                f"objective returned {name} of shape {tuple(values.shape)} beside losses of shape "
                f"{tuple(self.losses.shape)}; the shapes must be the same."
            )

    def _metric(self, name: str) -> Tensor:
        metric = self.metrics[name]
        values = metric if isinstance(metric, Tensor) else metric()
        self._check_shape(f"metric {name!r}", values)
        return values.detach().double()

    def whole_predictions(self) -> Predictions | None:
        """Outputs and targets of all examples, checked; None if the objective gives none."""
        if self.predictions is None:
            return None
        given = self.predictions() if callable(self.predictions) else self.predictions
        if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(values, Tensor) for values in given):
            raise UsageError(
                f"objective returned predictions of type {type(given).__name__}; they must be a pair of tensors, "
                "(outputs, targets), or a function that gives one."
            )
        for name, values in zip(("outputs", "targets"), given, strict=True):
            if values.shape[: self.losses.dim()] != self.losses.shape:
                raise UsageError(
                    f"objective returned predictions whose {name} have shape {tuple(values.shape)} beside losses of "
                    f"shape {tuple(self.losses.shape)}; the first dimensions must be those of the losses."
                )
        outputs, targets = given
        return outputs.detach(), targets.detach()

    def counted_predictions(self) -> Predictions:
        """Outputs (n, …) and targets (n, …) of the n examples, or tokens, whose weight is not 0."""
        given = self.whole_predictions()
        if given is None:
            raise UsageError(
                "the objective gives no predictions, but evaluation.metrics are computed from them. Let it return "
                "PerExample(…, predictions=(outputs, targets)), or leave these metrics out."
            )
        outputs, targets = given
        if self.weights is None:
            num_dims = self.losses.dim()
            return outputs.flatten(0, num_dims - 1), targets.flatten(0, num_dims - 1)
        kept = self.weights != 0
        return outputs[kept], targets[kept]

    def rows(self, start: int, stop: int) -> "PerExample":
        """The terms of examples [start, stop), without a graph and without predictions."""
        metrics: dict[str, MetricValues] = {
            name: values[start:stop] if isinstance(values, Tensor) else _rows_of(values, start, stop)
            for name, values in self.metrics.items()
        }
        weights = None if self.weights is None else self.weights.detach()[start:stop]
        return PerExample(self.losses.detach()[start:stop], weights, metrics)

    def total_weight(self) -> Tensor:
        """Σ w_i: float64, shape ()."""
        if self.weights is None:
            return self.losses.new_full((), self.losses.numel(), dtype=torch.float64)
        return self.weights.detach().double().sum()

    def sums_of_weights(self) -> Tensor:
        """`sums` without metrics, at less cost: 0 in the place of a finite Σ w L."""
        if self.weights is not None and reads_at_once(self.losses.device):
            # In small steps every call counts.
            weights = self.weights.detach().double()
            weight, loss = weights.sum().item(), self.losses.detach().sum().item()
            if math.isfinite(weight) and math.isfinite(loss):
                count, negative = torch.count_nonzero(weights).item(), 0
                if count and weights.min().item() < 0:
                    negative = int(torch.count_nonzero(weights < 0).item())
                return torch.from_numpy(np.array([0.0, weight, count, negative]))
        return self.sums(())

    def sums(self, metric_names: Sequence[str]) -> Tensor:
        """Σ w L, Σ w, the number of w ≠ 0, the number of w < 0, and each metric's sum: float64.

        Shape (NUM_SUMS + number of metrics,).
        """
        losses = self.losses.detach().double()
        if self.weights is None:
            count = losses.new_full((), losses.numel())  # filled by a kernel: new_tensor would wait for a GPU
            parts = [losses.sum(), count, count, torch.zeros_like(count)]
            metrics = [self._metric(name).sum() for name in metric_names]
        else:
            weights = self.weights.detach().double()
            kept = weights != 0
            losses = losses.masked_fill(~kept, 0.0) * weights
            parts = [losses.sum(), weights.sum(), kept.sum().double(), (weights < 0).sum().double()]
            metrics = [self._metric(name).masked_fill(~kept, 0.0).sum() for name in metric_names]
        return torch.stack(parts + metrics)


def _rows_of(values: Callable[[], Tensor], start: int, stop: int) -> Callable[[], Tensor]:
    return lambda: values()[start:stop]


TAKEN = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "parameter_norm",
    "update_ratio",
    "epoch",
    "noise_scale",
    "gradient_variance",
    "skipped_steps",
    "examples_sha256",
    "weights_sha256",
)
"""Names of what the trainer itself logs as train/… and eval/…."""


def check_metric_names(names: Iterable[object]) -> None:
    """Raise UsageError if the objective gives one of its metrics a name that the trainer's own metrics have."""
    for name in names:
        if not isinstance(name, str) or name in TAKEN:
            rule = "is the name of a metric of the trainer's own" if name in TAKEN else "is no text"
            raise UsageError(
                f"objective returned a metric named {name!r}, which {rule}; one of the two would be lost. "
                "Give it another name."
            )


NUM_SUMS = 4


@dataclass(frozen=True)
class Totals:
    """`PerExample.sums`, summed over micro-batches and workers."""

    sums: Tensor
    metric_names: tuple[str, ...]
    wrong: Tensor | None = None
    """More than 0 if any worker has noticed something wrong; shape (1,)."""

    @property
    def wrong_anywhere(self) -> bool:
        """Waits for the device."""
        return self.wrong is not None and bool(self.wrong.item())

    @property
    def weight(self) -> Tensor:
        """Σ w_i, shape ()."""
        return self.sums[1]

    @property
    def count(self) -> Tensor:
        """Number of examples, or tokens, whose weight is not 0; shape ()."""
        return self.sums[2]

    @cached_property
    def _values(self) -> list[float]:
        """The sums on the host; waits for the device."""
        values: list[float] = self.sums.tolist()
        return values

    def means(self) -> dict[str, float]:
        """The exact weighted mean loss and the metrics' means; this waits for the device."""
        loss, weight, count, _, *metrics = self._values
        means = {"loss": loss / weight if weight else float("nan")}
        for name, value in zip(self.metric_names, metrics, strict=True):
            means[name] = value / count if count else float("nan")
        return means

    def check_weights(self, where: str) -> None:
        """Raise UsageError if a weight was negative or all were 0; this waits for the device."""
        _, weight, _, negative, *_ = self._values
        if negative:
            raise UsageError(
                f"objective returned {int(negative)} negative weights {where}; weights must be ≥ 0 "
                "(0 leaves an example out)."
            )
        if not math.isfinite(weight):
            raise UsageError(
                f"objective returned weights whose sum {where} is {weight}; weights must be finite and ≥ 0 (0 leaves "
                "an example out)."
            )
        if weight == 0:
            raise UsageError(
                f"objective returned only zero weights {where}: the weighted mean of no example is undefined. "
                "Give at least one example of every minibatch a weight > 0."
            )


class Coupled(Protocol):
    """An objective whose losses look at several examples at once, such as a contrastive one.

    Any object with these two methods is one. `encode` sees a micro-batch; `losses` sees the whole minibatch, however it
    was cut, and is computed alike on every worker. Parameters that either uses belong to the model, or to the objective
    if it is an nn.Module.
    """

    def encode(self, model: nn.Module, batch: Any) -> Tensor | Sequence[Tensor]:
        """One tensor or several for a batch of N examples, each of shape (N, …); each example's by itself alone."""

    def losses(self, *encodings: Tensor) -> PerExample:
        """The losses of N examples, from the encodings of all N in their order."""


Objective = Callable[[nn.Module, Any], PerExample] | Coupled


def is_coupled(objective: Any) -> TypeGuard[Coupled]:
    """Whether it is a pair; UsageError where it could be either kind of objective."""
    has_both = all(callable(getattr(objective, name, None)) for name in ("encode", "losses"))
    if isinstance(objective, type) or not has_both:
        return False
    is_module = isinstance(objective, nn.Module)
    if callable(objective) and not (is_module and type(objective).forward is nn.Module.forward):
        raise UsageError(
            f"the objective {type(objective).__name__} has encode and losses, and can be called with (model, batch), "
            "too; only one of the two can be the objective. Rename encode or losses, or leave out "
            f"{'forward' if is_module else '__call__'}."
        )
    return True
