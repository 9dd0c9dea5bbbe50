"""Averaging of CPU workers of one host, through memory that all of them read and write."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mbgd.averaging.host_memory.exchange import MOVED_ON, NO_NOTE, Exchange, check_moved_on
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.batches.plan import MicroBatch
from mbgd.task.objective import PerExample
from mbgd.task.task import Task
from mbgd.task.trained import Trained
from mbgd.workers.group import Workers

PLACED_AT_ONCE_BYTES = 2**18
"""Gradients of this size on are moved while the processor still has them in its cache, and their own memory is free."""

_NOTHING: AbstractContextManager[object] = nullcontext()


class SharedMemory:
    """Gradients are added up in shared memory when the last backward is done, in the order of the workers.

    torch's DistributedDataParallel takes no part: nothing is sent while the backward runs, for where sending is adding
    there is no waiting time to hide, and workers wait for each other twice a step instead of twice a bucket. Which
    parameters take part may differ from step to step and from worker to worker.
    """

    def __init__(self, task: Task, trained: Trained, workers: Workers, memory: HostMemory) -> None:
        """Raises CannotShareError, on all workers alike, where there is not enough memory to share."""
        self._task, self._trained, self._workers, self._memory = task, trained, workers, memory
        self._norms: MicroBatchNorms | None = None
        self._num_rows = [1] * workers.num_workers
        self._step = _Step()
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._hooks)
        trained.moved_on()
        self._prepare()

    def _prepare(self) -> None:
        """Make room for the gradients of those parameters that require one now."""
        _remove(self._hooks)
        self._parameters = self._trained.with_gradient()
        self._exchange = Exchange(self._parameters, 1, self._memory, rank=self._workers.rank)
        for parameter, place in zip(self._parameters, self._exchange.places[0], strict=True):
            if parameter.nbytes >= PLACED_AT_ONCE_BYTES:
                hook = _Place(self._step, place)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def forward(self, batch: Any, num_examples: int) -> PerExample:
        self._step.runs = True
        return self._task.forward(batch, num_examples)

    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> AbstractContextManager[object]:
        # Gradients add up until the end.
        return _NOTHING if self._norms is None else self._measured(self._norms, micro_batch.number)

    @contextmanager
    def _measured(self, norms: MicroBatchNorms, number: int) -> Iterator[None]:
        before: dict[Tensor, Tensor] = {p: p.grad.clone() for p in self._parameters if p.grad is not None}
        yield
        gradients: dict[Tensor, Tensor] = {p: p.grad for p in self._parameters if p.grad is not None}
        norms.take(number, gradients, before)

    def start(self, norms: MicroBatchNorms | None = None) -> None:
        self._norms = norms

    def finish(self, note: int = NO_NOTE) -> list[int] | None:
        rows = [[p.grad for p in self._parameters]]
        has_moved_on = self._trained.moved_on()
        notes = self._exchange(rows, self._num_rows, in_order, MOVED_ON if has_moved_on else note)
        self._step.runs = False
        if MOVED_ON not in notes:
            return notes
        check_moved_on(notes)
        self._prepare()
        return self.finish(note)

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        total = torch.zeros(num_values, dtype=torch.float64)
        for _, values in leaves:
            total += values
        return reduce(torch.add, self._memory.all_gather(total))

    def describe(self) -> str:
        return "shared_memory"


@dataclass
class _Step:
    runs: bool = False
    """Whether the gradients that are made now are this averaging's: the model may have other trainers, too."""


class _Place:
    """Moves a gradient to where it belongs; further micro-batches then add to it there."""

    is_averaging_hook = True

    def __init__(self, step: _Step, place: Tensor) -> None:
        self._step, self._place = step, place

    def __call__(self, parameter: Tensor) -> None:
        if self._step.runs and parameter.grad is not None and parameter.grad is not self._place:
            parameter.grad = self._place.copy_(parameter.grad)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def in_order(rows: Sequence[Tensor]) -> Tensor:
    """The sum of rows from the first worker on, in the first one's memory."""
    return reduce(Tensor.add_, rows)
