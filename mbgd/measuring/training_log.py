"""What is logged of training: means, norms, rates, fingerprints, and in which steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.batches.loader import Loader
from mbgd.batches.plan import Plan
from mbgd.checkpoints.fingerprint import examples_sha256, weights_sha256
from mbgd.config import AveragingName, Precision, Settings
from mbgd.measuring.clock import Clock
from mbgd.step.noise_scale import NoiseScale
from mbgd.step.update import Norms, Update
from mbgd.task.objective import Totals
from mbgd.task.task import Task
from mbgd.workers.group import Workers


class TrainingLog:
    """Turns what a step came to into metrics; knows when the last logged step was."""

    def __init__(self, settings: Settings, plan: Plan, workers: Workers, *, num_steps: int, has_tokens: bool) -> None:
        self._settings, self._plan, self._workers = settings, plan, workers
        self._num_steps, self._has_tokens = num_steps, has_tokens
        self._num_tokens = torch.zeros((), dtype=torch.float64, device=workers.device)  # since the last logged step
        self.last_logged = 0
        self.clock = Clock(workers.device)

    def logs(self, step: int) -> bool:
        """Whether step number `step` is logged: the first, so that mistakes show at once, every Nth and the last."""
        done = step + 1
        return done == 1 or done % self._settings.log_every_steps == 0 or done == self._num_steps

    def count_tokens(self, count: Tensor) -> None:
        if self._has_tokens:
            self._num_tokens += count

    def metrics(
        self, step: int, totals: Totals, norms: Norms, optimizer: Optimizer, update: Update, noise_scale: NoiseScale
    ) -> dict[str, float]:
        """Of a logged step, after `step` steps; this waits for the device."""
        metrics = {f"train/{name}": value for name, value in totals.means().items()}
        metrics["train/learning_rate"] = float(optimizer.param_groups[0]["lr"])
        metrics |= {f"train/{name}": value for name, value in norms.values().items()}
        metrics |= {f"train/{name}": value for name, value in noise_scale.metrics().items()}
        if self._settings.precision is Precision.fp16:
            metrics["train/skipped_steps"] = update.num_skipped
        metrics["train/epoch"] = self._plan.examples_seen(step) / self._plan.examples_per_epoch
        return metrics | {f"time/{name}": value for name, value in self._times(step).items()}

    def _times(self, step: int) -> dict[str, float]:
        """How fast training went since the last logged step."""
        last = self.last_logged
        times = self.clock.read(
            num_steps=step - last,
            num_examples=self._plan.examples_seen(step) - self._plan.examples_seen(last),
            num_tokens=int(self._num_tokens.item()) if self._has_tokens else None,
        )
        self._num_tokens.zero_()
        self.last_logged = step
        return {**times, "num_workers": self._workers.num_workers}

    def fingerprints(self, metrics: Mapping[str, float], step: int, loader: Loader, task: Task) -> dict[str, Any]:
        """With reproducible averaging, hashes by which two runs can be compared line by line."""
        if self._settings.averaging.name is not AveragingName.reproducible:
            return {}
        if "train/loss" in metrics:
            return {"train/examples_sha256": examples_sha256(loader.minibatch_indices(step - 1))}
        return {"eval/weights_sha256": weights_sha256(task)} if metrics else {}
