"""Minibatch gradient descent in one process, in plain torch: what every averaging must equal.

Imports nothing from mbgd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LossesAndWeights = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, Tensor | None]]


def train(
    model: nn.Module,
    losses_and_weights: LossesAndWeights,
    data: Sequence[Tensor],
    minibatches: Sequence[Sequence[int]],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
) -> list[float]:
    """Trains in place on the minibatches, given as example indices; each minibatch's weighted mean loss."""
    optimizer = make_optimizer(model.parameters())
    means = []
    for minibatch in minibatches:
        batch = tuple(part[torch.as_tensor(minibatch)] for part in data)
        losses, weights = losses_and_weights(model, batch)
        mean = losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        mean.backward()  # type: ignore[no-untyped-call]
        if max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), max_grad_value)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        means.append(float(mean.detach()))
    return means


def train_mean_of_means(
    model: nn.Module,
    losses_and_weights: LossesAndWeights,
    data: Sequence[Tensor],
    shards: Sequence[Sequence[Sequence[int]]],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    """The field's recurring bug, as a control: each shard's mean gradient counts the same, whatever its weight."""
    optimizer = make_optimizer(model.parameters())
    for minibatch in shards:
        optimizer.zero_grad()
        filled = [shard for shard in minibatch if len(shard)]
        for shard in filled:
            losses, weights = losses_and_weights(model, tuple(part[torch.as_tensor(shard)] for part in data))
            mean = losses.mean() if weights is None else (losses * weights).sum() / weights.sum().clamp(min=1e-300)
            (mean / len(filled)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
