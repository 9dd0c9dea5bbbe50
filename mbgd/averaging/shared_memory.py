"""Averaging of CPU workers of one host, through memory that all of them read and write."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mbgd.averaging.exchange import Exchange
from mbgd.averaging.memory import HostMemory
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.objective import PerExample
from mbgd.plan import MicroBatch
from mbgd.task import Task
from mbgd.workers import Workers

PLACED_AT_ONCE_BYTES = 2**18
"""Gradients of this size on are moved while the processor still has them in its cache, and their own memory is free."""

_NOTHING: AbstractContextManager[object] = nullcontext()


class SharedMemory:
    """Gradients are added up in shared memory when the last backward is done, in the order of the workers.

    torch's DistributedDataParallel takes no part: nothing is sent while the backward runs, for where sending is adding
    there is no waiting time to hide, and workers wait for each other twice a step instead of twice a bucket. Which
    parameters take part may differ from step to step and from worker to worker.
    """

    def __init__(self, task: Task, workers: Workers, memory: HostMemory) -> None:
        self._task, self._memory = task, memory
        self.norms: MicroBatchNorms | None = None
        self._parameters = [p for p in task.parameters() if p.requires_grad]
        self._exchange = Exchange(self._parameters, 1, memory, rank=workers.rank)
        self._num_rows = [1] * workers.num_workers
        self._step = _Step()
        hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(_place, self._step, place))  # type: ignore[no-untyped-call]
            for parameter, place in zip(self._parameters, self._exchange.places[0], strict=True)
            if parameter.nbytes >= PLACED_AT_ONCE_BYTES
        ]
        weakref.finalize(self, _remove, hooks)

    def task(self, batch: Any, num_examples: int) -> PerExample:
        self._step.runs = True
        return self._task.forward(batch, num_examples)

    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> AbstractContextManager[object]:
        # Gradients add up until the end.
        return _NOTHING if self.norms is None else self._measured(self.norms, micro_batch.number)

    @contextmanager
    def _measured(self, norms: MicroBatchNorms, number: int) -> Iterator[None]:
        before: dict[Tensor, Tensor] = {p: p.grad.clone() for p in self._parameters if p.grad is not None}
        yield
        gradients: dict[Tensor, Tensor] = {p: p.grad for p in self._parameters if p.grad is not None}
        norms.take(number, gradients, before)

    def finish(self) -> None:
        self._exchange([[p.grad for p in self._parameters]], self._num_rows, in_order)
        self._step.runs = False

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        total = torch.zeros(num_values, dtype=torch.float64)
        for _, values in leaves:
            total += values
        return reduce(torch.add, self._memory.gather(total))

    def describe(self) -> str:
        return "shared_memory"


@dataclass
class _Step:
    runs: bool = False
    """Whether the gradients that are made now are this averaging's: the model may have other trainers, too."""


def _place(step: _Step, place: Tensor, parameter: Tensor) -> None:
    """Move a gradient to where it belongs; further micro-batches then add to it there."""
    if step.runs and parameter.grad is not None and parameter.grad is not place:
        parameter.grad = place.copy_(parameter.grad)


def _remove(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def in_order(rows: Sequence[Tensor]) -> Tensor:
    """The sum of rows from the first worker on, in the first one's memory."""
    return reduce(Tensor.add_, rows)
