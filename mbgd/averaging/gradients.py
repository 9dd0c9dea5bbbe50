"""Gradients by parameter, and their addition where some parameters have none."""

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = dict[Tensor, Tensor]
"""Parameter → gradient."""


def flat(gradients: Gradients, parameters: Sequence[Tensor]) -> Tensor:
    """The gradients as one vector in a bucket's layout; zeros for a parameter without a gradient."""
    return torch.cat([(gradients[p] if p in gradients else torch.zeros_like(p)).flatten() for p in parameters])


def add_into_right(left: Gradients, right: Gradients) -> Gradients:
    """left + right, in right's memory, for the parameters of right."""
    both = [p for p in right if p in left]
    if both:
        torch._foreach_add_([right[p] for p in both], [left[p] for p in both])
    return right


def add_gradients(left: Gradients, right: Gradients) -> Gradients:
    """left + right, in left's memory; a parameter without a gradient on one side counts as zeros there."""
    both = [p for p in left if p in right]
    if both:
        torch._foreach_add_([left[p] for p in both], [right[p] for p in both])
    return right | left
