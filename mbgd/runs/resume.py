"""Resuming a run: from which checkpoint, and whether it fits; the same decision on every worker."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.memory_tier import newest_in_memory, remove_memory
from mbgd.config import Config, must_match
from mbgd.errors import UsageError
from mbgd.files.atomic import write_atomically
from mbgd.files.reading import Unreadable, flush, read_json
from mbgd.files.run_files import CONFIG, Count, Sha256
from mbgd.runs.run_folder import RunFolder
from mbgd.text.escaping import plain
from mbgd.trainer import Trainer
from mbgd.workers.process_group import is_of_exchange

EVALUATION = "evaluation.json"
"""Next to the checkpoints: a hash of what their evaluations depend on, for checkpoints beyond a given step."""


class _Evaluation(msgspec.Struct):
    sha256: Sha256
    beyond_step: Count


@dataclass(frozen=True)
class _Decision:
    checkpoint: Path | None = None
    is_complete: bool = False
    keeps_evaluations: bool = False
    """Whether this configuration would give the evaluation values in the checkpoint."""
    problem: str = ""


def resume(trainer: Trainer, folder: RunFolder, config: Config, now: Mapping[str, Any]) -> bool:
    """Restore the trainer and prepare the folder to go on; False if the run is complete already.

    now: the configuration as plain values. UsageError, on every worker, if the folder holds another run.
    """
    workers = trainer.setup.workers
    if config.resume.from_ == "never" or not folder.has_begun:
        remove_memory(folder.path, workers)  # snapshots of a run whose folder is gone
    in_memory = None
    if config.checkpoint.memory_every_steps is not None and config.resume.from_ != "never":
        in_memory = newest_in_memory(folder.path, workers, must_match(now))
    decision = _agree(trainer, folder, config, now, in_memory)
    if decision.is_complete:
        return False
    if decision.checkpoint is not None:
        try:
            restore(trainer, decision.checkpoint)
        except UsageError as error:
            if decision.checkpoint != in_memory:
                raise
            if workers.is_main:
                print(f"warning: {error}\nThe run goes on from the disk instead.", flush=True)
            decision = _agree(trainer, folder, config, now, None)
            if decision.is_complete:
                return False
            if decision.checkpoint is not None:
                restore(trainer, decision.checkpoint)
    if not decision.keeps_evaluations:
        metrics = trainer.state.metrics  # the run evaluates anew
        trainer.state.metrics = {name: value for name, value in metrics.items() if not name.startswith("eval/")}
    remove_memory(folder.path, workers, but=decision.checkpoint)  # other snapshots do not belong to this course
    problem = ""
    if workers.is_main:
        problem = reopen(folder, trainer.state.step, None if decision.keeps_evaluations else _evaluated_by(now))
        if decision.checkpoint is not None and not problem and not config.tracking.quiet:
            print(f"resume      step {trainer.state.step}, from {decision.checkpoint}", flush=True)
    if problem := workers.broadcast(problem):
        raise UsageError(problem)
    return True


def _agree(
    trainer: Trainer, folder: RunFolder, config: Config, now: Mapping[str, Any], in_memory: Path | None
) -> _Decision:
    """The main worker's decision, on every worker; UsageError on all if it is a problem."""
    mine = _Decision()
    if trainer.setup.workers.is_main:
        mine = _decide(folder, config, now, trainer.setup.num_steps, in_memory)
    told: list[Any] = [mine.checkpoint and str(mine.checkpoint), mine.is_complete, mine.keeps_evaluations, mine.problem]
    path, is_complete, keeps_evaluations, problem = trainer.setup.workers.broadcast(told)
    if problem:
        raise UsageError(problem)
    return _Decision(path and Path(path), is_complete, keeps_evaluations)


@dataclass(frozen=True)
class _Found:
    """The state to go on from."""

    checkpoint: Path | None
    step: int
    identity: Mapping[str, Any] | None
    """Identity of the run that has begun here, if any."""
    done: Mapping[str, Any] | None
    """The summary of the complete run in the folder, if there is one."""
    is_another_runs: bool


def _decide(
    folder: RunFolder, config: Config, now: Mapping[str, Any], num_steps: int, in_memory: Path | None
) -> _Decision:
    if config.resume.from_ == "never":
        return _Decision()
    try:
        found = _find(folder, config, in_memory)
    except UsageError as error:
        return _Decision(problem=str(error))
    except (OSError, ValueError) as error:
        return _Decision(problem=f"the run in {folder.path} cannot be read ({plain(error)}). Give another run.dir.")
    path, done = found.checkpoint, found.done
    differing = checkpoint.differences(found.identity, must_match(now)) if found.identity is not None else []
    if differing and not config.resume.force:
        return _Decision(
            problem=f"{path or folder.path} belongs to a run with other settings:\n"
            + "".join(f"  - {one}\n" for one in differing)
            + "Give another run.dir (or resume=never and an empty one) for a new run, or resume.force=true to go on "
            "anyway."
        )
    goes_on = config.resume.force and bool(differing)  # such as without the observer that stopped the run
    if done is not None and (done["steps"] >= num_steps or (done.get("stopped_by") and not goes_on)):
        return _Decision(is_complete=True)
    if path is not None and found.step > num_steps:
        return _Decision(problem=f"{path} is beyond the {num_steps} steps of this run. Set more steps or epochs.")
    if path is None and done is not None:
        return _Decision(
            problem=f"{folder.path} holds a complete run of {done['steps']} steps, but no checkpoint to go on from."
        )
    own = path is not None and not found.is_another_runs
    return _Decision(path, keeps_evaluations=own and _is_evaluated_alike(folder, found.step, _evaluated_by(now)))


