"""A large tensor in pieces, so that what is computed of it takes little memory."""

import torch
from torch import Tensor

PIECE_VALUES = 2**20


def pieces(values: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows, of about `PIECE_VALUES` values each; at least one row."""
    per_row = values[0].numel() if len(values) else 1
    return torch.split(values, max(1, PIECE_VALUES // max(1, per_row)))
