"""Averaging: turning the workers' gradients into the gradient of the minibatch's mean loss, on every worker.

An averaging adds up, over all micro-batches of all workers; `update.py` divides, once. The trainer cannot tell the
averagings apart; an averaging knows nothing of models, data or objectives beyond the parameters' gradients.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from mbgd.averaging.ddp import DDP
from mbgd.config import Averaging as Settings
from mbgd.objective import PerExample
from mbgd.task import Task
from mbgd.workers import Workers


class Averaging(Protocol):
    """One way to add up over micro-batches and workers."""

    def task(self, batch: Any, num_examples: int) -> PerExample:
        """`Task.forward`, prepared so that the backward of its losses leads to an exchange of gradients."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of one micro-batch; gradients are exchanged after the shard's last."""

    def finish(self) -> None:
        """Wait until every parameter's `.grad` is the sum over all workers' micro-batches (None if none used it)."""

    def sum(self, leaves: Sequence[Tensor]) -> Tensor:
        """Add up the micro-batches' vectors (equal shapes, float64) over all workers."""


def create(settings: Settings, task: Task, workers: Workers, *, parameters_vary: bool) -> Averaging:
    """The averaging that the settings name; parameters_vary: not every parameter takes part in every loss."""
    if settings.find_unused_parameters is not None:
        parameters_vary = settings.find_unused_parameters
    return DDP(task, workers, find_unused_parameters=parameters_vary)


def default_num_micro_batches(settings: Settings, num_workers: int) -> int:
    """How many micro-batches a minibatch is cut into where `batch.micro_batch_size` does not say."""
    return num_workers
