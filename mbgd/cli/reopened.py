"""A run's model with its weights, on this worker, for tools that compute with it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mbgd.building.build import build_trainer
from mbgd.building.recorded import recorded
from mbgd.errors import UsageError
from mbgd.runs.weights import Weights, load_from_run
from mbgd.runs.wording import count
from mbgd.text.escaping import plain
from mbgd.trainer import Trainer
from mbgd.workers.group import start_workers


@dataclass(frozen=True)
class Reopened:
    trainer: Trainer
    weights: Weights

    def lines(self) -> dict[str, str]:
        """For people: which weights compute on which examples."""
        workers = self.trainer.setup.workers.num_workers
        sets = self.trainer.evaluations.num_examples
        examples = " + ".join(f"{number:,} {name}".rstrip() for name, number in sets.items())
        return {
            "weights": f"{plain(self.weights.file)}, after step {self.weights.step:,}"
            + (", moving average" if self.weights.ema else ""),
            "examples": f"{examples}, on {count(workers, 'worker')}",
        }


@contextmanager
def reopened(parsed: argparse.Namespace) -> Iterator[Reopened]:
    """The run on this worker as one of those that were started; UsageError if it has no evaluation examples."""
    config = recorded(parsed.run, parsed.overrides)
    backend = config.backend
    with start_workers(backend.name.value, backend.timeout_seconds, device=backend.device.value) as workers:
        trainer = build_trainer(config, workers)
        if not trainer.evaluations:
            raise UsageError(
                f"{plain(parsed.run)} with this data has no evaluation examples: data.evaluation is null. Name data "
                "that has some: data=NAME …, or data.evaluation={_target_: …}."
            )
        weights = load_from_run(trainer, parsed.run, step=parsed.step, best=parsed.best, ema=parsed.ema)
        yield Reopened(trainer, weights)
