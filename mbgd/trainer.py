"""The training loop: one optimizer step is the gradient of the weighted mean loss over the whole minibatch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd import averaging as averagings
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.buffers import MovingBuffers
from mbgd.checkpoint import differences
from mbgd.clock import Clock
from mbgd.config import AveragingName, Precision, Settings, problems
from mbgd.errors import NotSaved, Preempted, UsageError
from mbgd.evaluation import Evaluation
from mbgd.fingerprint import examples_sha256, weights_sha256
from mbgd.loader import Data, Examples, Loader, Shard
from mbgd.noise_scale import NUM_NOISE_SUMS, NoiseScale, noise_sums
from mbgd.objective import NUM_SUMS, Objective, PerExample, Totals
from mbgd.plan import MicroBatch, Minibatch, count_steps, make_plan
from mbgd.precision import autocast, parameter_dtype
from mbgd.preemption import NoStop, Stop
from mbgd.preflight import try_out
from mbgd.profiling import NoProfiler, Profiler, part
from mbgd.randomness import key_generators
from mbgd.saving import Checkpoints, NoCheckpoints, save_last
from mbgd.snapshot import Snapshot, SnapshotMemory
from mbgd.task import Task
from mbgd.tracking import NoTracker, Tracker
from mbgd.update import Norms, Update
from mbgd.workers import Workers


@dataclass
class State:
    """With the parameters and the optimizer's state, all there is to resume from."""

    step: int = 0
    """Optimizer steps completed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each."""
    tracking: dict[str, str] = field(default_factory=dict)
    """By what trackers know the run, so that one that goes on is the same to them."""


@dataclass(frozen=True)
class StepResult:
    """What a logged step came to, on the device."""

    totals: Totals
    norms: Norms


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    metrics: dict[str, float]
    """The last value of each, by names such as train/loss and eval/accuracy."""
    steps: int
    examples_seen: int
    examples_per_second: float
    num_skipped_steps: int
    """Steps without an update because gradients overflowed in fp16."""


