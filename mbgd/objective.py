"""The loss contract: an objective hands over one loss per example, never a mean. The trainer does the averaging.

    def objective(model, batch) -> PerExample

The objective calls the model, so the trainer never needs to know what a batch looks like.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbgd.errors import UsageError

Metric = Tensor | Callable[[], Tensor]

Predictions = tuple[Tensor, Tensor]
"""Outputs and targets."""


@dataclass(frozen=True, slots=True)
class PerExample:
    """What an objective returns: unreduced losses, with their weights and metrics."""

    losses: Tensor
    """Shape (N,) for N examples, or (N, T) for T tokens each."""
    weights: Tensor | None = None
    """w_i ≥ 0, same shape as `losses`; 0 leaves an example (or token) out. None: all 1."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Per-example values, same shape as `losses`, or functions that give them (called only where they are logged).
    A metric's mean is taken over the examples whose weight is not 0, each counted once."""
    predictions: Predictions | Callable[[], Predictions] | None = None
    """Outputs of shape (N, …), or (N, T, …) for T tokens each, and targets alike, or a function that gives both: what
    the metrics of the whole evaluation set (`Evaluation.metrics`) are computed from. Used in evaluations alone."""

    def check(self, num_examples: int) -> None:
        """Raise UsageError unless the shapes keep the contract for a micro-batch of `num_examples`."""
        shape = self.losses.shape
        if len(shape) not in (1, 2) or shape[0] != num_examples:
            got = f"losses of shape {tuple(shape)} for {num_examples} examples" if shape else "a scalar loss"
            raise UsageError(
                f"objective returned {got}; expected one loss per example, shape ({num_examples},) or "
                f"({num_examples}, T). Use reduction='none': the trainer does the averaging."
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

    def counted_predictions(self) -> Predictions:
        """Outputs (n, …) and targets (n, …) of the n examples, or tokens, whose weight is not 0."""
        if self.predictions is None:
            raise UsageError(
                "the objective gives no predictions, of which evaluation.metrics are computed. Let it return "
                "PerExample(…, predictions=(outputs, targets)), or leave these metrics out."
            )
        given = self.predictions() if callable(self.predictions) else self.predictions
        if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(values, Tensor) for values in given):
            raise UsageError(
                f"objective returned predictions of type {type(given).__name__}; they must be a pair of tensors, "
                "(outputs, targets), or a function that gives one."
            )
        outputs, targets = given
        num_dims = self.losses.dim()
        for name, values in (("outputs", outputs), ("targets", targets)):
            if values.shape[:num_dims] != self.losses.shape:
                raise UsageError(
                    f"objective returned predictions whose {name} have shape {tuple(values.shape)} beside losses of "
                    f"shape {tuple(self.losses.shape)}; the first dimensions must be those of the losses."
                )
        if self.weights is None:
            return outputs.detach().flatten(0, num_dims - 1), targets.flatten(0, num_dims - 1)
        kept = self.weights != 0
        return outputs.detach()[kept], targets[kept]

    def sums(self, metric_names: Sequence[str]) -> Tensor:
        """The sums that make exact means, of the loss and these metrics: float64, shape (NUM_SUMS + their number,)."""
        losses = self.losses.detach().double()
        if self.weights is None:
            count = losses.new_tensor(losses.numel())
            parts = [losses.sum(), count, count, torch.zeros_like(count)]
            metrics = [self._metric(name).sum() for name in metric_names]
        else:
            weights = self.weights.detach().double()
            kept = weights != 0
            losses = losses.masked_fill(~kept, 0.0) * weights
            parts = [losses.sum(), weights.sum(), kept.sum().double(), (weights < 0).sum().double()]
            metrics = [self._metric(name).masked_fill(~kept, 0.0).sum() for name in metric_names]
        return torch.stack(parts + metrics)


NUM_SUMS = 4


@dataclass(frozen=True)
class Totals:
    """`PerExample.sums` added up over micro-batches and workers."""

    sums: Tensor
    metric_names: tuple[str, ...]
    wrong: Tensor | None = None
    """More than 0 where any worker has noticed something wrong; shape (1,)."""

    @property
    def wrong_anywhere(self) -> bool:
        """This waits for the device."""
        return self.wrong is not None and bool(self.wrong.item())

    @property
    def weight(self) -> Tensor:
        """Σ w_i, shape ()."""
        return self.sums[1]

    @property
    def count(self) -> Tensor:
        """How many examples, or tokens, have a weight other than 0; shape ()."""
        return self.sums[2]

    @cached_property
    def _values(self) -> list[float]:
        """The sums on the host, for which it waits."""
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
        if weight == 0:
            raise UsageError(
                f"objective returned only zero weights {where}: the weighted mean of no example is undefined. "
                "Give at least one example of every minibatch a weight > 0."
            )


