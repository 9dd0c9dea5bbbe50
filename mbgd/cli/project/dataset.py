"""Your own dataset: any class with `__len__` and `__getitem__`."""

import math

import torch
from torch import Tensor


class Spirals(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Points on two spirals, with the spiral as label; `offset` shifts the points along it, for an evaluation set."""

    def __init__(self, num_examples: int, offset: float = 0.0) -> None:
        self.num_examples, self.offset = num_examples, offset

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.num_examples:
            raise IndexError(index)
        part, side = (index + self.offset) / self.num_examples, index % 2
        angle = 1.5 * math.pi * part
        radius = part if side else -part
        return torch.tensor([radius * math.cos(angle), radius * math.sin(angle)]), torch.tensor(side)
