"""One run from its configuration to its results, on one worker: compose → workers → build → fit → results.

A module of its own because torch takes seconds to import: --help, tab completion and the parent of a sweep do not need
it.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mbgd import versions
from mbgd.building.build import SeededData, build_trainer, resolved_yaml, run_name, typed
from mbgd.checkpoints import saving
from mbgd.checkpoints.handover import Carried, hand_over
from mbgd.checkpoints.keeper import Keeper
from mbgd.checks.same_program import check_newcomer, check_same_config
from mbgd.cli import failing, launching
from mbgd.config import Config, DeviceName, Recovery, must_match, resolved
from mbgd.errors import FAILED, GroupChanged, Preempted, RunComplete, UsageError, WorkersLost
from mbgd.files.run_files import REPORT
from mbgd.measuring import profiling
from mbgd.runs import wording
from mbgd.runs.initial_weights import start_from
from mbgd.runs.resume import reopen, resume
from mbgd.runs.run_folder import RunFolder, open_run_folder
from mbgd.runs.trackers import check_installed, open_trackers
from mbgd.step.done import Result
from mbgd.text.escaping import plain
from mbgd.tracking import Trackers, console, told_of_its_end
from mbgd.tracking.recent import Recent
from mbgd.trainer import Trainer
from mbgd.workers.group import Workers, num_workers_from_environment, start_workers
from mbgd.workers.log import start_log
from mbgd.workers.membership import Membership, members_of_launcher
from mbgd.workers.place import place
from mbgd.workers.preemption import EXIT_CODE, StopOnSignal


def run(composed: Any, choices: Mapping[str, Any]) -> None:
    """Train the configuration that Hydra has composed from the `choices` of its groups."""
    config = typed(composed)
    check_installed(config.tracking)
    trackers = Trackers()
    with told_of_its_end(trackers):  # closed after the last barrier: no worker waits while the main one uploads
        done = _train(composed, config, choices, trackers)
    if done is not None and not config.tracking.quiet:
        result, folder = done
        report = folder.path / REPORT if REPORT in trackers.closed else None
        print(wording.describe_end(result, report, console.width()))


def _train(
    composed: Any, config: Config, choices: Mapping[str, Any], trackers: Trackers
) -> tuple[Result, RunFolder] | None:
    """Train on this worker; the main one also opens the trackers, and returns the result and the locked folder."""
    backend, membership = config.backend, None
    launched_rank = place().rank
    if config.recovery is Recovery.continue_ and num_workers_from_environment() > 1:
        membership = members_of_launcher(backend.timeout_seconds)
    training = Training(composed, config, choices, trackers, membership, launched_rank)
    with suppress(RunComplete):
        if membership is not None and membership.is_newcomer:
            training.prepare_to_join(membership)
            membership.join(backend.timeout_seconds, training.notes_signals())
        while True:
            try:
                with start_workers(
                    backend.name.value, backend.timeout_seconds, device=backend.device.value, membership=membership
                ) as workers:
                    return training.on(workers)
            except GroupChanged:
                assert membership is not None
            except UsageError as error:
                if training.has_begun:
                    error.exit_code = FAILED
                raise
            training.leave_group()
            membership.move_on()
    return None


class Training:
    """One worker's part of a run, in one group of workers after another."""

    def __init__(
        self,
        composed: Any,
        config: Config,
        choices: Mapping[str, Any],
        trackers: Trackers,
        membership: Membership | None,
        launched_rank: int,
    ) -> None:
        """launched_rank: names this process's log, whatever its rank becomes."""
        self._config, self._choices, self._membership = config, choices, membership
        self._trackers, self._tracker = trackers, Recent(trackers)
        self._text, self._launched_rank = resolved_yaml(composed), launched_rank
        self._plain = yaml.safe_load(self._text)
        self._seeded: SeededData | None = None
        self._trainer: Trainer | None = None
        self._folder: RunFolder | None = None
        self._checkpoints: Keeper | None = None
        self._stop: StopOnSignal | None = None
        self._carried: Carried | None = None
        self.has_begun = self._writes = self._has_log = False

    def on(self, workers: Workers) -> tuple[Result, RunFolder] | None:
        """Train in this group from its start, or from where the group before it was."""
        of_config = check_same_config(workers, self._plain)
        if self._membership is not None:
            self._membership.begin(workers.backend)
        self.prepare()
        trainer = build_trainer(self._config, workers, self._seeded)
        carried = None if self._membership is None else hand_over(workers, self._carried)
        if carried is None and self.has_begun:
            raise WorkersLost("no worker that is left has the whole state. The run goes on from its last checkpoint.")
        if self._membership is not None and not self.has_begun and workers.is_main:
            self._membership.describe({**trainer.setup.program, **of_config})
        folder = self._folder = self._open_folder(workers)
        if not self._has_log:
            start_log(folder.log_path(self._launched_rank), self._launched_rank, workers.num_workers)
            self._has_log = True
        if carried is not None:
            self._go_on(trainer, folder, carried)
        elif not self._begin(trainer, folder):
            return None
        self._trainer, self._carried = trainer, None
        self._open(trainer, folder)
        self.has_begun = True
        self._tracker.catch_up(carried.told if carried is not None else ())
        return self._fit(trainer, folder)

    def prepare(self) -> None:
        """Build the datasets, if that has not been done."""
        self._seeded = self._seeded or SeededData(self._config)

    def prepare_to_join(self, membership: Membership) -> None:
        """As a newcomer: do what the others should not wait for; UsageError where they run another program."""
        self.prepare()
        alone = Workers()
        mine = check_same_config(alone, self._plain)
        if self._config.backend.device is not DeviceName.cuda:  # a trainer of one worker, which does all slow imports
            mine = {**build_trainer(self._config, alone, self._seeded).setup.program, **mine}
        if (of_others := membership.program()) is not None:
            check_newcomer(mine, of_others)

    def notes_signals(self) -> Callable[[], bool]:
        """From now on a signal to stop does not end this process at once; returns whether there was one."""
        self._stop = StopOnSignal(Workers(), self._membership)
        return self._stop.is_asked

    def leave_group(self) -> None:
        """Take the state along, and free what belongs to the group."""
        if self._trainer is not None:
            self._carried = self._trainer.carried(self._tracker.told)
            self._trainer = None
        gc.collect()  # the memory that the workers shared

    def _open_folder(self, workers: Workers) -> RunFolder:
        """The run's folder; the main worker holds its lock."""
        known, run = self._folder, self._config.run
        if workers.broadcast(known is not None and known.is_held):  # it was the main worker of the last group, too
            path = workers.broadcast(None if known is None else str(known.path))
            return known or RunFolder(Path(path))
        may_hold_a_run = known is not None or self._config.resume.from_ != "never"
        if known is not None:
            run = replace(run, dir=str(known.path))
        return open_run_folder(run, run_name(run, self._choices), workers, may_hold_a_run=may_hold_a_run)

    def _begin(self, trainer: Trainer, folder: RunFolder) -> bool:
        """Begin the run, or resume it from a checkpoint; False if it is complete."""
        if not resume(trainer, folder, self._config, self._plain):
            if trainer.setup.workers.is_main:
                print(f"{folder.path} holds this run already, complete; give another run.dir for a new one.")
            return False
        if trainer.state.step == 0:
            start_from(trainer, self._config.init, quiet=self._config.tracking.quiet)
            if self._membership is not None:  # as after resuming, each worker's pieces are with the others from here on
                trainer.train_step.begin(0)
        return True

    def _go_on(self, trainer: Trainer, folder: RunFolder, carried: Carried) -> None:
        """Go on from the state of the group before."""
        workers, problem = trainer.setup.workers, ""
        trainer.take_over(carried)
        trainer.setup.warnings.clear()  # they have been told
        if workers.is_main and not self._writes:  # nobody knows which lines the lost main worker has written
            told = carried.told
            problem = reopen(folder, told[0][1] - 1 if told else trainer.state.step, None)
        if problem := workers.broadcast(problem):
            raise UsageError(problem)
        one = workers.num_workers == 1
        trainer.setup.tell(
            f"recovery    {workers.num_workers} worker{'' if one else 's'} go{'es' if one else ''} on after step "
            f"{trainer.state.step}"
        )

    def _open(self, trainer: Trainer, folder: RunFolder) -> None:
        """Open what this worker writes to: checkpoints and, on the main worker, the trackers."""
        workers, begins_to_write = trainer.setup.workers, trainer.setup.workers.is_main and not self._writes
        if self._checkpoints is None or begins_to_write:
            checkpoint = resolved(self._config.checkpoint, trainer.setup.plan)
            identity = must_match(self._plain)
            self._checkpoints = saving.create(checkpoint, folder.path, folder.checkpoints_path, identity, workers)
        if begins_to_write:
            self._writes = True
            self._tracker.told.clear()  # until here it went to no file
            tell_of_another_version(folder.path)
            folder.write_config(self._text)
            open_trackers(self._trackers, self._config, folder, trainer)

    def _fit(self, trainer: Trainer, folder: RunFolder) -> tuple[Result, RunFolder] | None:
        workers, config = trainer.setup.workers, self._config
        if self._stop is None:
            self._stop = StopOnSignal(workers, self._membership)
        else:
            self._stop.meet(workers)
        profiler = profiling.create(config.profile, folder.path, workers, quiet=config.tracking.quiet)
        try:
            result = trainer.fit(self._tracker, self._checkpoints, self._stop, profiler)
            if workers.is_main:
                folder.write_results(result, trainer)
        except Preempted as stopped:
            stopped.folder = str(folder.path)
            raise
        return (result, folder) if workers.is_main else None


def run_or_explain(composed: Any, choices: Mapping[str, Any]) -> None:
    """`run`; an exception is reported in a few lines, once for all workers, and fully in the log."""
    with failing.explained("training"):
        try:
            run(composed, choices)
        except Preempted as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"{stopped}; {how_to_go_on(stopped.folder)}", flush=True)
            sys.exit(EXIT_CODE)


def how_to_go_on(folder: str) -> str:
    """How to go on with a stopped run: if the command is known, ready to paste."""
    command = os.environ.get(launching.COMMAND)
    if command is None:
        return f"the same command goes on from there if it names the run: run.dir={plain(folder)}"
    return f"saved in {plain(folder)}. To go on: {launching.with_folder(command, folder)}"


def tell_of_another_version(folder: Path) -> None:
    """Print a note if another version of mbgd began this run."""
    try:
        before = json.loads((folder / "run.json").read_bytes())["environment"]["mbgd"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != versions.of_mbgd():
        print(f"note: mbgd {plain(before)} began this run; mbgd {versions.of_mbgd()} goes on with it", flush=True)
