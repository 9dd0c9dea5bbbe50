"""The number of threads of a CPU worker, where neither the user nor a launcher sets it.

On a machine with other load, the threads of a short computation wait for each other longer than one thread would take.
The model's work is counted, not timed, so that a resumed run chooses the same number of threads, and so the same bits.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mbgd.batches.plan import Plan
from mbgd.config import Averaging, AveragingName
from mbgd.workers.place import place

SMALL = 2**22
"""Up to this many multiplications in a micro-batch's forward, one thread is as fast: a few milliseconds at most."""

SHARED_OUT = "MBGD_THREADS_SHARED_OUT"
"""Environment variable, set where OMP_NUM_THREADS is a worker's share of the cores and not the user's choice."""

why: list[str] = []
"""For people: the reason for the number of threads, if `choose` set it."""


class Work:
    """Approximate number of multiplications in the forward of one example."""

    per_example = 0.0


@contextmanager
def work_counted(model: nn.Module) -> Iterator[Work]:
    """Counts the multiplications of the model's first forward inside, layer by layer."""
    work, total, is_counted = Work(), 0.0, False

    def count(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal total, is_counted
        if is_counted:
            return
        if isinstance(output, Tensor) and output.dim() > 0:
            weights = [one for one in module.parameters(recurse=False) if one.dim() > 1]
            # Each weight is used once per position of the output: (N, H, W) of a convolution, (N, T) of tokens.
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
    """Use one thread for a small model, and a worker's share of the cores, unless the number of threads is set."""
    why.clear()
    is_said = "OMP_NUM_THREADS" in os.environ and SHARED_OUT not in os.environ
    is_said = is_said or settings.num_threads is not None or settings.name is AveragingName.reproducible
    if is_said or device.type != "cpu" or torch.get_num_threads() == 1:
        return
    size = min(plan.minibatch_size, plan.num_examples)
    if work.per_example * size / plan.num_micro_batches(size) <= SMALL:
        torch.set_num_threads(1)
        why.append("small model; averaging.num_threads: more")
        return
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return  # how many workers share this host is not known
    # Launchers that bind each worker to cores of its own leave it fewer than the host has.
    num_cores, num_workers = os.cpu_count() or 1, place().local_num_workers
    share = max(1, num_cores // num_workers)
    if num_workers > 1 and _num_own_cores() == num_cores and torch.get_num_threads() > share:
        torch.set_num_threads(share)
        why.append(f"{num_workers} workers share {num_cores} cores; averaging.num_threads: more")


def _num_own_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
