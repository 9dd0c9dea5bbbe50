"""Keeps every module in the training or evaluation mode that the user gave it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def set_training(model: nn.Module) -> bool:
    """Put a model that is entirely in evaluation mode into training mode; returns whether it did.

    `from_pretrained` and a last evaluation leave models in evaluation mode. If only parts are in evaluation mode, such
    as a frozen BatchNorm, that is intended and stays.
    """
    if any(module.training for module in model.modules()):
        return False
    model.train()
    return True


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the whole module is in evaluation mode; afterwards each submodule has its previous mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train()  # modules may override train() to do more than set the flag
        for part, is_training in modes:
            part.training = is_training
