"""Your own model."""

import torch
from torch import Tensor


class Net(torch.nn.Module):
    """Points (N, 2) → one logit for each of two classes, (N, 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()
        )
        self.output = torch.nn.Linear(width, 2)

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.output(self.layers(points))
        return logits
