"""Exact weighted means, and metrics of the whole set, over exactly the evaluation examples, by any workers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mbgd.averaging import Averaging
from mbgd.config import Settings
from mbgd.loader import Data, Indices, read
from mbgd.metrics import Metrics
from mbgd.objective import NUM_SUMS, Totals
from mbgd.plan import MicroBatch, micro_batches
from mbgd.precision import autocast, parameter_dtype
from mbgd.task import Task
from mbgd.workers import Workers


class Evaluation:
    """Evaluates a task on a dataset, every example exactly once, each worker its contiguous share."""

    def __init__(
        self,
        task: Task,
        data: Data,
        metric_names: tuple[str, ...],
        settings: Settings,
        workers: Workers,
        averaging: Averaging,
    ) -> None:
        self._task, self._data, self._metric_names = task, data, metric_names
        self._workers, self._averaging, self._precision = workers, averaging, settings.precision
        self._seed = settings.seed
        self._metrics = Metrics(settings.evaluation.metrics, workers)
        num_examples = len(data.evaluation)
        self._num_parts = -(-num_examples // settings.evaluation.batch_size)
        shard = micro_batches(0, num_examples, self._num_parts, workers.rank, workers.num_workers)
        self._shard = [micro_batch for micro_batch in shard if micro_batch.counts]

    def __call__(self) -> dict[str, float]:
        """Mean loss and metrics, the same on every worker; the model is in training mode again afterwards."""
        task, leaves, predictions = self._task.eval(), [], []
        with torch.inference_mode(), autocast(self._precision, self._workers.device):
            for micro_batch, batch in self._batches():
                terms = task(batch, micro_batch.size)
                leaves.append((micro_batch.number, terms.sums(self._metric_names)))
                if self._metrics:
                    predictions += [values.cpu() for values in terms.counted_predictions()]
            num_values = NUM_SUMS + len(self._metric_names)
            total = self._averaging.sum(leaves, num_leaves=self._num_parts, num_values=num_values)
            means = Totals(total, self._metric_names).means()
        task.train()
        return {**means, **self._metrics(predictions)}

    def _batches(self) -> Iterator[tuple[MicroBatch, Any]]:
        indices: Iterator[Indices] = (np.arange(mb.start, mb.stop) for mb in self._shard)
        batches = read(
            self._data.evaluation,
            indices,
            num_workers=self._data.num_workers,
            device=self._workers.device,
            dtype=parameter_dtype(self._precision),
            seed=self._seed,
        )
        return zip(self._shard, batches, strict=True)
