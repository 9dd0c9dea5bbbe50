"""The parameters' dtype and the autocast context of each precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from mbgd.config import Precision


def parameter_dtype(precision: Precision) -> torch.dtype:
    return torch.float64 if precision is Precision.fp64 else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward; reusable."""
    if precision in (Precision.bf16, Precision.bf16_true):
        return torch.autocast(device.type, torch.bfloat16)
    if precision is Precision.fp16:
        return torch.autocast(device.type, torch.float16)
    return nullcontext()
