"""Contexts of the trial before training: what torch refuses, and what the model returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mbgd.errors import UsageError


@contextmanager
def refused_operations() -> Iterator[None]:
    """With averaging=reproducible torch refuses operations that are not deterministic; explain its error to users."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UsageError(
            f"averaging=reproducible, but the model or the objective uses an operation without a deterministic version "
            f"in torch on this device: {str(error).split(' does not')[0]}. Replace the operation, or use "
            "averaging=ddp."
        ) from error


@contextmanager
def output_shapes(model: nn.Module) -> Iterator[list[torch.Size]]:
    """Collects the shapes of the model's outputs."""
    shapes: list[torch.Size] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 1:
            shapes.append(output.shape)

    handle = model.register_forward_hook(note)
    try:
        yield shapes
    finally:
        handle.remove()
