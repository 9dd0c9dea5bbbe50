"""Cross-entropy of classes, unreduced."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbgd.batches.pieces import pieces
from mbgd.errors import UsageError
from mbgd.task.objective import PerExample, Predictions


class CrossEntropy:
    """Cross-entropy of class logits, equal to torch's weighted mean over the whole minibatch.

    Targets are class numbers of shape (N,), or (N, …) for a class per token or pixel. `model(inputs)` gives logits of
    shape (N, C, …), torch's layout, or (N, …, C); … may be flattened. A target equal to `ignore_index` has weight 0
    (None: every target counts); with `class_weights` (C values ≥ 0) a target's weight is its class's weight.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        class_dim: int | None = None,
    ) -> None:
        """class_dim: the logits' dimension that holds the classes, 1 or -1; None: inferred from the first batch whose
        shapes allow only one."""
        if not 0.0 <= label_smoothing <= 1.0:
            raise UsageError(f"label_smoothing={label_smoothing}; it must lie between 0 and 1.")
        if class_weights is not None and not all(0 <= weight < math.inf for weight in class_weights):
            raise UsageError(f"class_weights={list(class_weights)}; they must be ≥ 0 and finite.")
        if class_weights is not None and label_smoothing and min(class_weights) == 0:
            raise UsageError(
                f"class_weights={list(class_weights)} with label_smoothing={label_smoothing}: a class of weight 0 "
                "is left out of the mean, yet smoothing gives its examples a loss. Use weights > 0, or no smoothing."
            )
        if class_dim not in (None, 1, -1):
            raise UsageError(f"class_dim={class_dim}; it must be 1, for logits (N, C, …), or -1, for (N, …, C).")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.class_weights = None if class_weights is None else tuple(float(weight) for weight in class_weights)
        self.class_dim = class_dim
        self._weight_tensors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        inputs, targets = batch
        logits = self.classes_last(model(inputs), targets)
        if targets.dtype is not torch.int64:
            _check_integers(targets)
            targets = targets.long()
        rows, of_rows = logits, targets
        if targets.dim() > 1:
            # One row per token: several times as fast as F.cross_entropy on (N, C, T).
            rows, of_rows = logits.flatten(0, -2), targets.flatten()
        if rows.dtype.itemsize < 4:
            rows = rows.float()  # neither losses nor weights in 16 bits
        class_weights = self._class_weights(rows)
        try:
            losses = F.cross_entropy(
                rows,
                of_rows,
                weight=class_weights if self.label_smoothing else None,
                reduction="none",
                ignore_index=_NO_TARGET if self.ignore_index is None else self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
        except IndexError:
            self.check_targets(targets, num_classes=logits.shape[-1])
            raise
        if targets.dim() > 1:  # otherwise the shape is right already, and the view would cost 10 µs
            losses = losses.view(targets.shape)
        weights = self._weights(targets, losses, class_weights)
        if self.label_smoothing and class_weights is not None and weights is not None:
            # torch has multiplied smoothed losses by the class weight already; the trainer does it, too.
            losses = losses / weights.masked_fill(weights == 0, 1.0)
        accuracy = partial(_correct, logits, targets)
        return PerExample(losses, weights, {"accuracy": accuracy}, partial(_probabilities, logits, targets))

    def classes_last(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The logits as (*targets.shape, C); UsageError if the shapes do not fit, or fit in two ways."""
        if logits.dim() == 2 and logits.shape[:1] == targets.shape:
            return logits
        dims = _class_dims(logits.shape, targets.shape)
        shapes = f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}"
        if not dims:
            raise UsageError(
                f"the model gives {shapes}. Cross-entropy takes targets (N, …) with logits (N, C, …) or (N, …, C), or "
                "with … flattened; for one class per example (N,) and (N, C)."
            )
        if logits.dim() > 2:
            if len(dims) > 1 and self.class_dim is None:
                raise UsageError(
                    f"{shapes} fit with the classes in dimension 1 and in dimension -1. Set objective.class_dim=1 for "
                    "(N, C, …), or objective.class_dim=-1 for (N, …, C)."
                )
            self.class_dim = self.class_dim or dims[0]
            if self.class_dim not in dims:
                raise UsageError(
                    f"class_dim={self.class_dim}, by objective.class_dim or by an earlier batch, but {shapes} have the "
                    f"classes in dimension {dims[0]}. Let the model give all outputs in one layout, or correct the "
                    "option."
                )
            logits = logits.movedim(self.class_dim, -1)
        return logits.reshape(*targets.shape, logits.shape[-1])

    def _class_weights(self, rows: Tensor) -> Tensor | None:
        """The class weights, in the dtype and on the device of the logits."""
        if self.class_weights is None:
            return None
        self._check_num_classes(rows.shape[-1])
        kind = rows.dtype, rows.device
        if kind not in self._weight_tensors:
            with torch.inference_mode(mode=False):  # an evaluation may come first, and a later backward uses them
                self._weight_tensors[kind] = torch.tensor(self.class_weights, dtype=rows.dtype, device=rows.device)
        return self._weight_tensors[kind]

    def _weights(self, targets: Tensor, losses: Tensor, class_weights: Tensor | None) -> Tensor | None:
        if self.ignore_index is None:
            return None if class_weights is None else class_weights[targets]
        counts = targets != self.ignore_index
        if class_weights is None:
            return counts.to(losses.dtype)
        return class_weights[targets.masked_fill(~counts, 0)] * counts

    def check_targets(self, targets: Tensor, *, num_classes: int) -> None:
        """Raise UsageError unless every target is a class number or `ignore_index`."""
        _check_integers(targets)
        wrong = torch.cat([self._wrong(piece, num_classes) for piece in pieces(targets)])
        if len(wrong):
            raise UsageError(
                f"{len(wrong)} targets lie outside the classes, for example {int(wrong[0])}; the model has "
                f"{num_classes} outputs, so a target must be 0 to {num_classes - 1}. "
                "Correct the targets, set objective.ignore_index, or give the model more outputs."
            )
        self._check_num_classes(num_classes)

    def _wrong(self, targets: Tensor, num_classes: int) -> Tensor:
        is_wrong = (targets < 0) | (targets >= num_classes)
        return targets[is_wrong if self.ignore_index is None else is_wrong & (targets != self.ignore_index)]

    def _check_num_classes(self, num_classes: int) -> None:
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise UsageError(
                f"{len(self.class_weights)} class_weights for {num_classes} classes; there must be one for each."
            )


_NO_TARGET = -(2**62)  # F.cross_entropy always has an ignore_index; no target can be this one


def _check_integers(targets: Tensor) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool:
        raise UsageError(f"targets have dtype {targets.dtype}; cross-entropy takes class numbers of dtype int64.")


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.detach().argmax(-1) == targets


def _probabilities(logits: Tensor, targets: Tensor) -> Predictions:
    dtype = torch.promote_types(logits.dtype, torch.float32)  # bf16 would make ties
    return logits.detach().softmax(-1, dtype=dtype), targets


def _class_dims(logits: Sequence[int], targets: Sequence[int]) -> tuple[int, ...]:
    """The dimensions, of 1 and -1, that may hold the classes, for these shapes of logits and targets.

    Targets (N, …) fit logits (N, C, …), torch's layout, or (N, …, C). The dimensions … may be flattened into one on
    either side. Logits of two dimensions are (rows, C), a row for each target. Empty: the shapes do not fit; two
    dimensions: either is possible.
    """
    if len(logits) < 2 or not targets:
        return ()
    if len(logits) == 2:
        return (-1,) if logits[0] == math.prod(targets) else ()
    positions = {1: logits[2:], -1: logits[1:-1]}
    return tuple(dim for dim, of in positions.items() if logits[0] == targets[0] and _are_same(of, targets[1:]))


def _are_same(positions: Sequence[int], others: Sequence[int]) -> bool:
    if 1 in (len(positions), len(others)):
        return math.prod(positions) == math.prod(others)
    return tuple(positions) == tuple(others)
