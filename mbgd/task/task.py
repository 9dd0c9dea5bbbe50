"""Model and objective as one module, which DistributedDataParallel can wrap.

The objective gets the user's own model, never a wrapper, so it may call any of its methods on any number of workers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.coupled import Pair
from mbgd.task.objective import Objective, PerExample, is_coupled

OBJECTIVE = "objective."
"""Prefix of the names of the objective's parameters and buffers; the model's names have none."""


class Task(nn.Module):
    """A micro-batch → its per-example losses; those of a coupled objective as if the micro-batch were all examples."""

    def __init__(self, model: nn.Module, objective: Objective, *, in_bf16: bool = False) -> None:
        """in_bf16: the model computes with matrices and embeddings in bf16, rounded from its parameters in fp32.

        Their gradients are cast back to fp32, in which they are added up and the optimizer works: a small update, which
        bf16 would round away, is kept. Vectors stay in fp32: normalisations need them, and they take no memory.
        """
        super().__init__()
        self._in_bf16 = in_bf16
        self.model = model
        self.objective = _module_of(objective, model)
        self.pair = Pair(objective) if is_coupled(objective) else None
        """The coupled objective; None: each example has a loss of its own."""
        # nn.Module.__getattr__ for `self.model` costs microseconds in every step.
        self._parts: tuple[Any, nn.Module, Pair | None] = (objective, model, self.pair)

    def forward(self, batch: Any, num_examples: int) -> PerExample:
        if self._in_bf16:
            rounded = {name: p.to(torch.bfloat16) for name, p in self.named_parameters() if self._is_rounded(name, p)}
            self._in_bf16 = False  # the call below comes back here
            try:
                terms: PerExample = torch.func.functional_call(self, rounded, (batch, num_examples))
                return terms
            finally:
                self._in_bf16 = True
        objective, model, pair = self._parts
        if pair is not None:
            return pair.losses(pair.encode(model, batch, num_examples))
        terms = objective(model, batch)
        if not isinstance(terms, PerExample):
            raise UsageError(
                f"objective returned {type(terms).__name__}; it must return mbgd.PerExample(losses=…) with one "
                "unreduced loss per example (reduction='none'): the trainer does the averaging."
            )
        terms.check(num_examples)
        return terms

    @staticmethod
    def _is_rounded(name: str, parameter: Tensor) -> bool:
        return name.startswith("model.") and parameter.dim() > 1 and parameter.dtype is torch.float32

    @property
    def given_objective(self) -> Objective:
        """The objective as the user gave it: a module, an object or a function."""
        objective: Objective = self._parts[0]
        return objective

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Every parameter once, under the first of its names; see `plain_name`."""
        return {plain_name(name): parameter for name, parameter in self.named_parameters()}

    def move_(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move parameters and buffers to the device, floating ones as `dtype`, complex ones as `dtype.to_complex()`."""
        self._apply(lambda tensor: tensor.to(device, dtype_of(tensor, dtype)))  # type: ignore[no-untyped-call]


def refuse_odd_parts(task: Task) -> None:
    """UsageError for lazy parameters, and for names that model and objective would share."""
    for name, parameter in task.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UsageError(
                f"the parameter {plain_name(name)} has no shape yet (a lazy layer). Let the model compute one batch "
                "before the optimizer is made, or give the layer its sizes."
            )
    if task.objective is not None and any(name.startswith(OBJECTIVE) for name, _ in task.model.named_modules()):
        raise UsageError(
            f"the model has a part named {OBJECTIVE[:-1]}, and the objective is a module too, so their parameters "
            "would have the same names. Rename that part of the model."
        )


def _module_of(objective: Objective, model: nn.Module) -> nn.Module | None:
    """The module whose parameters the objective adds: the objective itself, or the object it is a method of."""
    owner = objective if isinstance(objective, nn.Module) else getattr(objective, "__self__", None)
    return owner if isinstance(owner, nn.Module) and owner is not model else None


def plain_name(name: str) -> str:
    """The user's name for a name in a `Task`: without the task's `model.` and without torch.compile's `_orig_mod.`."""
    return ".".join(part for part in name.removeprefix("model.").split(".") if part != "_orig_mod")


def dtype_of(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is cast to in a run of this dtype; integers keep theirs."""
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype
