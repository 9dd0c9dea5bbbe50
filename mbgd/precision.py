"""The dtypes of a run, loss scaling, and autocast."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mbgd.config import Precision


def parameter_dtype(precision: Precision) -> torch.dtype:
    return torch.float64 if precision is Precision.fp64 else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward; reusable."""
    if precision is Precision.bf16:
        return torch.autocast(device.type, torch.bfloat16)
    if precision is Precision.fp16:
        return torch.autocast(device.type, torch.float16)
    return nullcontext()


def move(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A batch (a tensor, or tuples, lists and mappings of them) on the device, floating tensors in `dtype`."""
    if isinstance(batch, Tensor):
        target = dtype if batch.is_floating_point() else batch.dtype
        if device.type == "cuda" and not batch.is_cuda:
            # Only a copy from pinned memory runs beside the computation.
            return batch.pin_memory().to(device, target, non_blocking=True)
        return batch.to(device, target)
    if isinstance(batch, Mapping):
        return {key: move(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device, dtype) for value in batch)
    return batch