Objective = Callable[[nn.Module, Any], PerExample]


class CrossEntropy:
    """Cross-entropy of class logits, equal to torch's weighted mean over the whole minibatch.

    `model(inputs)` gives logits of shape (N, C), or (N, T, C) for T tokens each; targets are int64 class numbers
    of shape (N,) or (N, T). A target equal to `ignore_index` has weight 0 (None: every target counts); with
    `class_weights` (C values ≥ 0) an example's weight is that of its class.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        if not 0.0 <= label_smoothing <= 1.0:
            raise UsageError(f"label_smoothing={label_smoothing}; it must lie between 0 and 1.")
        if class_weights is not None and min(class_weights) < 0:
            raise UsageError(f"class_weights={list(class_weights)}; they must be ≥ 0.")
        if class_weights is not None and label_smoothing and min(class_weights) == 0:
            raise UsageError(
                f"class_weights={list(class_weights)} with label_smoothing={label_smoothing}: a class of weight 0 "
                "is left out of the mean, yet smoothing gives its examples a loss. Use weights > 0, or no smoothing."
            )
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.class_weights = None if class_weights is None else torch.tensor(list(class_weights))

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        inputs, targets = batch
        logits = model(inputs)
        rows = logits.flatten(0, -2)  # one per token: several times as fast as torch's way with (N, C, T)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits)
        try:
            losses = F.cross_entropy(
                rows,
                targets.flatten(),
                weight=self.class_weights,
                reduction="none",
                ignore_index=_NO_TARGET if self.ignore_index is None else self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
        except IndexError:
            self.check_targets(targets, num_classes=logits.shape[-1])
            raise
        if targets.dim() > 1:  # otherwise they have that shape, and the view would cost 10 µs
            losses = losses.view(targets.shape)
        weights = self._weights(targets, losses)
        if self.class_weights is not None and weights is not None:
            # torch's losses carry the class weight already; the trainer multiplies by it.
            losses = losses / weights.masked_fill(weights == 0, 1.0)
        accuracy = partial(_correct, logits, targets)
        return PerExample(losses, weights, {"accuracy": accuracy}, partial(_probabilities, logits, targets))

    def _weights(self, targets: Tensor, losses: Tensor) -> Tensor | None:
        if self.ignore_index is None:
            return None if self.class_weights is None else self.class_weights[targets]
        counts = targets != self.ignore_index
        if self.class_weights is None:
            return counts.to(losses.dtype)
        return self.class_weights[targets.masked_fill(~counts, 0)] * counts

    def check_targets(self, targets: Tensor, *, num_classes: int) -> None:
        """Raise UsageError unless every target is a class number or `ignore_index`."""
        if targets.is_floating_point() or targets.is_complex():
            raise UsageError(f"targets have dtype {targets.dtype}; cross-entropy takes class numbers of dtype int64.")
        if self.ignore_index is not None:
            targets = targets[targets != self.ignore_index]
        wrong = targets[(targets < 0) | (targets >= num_classes)]
        if len(wrong):
            raise UsageError(
                f"{len(wrong)} targets lie outside the classes, for example {int(wrong[0])}; the model has "
                f"{num_classes} outputs, so a target must be 0 to {num_classes - 1}. "
                "Correct the targets, set objective.ignore_index, or give the model more outputs."
            )
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise UsageError(
                f"{len(self.class_weights)} class_weights for {num_classes} classes; there must be one for each."
            )


_NO_TARGET = -(2**62)  # torch always ignores some number; one that no target can be


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.detach().argmax(-1) == targets


def _probabilities(logits: Tensor, targets: Tensor) -> Predictions:
    dtype = torch.promote_types(logits.dtype, torch.float32)  # bf16 would make ties
    return logits.detach().softmax(-1, dtype=dtype), targets


class MeanSquaredError:
    """Squared error of each example, averaged over the example's values.

    `model(inputs)` gives predictions of the targets' shape, or (N, 1) for targets of shape (N,).
    """

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        inputs, targets = batch
        predictions = model(inputs)
        if predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1:
            predictions = predictions.squeeze(-1)
        if predictions.shape != targets.shape:
            raise UsageError(
                f"the model's output has shape {tuple(predictions.shape)} and the targets {tuple(targets.shape)}; "
                "mean squared error needs equal shapes."
            )
        squares = F.mse_loss(predictions, targets.to(predictions.dtype), reduction="none")
        losses = squares.flatten(1).mean(1) if squares.dim() > 1 else squares
        return PerExample(losses, predictions=(predictions, targets))
