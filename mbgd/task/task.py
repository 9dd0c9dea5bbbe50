"""What one worker computes: the model under its objective, as one module that DistributedDataParallel can wrap.

The objective gets the user's own model, never a wrapper, so that it may call any method of it on any number of
workers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.objective import Objective, PerExample

OBJECTIVE = "objective."
"""What the names of the objective's parameters and buffers begin with; the model's stand as they are."""


class Task(nn.Module):
    """A micro-batch → its per-example losses."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = _module_of(objective, model)
        self._parts = (objective, model)  # nn.Module's own way to `self.model` costs microseconds in every step

    def forward(self, batch: Any, num_examples: int) -> PerExample:
        objective, model = self._parts
        terms = objective(model, batch)
        if not isinstance(terms, PerExample):
            raise UsageError(
                f"objective returned {type(terms).__name__}; it must return mbgd.PerExample(losses=…) with one "
                "unreduced loss per example (reduction='none'): the trainer does the averaging."
            )
        terms.check(num_examples)
        return terms

    @property
    def given_objective(self) -> Objective:
        """The objective as the user gave it: a module, an object or a function."""
        return self._parts[0]

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Every parameter once, under the first of its names; see `plain_name`."""
        return {plain_name(name): parameter for name, parameter in self.named_parameters()}

    def move_(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move parameters and buffers to the device; floating ones to `dtype`, complex ones to its complex twin."""
        self._apply(lambda tensor: tensor.to(device, dtype_of(tensor, dtype)))  # type: ignore[no-untyped-call]


def refuse_odd_parts(task: Task) -> None:
    """UsageError where model or objective has a part whose state could not be told by name."""
    for name, parameter in task.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UsageError(
                f"the parameter {plain_name(name)} has no shape yet (a lazy layer). Let the model compute one batch "
                "before the optimizer is made, or give the layer its sizes."
            )
    if task.objective is not None and any(name.startswith(OBJECTIVE) for name, _ in task.model.named_modules()):
        raise UsageError(
            f"the model has a part named {OBJECTIVE[:-1]}, and the objective is a module too; the names of their "
            "parameters could not be told apart. Rename that part of the model."
        )


def _module_of(objective: Objective, model: nn.Module) -> nn.Module | None:
    """The module whose parameters the objective brings: itself, or what it is a method of."""
    owner = objective if isinstance(objective, nn.Module) else getattr(objective, "__self__", None)
    return owner if isinstance(owner, nn.Module) and owner is not model else None


def plain_name(name: str) -> str:
    """A name within a `Task` as users know it: without the task's `model.` and without torch.compile's `_orig_mod.`."""
    return ".".join(part for part in name.removeprefix("model.").split(".") if part != "_orig_mod")


def dtype_of(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is cast to where the run computes in `dtype`; integers stay what they are."""
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype
