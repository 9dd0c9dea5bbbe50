"""How long each worker needs for its own part of a step: summed in logged steps, in the exchange of the losses."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mbgd.batches.plan import MicroBatch, Minibatch
from mbgd.task.objective import PerExample
from mbgd.workers.group import Workers


class Speeds:
    """A sum over micro-batches of vectors with one place per worker, each filled by that worker alone."""

    needs_backward = False

    def __init__(self, workers: Workers, logs: Callable[[int], bool], own_seconds: Callable[[], float]) -> None:
        """logs(step): whether a step is logged. own_seconds(): a step's, before the last logged step; 0 if unknown."""
        self._workers, self._logs, self._own_seconds = workers, logs, own_seconds
        self._is_wanted = False
        self._numbers: list[int] = []
        self.by_rank: Tensor | None = None
        """Seconds per micro-batch; 0 of workers that have none in this step. None in a step that is not logged."""

    @property
    def width(self) -> int:
        return self._workers.num_workers

    def begin(self, step: int) -> bool:
        self._numbers, self.by_rank = [], None
        self._is_wanted = self._workers.num_workers > 1 and self._logs(step)
        return self._is_wanted

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        if self._is_wanted:
            self._numbers.append(micro_batch.number)

    def leaves(self) -> Mapping[int, Tensor]:
        zeros = torch.zeros(self.width, dtype=torch.float64, device=self._workers.device)
        mine = zeros.clone()
        mine[self._workers.rank] = self._own_seconds() / max(len(self._numbers), 1)
        return {number: zeros if at else mine for at, number in enumerate(self._numbers)}

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self.by_rank = total
