"""The training loop."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mbgd.batches.loader import Data, Shard
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checkpoints.keeper import Keeper
from mbgd.checkpoints.parts import Parts
from mbgd.checkpoints.run_state import RunState
from mbgd.checkpoints.saving import save_last
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checkpoints.task_state import TaskState
from mbgd.checks.replicas import Replicas
from mbgd.checks.setup import set_up
from mbgd.config import Settings
from mbgd.errors import NotSaved, ObserverFailed, Preempted
from mbgd.evaluation.evaluator import Evaluations
from mbgd.measuring.garbage import collected_at_steps
from mbgd.measuring.profiling import NoProfiler, Profiler
from mbgd.step.done import Result
from mbgd.step.observers import Observers
from mbgd.step.train_step import TrainStep
from mbgd.task.objective import Objective
from mbgd.tracking import NoTracker, Tracker
from mbgd.tracking.base import writer
from mbgd.tracking.training_log import TrainingLog
from mbgd.workers.agreement import Agreement
from mbgd.workers.group import Workers
from mbgd.workers.preemption import NoStop, Stop


class Trainer:
    """Trains a model, on this worker as one of `workers`.

    The model is moved to the worker's device and the precision's dtype; `optimizer` must have been made from its
    parameters and, if the objective is a module, from the objective's. Raises UsageError, the same on every worker and
    before training, if the settings, the optimizer or the objective break a rule, or if the workers do not run the same
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
        observers: Mapping[str, Any] | Sequence[Any] = (),
    ) -> None:
        self.setup = setup = set_up(model, objective, optimizer, data, settings, workers or Workers())
        self.evaluations = Evaluations(setup)
        self.log = TrainingLog(setup)
        self.observers = Observers(observers, setup.workers, self.evaluations.names)
        self.train_step = TrainStep(setup, self.log.logs, self.log.clock, self.observers.of_users())
        self.train_step.observers.append(self.log)
        self.state = RunState(setup)
        self._replicas = Replicas(setup.workers)
        state_of_task = TaskState(setup.task, setup.buffers)
        self._compared = (state_of_task, self.train_step.update.state.copied)
        parts = (self.state, state_of_task, self.train_step.update.state, self.train_step.noise_scale, self.observers)
        self._parts = Parts(parts, setup.trained.by_name, setup.workers.device)
        self.observers.before_training(self)

    def fit(
        self,
        tracker: Tracker | None = None,
        checkpoints: Keeper | None = None,
        stop: Stop | None = None,
        profiler: Profiler | None = None,
    ) -> Result:
        """Train from `state.step` up to the last step, evaluate, and return the result.

        checkpoints: those that this worker keeps. When `stop` says so, raises Preempted if the state is saved, and
        NotSaved if it could not be, the same on every worker. An observer that raises ends the run as ObserverFailed,
        with the state after its step saved where one worker has all of it.
        """
        tracker, stop, checkpoints = tracker or NoTracker(), stop or NoStop(), self.train_step.together(checkpoints)
        state, setup, first_step = self.state, self.setup, self.state.step
        setup.tell(*setup.warnings)
        self.observers.at_start(first_step, writer(tracker))
        self.train_step.begin(first_step)
        self.log.clock.restart()
        if first_step == 0 and setup.settings.evaluation.at_start:
            with self.log.clock.paused():
                self._log(tracker, self.evaluate())
        try:
            evaluation = self._train(tracker, checkpoints, stop, profiler or NoProfiler())
        except ObserverFailed:
            checkpoints.alone(state.step, self.snapshot)
            raise
        if not evaluation and not any(name.startswith("eval/") for name in state.metrics):
            self._log(tracker, evaluation := self.evaluate())
        if state.step > 0 and (problem := save_last(checkpoints, setup.workers, state.step, evaluation, self.snapshot)):
            setup.tell(f"warning: {problem}. The run's results are written all the same.")
        if weights_step := self.observers.at_end():
            state.metrics.update(self.evaluate())
        self.train_step.end()
        return self._result(first_step, weights_step)

    def _train(self, tracker: Tracker, checkpoints: Keeper, stop: Stop, profiler: Profiler) -> dict[str, float]:
        """Make the steps; returns the metrics of the evaluation after the last one, if there was one."""
        state, setup, first_step = self.state, self.setup, self.state.step
        evaluation: dict[str, float] = {}
        is_time_for_checkpoint = Agreement(setup.workers)
        for shard in self._shards(profiler):
            done = self.train_step(shard)
            state.step = done.step + 1
            self.observers.after_update(done)
            tracker.progress(state.step)
            if self.log.logs(done.step):
                self._log(tracker, self.log.metrics(done, self.train_step.metrics()))
            is_time = is_time_for_checkpoint(state.step, checkpoints.due_by_time())
            evaluates = self.evaluations.are_due(state.step)
            if state.step == first_step + 1:
                checkpoints.check(self.train_step.update.state.problems() + self.observers.problems())
            if is_time or evaluates or setup.compares_after(state.step) or state.step == first_step + 1:
                self.check()
            evaluation = {}
            if evaluates:
                with self.log.clock.paused():
                    self._log(tracker, evaluation := self.evaluate())
                self.observers.after_evaluation(state.step, evaluation)
            checkpoints.after_step(state.step, evaluation, self.snapshot, is_time=is_time)
            if stop.agreed(state.step):
                self._stop(checkpoints, evaluation)
            if self.observers.stopped_by:
                break
        return evaluation

    def _shards(self, profiler: Profiler) -> Iterable[Shard]:
        first_step = self.state.step
        num_steps = first_step if self.observers.stopped_by else self.setup.num_steps
        shards = self.log.clock.laps(self.setup.loader.shards(first_step, num_steps))
        return profiler.steps(collected_at_steps(shards, first_step), first_step)

    def _log(self, tracker: Tracker, metrics: dict[str, float]) -> None:
        self.state.metrics.update(metrics)
        tracker.log(self.state.step, {**metrics, **self.log.fingerprints(metrics, self.state.step)})

    def _stop(self, checkpoints: Keeper, evaluation: dict[str, float]) -> None:
        self.check()
        step, workers = self.state.step, self.setup.workers
        problem = save_last(checkpoints, workers, step, evaluation, self.snapshot)
        workers.barrier()  # torchrun ends the others as soon as one leaves, and they may still write
        raise NotSaved(step, problem) if problem else Preempted(step)

    def _result(self, first_step: int, weights_step: int | None) -> Result:
        examples_seen = self.setup.plan.examples_seen(self.state.step)
        return Result(
            metrics=self.state.metrics,
            steps=self.state.step,
            examples_seen=examples_seen,
            examples_per_second=(examples_seen - self.setup.plan.examples_seen(first_step)) / self.log.clock.seconds(),
            num_skipped_steps=self.train_step.update.num_skipped,
            stopped_by=self.observers.stopped_by,
            weights_step=weights_step,
        )

    def check(self) -> None:
        """Raise, the same on every worker, if the state is not finite or differs between workers."""
        self.train_step.check_state(self.state.step)
        self._replicas.compare_parts(self.state.step, self._compared)
        self.train_step.alarm.check_buffers(self.state.step)

    def snapshot(self) -> Snapshot:
        """The whole state of the run, in memory of its own; UsageError if it is not finite."""
        return self._parts.snapshot(self.state.step)

    def restore(self, snapshot: Snapshot) -> None:
        """Resume from a snapshot; UsageError, with nothing changed, if it does not fit model, optimizer and data."""
        self._parts.restore(snapshot)
        self.log.last_logged = snapshot.step

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation examples by names such as eval/loss; empty without an evaluation dataset."""
        return self.observers.evaluated(lambda: self.evaluations(self.train_step.averaging.sum))

    def weights_sha256(self) -> str:
        """Hash of the parameters of model and objective: equal if and only if the parameters are equal, bit for bit."""
        return weights_sha256(self.setup.task)
