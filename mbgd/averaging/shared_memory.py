"""Averaging for CPU workers of one host, in memory that all of them map."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mbgd.averaging.ddp import sum_here
from mbgd.averaging.host_memory.exchange import Exchange, check_moved_on
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.host_memory.parameters import SharedParameters
from mbgd.averaging.host_memory.rows import MOVED_ON, NO_NOTE, Row
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.averaging.pieces import Owned, OwnedParameters, Piece
from mbgd.batches.plan import MicroBatch
from mbgd.task.trained import Trained
from mbgd.workers.group import Workers

PLACED_AT_ONCE_BYTES = 2**18
"""Gradients of at least this size are copied to shared memory at once, while they are in the processor's cache; their
own memory is then freed."""

_NOTHING: AbstractContextManager[object] = nullcontext()


class SharedMemory:
    """Sums gradients in shared memory after the last backward, in rank order.

    Without DistributedDataParallel: nothing is sent, so there is no communication to overlap with the backward, and
    workers wait for each other twice a step instead of twice a bucket. The parameters that take part may differ from
    step to step and from worker to worker.
    """

    def __init__(self, task: nn.Module, trained: Trained, workers: Workers, memory: HostMemory) -> None:
        """Raises CannotShareError, on all workers alike, if there is too little memory to share."""
        self._task, self._trained, self._workers, self._memory = task, trained, workers, memory
        self._norms: MicroBatchNorms | None = None
        self._num_rows = [1] * workers.num_workers
        self._step = _Step()
        self._owned: Owned | None = None
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._hooks)
        trained.moved_on()
        self._prepare()

    def _prepare(self) -> None:
        """Allocate shared memory for the gradients of the parameters that require one now."""
        _remove(self._hooks)
        self._parameters = self._trained.with_gradient()
        for parameter, place in zip(self._parameters, self._make_exchange(), strict=True):
            if parameter.nbytes >= PLACED_AT_ONCE_BYTES:
                hook = _Place(self._step, place)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _make_exchange(self) -> list[Tensor]:
        """This worker's gradients in shared memory, one for each of the parameters."""
        self._exchange = Exchange(self._parameters, 1, self._memory, rank=self._workers.rank)
        if self._owned is not None:
            self._exchange.own(self._owned)
        return self._exchange.places[0]

    def forward(self, batch: Any, num_examples: int) -> Any:
        self._step.runs = True
        return self._task.forward(batch, num_examples)

    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> AbstractContextManager[object]:
        # Gradients accumulate over micro-batches.
        return _NOTHING if self._norms is None else self._measured(self._norms, micro_batch.number)

    @contextmanager
    def _measured(self, norms: MicroBatchNorms, number: int) -> Iterator[None]:
        held = self._trained.parameters  # also those that require a gradient only since the last step
        before: dict[Tensor, Tensor] = {p: p.grad.clone() for p in held if p.grad is not None}
        yield
        gradients: dict[Tensor, Tensor] = {p: p.grad for p in held if p.grad is not None}
        norms.take(number, gradients, before)

    def start(self, norms: MicroBatchNorms | None = None) -> None:
        self._norms = norms

    def own(self, parameters: Mapping[str, nn.Parameter], of_workers: list[list[Piece]]) -> OwnedParameters:
        shared = SharedParameters(parameters, of_workers, self._memory, self._workers.rank)
        self._owned = shared.owned
        self._exchange.own(shared.owned)
        return shared

    def finish(self, note: int = NO_NOTE, *, whole: bool = True) -> list[int] | None:
        gradients = [p.grad for p in self._parameters]
        has_moved_on = self._trained.moved_on()
        notes = self._add_up(gradients, MOVED_ON if has_moved_on else note, whole=whole)
        self._step.runs = False
        if MOVED_ON not in notes:
            return notes
        check_moved_on(notes)
        self._prepare()
        return self.finish(note, whole=whole)

    def _add_up(self, gradients: Row, note: int, *, whole: bool) -> list[int]:
        """Make the parameters' gradients the sum of all workers'; returns every worker's note, by rank."""
        return self._exchange([gradients], self._num_rows, in_order, note, whole=whole)

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        return reduce(torch.add, self._memory.all_gather(sum_here(leaves, num_values, self._workers.device)))

    def start_sum(
        self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int
    ) -> Callable[[], Tensor]:
        of_workers = self._memory.put(sum_here(leaves, num_values, self._workers.device))
        return lambda: reduce(torch.add, of_workers)

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        return self._memory.all_gather(values)

    @property
    def shares_memory(self) -> bool:
        return True

    def describe(self) -> str:
        return "shared_memory"


@dataclass
class _Step:
    runs: bool = False
    """Whether a step of this averaging is running: the model may be trained by others, too."""


class _Place:
    """Moves a gradient to its place in shared memory; later micro-batches accumulate into it there."""

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
    """The sum of the rows in rank order, in the first row's memory."""
    return reduce(Tensor.add_, rows)
