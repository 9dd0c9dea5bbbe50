"""Going on with a run: which checkpoint, whether it may be, and the same answer on every worker."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mbgd import checkpoint
from mbgd.config import Config, identity
from mbgd.errors import UsageError
from mbgd.memory_tier import newest_in_memory, remove_memory
from mbgd.run_folder import RunFolder
from mbgd.trainer import Trainer


@dataclass(frozen=True)
class _Decision:
    checkpoint: Path | None = None
    is_complete: bool = False
    problem: str = ""


def resume(trainer: Trainer, folder: RunFolder, config: Config, now: Mapping[str, Any]) -> bool:
    """Bring the trainer and the folder to where the run goes on; False if the run is complete already.

    now: the configuration as plain values. UsageError, on every worker, where the run there is another one.
    """
    workers = trainer.workers
    if config.resume == "never" or folder.read_config() is None:
        remove_memory(folder.path, workers)  # of a run whose folder is gone
    in_memory = None
    if config.checkpoint.memory_every is not None and config.resume != "never":
        in_memory = newest_in_memory(folder.path, workers, identity(now))
    decision = _agree(trainer, folder, config, now, in_memory)
    if decision.is_complete:
        return False
    if decision.checkpoint is not None:
        try:
            _restore(trainer, decision.checkpoint)
        except UsageError as error:
            if decision.checkpoint != in_memory:
                raise
            if workers.is_main:
                print(f"warning: {error}\nThe run goes on from the disk instead.", flush=True)
            decision = _agree(trainer, folder, config, now, None)
            if decision.is_complete:
                return False
            if decision.checkpoint is not None:
                _restore(trainer, decision.checkpoint)
    remove_memory(folder.path, workers, but=decision.checkpoint)  # the rest is of another course
    if workers.is_main:
        folder.reopen(trainer.state.step)
        if decision.checkpoint is not None and not config.tracking.quiet:
            print(f"resume      step {trainer.state.step}, from {decision.checkpoint}", flush=True)
    return True


def _agree(
    trainer: Trainer, folder: RunFolder, config: Config, now: Mapping[str, Any], in_memory: Path | None
) -> _Decision:
    """What the main worker decides, on every worker; UsageError on all where that is a problem."""
    decision = _Decision()
    if trainer.workers.is_main:
        decision = _decide(folder, config, identity(now), trainer.num_steps, in_memory)
    path, is_complete, problem = trainer.workers.broadcast(
        [decision.checkpoint and str(decision.checkpoint), decision.is_complete, decision.problem]
    )
    if problem:
        raise UsageError(problem)
    return _Decision(path and Path(path), is_complete)


def _decide(
    folder: RunFolder, config: Config, now: Mapping[str, Any], num_steps: int, in_memory: Path | None
) -> _Decision:
    if config.resume == "never":
        return _Decision()
    try:
        path = checkpoint.newest(folder.checkpoints_path)
        begun, done = folder.read_config(), folder.steps_of_complete_run()
        before = identity(begun) if begun is not None else None
        if path is None and config.resume != "auto":
            path = _named(Path(config.resume))
        if in_memory is not None and (path is None or checkpoint.step_of(in_memory) > checkpoint.step_of(path)):
            path = in_memory
        if path is not None:
            snapshot_step, before = checkpoint.read_manifest(path)
    except UsageError as error:
        return _Decision(problem=str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _Decision(problem=f"the run in {folder.path} cannot be read ({error}). Give another run.dir.")
    source = path or folder.path
    found = checkpoint.differences(before, now) if before is not None else []
    if found and not config.resume_force:
        return _Decision(
            problem=f"{source} is of a run that took another course:\n"
            + "".join(f"  - {one}\n" for one in found)
            + "Give another run.dir (or resume=never and an empty one) for a new run, or resume_force=true to go on "
            "all the same."
        )
    if done is not None and done >= num_steps:
        return _Decision(is_complete=True)
    if path is not None and snapshot_step > num_steps:
        return _Decision(problem=f"{path} is beyond the {num_steps} steps of this run. Set more steps or epochs.")
    if path is None and done is not None:
        return _Decision(
            problem=f"{folder.path} holds a complete run of {done} steps, but no checkpoint to go on from."
        )
    return _Decision(path)


def _named(path: Path) -> Path:
    """The checkpoint that `resume=PATH` means: that folder, or the newest of the run there."""
    if (path / checkpoint.MANIFEST).exists():
        if problem := checkpoint.verify(path):
            raise UsageError(f"resume={path}: the checkpoint is broken ({problem}). Name another one.")
        return path
    found = checkpoint.newest(path / "checkpoints")
    if found is None:
        raise UsageError(
            f"resume={path}: there is no checkpoint. Name a run's folder, a checkpoint's folder, auto or never."
        )
    return found


def _restore(trainer: Trainer, path: Path) -> None:
    failure = ""
    try:
        snapshot, _ = checkpoint.read(path)
    except (OSError, SafetensorError) as error:
        failure = str(error)
    failed = trainer.workers.max_(torch.tensor(int(bool(failure)), device=trainer.workers.device))
    if failed.item():
        raise UsageError(
            f"checkpoint {path} cannot be read on every worker ({failure or 'it can on this one'}). All workers must "
            "see the run's folder: put it on a file system that the hosts share."
        )
    trainer.restore(snapshot)