class Trainer:
    """Trains a model on this worker as one of `workers`.

    The model is moved to the worker's device and the precision's dtype; `optimizer` must have been made from its
    parameters. Raises UsageError, on every worker alike and before anything is exchanged, where the settings or
    the objective break a rule.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        data: Data,
        settings: Settings,
        workers: Workers | None = None,
    ) -> None:
        if found := problems(settings):
            raise UsageError("\n".join(found))
        self.workers = workers = workers or Workers()
        self.settings, self.model, self.optimizer = settings, model, optimizer
        self.plan = make_plan(settings, len(data.train), workers.num_workers)
        self.num_steps = count_steps(settings, self.plan)
        averagings.prepare(settings.averaging, self.plan, workers.device)
        self.state = State()
        dtype = parameter_dtype(settings.precision)
        task = Task(model, objective).to(device=workers.device, dtype=dtype).train()
        own_copies = settings.averaging.name is AveragingName.reproducible
        self._loader = Loader(data, self.plan, settings.seed, workers, dtype=dtype, own_copies=own_copies)
        self._findings = findings = try_out(task, data, self._loader.minibatch_indices(0), settings, workers.device)
        self._averaging = averagings.create(
            settings.averaging, task, self.plan, workers, parameters_vary=bool(findings.unused_parameters)
        )
        self.averaging_description = self._averaging.describe()
        self._autocast = autocast(settings.precision, workers.device)
        self._buffers = MovingBuffers(model, findings.moving_buffers)
        self._update = Update(list(model.parameters()), optimizer, settings, workers.device)
        self.noise_scale = NoiseScale(settings.noise_scale, self.plan, workers.device)
        self._evaluation = (
            Evaluation(task, data, findings.metric_names, settings, workers, self._averaging)
            if data.evaluation is not None
            else None
        )
        self.num_evaluation_examples = 0 if data.evaluation is None else len(data.evaluation)
        self._snapshot_memory = SnapshotMemory(pinned=workers.device.type == "cuda")
        self._clock = Clock(workers.device)
        self._num_tokens = torch.zeros((), dtype=torch.float64, device=workers.device)  # since the last logged step
        self._last_logged = 0

    def fit(
        self,
        tracker: Tracker | None = None,
        checkpoints: Checkpoints | None = None,
        stop: Stop | None = None,
        profiler: Profiler | None = None,
    ) -> Result:
        """Train from `state.step` up to the last step, evaluate, and return what the run came to.

        checkpoints: what this worker keeps. Once `stop` says so, raises Preempted if the state is saved and NotSaved if
        it could not be, the same on every worker.
        """
        tracker, checkpoints, stop = tracker or NoTracker(), checkpoints or NoCheckpoints(), stop or NoStop()
        profiler = profiler or NoProfiler()

        def log(metrics: dict[str, float]) -> None:
            self.state.metrics.update(metrics)
            tracker.log(self.state.step, {**metrics, **self._fingerprints(metrics)})

        evaluation: dict[str, float] = {}
        first_step, self._clock = self.state.step, Clock(self.workers.device)
        shards = self._clock.laps(self._loader.shards(first_step, self.num_steps))
        for shard in profiler.steps(shards, first_step):
            result = self.train_step(shard)
            self.state.step = shard.step + 1
            tracker.progress(self.state.step)
            if result is not None:
                log(self._train_metrics(result))
            evaluation = {}
            if self._evaluates_after(self.state.step):
                with self._clock.paused():
                    log(evaluation := self.evaluate())
            if self.state.step == first_step + 1:
                checkpoints.check(self._update.optimizer_state.problems())
            checkpoints.after_step(self.state.step, evaluation, self.snapshot)
            if stop.agreed(self.state.step):
                problem = save_last(checkpoints, self.workers, self.state.step, evaluation, self.snapshot)
                self.workers.barrier()  # whoever left first would make torchrun end the others while they write
                raise NotSaved(self.state.step, problem) if problem else Preempted(self.state.step)
        if self.state.step == 0:
            log(self.evaluate())
        else:
            problem = save_last(checkpoints, self.workers, self.state.step, evaluation, self.snapshot)
            if problem and self.workers.is_main:
                print(f"warning: {problem}. The run's results are written all the same.", flush=True)
        examples_seen = self.plan.examples_seen(self.state.step)
        return Result(
            metrics=self.state.metrics,
            steps=self.state.step,
            examples_seen=examples_seen,
            examples_per_second=(examples_seen - self.plan.examples_seen(first_step)) / self._clock.seconds(),
            num_skipped_steps=self._update.num_skipped,
        )

    def snapshot(self) -> Snapshot:
        """The whole state of the run, in memory of its own."""
        return self._snapshot_memory.snapshot(
            self.state.step,
            tensors={"model": _model_tensors(self.model), "optimizer": self._update.tensors()},
            values={
                "optimizer": self._update.values(),
                "metrics": dict(self.state.metrics),
                "noise_scale": self.noise_scale.values(),
                "run": self._kind_of_run(),
                "tracking": dict(self.state.tracking),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; UsageError, with nothing changed, where it does not fit model, optimizer and data."""
        tensors, saved = _model_tensors(self.model), snapshot.tensors["model"]
        found = differences({**snapshot.values["run"], **_kinds(saved)}, {**self._kind_of_run(), **_kinds(tensors)})
        found += self._update.misfits(snapshot.tensors["optimizer"], snapshot.values["optimizer"])
        if found:
            raise UsageError("the checkpoint does not fit this run:\n" + "\n".join(f"  - {one}" for one in found))
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        self._update.restore(snapshot.tensors["optimizer"], snapshot.values["optimizer"])
        self.state.step, self.state.metrics = snapshot.step, dict(snapshot.values["metrics"])
        self.noise_scale.restore(snapshot.values["noise_scale"])
        self.state.tracking = dict(snapshot.values.get("tracking", {}))
        self._last_logged = snapshot.step

    def _kind_of_run(self) -> dict[str, Any]:
        """What must be the same, beside the model, for the state of one run to mean anything in another."""
        return {
            "number of training examples": self.plan.num_examples,
            "batch.size": self.plan.minibatch_size,
            "optimizer": type(self.optimizer).__name__,
        }

    def train_step(self, shard: Shard) -> StepResult | None:
        """One optimizer step: gradient = Σ w_i ∇L_i / Σ w_i over every example of every worker.

        Returns what is logged, at the steps that are logged.
        """
        step, lap = shard.step, self._clock.lap
        log = self._logs(step)
        measure_noise = self.noise_scale.measures(step)
        want_sums = log or measure_noise or self._findings.has_weights or bool(self._buffers)
        metric_names = self._findings.metric_names if log else ()
        sums = []
        self._averaging.norms = MicroBatchNorms(self._update.parameters) if measure_noise else None
        self._update.clear_gradients()
        self._buffers.start_step()
        for examples in shard.micro_batches:
            terms = self._forward_backward(step, examples, is_last=examples is shard.micro_batches[-1])
            if want_sums and examples.micro_batch.counts:
                sums.append((examples.micro_batch.number, self._sums(terms, examples.micro_batch, metric_names)))
        lap("forward_backward")
        with part("averaging"):
            self._averaging.finish()  # every gradient is now the sum over every example of every worker
            totals, noise = self._totals(shard.minibatch, sums, metric_names) if want_sums else (None, None)
        lap("averaging")
        if log:
            assert totals is not None
            self._check(step, totals)
        weight = totals.weight if totals is not None and self._findings.has_weights else shard.minibatch.size
        with part("optimizer"):
            norms = self._update(step, weight, want_norm=measure_noise, want_change=log)
        if noise is not None and norms is not None:
            self.noise_scale.add(noise, weight=weight, size=shard.minibatch.size, gradient_norm=norms.gradient)
        lap("optimizer")
        return StepResult(totals, norms) if log and totals is not None and norms is not None else None

    def _forward_backward(self, step: int, examples: Examples, *, is_last: bool) -> PerExample:
        """Add Σ w_i ∇L_i over this micro-batch to the parameters' gradients."""
        micro_batch = examples.micro_batch
        self._buffers.start_micro_batch()
        key_generators(self.workers.device, self.settings.seed, step, micro_batch.number)
        with self._averaging.micro_batch(micro_batch, is_last=is_last):
            with part("forward"), self._autocast:
                terms = self._averaging.task(examples.batch, micro_batch.size)
            with part("backward"):
                # Backward from the vector of losses, w_i into L_i, is the gradient of their weighted sum.
                torch.autograd.backward(terms.losses, self._update.backward_weights(terms, counts=micro_batch.counts))
        return terms

    def _sums(self, terms: PerExample, micro_batch: MicroBatch, metric_names: Sequence[str]) -> Tensor:
        """What of a micro-batch is added up beside gradients: for the means, the moving buffers, and the noise."""
        parts = [terms.sums(metric_names)]
        if self._buffers:
            parts.append(self._buffers.values())
        if self._averaging.norms is not None:
            squared_norm = self._averaging.norms.squared(micro_batch.number) / self._update.loss_scale().square()
            parts.append(noise_sums(squared_norm, weight=parts[0][1]))
        return torch.cat(parts)

    def _totals(
        self, minibatch: Minibatch, sums: Sequence[tuple[int, Tensor]], metric_names: tuple[str, ...]
    ) -> tuple[Totals, Tensor | None]:
        """Add up `_sums` over micro-batches and workers; the moving buffers become their means."""
        num_leaves = self.plan.num_micro_batches(minibatch.size)
        sizes = [NUM_SUMS + len(metric_names), self._buffers.num_values]
        if self._averaging.norms is not None:
            sizes.append(NUM_NOISE_SUMS)
        total = self._averaging.sum(sums, num_leaves=num_leaves, num_values=sum(sizes))
        means, buffers, *noise = torch.split(total, sizes)
        if self._buffers:
            self._buffers.set_to(buffers / num_leaves)
        totals = Totals(means, metric_names)
        if self._findings.has_tokens:
            self._num_tokens += totals.count
        return totals, noise[0] if noise else None

    def _check(self, step: int, totals: Totals) -> None:
        """Stop, on every worker alike and before the update, where weights or losses make no mean."""
        totals.check_weights(f"in the minibatch of step {step + 1}")
        loss = totals.means()["loss"]
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss is {loss} at step {step + 1}; it was finite at step {self._last_logged}, so it went wrong "
                f"in steps {self._last_logged + 1} to {step + 1}. Usual remedies: a smaller optimizer.lr, clip_norm=1, "
                "precision=fp32, or a look at the examples of these steps."
            )

    def _train_metrics(self, result: StepResult) -> dict[str, float]:
        """What is logged of a step; this waits for the device."""
        metrics = {f"train/{name}": value for name, value in result.totals.means().items()}
        metrics["train/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        metrics |= {f"train/{name}": value for name, value in result.norms.values().items()}
        metrics |= {f"train/{name}": value for name, value in self.noise_scale.metrics().items()}
        if self.settings.precision is Precision.fp16:
            metrics["train/skipped_steps"] = self._update.num_skipped
        metrics["train/epoch"] = self.plan.examples_seen(self.state.step) / self.plan.examples_per_epoch
        return metrics | {f"time/{name}": value for name, value in self._times().items()}

    def _times(self) -> dict[str, float]:
        """How fast training went since the last logged step."""
        step, last = self.state.step, self._last_logged
        times = self._clock.read(
            num_steps=step - last,
            num_examples=self.plan.examples_seen(step) - self.plan.examples_seen(last),
            num_tokens=int(self._num_tokens.item()) if self._findings.has_tokens else None,
        )
        self._num_tokens.zero_()
        self._last_logged = step
        return {**times, "num_workers": self.workers.num_workers}

    def _fingerprints(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """With reproducible averaging, hashes by which two runs can be compared line by line."""
        if self.settings.averaging.name is not AveragingName.reproducible:
            return {}
        if "train/loss" in metrics:
            return {"train/examples_sha256": examples_sha256(self._loader.minibatch_indices(self.state.step - 1))}
        return {"eval/weights_sha256": weights_sha256(self.model)} if metrics else {}

    def _logs(self, step: int) -> bool:
        """The first step is logged, so that mistakes show at once, then every `log_every_steps` and the last."""
        done = step + 1
        return done == 1 or done % self.settings.log_every_steps == 0 or done == self.num_steps

    def _evaluates_after(self, num_steps: int) -> bool:
        every = self.settings.evaluation.every_steps or self.plan.steps_per_epoch
        return num_steps % every == 0 or num_steps == self.num_steps

    @property
    def evaluation_names(self) -> list[str]:
        """Names of what `evaluate` gives."""
        if self._evaluation is None:
            return []
        names = ("loss", *self._findings.metric_names, *self.settings.evaluation.metrics)
        return [f"eval/{name}" for name in names]

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation examples by names such as eval/loss; empty without an evaluation dataset."""
        if self._evaluation is None:
            return {}
        return {f"eval/{name}": value for name, value in self._evaluation().items()}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and buffers, as they lie."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}
