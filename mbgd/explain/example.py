"""Five weights and two examples with given gradients: a case small enough to check by hand."""

from typing import Any

import torch
from torch import nn

from mbgd.data.in_memory import InMemory
from mbgd.task.objective import PerExample

GRADIENTS = (1.5, -2.0, 1.1, 0.4, -0.9), (1.2, 2.3, -1.1, -0.8, -0.7)
"""Gradients of the two losses with respect to the five weights; their mean is (1.35, 0.15, 0, −0.2, −0.8)."""

LOSSES = 2.0, -2.0

OVERRIDES = (
    "model=own",
    "model._target_=mbgd.explain.example.FiveWeights",
    "data=own",
    "data.train._target_=mbgd.explain.example.two_examples",
    "data.evaluation=null",
    "data.shuffle=false",
    "objective=own",
    "objective._target_=mbgd.explain.example.linear_loss",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "optimizer.momentum=0",
    "schedule=constant",
    "batch.size=2",
)


class FiveWeights(nn.Module):
    """Σ w_j x_j, with weights initialized to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.w


def two_examples() -> InMemory:
    return InMemory(torch.tensor(GRADIENTS, dtype=torch.float64), torch.tensor(LOSSES, dtype=torch.float64))


def linear_loss(model: nn.Module, batch: Any) -> PerExample:
    """L = w · x + c, whose gradient with respect to w is x."""
    inputs, constants = batch
    return PerExample(model(inputs) + constants)
