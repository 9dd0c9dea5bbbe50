"""Tensors of the model that lie in the memory of trained parameters, and would not follow them to other memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mbgd.task.task import Task, plain_name


def overlapping(task: Task, trained: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two different tensors of the task in the same memory, one of them a trained parameter; or None.

    Such are parameters that are tied by `.data`, and views of a parameter that a module keeps. Only what lies within
    the same bytes counts, so parts of one flat tensor may be parameters. trained: the trained parameters by name.
    """
    found = {id(tensor): (name, tensor) for name, tensor in _tensors_of(task)}
    found.update({id(tensor): (name, tensor) for name, tensor in trained.items()})
    ranges = sorted((*_range_of(tensor), name) for name, tensor in found.values() if tensor.numel())
    # (begin, end, name) of those that reach furthest among the ranges that begin earlier
    trained_up_to, others_up_to = (0, 0, ""), (0, 0, "")
    for one in ranges:
        begin, _, name = one
        is_trained = name in trained
        for other in (trained_up_to, others_up_to) if is_trained else (trained_up_to,):
            if begin < other[1]:
                return other[2], name
        if is_trained:
            trained_up_to = max(trained_up_to, one, key=lambda range_: range_[1])
        else:
            others_up_to = max(others_up_to, one, key=lambda range_: range_[1])
    return None


def _tensors_of(task: Task) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and other attributes of all modules."""
    for prefix, module in task.named_modules():
        for attribute, value in vars(module).items():
            held = value if attribute in ("_parameters", "_buffers") else {attribute: value}
            for name, one in held.items():
                for tensor in _tensors_in(one):
                    yield plain_name(f"{prefix}.{name}" if prefix else name), tensor


def _tensors_in(value: Any, around: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """around: ids of the containers around it, of which it may be one itself."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not nn.parameter.is_lazy(value):
            yield value
    elif isinstance(value, list | tuple | dict) and id(value) not in around:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(one, around | {id(value)})


def _range_of(tensor: Tensor) -> tuple[int, int]:
    """The first byte, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
