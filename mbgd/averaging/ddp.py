"""Averaging by torch's DistributedDataParallel, with a communication hook that sums instead of averaging."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from mbgd.averaging.gradients import of_bucket
from mbgd.averaging.host_memory.rows import NO_NOTE
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.averaging.pieces import Owned, Piece
from mbgd.averaging.sent_parameters import SentParameters
from mbgd.batches.plan import MicroBatch
from mbgd.errors import UsageError
from mbgd.task.trained import Trained
from mbgd.workers.group import Workers
from mbgd.workers.under_way import UnderWay

# `task/buffers.py` averages the buffers that change. torch 2.13 renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_BUFFERS_STAY: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}

_NOTHING: AbstractContextManager[object] = nullcontext()


Hook = Callable[[GradBucket], torch.futures.Future[Tensor]]


def wrap(task: nn.Module, trained: Trained, hook: Hook, *, find_unused_parameters: bool) -> DistributedDataParallel:
    """The task under DDP, whose buckets of gradients go to `hook`, a method, instead of being averaged."""
    of_optimizer = set(trained.parameters)
    if not trained.with_gradient():
        raise UsageError("none of the optimizer's parameters requires a gradient; there is nothing to train.")
    others = [name for name, p in task.named_parameters(remove_duplicate=False) if p not in of_optimizer]
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(task, others)  # type: ignore[no-untyped-call]
    ddp = DistributedDataParallel(
        task,
        init_sync=False,  # `start_alike` does it
        gradient_as_bucket_view=True,  # saves a copy of all gradients in every step
        find_unused_parameters=find_unused_parameters,
        **_BUFFERS_STAY,
    )
    ddp.register_comm_hook(state=WeakMethod(hook), hook=_call)
    return ddp


def _call(hook: "WeakMethod[Hook]", bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's C++ part holds its hook for good; the method itself would hold its averaging, and that DDP, for ever."""
    method = hook()
    assert method is not None, "the averaging is gone"
    return method(bucket)


def completed(buffer: Tensor) -> torch.futures.Future[Tensor]:
    """A finished future for DDP: the sum reaches the bucket, whose views are the gradients, by the end of `finish`.

    A callback on the exchange would run Python in a thread of the process group, which is slow and can crash a process
    that is exiting.
    """
    # A future must be told its tensors' GPUs.
    devices: list[int | str | torch.device] | None = [buffer.device] if buffer.is_cuda else None
    ready: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    ready.set_result(buffer)
    return ready


def check_exchanged(trained: Trained, exchanged: bool) -> None:
    """UsageError if the last backward did not fill all of DDP's buckets: the other workers would wait for them."""
    if not exchanged:
        missing = [name for name, p in trained.by_name.items() if p.grad is None]
        raise UsageError(
            f"parameters {missing or 'of the model'} took no part in this step's loss on this worker, but did in the "
            "first step. Set averaging.find_unused_parameters=true: which parameters take part then may differ from "
            "step to step."
        )


def used_anywhere(parameters: Sequence[Tensor], workers: Workers) -> list[bool]:
    """For each parameter, whether any worker has a gradient for it."""
    flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64, device=workers.device)
    return [bool(flag) for flag in workers.max_(flags).tolist()] if parameters else []


def sum_here(leaves: Sequence[tuple[int, Tensor]], num_values: int, device: torch.device) -> Tensor:
    """The sum of this worker's vectors, in order: float64, shape (num_values,)."""
    total = torch.zeros(num_values, dtype=torch.float64, device=device)
    for _, values in leaves:
        total += values
    return total


