"""Your own parts: a model, a dataset and an objective that are not in mbgd.

    PYTHONPATH=examples torchrun --standalone --nproc-per-node 2 train.py \\
        model=own model._target_=own_parts.Net +model.width=32 \\
        data=own data.train._target_=own_parts.Spirals +data.train.num_examples=1500 \\
        objective=own objective._target_=own_parts.two_class_loss
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd


class Net(nn.Module):
    """Points (N, 2) → logits (N,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.layers(points).squeeze(-1)
        return logits


class Spirals(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Points on two spirals, with the spiral as label."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        angle = 3 * math.pi * index / self.num_examples
        side = index % 2
        radius = angle / (3 * math.pi) * (1 if side else -1)
        point = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)])
        return {"point": point, "side": torch.tensor(float(side))}


def two_class_loss(model: nn.Module, batch: dict[str, Tensor]) -> mbgd.PerExample:
    """One loss per example, unreduced: the trainer does the averaging."""
    logits = model(batch["point"])
    losses = F.binary_cross_entropy_with_logits(logits, batch["side"], reduction="none")
    return mbgd.PerExample(losses, metrics={"accuracy": (logits > 0) == (batch["side"] > 0.5)})
