"""Averaging: turning the workers' gradients into the gradient of the minibatch's mean loss, on every worker.

An averaging sums over all micro-batches of all workers; `step/update.py` divides once. The trainer does not know which
averaging it has; an averaging knows nothing of models, data or objectives beyond the parameters' gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mbgd.averaging.ddp import DDP
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.averaging.hosts import ReproducibleOnHosts, SharedMemoryOnHosts
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.averaging.pieces import OwnedParameters, Piece
from mbgd.averaging.reproducible import Reproducible
from mbgd.averaging.shared_memory import SharedMemory
from mbgd.averaging.start import start_alike
from mbgd.batches.plan import MicroBatch, Plan
from mbgd.config import Averaging, AveragingName
from mbgd.errors import UsageError
from mbgd.task.trained import Trained
from mbgd.workers import cuda
from mbgd.workers.group import Workers
from mbgd.workers.process_settings import set_deterministic


class Averager(Protocol):
    """One way to sum over micro-batches and workers."""

    def forward(self, batch: Any, num_examples: int) -> Any:
        """The task's forward, set up so that the backward of its result triggers the exchange of gradients."""

    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> AbstractContextManager[object]:
        """Context of one forward and backward; the shard's last backward may already exchange gradients."""

    def start(self, norms: MicroBatchNorms | None = None) -> None:
        """Begin a step; norms: measures each micro-batch's gradients before they are summed."""

    def own(self, parameters: Mapping[str, nn.Parameter], of_workers: list[list[Piece]]) -> OwnedParameters:
        """Let each worker update its pieces alone; the parameters, alike on all workers, move to other memory.

        For several workers. Raises CannotShareError, with nothing changed.
        """

    @property
    def shares_memory(self) -> bool:
        """Whether gradients go through memory that all workers share, and parameters lie there once they are owned."""

    def finish(self, note: int = 0, *, whole: bool = True) -> list[int] | None:
        """Wait until every parameter's `.grad` is the sum over all workers' micro-batches (None if none used it).

        Pieces that this worker owns have their part of it. whole=False: with pieces, only they need to have it.

        note: a number from 0 to 254 that each worker sends to all. Returns every worker's note by rank, or None where
        the averaging exchanges no notes.
        """

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        """Sum one vector (float64, num_values values) per micro-batch over all `num_leaves` micro-batches.

        leaves: (number, vector) of this worker's micro-batches, in order.
        """

    def start_sum(
        self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int
    ) -> Callable[[], Tensor]:
        """Start `sum` between the last forward and its backward; the result can be called after `finish`, in which the
        workers meet anyway, and gives the sum."""

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        """Every worker's values by rank, valid until the second call after this one; for several workers."""

    def describe(self) -> str:
        """For people: the averaging's name and the backend that carries its gradients."""


def fix_threads(settings: Averaging, device: torch.device) -> None:
    """Set this worker's number of threads where the averaging needs a fixed one.

    Also called before the model is built: some initialisations depend on the number of threads.
    """
    num_threads = settings.num_threads
    if num_threads is None and settings.name is AveragingName.reproducible and device.type == "cpu":
        num_threads = 1  # launchers choose it by the number of workers
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def prepare(settings: Averaging, plan: Plan, device: torch.device) -> None:
    """Set torch's options for the averaging; UsageError if it cannot average this plan."""
    fix_threads(settings, device)
    if settings.name is AveragingName.shared_memory and device.type != "cpu":
        raise UsageError(
            f"averaging=shared_memory with workers on {device.type}; it sums gradients in the host's memory, so it "
            "needs CPU workers. Use averaging=ddp, or backend=gloo backend.device=cpu for CPU workers."
        )
    if settings.name is not AveragingName.reproducible:
        return
    size = min(plan.minibatch_size, plan.num_examples)
    num_micro_batches = plan.num_micro_batches(size)
    if plan.num_workers > num_micro_batches:
        remedy = (
            f"Use fewer workers: a minibatch has {size} example{'s' if size > 1 else ''}."
            if size < plan.num_workers
            else f"Use fewer workers, or smaller micro-batches with batch.micro_batch_size={size // plan.num_workers}."
        )
        raise UsageError(
            f"averaging=reproducible with {plan.num_workers} workers and {num_micro_batches} "
            f"micro-batch{'es' if num_micro_batches > 1 else ''}; a worker takes whole micro-batches. {remedy}"
        )
    if device.type == "cuda":
        cuda.make_deterministic()
    set_deterministic(2)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def create(
    settings: Averaging,
    task: nn.Module,
    trained: Trained,
    plan: Plan,
    workers: Workers,
    *,
    parameters_vary: bool,
    exchanges_in_backward: bool = False,
) -> Averager:
    """The averaging that the settings name, the same on every worker; makes the workers' models equal.

    parameters_vary: not every parameter takes part in every loss. exchanges_in_backward: layers of the model exchange
    values between the workers.
    """
    if settings.find_unused_parameters is not None:
        parameters_vary = settings.find_unused_parameters
    start_alike(task, workers)
    is_reproducible, note = settings.name is AveragingName.reproducible, ""
    if settings.name is not AveragingName.ddp and workers.num_workers > 1 and workers.device.type == "cpu":
        try:
            memory = HostMemory(workers)
            is_one_host = len(memory.hosts) == 1
            if is_reproducible:
                kind = Reproducible if is_one_host else ReproducibleOnHosts
                return kind(task, trained, workers, plan, memory, find_unused_parameters=parameters_vary)
            return (SharedMemory if is_one_host else SharedMemoryOnHosts)(task, trained, workers, memory)
        except CannotShareError as error:
            if settings.name is AveragingName.shared_memory:
                raise UsageError(
                    f"averaging=shared_memory, but {error}. Use averaging=ddp; averaging=auto takes what works."
                ) from error
            note = f"; not through shared memory: {error}"
    if is_reproducible:
        return Reproducible(task, trained, workers, plan, find_unused_parameters=parameters_vary, note=note)
    late = exchanges_in_backward and parameters_vary
    return DDP(task, trained, workers, find_unused_parameters=parameters_vary, sums_late=late, note=note)
