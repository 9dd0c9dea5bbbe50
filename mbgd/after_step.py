"""What follows an optimizer step."""

from typing import Protocol

from mbgd.checkpoints.handover import Progress
from mbgd.checkpoints.keeper import Keeper
from mbgd.checkpoints.run_state import RunState
from mbgd.checkpoints.saving import save_last
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checks.setup import Setup
from mbgd.errors import NotSaved, Preempted
from mbgd.evaluation.evaluator import Evaluations
from mbgd.step.done import Done
from mbgd.step.observers import Observers
from mbgd.step.train_step import TrainStep
from mbgd.tracking import Tracker
from mbgd.tracking.training_log import TrainingLog
from mbgd.workers.agreement import Agreement
from mbgd.workers.preemption import Stop


class OfTrainer(Protocol):
    """What it needs of the trainer."""

    setup: Setup
    evaluations: Evaluations
    log: TrainingLog
    observers: Observers
    train_step: TrainStep
    state: RunState
    progress: Progress

    def check(self) -> None: ...

    def snapshot(self) -> Snapshot: ...

    def evaluate(self) -> dict[str, float]: ...


class AfterStep:
    """What follows a step: it is logged, compared, evaluated and saved, and training may stop there.

    The trainer's `progress` notes what is done, so that another group of workers can go on in the middle of it.
    """

    def __init__(self, trainer: OfTrainer, tracker: Tracker, checkpoints: Keeper, stop: Stop) -> None:
        self._trainer, self._tracker, self._checkpoints, self._stop = trainer, tracker, checkpoints, stop
        self._is_time_for_checkpoint = Agreement(trainer.setup.workers)

    def __call__(self, done: Done | None = None, *, is_first: bool = False) -> None:
        """done: None where another group made the step, and logged it. is_first: of the steps that this one makes."""
        trainer, checkpoints = self._trainer, self._checkpoints
        step, progress = trainer.state.step, trainer.progress
        self._tracker.progress(step)
        if done is not None and trainer.log.logs(done.step):
            self.log(trainer.log.metrics(done, trainer.train_step.metrics()))
        is_time = self._is_time_for_checkpoint(step, checkpoints.due_by_time())
        evaluates = trainer.evaluations.are_due(step)
        if is_first:
            checkpoints.check(trainer.train_step.update.state.problems() + trainer.observers.problems())
        if is_time or evaluates or is_first or trainer.setup.compares_after(step):
            trainer.check()
        if evaluates and progress.evaluation is None:
            self.evaluate()
        evaluation = progress.evaluation or {}
        self._ask_observers()
        checkpoints.after_step(step, evaluation, trainer.snapshot, is_time=is_time)
        if self._stop.agreed(step):
            self._save_and_stop(evaluation)
        progress.is_over = True

    def before_first(self) -> None:
        """Evaluate before the first step."""
        if self._trainer.progress.evaluation is None:
            self.evaluate()
        self._ask_observers()

    def _ask_observers(self) -> None:
        """Tell them of the evaluation, if there was one, and stop where one wants to."""
        trainer, step, progress = self._trainer, self._trainer.state.step, self._trainer.progress
        if progress.evaluation:
            if progress.stops is None:
                progress.stops = trainer.observers.after_evaluation(step, progress.evaluation)
            trainer.observers.stop(step, progress.stops)

    def log(self, metrics: dict[str, float]) -> None:
        trainer = self._trainer
        trainer.state.metrics.update(metrics)
        self._tracker.log(trainer.state.step, {**metrics, **trainer.log.fingerprints(metrics, trainer.state.step)})

    def evaluate(self) -> None:
        with self._trainer.log.clock.paused():
            evaluation = self._trainer.evaluate()
            self.log(evaluation)
        self._trainer.progress.evaluation = evaluation

    def _save_and_stop(self, evaluation: dict[str, float]) -> None:
        trainer = self._trainer
        trainer.check()
        step, workers = trainer.state.step, trainer.setup.workers
        problem = save_last(self._checkpoints, workers, step, evaluation, trainer.snapshot)
        workers.barrier()  # torchrun ends the others as soon as one leaves, and they may still write
        raise NotSaved(step, problem) if problem else Preempted(step)
