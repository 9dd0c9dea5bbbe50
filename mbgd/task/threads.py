"""How many threads a CPU worker computes with, where neither the user nor a launcher has said it.

On a machine that does other things, too, the threads of a short computation wait for each other longer than it takes
alone. What a model needs is counted, not timed: a run that goes on has as many threads as before, and so the same bits.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mbgd.batches.plan import Plan
from mbgd.config import Averaging, AveragingName

SMALL = 2**22
"""Multiplications in the forward of a micro-batch up to which one thread is as fast: some milliseconds at most."""

SHARED_OUT = "MBGD_THREADS_SHARED_OUT"
"""Environment variable that is there where OMP_NUM_THREADS is a worker's share of the cores, not the user's wish."""

why: list[str] = []
"""For people: why this process has as many threads as it has, where that was chosen here."""


class Work:
    """Multiplications in a forward of one example, about."""

    per_example = 0.0


@contextmanager
def work_counted(model: nn.Module) -> Iterator[Work]:
    """While inside, what the first forward of the model multiplies is counted, layer by layer."""
    work, total, is_counted = Work(), 0.0, False

    def count(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal total, is_counted
        if is_counted:
            return
        if isinstance(output, Tensor) and output.dim() > 0:
            weights = [one for one in module.parameters(recurse=False) if one.dim() > 1]
            # Each weight is used once for every place of the output: (N, H, W) of a convolution, (N, T) of tokens.
            if not isinstance(module, nn.Embedding):
                total += sum(weight.numel() * output.numel() / weight.shape[0] for weight in weights)
        if module is model:
            is_counted = True
            num_examples = output.shape[0] if isinstance(output, Tensor) and output.dim() > 0 else 1
            work.per_example = total / max(1, num_examples)

    handle = register_module_forward_hook(count)
    try:
        yield work
    finally:
        handle.remove()


def choose(settings: Averaging, device: torch.device, plan: Plan, work: Work) -> None:
    """One thread for a small model, where nobody has said how many."""
    why.clear()
    is_said = "OMP_NUM_THREADS" in os.environ and SHARED_OUT not in os.environ
    is_said = is_said or settings.num_threads is not None or settings.name is AveragingName.reproducible
    if is_said or device.type != "cpu" or torch.get_num_threads() == 1:
        return
    size = min(plan.minibatch_size, plan.num_examples)
    if work.per_example * size / plan.num_micro_batches(size) > SMALL:
        return
    torch.set_num_threads(1)
    why.append("small model; averaging.num_threads: more")
