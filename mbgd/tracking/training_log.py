"""The training metrics (means, norms, rates, fingerprints) and the steps at which they are logged."""

from collections.abc import Mapping
from typing import Any

import torch

from mbgd.checkpoints.fingerprint import examples_sha256, weights_sha256
from mbgd.checks.setup import Setup
from mbgd.config import AveragingName, CompileName
from mbgd.config.duration import whole
from mbgd.measuring.clock import Clock
from mbgd.measuring.load import Load
from mbgd.step.done import Done
from mbgd.task.compiling import num_graphs
from mbgd.tracking.slowest_worker import SlowestWorker

RANK, HOST = "time/slowest_worker_rank", "time/slowest_worker_host"


class TrainingLog:
    """Turns the result of a step into metrics, and remembers the last logged step."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._has_tokens = setup, setup.findings.has_tokens
        # Since the last logged step.
        self._num_tokens = torch.zeros((), dtype=torch.float64, device=setup.workers.device)
        self.last_logged = 0
        self.clock = Clock(setup.workers.device)
        self._load = Load(setup.workers.device)
        self._slowest = SlowestWorker(setup.workers)

    def logs(self, step: int) -> bool:
        """Whether step number `step` is logged: the first, so that mistakes show at once, every Nth and the last."""
        num_done = step + 1
        every_steps = whole(self._setup.settings.log_every_steps)
        return num_done == 1 or num_done % every_steps == 0 or num_done == self._setup.num_steps

    def after_update(self, done: Done) -> None:
        """Count the tokens."""
        if done.num_tokens is not None:
            self._num_tokens += done.num_tokens

    def metrics(self, done: Done, more: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a logged step, and `more`; this waits for the device."""
        assert done.totals is not None
        assert done.norms is not None
        plan, step = self._setup.plan, done.step + 1
        metrics = {**done.totals.means(), "learning_rate": float(self._setup.optimizer.param_groups[0]["lr"])}
        metrics |= {**done.norms.values(), **more}
        metrics["epoch"] = plan.examples_seen(step) / plan.examples_per_epoch
        times = {f"time/{name}": value for name, value in self._times(step).items()}
        times |= {f"time/{name}": value for name, value in self._slowest.metrics(step, done.seconds_by_rank).items()}
        return {f"train/{name}": value for name, value in metrics.items()} | times

    def _times(self, step: int) -> dict[str, float]:
        """Speed and times since the last logged step."""
        last, plan = self.last_logged, self._setup.plan
        times = self.clock.read(
            num_steps=step - last,
            num_examples=plan.examples_seen(step) - plan.examples_seen(last),
            num_tokens=int(self._num_tokens.item()) if self._has_tokens else None,
        )
        self._num_tokens.zero_()
        self.last_logged = step
        graphs = {} if self._setup.settings.compile is CompileName.none else {"compiled_graphs": num_graphs()}
        return {**times, **self._load.read(), "num_workers": self._setup.workers.num_workers, **graphs}

    def fingerprints(self, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
        """Values that are texts: the slowest worker's host; hashes that let two runs be compared line by line."""
        host = {HOST: self._slowest.host(metrics[RANK])} if RANK in metrics else {}
        return host | self._hashes(metrics, step)

    def _hashes(self, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
        """With reproducible averaging."""
        if self._setup.settings.averaging.name is not AveragingName.reproducible:
            return {}
        if "train/loss" in metrics:
            return {"train/examples_sha256": examples_sha256(self._setup.loader.minibatch_indices(step - 1))}
        return {"eval/weights_sha256": weights_sha256(self._setup.task)} if metrics else {}
