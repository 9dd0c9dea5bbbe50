"""The training loop."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mbgd.after_step import AfterStep
from mbgd.batches.loader import Data
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checkpoints.handover import Carried, Progress, Told
from mbgd.checkpoints.keeper import Keeper
from mbgd.checkpoints.parts import Parts
from mbgd.checkpoints.run_state import RunState
from mbgd.checkpoints.saving import save_last
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checkpoints.task_state import TaskState
from mbgd.checks.replicas import Replicas
from mbgd.checks.setup import set_up
from mbgd.config import Settings
from mbgd.errors import ObserverFailed
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
        self.progress = Progress(is_over=True)
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
        state, setup, first_step = self.state, self.setup, self.state.step
        self._compared[0].put_back_kept()  # an earlier fit may have ended with other weights than the last step's
        tracker, checkpoints = tracker or NoTracker(), self.train_step.together(checkpoints)
        after_step = AfterStep(self, tracker, checkpoints, stop or NoStop())
        setup.tell(*setup.warnings)
        self.observers.at_start(first_step, writer(tracker))
        self.train_step.begin(first_step)
        self.log.clock.restart()
        if first_step == 0 and setup.settings.evaluation.at_start and self.progress.stops is None:
            after_step.before_first()
        try:
            self._train(after_step, profiler or NoProfiler())
        except ObserverFailed:
            checkpoints.alone(state.step, self.snapshot)
            raise
        if not self.progress.evaluation and not any(name.startswith("eval/") for name in state.metrics):
            after_step.evaluate()
        evaluation = self.progress.evaluation or {}
        if state.step > 0 and (problem := save_last(checkpoints, setup.workers, state.step, evaluation, self.snapshot)):
            setup.tell(f"warning: {problem}. The run's results are written all the same.")
        if setup.workers.go_on or self.observers.act_at_end:
            self._compared[0].keep(state.step)
        weights_step = self.observers.at_end()
        metrics = {**state.metrics, **({} if weights_step is None else self.evaluate())}
        if weights_step is None and not setup.workers.go_on:
            self._compared[0].forget()
        self.train_step.end()
        seen, seen_before = (setup.plan.examples_seen(step) for step in (state.step, first_step))
        return Result(
            metrics=metrics,
            steps=state.step,
            examples_seen=seen,
            examples_per_second=(seen - seen_before) / self.log.clock.seconds(),
            num_skipped_steps=self.train_step.update.num_skipped,
            stopped_by=self.observers.stopped_by,
            weights_step=weights_step,
        )

    def _train(self, after_step: AfterStep, profiler: Profiler) -> None:
        """Make the steps, and after each what follows it."""
        first_step = self.state.step
        if not self.progress.is_over:
            after_step()
        num_steps = first_step if self.observers.stopped_by else self.setup.num_steps
        shards = self.log.clock.laps(self.setup.loader.shards(first_step, num_steps))
        for shard in profiler.steps(collected_at_steps(shards, first_step), first_step):
            done = self.train_step(shard)
            self.state.step = done.step + 1
            self.observers.after_update(done)
            self.progress = Progress(self.state.step)
            after_step(done, is_first=done.step == first_step)
            if self.observers.stopped_by:
                break

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
        self._compared[0].forget()
        self.setup.buffers.start_step()  # from now on these are the values before the step
        self.log.last_logged = snapshot.step
        self.progress = Progress(snapshot.step, is_over=True)

    def carried(self, told: Sequence[Told]) -> Carried | None:
        """The state for another group of workers, without a collective; None where this worker does not have it all.

        The trainer makes no further step.
        """
        step = self.state.step
        if self.progress.step != step or not self.train_step.update.state.recall(step):
            return None
        self._compared[0].put_back()  # forwards of a step that was not finished have changed buffers
        return Carried(self.snapshot(), self.progress, list(told))

    def take_over(self, carried: Carried) -> None:
        """Go on in the middle of what another group did."""
        self.restore(carried.snapshot)
        self.progress = carried.progress

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation examples by names such as eval/loss; empty without an evaluation dataset."""
        return self.observers.evaluated(lambda: self.evaluations(self.train_step.averaging.sum))

    def weights_sha256(self) -> str:
        """Hash of the parameters of model and objective: equal if and only if the parameters are equal, bit for bit."""
        return weights_sha256(self.setup.task)
