"""The state that an optimizer makes, found out by stepping a copy of it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

from mbgd.files.state_tree import Flattening

METHODS = ("step", "state_dict", "load_state_dict")
"""Those that an object may have replaced by bound methods of others; a copy has its class's."""
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True)
class Kind:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {tuple(self.shape)}"


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether torch calls hooks before or after `step`, of this optimizer or of all."""
    of_all = of_torch._global_optimizer_pre_hooks or of_torch._global_optimizer_post_hooks
    return bool(of_all) or any(getattr(optimizer, hooks, None) for hooks in STEP_HOOKS)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def try_out(optimizer: Optimizer) -> dict[str, Kind]:
    """The state that a step makes, by path. Needs memory for a copy of parameters, gradients and state meanwhile."""
    devices = {parameter.device for parameter in parameters_of(optimizer) if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        tried, copies = copy_with(optimizer, parameters_of(optimizer))
        for parameter in copies:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.grad = torch.randn_like(parameter)
        type(tried).step(tried)
    flattening = Flattening()
    for key, value in tried.state_dict()["state"].items():
        flattening(value, str(key))
    return {name: Kind(one.shape, one.dtype, one.device) for name, one in flattening.tensors.items()}


def copy_with(optimizer: Optimizer, parameters: Sequence[Tensor]) -> tuple[Optimizer, list[Tensor]]:
    """A copy of the optimizer that holds copies of the parameters, and these copies, in order."""
    copies = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in parameters]
    return copy_holding(optimizer, parameters, copies), list(copies)


def copy_holding(optimizer: Optimizer, parameters: Sequence[Tensor], copies: Sequence[nn.Parameter]) -> Optimizer:
    """A copy of the optimizer that holds `copies` in place of the parameters."""
    return _copy(optimizer, {id(p): copy for p, copy in zip(parameters, copies, strict=True)})


def _copy(optimizer: Optimizer, copies: dict[int, Any]) -> Optimizer:
    """A deep copy that shares nothing, with `copies`, by id, in place of the parameters, and without step hooks.

    copy.deepcopy would leave out the attributes of users' own classes.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    copies[id(optimizer)] = twin
    attributes = {name: value for name, value in vars(optimizer).items() if name not in METHODS}
    for value in attributes.values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, Optimizer) and id(inner) not in copies:
                _copy(inner, copies)
    for name, value in attributes.items():
        vars(twin)[name] = type(value)() if name in STEP_HOOKS else copy.deepcopy(value, copies)
    return twin
