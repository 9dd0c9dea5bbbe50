"""Objectives whose targets have the shape of the model's outputs: squared error, Huber loss, binary cross-entropy."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.objective import PerExample, Predictions, reads_at_once


class MeanSquaredError:
    """Squared error of each example, averaged over the example's values.

    `model(inputs)` gives predictions of the targets' shape; one more dimension of size 1 is allowed, as in (N, 1) for
    targets (N,).
    """

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        predictions, targets, wide, of_targets = _paired(model, batch, "mean squared error")
        return _of_examples(F.mse_loss(wide, of_targets, reduction="none"), predictions, targets)


class Huber:
    """Huber loss of each example, averaged over the example's values: d²/2 up to `delta`, then delta · (|d| − delta/2).

    Shapes as for `MeanSquaredError`.
    """

    def __init__(self, *, delta: float = 1.0) -> None:
        if not 0.0 < delta < math.inf:
            raise UsageError(f"delta={delta}; it is the difference where the loss turns linear, a finite number > 0.")
        self.delta = float(delta)

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        predictions, targets, wide, of_targets = _paired(model, batch, "the Huber loss")
        losses = F.huber_loss(wide, of_targets, reduction="none", delta=self.delta)
        return _of_examples(losses, predictions, targets)


class BinaryCrossEntropy:
    """Binary cross-entropy of logits, equal to torch's mean over all values of the whole minibatch.

    `model(inputs)` gives one logit for each target: targets of shape (N,), (N, C) for C labels, (N, …) for pixels. One
    more dimension of size 1 is allowed, as in (N, 1, H, W) for targets (N, H, W). Targets are 0, 1, or probabilities.
    Each value counts as one loss; one whose target equals `ignore_index` has weight 0 (None: every target counts).
    """

    def __init__(
        self, *, pos_weight: float | Sequence[float] | None = None, class_dim: int = 1, ignore_index: int | None = None
    ) -> None:
        """pos_weight: factor of the loss of positive targets, torch's `pos_weight`: one number, or one for each class.
        class_dim: the targets' dimension that holds the classes, 1 or -1; used with several numbers alone."""
        given = () if pos_weight is None else pos_weight if isinstance(pos_weight, Sequence) else (pos_weight,)
        if not all(0 <= weight < math.inf for weight in given):
            raise UsageError(f"pos_weight={pos_weight}; it must be ≥ 0 and finite.")
        if class_dim not in (1, -1):
            raise UsageError(f"class_dim={class_dim}; it must be 1, for targets (N, C, …), or -1, for (N, …, C).")
        self.pos_weight = pos_weight if isinstance(pos_weight, int | float) else tuple(given) or None
        self.class_dim, self.ignore_index = class_dim, ignore_index
        self._tensors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        logits, targets, wide, of_targets = _paired(model, batch, "binary cross-entropy")
        weights = None
        if self.ignore_index is not None:
            counts = targets != self.ignore_index
            weights, of_targets = counts.to(wide.dtype), of_targets.masked_fill(~counts, 0.0)
        of_targets = self._in_range(of_targets)
        losses = F.binary_cross_entropy_with_logits(
            wide, of_targets, reduction="none", pos_weight=self._pos_weight(wide)
        )
        outputs = logits.detach()
        return PerExample(
            losses,
            weights,
            {"accuracy": lambda: (outputs > 0) == (of_targets > 0.5)},
            lambda: _probabilities(outputs, targets),
        )

    def _pos_weight(self, logits: Tensor) -> Tensor | None:
        """In the dtype and on the device of the logits, shaped so that it multiplies each class."""
        if self.pos_weight is None:
            return None
        kind = logits.dtype, logits.device
        if kind not in self._tensors:
            with torch.inference_mode(mode=False):  # an evaluation may come first, and a later backward uses it
                self._tensors[kind] = torch.tensor(self.pos_weight, dtype=logits.dtype, device=logits.device)
        weight = self._tensors[kind]
        if weight.dim() == 0:
            return weight
        if logits.dim() < 2 or logits.shape[self.class_dim] != len(weight):
            raise UsageError(
                f"{len(weight)} values of pos_weight for targets of shape {tuple(logits.shape)}; there must be one for "
                f"each class, in dimension {self.class_dim}, or a single number. Classes may also lie in the last "
                "dimension: objective.class_dim=-1."
            )
        return weight if self.class_dim == -1 else weight.view(-1, *[1] * (logits.dim() - 2))

    def _in_range(self, targets: Tensor) -> Tensor:
        """The targets; UsageError if one is not from 0 to 1, where the loss has no lower bound.

        On a GPU, where reading them would wait, such a target becomes nan, and the trainer finds the loss.
        """
        if not reads_at_once(targets.device):
            return targets.masked_fill((targets < 0) | (targets > 1), math.nan)
        if targets.numel():
            lowest, highest = torch.aminmax(targets.detach())
            if lowest.item() < 0 or highest.item() > 1:
                self.check_targets(targets, num_classes=1)
        return targets

    def check_targets(self, targets: Tensor, *, num_classes: int) -> None:
        """Raise UsageError unless every target is from 0 to 1, or `ignore_index`."""
        if targets.dtype is torch.bool or targets.is_complex():
            return
        if self.ignore_index is not None:
            targets = targets[targets != self.ignore_index]
        wrong = targets[(targets < 0) | (targets > 1)]
        if len(wrong):
            raise UsageError(
                f"{len(wrong)} targets lie outside 0 to 1, for example {wrong[0].item()}; binary cross-entropy takes "
                "0, 1, or a probability. Correct the targets, set objective.ignore_index, or use "
                "objective=cross_entropy for class numbers."
            )


def _paired(model: nn.Module, batch: Any, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(outputs, targets, both again in at least 32 bits): outputs in the targets' shape.

    name: the loss, in errors.
    """
    inputs, targets = batch
    outputs = model(inputs)
    if outputs.dim() == targets.dim() + 1:
        for dim in range(1, outputs.dim()):
            if outputs.shape[dim] == 1 and outputs.squeeze(dim).shape == targets.shape:
                outputs = outputs.squeeze(dim)
                break
    if outputs.shape != targets.shape:
        raise UsageError(
            f"the model's output has shape {tuple(outputs.shape)} and the targets {tuple(targets.shape)}; {name} needs "
            "equal shapes, because others would be broadcast: every output would meet every target. One more dimension "
            "of size 1, as in (N, 1) for (N,), is left out. Let the model give the targets' shape, or reshape the "
            "targets in the dataset."
        )
    dtype = torch.promote_types(outputs.dtype, torch.float32)  # targets are not rounded to 16 bits
    return outputs, targets, outputs.to(dtype), targets.to(dtype)


def _of_examples(losses: Tensor, predictions: Tensor, targets: Tensor) -> PerExample:
    """Losses of an example's values → their mean."""
    losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
    return PerExample(losses, predictions=(predictions, targets))


def _probabilities(logits: Tensor, targets: Tensor) -> Predictions:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid(), targets