def _find(folder: RunFolder, config: Config, in_memory: Path | None) -> _Found:
    """Look for the state to go on from. The run's own files that cannot be read are renamed, with a message."""
    path, is_another_runs = checkpoint.newest(folder.checkpoints_path, whole_run=True), False
    try:
        done = folder.summary_of_complete_run()
    except Unreadable as error:
        folder.keep_aside(error.path, error.reason)
        done = None
    if path is None and config.resume.from_ != "auto":
        path, is_another_runs = _named(Path(config.resume.from_)), True
    if (
        in_memory is not None
        and (path is None or checkpoint.step_of(in_memory) > checkpoint.read_manifest(path)[0])
        and checkpoint.verify(in_memory, whole_run=True) is None
    ):
        path, is_another_runs = in_memory, False
    try:
        begun = _identity_of_begun(folder)
    except Unreadable as error:
        if path is None and not config.resume.force:
            raise UsageError(
                f"{error.path} cannot be read ({error.reason}), and there is no checkpoint: nothing tells whether the "
                "run there is this one. Give another run.dir, or resume.force=true to begin anew in this one."
            ) from error
        folder.keep_aside(error.path, error.reason)
        begun = None
    if path is None:
        return _Found(None, 0, begun, done, is_another_runs)
    step, before = checkpoint.read_manifest(path)
    return _Found(path, step, before, done, is_another_runs)


def _identity_of_begun(folder: RunFolder) -> dict[str, Any] | None:
    config = folder.read_config()
    if config is None:
        return None
    try:
        return must_match(config)
    except Exception as error:  # a key is missing or has another type
        reason = f"it is not a run's configuration ({type(error).__name__}: {plain(error)})"
        raise Unreadable(folder.path / CONFIG, reason) from error


def _named(path: Path) -> Path:
    """The checkpoint that `resume=PATH` names; see `checkpoint.named`."""
    found = checkpoint.named(path, "resume")
    if found is None:
        raise UsageError(
            f"resume={plain(path)}: there is no checkpoint. Name a run's folder, a checkpoint's folder, auto or never."
        )
    return found


def restore(trainer: Trainer, path: Path) -> None:
    """Restore a checkpoint; UsageError, on every worker, if one cannot read it or it does not fit."""
    failure, snapshot = "", None
    try:
        snapshot, _ = checkpoint.read(path)
    except Exception as error:  # a file system that fails, or a file that has changed since it was verified
        failure = f"{type(error).__name__}: {plain(error)}"
    failed = trainer.setup.workers.max_(torch.tensor(int(bool(failure)), device=trainer.setup.workers.device))
    if failed.item() or snapshot is None:
        raise UsageError(
            f"checkpoint {path} cannot be read on every worker ({failure or 'it can on this one'}). All workers must "
            "see the run's folder: put it on a file system that the hosts share."
        )
    try:
        trainer.restore(snapshot)
    except UsageError as error:
        lines = str(error).split("\n")  # the file's names of tensors and keys may need escaping
        raise UsageError("\n".join(plain(line) for line in lines)) from error
    except Exception as error:  # state that only the optimizer itself checks
        if is_of_exchange(error):
            raise
        raise UsageError(
            f"the checkpoint {path} does not fit this run ({type(error).__name__}: {plain(error)}). Move it out of the "
            "folder to go on from the one before, or give another run.dir."
        ) from error


def _is_evaluated_alike(folder: RunFolder, step: int, evaluated_by: str) -> bool:
    """Whether the folder's checkpoint of this step holds values of evaluations with this hash."""
    try:
        known = read_json(folder.checkpoints_path / EVALUATION, _Evaluation)
    except (FileNotFoundError, Unreadable):
        return False
    return bool(known["sha256"] == evaluated_by and step > known["beyond_step"])


def _evaluated_by(config: Mapping[str, Any]) -> str:
    """A hash of everything that evaluations depend on beside the weights."""
    of_training = ("train", "shuffle", "order", "num_workers")
    data = {name: value for name, value in config["data"].items() if name not in of_training}
    metrics = (config.get("evaluation") or {}).get("metrics")
    depends = [data, metrics, config.get("model"), config.get("objective"), config.get("precision")]
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


def reopen(folder: RunFolder, step: int, evaluated_by: str | None) -> str:
    """Reopen the folder after `step` steps; returns the problem, or an empty text.

    evaluated_by: the new hash, if evaluations changed.
    """
    try:
        folder.reopen(step)
        if evaluated_by is not None:
            folder.checkpoints_path.mkdir(exist_ok=True)
            content = json.dumps({"sha256": evaluated_by, "beyond_step": step})
            write_atomically(folder.checkpoints_path / EVALUATION, content.encode())
            flush(folder.path)
    except (OSError, UsageError) as error:
        return f"run.dir={plain(folder.path)} cannot be written: {plain(error)}. Make it writable, and start again."
    return ""