class DDP:
    """DDP's all-reduce sums gradients while the last backward still runs.

    Stock DDP divides by the number of workers before it sums, which gives the mean of the workers' sums: right only
    if every worker holds equal weight. A communication hook leaves the division to the trainer.
    """

    def __init__(
        self,
        task: nn.Module,
        trained: Trained,
        workers: Workers,
        *,
        find_unused_parameters: bool,
        sums_late: bool = False,
        note: str = "",
    ) -> None:
        """sums_late: exchange gradients after the backward, in which the model's layers have exchanges of their own.
        Where unused parameters differ between workers, so would the order of these and of DDP's buckets.

        note: text that `describe` appends.
        """
        self._workers, self._task, self._trained, self._note = workers, task, trained, note
        self._parameters_vary, self._sums_late = find_unused_parameters, sums_late
        self._ddp: DistributedDataParallel | None = None
        self._norms: MicroBatchNorms | None = None
        self._exchanged = True
        self._sums = UnderWay()
        """First that of the weights, then those of the buckets."""
        self._late: list[Tensor] = []
        self._owned: Owned | None = None
        trained.moved_on()
        self._wrap()

    def _wrap(self) -> None:
        if self._workers.num_workers > 1:
            self._ddp = None  # so that the old DDP's hooks are gone first
            self._wrapped = set(self._trained.with_gradient())
            self._ddp = wrap(self._task, self._trained, self._sum_bucket, find_unused_parameters=self._parameters_vary)

    def _sum_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self._exchanged = bucket.is_last()
        if self._norms is not None:
            self._norms.take(self._number, of_bucket(bucket), self._before)
        self._late.append(bucket.buffer())
        if not self._sums_late:
            self._start_sums()
        return completed(bucket.buffer())

    def _start_sums(self) -> None:
        for buffer in self._late:
            self._sums.add(dist.all_reduce(buffer, async_op=True))
        self._late.clear()

    def forward(self, batch: Any, num_examples: int) -> Any:
        # Without DDP the forward is called directly: in small steps every call counts.
        forward = self._task.forward if self._ddp is None else self._ddp
        return forward(batch, num_examples)

    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> AbstractContextManager[object]:
        if self._norms is not None:
            return self._measured(self._norms, micro_batch, is_last=is_last)
        return self._exchanging(is_last=is_last)

    def _exchanging(self, *, is_last: bool) -> AbstractContextManager[object]:
        if self._ddp is None:
            return _NOTHING
        if is_last:
            self._exchanged = False
            return _NOTHING
        return self._ddp.no_sync()

    @contextmanager
    def _measured(self, norms: MicroBatchNorms, micro_batch: MicroBatch, *, is_last: bool) -> Iterator[None]:
        self._number = micro_batch.number
        self._before: dict[Tensor, Tensor] = {p: p.grad.clone() for p in self._trained.parameters if p.grad is not None}
        with self._exchanging(is_last=is_last):
            yield
        if self._ddp is None or not is_last:
            gradients: dict[Tensor, Tensor] = {p: p.grad for p in self._trained.parameters if p.grad is not None}
            norms.take(self._number, gradients, self._before)
        self._before.clear()

    def start(self, norms: MicroBatchNorms | None = None) -> None:
        self._norms = norms
        if self._ddp is not None and self._trained.moved_on():
            self._wrap()

    def own(self, parameters: Mapping[str, nn.Parameter], of_workers: list[list[Piece]]) -> SentParameters:
        sent = SentParameters(parameters, of_workers, self._workers)
        self._owned = sent.owned
        self._wrap()  # strides may have changed
        return sent

    @property
    def shares_memory(self) -> bool:
        return False

    def finish(self, note: int = NO_NOTE, *, whole: bool = True) -> list[int] | None:
        if self._ddp is None:
            self._trained.moved_on()
            return [note]
        check_exchanged(self._trained, self._exchanged)
        self._start_sums()
        self._sums.wait()
        if self._trained.moved_on():
            self._sum_late([p for p in self._trained.with_gradient() if p not in self._wrapped])
            self._wrap()
        if self._owned is not None:
            self._owned.take_gradients(whole=whole)
        return None

    def _sum_late(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients of parameters that began to require one in a forward, and so are in no bucket."""
        for parameter, is_used in zip(parameters, used_anywhere(parameters, self._workers), strict=True):
            if is_used:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self._workers.sum_(parameter.grad)

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        return self._workers.sum_(sum_here(leaves, num_values, self._workers.device))

    def start_sum(
        self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int
    ) -> Callable[[], Tensor]:
        total = sum_here(leaves, num_values, self._workers.device)
        if self._ddp is not None:
            self._sums.add(dist.all_reduce(total, async_op=True))
        return lambda: total

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        return self._workers.all_gather(values)

    def describe(self) -> str:
        return f"ddp over {self._workers.backend}{self._note}" if self._ddp is not None else "none: one worker"
