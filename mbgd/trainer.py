"""The training loop: one optimizer step is the gradient of the weighted mean loss over the whole minibatch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd import averaging as averagings
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.batches.loader import Data, Examples, Loader, Shard
from mbgd.batches.plan import MicroBatch, count_steps, make_plan
from mbgd.batches.randomness import key_generators
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checkpoints.format import differences
from mbgd.checkpoints.saving import Checkpoints, NoCheckpoints, save_last
from mbgd.checkpoints.snapshot import Snapshot, SnapshotMemory
from mbgd.checkpoints.task_state import TaskState, refuse_odd_parts
from mbgd.checks import diagnosis
from mbgd.checks.preflight import Trial, check_skipping, check_targets
from mbgd.checks.recomputing import Recomputing
from mbgd.checks.replicas import Replicas
from mbgd.checks.same_program import check_same_program
from mbgd.config import AveragingName, Config, Precision, Settings, problems
from mbgd.errors import NotSaved, Preempted, UsageError
from mbgd.evaluation.evaluating import Evaluation
from mbgd.files import strict_json
from mbgd.measuring.garbage import collected_at_steps
from mbgd.measuring.profiling import NoProfiler, Profiler, part
from mbgd.measuring.training_log import TrainingLog
from mbgd.step import optimizers
from mbgd.step.finite import Watch, Wrong, not_finite, shown
from mbgd.step.noise_scale import NUM_NOISE_SUMS, NoiseScale, noise_sums
from mbgd.step.update import Norms, Update
from mbgd.task import extra_state
from mbgd.task.buffers import Buffers
from mbgd.task.modes import set_training
from mbgd.task.objective import NUM_SUMS, Objective, PerExample, Totals
from mbgd.task.precision import autocast, parameter_dtype
from mbgd.task.task import Task
from mbgd.task.trained import Trained, check_module_hooks, describe_not_held
from mbgd.tracking import NoTracker, Tracker
from mbgd.workers.agreement import Agreement
from mbgd.workers.group import Workers
from mbgd.workers.preemption import NoStop, Stop

NOT_FINITE, LATE_BUFFERS = 1, 2
"""Notes that workers exchange with the gradients, as bits."""

MOST_SKIPPED = 50
"""Steps skipped in a row, in fp16, after which no loss scale will help: each has halved it."""

BeforeUpdate = Callable[[Shard, int | Tensor], None]
"""Gets the shard and the minibatch's weight; every trained parameter's `.grad` is the sum over the minibatch."""


@dataclass
class State:
    """With the parameters and the optimizer's state, all there is to resume from."""

    step: int = 0
    """Optimizer steps completed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each."""
    tracking: dict[str, str] = field(default_factory=dict)
    """The trackers' run ids, so that a resumed run continues them."""


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
    parameters and, where the objective is a module, from the objective's. Raises UsageError, on every worker alike and
    before training, where the settings, the optimizer or the objective break a rule, or the workers do not run the same
    program.
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
        check_same_program(workers, model, objective, optimizer, data, settings)
        self.plan = make_plan(settings, len(data.train), workers.num_workers)
        self.num_steps = count_steps(settings, self.plan)
        averagings.prepare(settings.averaging, self.plan, workers.device)
        self.state = State()
        dtype, device = parameter_dtype(settings.precision), workers.device
        self._task = task = Task(model, objective)
        refuse_odd_parts(task)
        optimizers.check(optimizer)
        check_module_hooks(task)
        extra_state.check(task)
        task.move_(device, dtype)
        self._trained = Trained(task, optimizer)
        self.warnings = self._set_up_modes()
        own_copies = settings.averaging.name is AveragingName.reproducible
        self._loader = Loader(data, self.plan, settings.seed, workers, dtype=dtype, own_copies=own_copies)
        self._buffers = Buffers(task, device)
        self._task_state = TaskState(task, self._buffers)
        self._findings = findings = self._try_out(data, objective)
        self._evaluation = self._make_evaluation(data)
        self._averaging = averagings.create(
            settings.averaging,
            task,
            self._trained,
            self.plan,
            workers,
            parameters_vary=bool(findings.unused_parameters),
        )
        self.averaging_description = self._averaging.describe()
        self._autocast = autocast(settings.precision, device)
        self._watch, self._watch_here = Watch(device), Watch(device)
        self._replicas = Replicas(workers)
        every = [settings.check.replicas_every_steps]
        if isinstance(settings, Config):
            every += [settings.checkpoint.every_steps, settings.checkpoint.memory_every]
        self._compared_every = [one for one in every if one is not None]
        self.before_update: list[BeforeUpdate] = []
        """Called in each step between averaging and update, on every worker."""
        self._update = Update(
            self._trained,
            optimizer,
            settings,
            device,
            self._watch,
            losses_per_example=findings.losses_per_example,
        )
        self._compares_forwards = self.plan.most_forwards > 1
        self._on_gpu = device.type == "cuda"
        self._must_be_finite = settings.precision is not Precision.fp16  # whose overflows are skipped
        self.noise_scale = NoiseScale(settings.noise_scale, self.plan, device)
        self.num_evaluation_examples = 0 if data.evaluation is None else len(data.evaluation)
        self._snapshot_memory = SnapshotMemory(device)
        self._log = self._make_log()
        self._recomputing = self._make_recomputing()

    def _make_recomputing(self) -> Recomputing | None:
        every, by_name = self.settings.check.recompute_every_steps, self._trained.by_name
        if every is None:
            return None
        plan, workers, seed = self.plan, self.workers, self.settings.seed
        return Recomputing(every, plan, workers, seed, by_name, self._gradients_again, self._loader.micro_batch)

    def _set_up_modes(self) -> list[str]:
        """Training mode for what came wholly in evaluation mode; what to tell of it and of parameters left out."""
        told = [describe_not_held(self._trained.not_held)] if self._trained.not_held else []
        for name, module in (("model", self._task.model), ("objective", self._task.objective)):
            if module is not None and set_training(module):
                told.append(
                    f"note: the {name} came in evaluation mode and is trained in training mode. Parts that are to stay "
                    "in evaluation mode, such as a frozen BatchNorm, are left so where other parts are not."
                )
        return told

    def _try_out(self, data: Data, objective: Objective) -> Any:
        for dataset in (data.train, data.evaluation):
            check_skipping(dataset, objective)
        trial = Trial(self._task, self._trained, self._buffers, data, self.plan, self.settings, self.workers.device)
        findings = trial(self._loader.minibatch_indices(0))
        check_targets(data.train, objective, findings.output_shape)
        self._buffers.expect(findings.moving_buffers)
        return findings

    def _make_evaluation(self, data: Data) -> Evaluation | None:
        settings = self.settings
        if data.evaluation is not None:
            output_shape = self._findings.output_shape
            return Evaluation(self._task, self._buffers, data, settings, self.workers, output_shape=output_shape)
        if metrics := settings.evaluation.metrics:
            raise UsageError(
                f"evaluation.metrics={', '.join(metrics)}, but there is no evaluation dataset. Give data.evaluation, "
                "or leave them out."
            )
        return None

    def _make_log(self) -> TrainingLog:
        has_tokens = self._findings.has_tokens
        return TrainingLog(self.settings, self.plan, self.workers, num_steps=self.num_steps, has_tokens=has_tokens)

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
            fingerprints = self._log.fingerprints(metrics, self.state.step, self._loader, self._task)
            tracker.log(self.state.step, {**metrics, **fingerprints})

        if self.workers.is_main:
            for warning in self.warnings:
                print(warning, flush=True)
        evaluation: dict[str, float] = {}
        first_step, last_logged = self.state.step, self._log.last_logged
        self._log = self._make_log()
        self._log.last_logged = last_logged
        is_time_for_checkpoint = Agreement(self.workers)
        shards = self._log.clock.laps(self._loader.shards(first_step, self.num_steps))
        shards = collected_at_steps(shards, first_step)
        for shard in profiler.steps(shards, first_step):
            result = self.train_step(shard)
            self.state.step = shard.step + 1
            tracker.progress(self.state.step)
            if result is not None:
                log(self._metrics(result))
            evaluation = {}
            is_time = is_time_for_checkpoint(self.state.step, checkpoints.due_by_time())
            evaluates = self._evaluates_after(self.state.step)
            if is_time or evaluates or self._compares_after(self.state.step):
                self.check()
            if evaluates:
                with self._log.clock.paused():
                    log(evaluation := self.evaluate())
            if self.state.step == first_step + 1:
                checkpoints.check(self._update.optimizer_state.problems())
            checkpoints.after_step(self.state.step, evaluation, self.snapshot, is_time=is_time)
            if stop.agreed(self.state.step):
                self.check()
                problem = save_last(checkpoints, self.workers, self.state.step, evaluation, self.snapshot)
                self.workers.barrier()  # whoever left first would make torchrun end the others while they write
                raise NotSaved(self.state.step, problem) if problem else Preempted(self.state.step)
        if not evaluation and not any(name.startswith("eval/") for name in self.state.metrics):
            log(evaluation := self.evaluate())
        if self.state.step > 0:
            problem = save_last(checkpoints, self.workers, self.state.step, evaluation, self.snapshot)
            if problem and self.workers.is_main:
                print(f"warning: {problem}. The run's results are written all the same.", flush=True)
        examples_seen = self.plan.examples_seen(self.state.step)
        return Result(
            metrics=self.state.metrics,
            steps=self.state.step,
            examples_seen=examples_seen,
            examples_per_second=(examples_seen - self.plan.examples_seen(first_step)) / self._log.clock.seconds(),
            num_skipped_steps=self._update.num_skipped,
        )

    def check(self) -> None:
        """Raise, on every worker alike, where the state is not finite or not the same on all workers."""
        wrong = self.workers.max_(self._watch_here.indicator() + self._watch.indicator())
        if wrong.item():
            raise self._found(self.state.step - 1)
        if spoilt := not_finite(self._trained.by_name):
            raise UsageError(
                f"after step {self.state.step} parameters are not finite: {shown(spoilt)}. The gradient of that "
                f"step was not, although its loss was. {diagnosis.remedy(self._findings.has_weights)}"
            )
        state = {f"{file}.{name}": t for file, of_file in self._tensors().items() for name, t in of_file.items()}
        values = self._update.values()
        self._replicas.compare(self.state.step, state, {**self._task_state.values(), "optimizer": values})
        if unseen := self._buffers.find_unseen():
            raise UsageError(
                f"by step {self.state.step} the buffers {shown(unseen)} have moved, by an operation that does not tell "
                "torch of it, and not in the trial before training: they were not averaged. Let them move from the "
                "first step on, or change them by operations of torch (copy_, lerp_)."
            )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {**self._task_state.tensors(), "optimizer": self._update.tensors()}

    def snapshot(self) -> Snapshot:
        """The whole state of the run, in memory of its own; UsageError where it is not finite."""
        tensors = self._tensors()
        spoilt = not_finite({**self._trained.by_name, **{f"optimizer.{n}": t for n, t in tensors["optimizer"].items()}})
        if spoilt:
            raise UsageError(
                f"the state after step {self.state.step} is not finite, so it is not saved: {shown(spoilt)}"
            )
        return self._snapshot_memory.snapshot(
            self.state.step,
            tensors=tensors,
            values={
                **self._task_state.values(),
                "optimizer": self._update.values(),
                "metrics": dict(self.state.metrics),
                "noise_scale": self.noise_scale.values(),
                "run": self._kind_of_run(),
                "tracking": dict(self.state.tracking),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; UsageError, with nothing changed, where it does not fit model, optimizer and data."""
        found = differences(snapshot.values["run"], self._kind_of_run())
        found += self._task_state.mismatches(snapshot.tensors)
        found += self._update.misfits(snapshot.tensors["optimizer"], snapshot.values["optimizer"])
        if found:
            raise UsageError("the checkpoint does not fit this run:\n" + "\n".join(f"  - {one}" for one in found))
        self._task_state.restore(snapshot.tensors, snapshot.values)
        self._update.restore(snapshot.tensors["optimizer"], snapshot.values["optimizer"])
        self.state.step, self.state.metrics = snapshot.step, strict_json.numbers(snapshot.values["metrics"])
        self.noise_scale.restore(snapshot.values["noise_scale"])
        self.state.tracking = dict(snapshot.values.get("tracking", {}))
        self._log.last_logged = snapshot.step

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
        self._trained.start_step()
        self._buffers.start_step()
        self._averaging.start()
        self._update.hooks.take_off()
        try:
            return self._step(shard)
        finally:
            self._update.hooks.put_back()

    def _step(self, shard: Shard) -> StepResult | None:
        step, lap = shard.step, self._log.clock.lap
        log = self._log.logs(step)
        measure_noise = self.noise_scale.measures(step)
        want_sums = log or measure_noise or self._findings.has_weights or bool(self._buffers)
        metric_names = self._findings.metric_names if log else ()
        sums = []
        measured = MicroBatchNorms(self._trained.parameters) if measure_noise else None
        self._averaging.norms = measured if self._recomputing is None else self._recomputing.watch(step, measured)
        first, last = shard.micro_batches[0], shard.micro_batches[-1]
        for examples in shard.micro_batches:
            terms = self._forward_backward(step, examples, is_first=examples is first, is_last=examples is last)
            if examples.micro_batch.counts:
                if want_sums:
                    sums.append((examples.micro_batch.number, self._sums(terms, examples.micro_batch, metric_names)))
                elif self._must_be_finite:
                    self._watch_here.check_losses(step, terms.losses)
        lap("forward_backward")
        self._check_parameters(step)
        if self._recomputing is not None:
            self._recomputing.check(shard)
        with part("averaging"):
            notes = self._averaging.finish(self._note())  # every gradient is now the sum over all workers' examples
            if notes is None or any(notes):
                self._heed(notes, shard)
            totals, noise = self._totals(shard, sums, metric_names) if want_sums else (None, None)
            if not want_sums and self._buffers:
                self._take_buffers(shard)
        lap("averaging")
        if totals is not None:
            self._check_totals(shard, totals, log=log)
        weight = totals.weight if totals is not None and self._findings.has_weights else shard.minibatch.size
        for look in self.before_update:
            look(shard, weight)
        with part("optimizer"):
            norms = self._update(step, weight, want_norm=measure_noise or self._on_gpu, want_change=log)
        if self._watch.found():
            raise self._found(step, shard)
        if measure_noise and noise is not None and norms is not None:
            self.noise_scale.add(noise, weight=weight, size=shard.minibatch.size, gradient_norm=norms.gradient)
        lap("optimizer")
        return StepResult(totals, norms) if log and totals is not None and norms is not None else None

    def _forward_backward(self, step: int, examples: Examples, *, is_first: bool, is_last: bool) -> PerExample:
        """Add Σ w_i ∇L_i over this micro-batch to the parameters' gradients."""
        micro_batch = examples.micro_batch
        if is_first and not is_last:
            self._trained.remember_flags()
        elif not is_first:
            self._buffers.put_back()
            self._trained.put_back_flags()
        key_generators(self.workers.device, self.settings.seed, step, micro_batch.number)
        with self._averaging.micro_batch(micro_batch, is_last=is_last):
            with part("forward"), self._autocast:
                terms = self._averaging.task(examples.batch, micro_batch.size)
            with part("backward"):
                # Backward from the vector of losses, w_i into L_i, is the gradient of their weighted sum.
                torch.autograd.backward(terms.losses, self._update.backward_weights(terms, counts=micro_batch.counts))
        self._buffers.end_micro_batch(micro_batch.number, micro_batch.size, counts=micro_batch.counts)
        return terms

    def _forward_again(self, step: int, examples: Examples) -> PerExample:
        """The forward of a micro-batch once more, as it was."""
        self._buffers.put_back()
        key_generators(self.workers.device, self.settings.seed, step, examples.micro_batch.number)
        with self._autocast:
            terms: PerExample = self._task(examples.batch, examples.micro_batch.size)
            return terms

    def _gradients_again(self, step: int, examples: Examples) -> dict[Tensor, Tensor]:
        """The gradients of a micro-batch once more, as the averaging takes them; nothing is changed."""
        terms = self._forward_again(step, examples)
        held = self._trained.with_gradient()
        weights = self._update.backward_weights(terms, counts=True)
        found = torch.autograd.grad(terms.losses, held, weights, allow_unused=True)
        self._buffers.put_back()
        return {
            p: g + 0.0 if self._findings.unused_parameters else g
            for p, g in zip(held, found, strict=True)
            if g is not None
        }

    def _sums(self, terms: PerExample, micro_batch: MicroBatch, metric_names: Sequence[str]) -> Tensor:
        """What of a micro-batch is added up beside gradients and buffers: for the means and the noise."""
        sums = terms.sums(metric_names)
        if self._averaging.norms is None:
            return sums
        squared_norm = self._averaging.norms.squared(micro_batch.number) / self._update.loss_scale().square()
        return torch.cat([sums, noise_sums(squared_norm, weight=sums[1])])

    def _totals(
        self, shard: Shard, sums: Sequence[tuple[int, Tensor]], metric_names: tuple[str, ...]
    ) -> tuple[Totals, Tensor | None]:
        """Add up `_sums` over micro-batches and workers; the moving buffers become their means."""
        num_leaves = self.plan.num_micro_batches(shard.minibatch.size)
        num_noise_sums = NUM_NOISE_SUMS if self._averaging.norms is not None else 0
        sizes = [NUM_SUMS + len(metric_names), num_noise_sums, self._buffers.num_values, 1]
        wrong = self._watch_here.indicator()
        moved = dict(self._buffers.sums())
        leaves = [(n, torch.cat([one, *([moved[n]] if n in moved else []), wrong])) for n, one in sums]
        total = self._averaging.sum(leaves, num_leaves=num_leaves, num_values=sum(sizes))
        means, noise, buffers, wrong_anywhere = torch.split(total, sizes)
        if self._buffers:
            self._set_buffers(shard, buffers)
        totals = Totals(means, metric_names, wrong_anywhere)
        self._log.count_tokens(totals.count)
        return totals, noise if num_noise_sums else None

    def _take_buffers(self, shard: Shard) -> None:
        """Average the buffers in a step in which nothing else is added up."""
        num_leaves = self.plan.num_micro_batches(shard.minibatch.size)
        num_values = self._buffers.num_values
        self._set_buffers(
            shard, self._averaging.sum(self._buffers.sums(), num_leaves=num_leaves, num_values=num_values)
        )

    def _set_buffers(self, shard: Shard, totals: Tensor) -> None:
        are_alike = self._buffers.take(totals, shard.minibatch.size)
        self._watch.check_true(Wrong.buffers, shard.step, are_alike)
        if self._watch.found():
            raise UsageError(f"step {shard.step + 1}: {self._buffers.unlike()}")

    def _heed(self, notes: Sequence[int] | None, shard: Shard) -> None:
        """Stop where a worker's loss is not finite; buffers that have begun to move do so on all workers from now on.

        notes: every worker's; None: only one's own is known.
        """
        if notes is not None and any(note & NOT_FINITE for note in notes):
            raise self._found(shard.step, shard)
        mine = sorted(self._buffers.late_names)
        if mine if notes is None else any(note & LATE_BUFFERS for note in notes):
            names = sorted({name for of_worker in self.workers.gather(mine) for name in of_worker})
            self._buffers.expect(names)

    def _note(self) -> int:
        return NOT_FINITE * self._watch_here.found() | LATE_BUFFERS * bool(self._buffers.late_names)

    def _check_parameters(self, step: int) -> None:
        """A forward must not change what is trained; the trial before training has refused what it saw."""
        if self._compares_forwards and (changed := self._trained.changed()):
            raise UsageError(
                f"the forward of step {step + 1} changed parameters in place ({shown(changed)}), which it did not do "
                "before training. Each worker and micro-batch would change them in another way, so that the workers' "
                "copies differ. Let the optimizer alone change parameters; bound them by a parametrization."
            )

    def _check_totals(self, shard: Shard, totals: Totals, *, log: bool) -> None:
        """Stop, on every worker alike and before the update, where weights or losses make no mean."""
        self._watch.check_sums(shard.step, totals.sums, loss=self._must_be_finite)
        if (log and totals.wrong_anywhere) or self._watch.found():
            raise self._found(shard.step, shard)
        if log and not self._must_be_finite and self._update.num_skipped_in_a_row >= MOST_SKIPPED:
            raise UsageError(
                f"step {shard.step + 1}: the gradients of the last {self._update.num_skipped_in_a_row} steps were not "
                "finite in fp16, at ever smaller loss scales. Use precision=bf16 or fp32, or a smaller optimizer.lr."
            )

    def _found(self, step: int, shard: Shard | None = None) -> UsageError:
        """The error of a run that cannot go on; called by every worker alike, after the forwards of `step`."""
        known = [one for watch in (self._watch, self._watch_here) if (one := watch.read()) is not None]
        found = min(known, default=None, key=lambda one: one[0])
        examples: list[int] = []
        if found is not None and found == (step, Wrong.loss) and shard is not None:
            indices = self._loader.minibatch_indices(step)
            examples = diagnosis.examples_not_finite(shard, self._forward_again, indices)
        return diagnosis.stop(step, found, self._trained, self._findings.has_weights, examples, self.workers)

    def _metrics(self, result: StepResult) -> dict[str, float]:
        return self._log.metrics(
            self.state.step, result.totals, result.norms, self.optimizer, self._update, self.noise_scale
        )

    def _compares_after(self, num_steps: int) -> bool:
        return num_steps == self.num_steps or any(num_steps % every == 0 for every in self._compared_every)

    def _evaluates_after(self, num_steps: int) -> bool:
        if self._evaluation is None:
            return False
        every = self.settings.evaluation.every_steps or self.plan.steps_per_epoch
        return num_steps % every == 0 or num_steps == self.num_steps

    @property
    def evaluation_names(self) -> list[str]:
        """Names of what `evaluate` gives."""
        if self._evaluation is None:
            return []
        names = ("loss", *self._evaluation.metric_names, *self.settings.evaluation.metrics)
        return [f"eval/{name}" for name in names]

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation examples by names such as eval/loss; empty without an evaluation dataset."""
        if self._evaluation is None:
            return {}
        return {f"eval/{name}": value for name, value in self._evaluation(self._averaging.sum).items()}

    def objective_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the objective, on the CPU; empty where it has none."""
        tensors = self._task_state.tensors().get("objective", {})
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def weights_sha256(self) -> str:
        """Hash of the parameters of model and objective: equal if and only if they are, bit for bit."""
        return weights_sha256(self._task)
