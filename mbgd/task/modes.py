"""Training and evaluation mode of every module, as the user set them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def set_training(model: nn.Module) -> bool:
    """Put a model that came wholly in evaluation mode into training mode; whether it did.

    `from_pretrained` and a last evaluation leave models so. Where only parts are in evaluation mode, such as a frozen
    BatchNorm, that was meant: they stay there.
    """
    if any(module.training for module in model.modules()):
        return False
    model.train()
    return True


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All of the module is in evaluation mode inside; afterwards each part is in the mode that it was in before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train()  # by the modules' own methods, which may do more than set a flag
        for part, is_training in modes:
            part.training = is_training
