"""The verified trainer on this worker: records each step without changing it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mbgd.batches.describing import content, kind
from mbgd.batches.loader import Shard
from mbgd.building.build import build_trainer
from mbgd.checks.replicas import checksum
from mbgd.config import Config, Precision
from mbgd.trainer import Trainer
from mbgd.workers.group import Workers

Gradient = dict[str, Tensor]
"""By the parameter's name, float64; an unused parameter has none."""


@dataclass(frozen=True)
class Done:
    """The result of one step of all workers."""

    step: int
    """Counted from 0."""
    loss: float
    gradient: Gradient
    """Of the mean loss, before hooks and clipping; empty off the main worker."""
    positions: list[list[tuple[int, int]]]
    """For each worker, the ranges of the epoch's positions that it computed."""
    digests: list[list[str]]
    """For each worker, hashes of the examples that it read, one per micro-batch."""
    replicas_alike: bool


class Subject:
    """Makes steps with the user's trainer."""

    def __init__(self, config: Config, workers: Workers, precision: Precision) -> None:
        self.trainer: Trainer = build_trainer(replace(config, precision=precision, log_every_steps=1), workers)
        self.trainer.train_step.before_update.append(self._take_down)
        self.parameters = self.trainer.setup.trained.by_name
        self._gradient: Gradient = {}

    def about(self) -> dict[str, Any]:
        """A description of the verified trainer, for people."""
        trainer, plan = self.trainer, self.trainer.setup.plan
        objective = trainer.setup.task.given_objective
        cut = plan.num_micro_batches(min(plan.minibatch_size, plan.num_examples))
        return {
            "model": type(trainer.setup.model).__name__,
            "objective": kind(objective).rpartition(".")[2],
            "data": f"{plan.num_examples:,} examples of {type(trainer.setup.data.train).__name__}",
            "num_workers": plan.num_workers,
            "plan": f"minibatches of {plan.minibatch_size}, micro-batches: {cut}, workers: {plan.num_workers}",
            "averaging": trainer.train_step.averaging.describe(),
        }

    @property
    def buffers(self) -> dict[str, Tensor]:
        return dict(self.trainer.setup.task.named_buffers())

    def shards(self, num_steps: int) -> Iterator[Shard]:
        return self.trainer.setup.loader.shards(0, num_steps)

    def step(self, shard: Shard) -> Done:
        workers = self.trainer.setup.workers
        counting = [one for one in shard.micro_batches if not one.micro_batch.is_stand_in]
        mine = {
            "positions": [[one.micro_batch.start, one.micro_batch.stop] for one in counting],
            "digests": [content(one.batch) for one in counting],
        }
        done = self.trainer.train_step(shard)
        self.trainer.state.step = shard.step + 1
        assert done.totals is not None  # every step is logged
        state = [p.detach() for p in self.parameters.values()]
        of_workers = workers.gather_values({**mine, "checksum": int(checksum(state, workers.device))})
        return Done(
            shard.step,
            done.totals.means()["loss"],
            self._gradient,
            [[(start, stop) for start, stop in one["positions"]] for one in of_workers],
            [one["digests"] for one in of_workers],
            len({one["checksum"] for one in of_workers}) == 1,
        )

    def _take_down(self, shard: Shard, weight: int | Tensor) -> None:
        if self.trainer.setup.workers.is_main:
            divisor = self.trainer.train_step.update.loss_scale() * weight
            self._gradient = {
                name: p.grad.to(torch.promote_types(p.dtype, torch.float64)) / divisor
                for name, p in self.parameters.items()
                if p.grad is not None
            }
