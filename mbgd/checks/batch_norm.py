"""Whether `batch_norm=minibatch` can hold for a task and its plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mbgd.averaging.batch_norm import layers_of
from mbgd.batches.plan import Plan
from mbgd.config import BatchNormOver, Settings
from mbgd.errors import UsageError
from mbgd.task.task import Task, plain_name


def check(task: Task, settings: Settings, plan: Plan) -> list[str]:
    """UsageError if the layers cannot use the statistics of the minibatch; returns notes for people."""
    if settings.batch_norm is not BatchNormOver.minibatch:
        return []
    _refuse_compiled(task)
    layers = layers_of(task)
    if not layers:
        return ["note: batch_norm=minibatch, but the model has no BatchNorm layer; it changes nothing."]
    for name, layer in layers.items():
        if type(layer).forward is not _BatchNorm.forward or "forward" in vars(layer):
            raise UsageError(
                f"batch_norm=minibatch, but the layer {name} ({type(layer).__name__}) has a forward of its own, so its "
                "statistics cannot be replaced by the minibatch's. Use torch's nn.BatchNorm1d, 2d or 3d there, or "
                "batch_norm=micro_batch."
            )
    num_micro_batches = max(plan.num_micro_batches(size) for size in plan.minibatch_sizes)
    if num_micro_batches > plan.num_workers:
        most = -(-max(plan.minibatch_sizes) // plan.num_workers)
        raise UsageError(
            f"batch_norm=minibatch with {num_micro_batches} micro-batches of a minibatch for {plan.num_workers} "
            f"worker{'s' if plan.num_workers > 1 else ''}; each worker may have one, because a layer must see the "
            "whole minibatch at once, and a worker computes its micro-batches one after another. Set "
            f"batch.micro_batch_size=null (or {most} or more), use {num_micro_batches} workers, or "
            "batch_norm=micro_batch."
        )
    return []


def _refuse_compiled(task: Task) -> None:
    for name, module in task.named_modules():
        is_compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if is_compiled or isinstance(module, torch.jit.ScriptModule):
            part = "the model" if name == "model" else plain_name(name)
            raise UsageError(
                f"batch_norm=minibatch, but {part} is compiled (torch.compile or torch.jit): compiled BatchNorm layers "
                "cannot exchange their statistics. Leave the model uncompiled, or use batch_norm=micro_batch."
            )


@contextmanager
def functions_refused() -> Iterator[None]:
    """Inside, BatchNorm by function, with statistics of its examples, is a UsageError."""
    with _Refusing():
        yield


class _Refusing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (kwargs.get("training") or (len(args) > 5 and args[5])):
            raise UsageError(
                "batch_norm=minibatch, but the model or the objective calls torch.nn.functional.batch_norm by itself, "
                "whose statistics would be those of a micro-batch. Use a layer, such as nn.BatchNorm2d, or "
                "batch_norm=micro_batch."
            )
        return func(*args, **kwargs)
