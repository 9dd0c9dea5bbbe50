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
from mbgd.config import Config, identity
from mbgd.errors import ComputedWrongly, NotSaved, Preempted, ReplicasDiffer, UsageError, WorkersLost
from mbgd.preemption import EXIT_CODE, StopOnSignal
from mbgd.resume import resume
from mbgd.run_folder import RunFolder, open_run_folder
from mbgd.same_program import check_same_config
from mbgd.tracking import Trackers, told_of_its_end, wording
from mbgd.tracking.opening import check_installed, open_trackers
from mbgd.trainer import Result
from mbgd.worker_log import start_log
from mbgd.workers import start_workers


def run(composed: Any, choices: Mapping[str, Any]) -> None:
    """Train what Hydra has composed from the `choices` of the configuration's groups."""
    config = typed(composed)
    check_installed(config.tracking)
    trackers = Trackers()
    with told_of_its_end(trackers):  # after the last barrier: no worker waits for what the main one still uploads
        done = _train(composed, config, choices, trackers)
    if done is not None and not config.tracking.quiet:
        result, folder = done
        print(wording.describe_end(result, folder.path))


def _train(
    composed: Any, config: Config, choices: Mapping[str, Any], trackers: Trackers
) -> tuple[Result, RunFolder] | None:
    """Train on this worker; on the main one also open the trackers, and give what came of it and the locked folder."""
    backend = config.backend
    with start_workers(backend.name.value, backend.timeout_seconds, device=backend.device.value) as workers:
        text = resolved_yaml(composed)
        plain = yaml.safe_load(text)
        check_same_config(workers, plain)
        trainer = build_trainer(config, workers)
        name = run_name(config.run, choices)
        folder = open_run_folder(config.run, name, workers, may_hold_a_run=config.resume != "never")
        start_log(folder.log_path(workers.rank), workers.rank, workers.num_workers)
        if not resume(trainer, folder, config, plain):
            if workers.is_main:
                print(f"{folder.path} holds this run already, complete; give another run.dir for a new one.")
            return None
        profiler = profiling.create(config.profile, folder.path, workers, quiet=config.tracking.quiet)
        checkpoints = saving.create(config.checkpoint, folder.path, folder.checkpoints_path, identity(plain), workers)
        if workers.is_main:
            folder.write_config(text)
            open_trackers(trackers, config, folder, trainer)
        result = trainer.fit(trackers, checkpoints, StopOnSignal(workers), profiler)
        if workers.is_main:
            folder.write_results(result, trainer)
    return (result, folder) if workers.is_main else None


def run_or_explain(composed: Any, choices: Mapping[str, Any]) -> None:
    """`run`, with mistakes of the user's, lost workers, preemption and a lost state told in a line."""
    try:
        run(composed, choices)
    except (UsageError, WorkersLost, ReplicasDiffer, ComputedWrongly, NotSaved) as error:
        rank = os.environ.get("RANK")
        sys.exit(f"error{f' on worker {rank}' if rank else ''}: {error}")
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there if it names the run (run.dir or run.id)", flush=True)
        sys.exit(EXIT_CODE)
