"""One run from its configuration to its results, on one worker: compose → workers → build → fit → results.

Apart from `train.py` because torch takes seconds to import, for which --help, tab completion and the parent of a sweep
need not wait.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from mbgd import profiling, saving
from mbgd.build import build_trainer, resolved_yaml, run_name, typed
from mbgd.config import identity
from mbgd.errors import NotSaved, Preempted, UsageError, WorkersLost
from mbgd.preemption import EXIT_CODE, StopOnSignal
from mbgd.resume import resume
from mbgd.run_folder import open_run_folder
from mbgd.tracking import NoTracker, Tracker, told_of_its_end, wording
from mbgd.tracking.opening import check_installed, open_trackers
from mbgd.worker_log import start_log
from mbgd.workers import start_workers


def run(composed: Any, choices: Mapping[str, Any]) -> None:
    """Train what Hydra has composed from the `choices` of the configuration's groups."""
    config = typed(composed)
    check_installed(config.tracking)
    with start_workers(config.backend.name.value, config.backend.timeout_seconds) as workers:
        trainer = build_trainer(config, workers)
        name = run_name(config.run, choices)
        folder = open_run_folder(config.run, name, workers, may_hold_a_run=config.resume != "never")
        start_log(folder.log_path(workers.rank), workers.rank, workers.num_workers)
        text = resolved_yaml(composed)
        plain = yaml.safe_load(text)
        if not resume(trainer, folder, config, plain):
            if workers.is_main:
                print(f"{folder.path} holds this run already, complete; give another run.dir for a new one.")
            return
        quiet = config.tracking.quiet
        profiler = profiling.create(config.profile, folder.path, workers, quiet=quiet)
        tracker: Tracker = NoTracker()
        checkpoints = saving.create(config.checkpoint, folder.path, folder.checkpoints_path, identity(plain), workers)
        if workers.is_main:
            folder.write_config(text)
            tracker = open_trackers(config, folder, trainer)
        with told_of_its_end(tracker):
            result = trainer.fit(tracker, checkpoints, StopOnSignal(workers), profiler)
            if workers.is_main:
                folder.write_results(result, trainer)
        if workers.is_main and not quiet:
            print(wording.describe_end(result, folder.path))


def run_or_explain(composed: Any, choices: Mapping[str, Any]) -> None:
    """`run`, with mistakes of the user's, lost workers, preemption and a lost state told in a line."""
    try:
        run(composed, choices)
    except (UsageError, WorkersLost, NotSaved) as error:
        rank = os.environ.get("RANK")
        sys.exit(f"error{f' on worker {rank}' if rank else ''}: {error}")
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there if it names the run (run.dir or run.id)", flush=True)
        sys.exit(EXIT_CODE)
