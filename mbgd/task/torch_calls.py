"""Calls of torch without what it adds to them for torch.compile and for its profiler, where neither is used.

torch imports torch._dynamo when an optimizer is made and at its steps, so that torch.compile stays out of it or breaks
its graph there, and symbolic shapes at a backward: together 1.5 seconds in every process, at every start. Where nothing
else has imported torch._dynamo, nothing is compiled, and what it would do there is nothing.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

INSTEAD = "__dynamo_disable"
"""What a function under `torch._disable_dynamo` is replaced by; torch sets it at the first call."""

_GRAPH_BREAKS = of_torch._use_grad_for_differentiable(lambda: None).__code__
"""The wrapper's around each of torch's own steps."""


def put_off_dynamo() -> None:
    """Let optimizers be made, saved and loaded without torch._dynamo; it gets hold of them once it is there."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if function is not None and not hasattr(function, INSTEAD):
            setattr(function, INSTEAD, partial(_call, function))


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not _has_dynamo():
        return function(*arguments, **keywords)
    disabled = torch._dynamo.disable(function, wrapping=False)  # type: ignore[no-untyped-call]
    setattr(function, INSTEAD, disabled)
    return disabled(*arguments, **keywords)


def step_of(optimizer: Optimizer) -> Callable[[], object]:
    """`optimizer.step` without the profiler's record of each call, and without torch._dynamo.

    The record takes 25 µs, 7 % of the smallest models' steps. If a profiler runs, or if `step` has hooks or was
    replaced, for example by a scheduler that counts the calls, it is called normally.
    """
    recorded = type(optimizer).step
    plain = getattr(recorded, "__wrapped__", None) if getattr(recorded, "hooked", False) else None
    if plain is None:
        return lambda: optimizer.step()
    unbroken = plain.__wrapped__ if getattr(plain, "__code__", None) is _GRAPH_BREAKS else None

    def step() -> object:
        hangs_on = (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            of_torch._global_optimizer_pre_hooks,
            of_torch._global_optimizer_post_hooks,
            "step" in vars(optimizer),
            torch._C._autograd._profiler_enabled(),
        )
        if any(hangs_on):
            return optimizer.step()
        if unbroken is None or _has_dynamo():
            return plain(optimizer)
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return unbroken(optimizer)

    return step


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """`torch.autograd.backward(roots, gradients)`, for gradients of the roots' shapes and dtypes.

    It compares shapes as if they were symbols, which takes longer than the backward of a small model.
    """
    # The threads of a GPU's backward get the caller's context from it, which torch.compile reads there.
    is_plain = all(type(root) is Tensor and (root.device.type == "cpu" or not _has_dynamo()) for root in roots)
    if not is_plain:
        torch.autograd.backward(roots, gradients)
        return
    run: Callable[..., object] = Variable._execution_engine.run_backward
    run(tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _has_dynamo() -> bool:
    return "torch._dynamo" in sys.modules
