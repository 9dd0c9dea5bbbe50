"""One run from its configuration to its results, on one worker: compose → workers → build → fit → results.

A module of its own because torch takes seconds to import: --help, tab completion and the parent of a sweep do not need
it.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mbgd import versions
from mbgd.building.build import build_trainer, resolved_yaml, run_name, typed
from mbgd.checkpoints import saving
from mbgd.checks.same_program import check_same_config
from mbgd.cli import failing, launching
from mbgd.config import Config, must_match, resolved
from mbgd.errors import FAILED, Preempted, UsageError
from mbgd.files.run_files import REPORT
from mbgd.measuring import profiling
from mbgd.runs import wording
from mbgd.runs.initial_weights import start_from
from mbgd.runs.resume import resume
from mbgd.runs.run_folder import RunFolder, open_run_folder
from mbgd.runs.trackers import check_installed, open_trackers
from mbgd.step.done import Result
from mbgd.text.escaping import plain
from mbgd.tracking import Trackers, console, told_of_its_end
from mbgd.workers.group import start_workers
from mbgd.workers.log import start_log
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
        report = folder.path / REPORT if config.tracking.report else None
        print(wording.describe_end(result, report, console.width()))


def _train(
    composed: Any, config: Config, choices: Mapping[str, Any], trackers: Trackers
) -> tuple[Result, RunFolder] | None:
    """Train on this worker; the main one also opens the trackers, and returns the result and the locked folder."""
    backend = config.backend
    with start_workers(backend.name.value, backend.timeout_seconds, device=backend.device.value) as workers:
        text = resolved_yaml(composed)
        plain = yaml.safe_load(text)
        check_same_config(workers, plain)
        trainer = build_trainer(config, workers)
        name = run_name(config.run, choices)
        folder = open_run_folder(config.run, name, workers, may_hold_a_run=config.resume.from_ != "never")
        start_log(folder.log_path(workers.rank), workers.rank, workers.num_workers)
        if not resume(trainer, folder, config, plain):
            if workers.is_main:
                print(f"{folder.path} holds this run already, complete; give another run.dir for a new one.")
            return None
        if trainer.state.step == 0:
            start_from(trainer, config.init, quiet=config.tracking.quiet)
        profiler = profiling.create(config.profile, folder.path, workers, quiet=config.tracking.quiet)
        checkpoint = resolved(config.checkpoint, trainer.setup.plan)
        checkpoints = saving.create(checkpoint, folder.path, folder.checkpoints_path, must_match(plain), workers)
        if workers.is_main:
            tell_of_another_version(folder.path)
            folder.write_config(text)
            open_trackers(trackers, config, folder, trainer)
        try:
            result = trainer.fit(trackers, checkpoints, StopOnSignal(workers), profiler)
            if workers.is_main:
                folder.write_results(result, trainer)
        except UsageError as error:
            error.exit_code = FAILED
            raise
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
