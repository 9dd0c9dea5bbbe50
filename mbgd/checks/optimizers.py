"""Which optimizers the trainer supports: those whose step() uses the gradients in `.grad` and takes no closure."""

import inspect
import math
from typing import Any

import torch
from torch.optim import Optimizer

from mbgd.errors import UsageError

HOLDS_PIECES = "_mbgd_holds_pieces"
"""Attribute of an optimizer that holds pieces of parameters in place of these: one trainer's, while that trains."""


def check(optimizer: Any) -> None:
    """UsageError unless the trainer supports `optimizer`, an object or a class."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if not issubclass(kind, Optimizer):
        raise UsageError(f"optimizer is a {kind.__name__}; it must be a torch.optim.Optimizer.")
    if hasattr(optimizer, HOLDS_PIECES):
        raise UsageError(
            f"the optimizer ({kind.__name__}) holds pieces of the parameters for another Trainer, whose fit has not "
            "ended (sharding=optimizer). Make a new optimizer and restore the last checkpoint, or use sharding=none."
        )
    if needs_closure(kind):
        raise UsageError(
            f"optimizer {kind.__name__} computes the loss several times in one step: its step() takes a closure. The "
            "trainer computes each minibatch once, over all workers, and steps with that gradient. Use an optimizer "
            "whose step() needs none, such as torch.optim.AdamW."
        )
    if issubclass(kind, torch.optim.SparseAdam):
        raise UsageError("optimizer SparseAdam takes only sparse gradients; the trainer averages dense ones. Use Adam.")
    for group in optimizer.param_groups if isinstance(optimizer, Optimizer) else ():
        rate = group.get("lr")
        if rate is None or not 0 <= float(rate) < math.inf:
            raise UsageError(
                f"optimizer {kind.__name__} has lr={rate}; each of its groups must have a learning rate, a finite "
                "number ≥ 0, which the schedule multiplies."
            )


def needs_closure(kind: type[Optimizer]) -> bool:
    """Whether step() cannot be called without arguments."""
    try:
        _, *parameters = inspect.signature(kind.step).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)


def not_matrices(model: torch.nn.Module) -> list[str]:
    """Names of trained parameters that are not matrices; optimizers such as Muon refuse them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.dim() != 2]
