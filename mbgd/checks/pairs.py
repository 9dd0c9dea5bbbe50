"""The part of the trial before training that only coupled objectives need."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mbgd.errors import UsageError
from mbgd.task.buffers import Buffers
from mbgd.task.coupled import Pair
from mbgd.task.task import OBJECTIVE, Task
from mbgd.text.listing import shown

LEAST_TOLERANCE, MOST_EPSILONS = 1e-3, 8
"""Relative difference up to which values are rounding: on GPUs some operations add up in any order."""


def moved_by_losses(task: Task, pair: Pair, buffers: Buffers, encode: Callable[[], Sequence[Tensor]]) -> set[str]:
    """Names of the objective's buffers that its `losses` changes; UsageError if `encode` changes them, too.

    encode(): the encodings of a few examples. It begins and ends with the buffers put back.
    """
    buffers.put_back()
    before = _values(buffers)
    if task.objective is None or not before:
        return set()
    with torch.no_grad():
        encodings = encode()
        by_encode = _changed(before, buffers)
        buffers.put_back()
        pair.losses(encodings)
        by_losses = _changed(before, buffers)
    buffers.put_back()
    if both := sorted(by_encode & by_losses):
        raise UsageError(
            f"the objective's encode and its losses both change the buffer {shown(both)}. What encode changes is "
            "averaged over the micro-batches; what losses changes is the same on every worker. Use a buffer for each."
        )
    return by_losses


def check_repeated(what: str, once: Tensor, again: Tensor) -> None:
    """UsageError unless values of the same examples, computed twice, differ by rounding alone; waits for the device."""
    if torch.equal(once, again):
        return
    tolerance = max(LEAST_TOLERANCE, MOST_EPSILONS * torch.finfo(once.dtype).eps)
    largest = once.abs().nan_to_num(posinf=0.0).amax().item() if once.numel() else 0.0
    if not torch.allclose(once, again, rtol=tolerance, atol=tolerance * largest, equal_nan=True):
        raise UsageError(
            f"two computations of the same examples under the same key differ: {what} "
            f"{once.flatten()[:2].tolist()} and {again.flatten()[:2].tolist()}. A coupled objective encodes each "
            "example twice in a step, and both must draw alike. The model or the objective draws random numbers from a "
            "generator of its own, or keeps state between calls. Draw from torch's default generators, which the "
            "trainer keys by (seed, step, micro-batch)."
        )


def _values(buffers: Buffers) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in buffers.tensors().items() if name.startswith(OBJECTIVE)}


def _changed(before: dict[str, Tensor], buffers: Buffers) -> set[str]:
    now = buffers.tensors()
    return {name for name, one in before.items() if name in now and not torch.equal(one, now[name])}
