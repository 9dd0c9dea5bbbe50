"""The weights of a finished or running run, to compute with: found in its folder, and loaded on every worker."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checkpoints.task_state import TaskState, with_other_weights
from mbgd.config import Direction
from mbgd.errors import UsageError
from mbgd.files.reading import Unreadable, check_regular
from mbgd.files.run_files import MODEL, OBJECTIVE, of_other_weights, read_config
from mbgd.runs.run_folder import RunFolder
from mbgd.task.task import plain_name
from mbgd.text.escaping import plain
from mbgd.trainer import Trainer


@dataclass(frozen=True)
class Weights:
    """Weights of a run on disk."""

    path: Path
    """A checkpoint's folder, or the model's file in the folder of a complete run."""
    step: int
    """Optimizer steps that led to them."""

    ema: bool = False
    """Whether they are the moving average that was kept beside the model's own weights."""

    @property
    def is_checkpoint(self) -> bool:
        return self.path.name != MODEL

    @property
    def file(self) -> Path:
        """The checkpoint's folder, or the file of a complete run that holds these weights."""
        return self.path.with_name(of_other_weights("ema")) if self.ema and not self.is_checkpoint else self.path


def find(folder: Path, *, step: int | None = None, best: bool = False) -> Weights:
    """The run's last weights, those of a step, or the best by its `checkpoint.best`; UsageError if there are none.

    Nothing is written: the run may still be going on.
    """
    paths, done, problems = checkpoint.complete(folder / "checkpoints"), None, []
    if best:
        found = best_of(folder, read_config(folder))
        if found is None:
            raise UsageError(
                f"{plain(folder)} keeps no best checkpoint: it was not trained with checkpoint.best=METRIC, or has not "
                "been evaluated yet. Leave out --best for its last weights."
            )
        paths = [found[0]]
    else:
        try:
            summary = RunFolder(folder).summary_of_complete_run()
            done = None if summary is None else int(summary["steps"])
            if summary is not None and summary.get("weights_step") is not None and step is None:
                return Weights(folder / MODEL, int(summary["weights_step"]))
        except Unreadable as error:
            problems.append(f"{plain(error.path.name)}: {error.reason}")
    least = done if step is None and done is not None else 0  # an older checkpoint is not the last state
    for path in paths:
        of_step = checkpoint.step_of(path)
        if of_step < least or step not in (None, of_step):
            continue
        problem = checkpoint.verify(path)
        if problem is None:
            return Weights(path, of_step)
        problems.append(f"{plain(path.name)}: {problem}")
    if done is not None and step in (None, done):
        return Weights(folder / MODEL, done)
    raise UsageError(_nothing(folder, step, problems))


def _nothing(folder: Path, step: int | None, problems: list[str]) -> str:
    there = [str(checkpoint.step_of(path)) for path in reversed(checkpoint.complete(folder / "checkpoints"))]
    broken = f" ({'; '.join(problems)})" if problems else ""
    if step is not None:
        return (
            f"{plain(folder)} holds no whole checkpoint of step {step}{broken}; there are the steps "
            f"{', '.join(there) or 'none'}. Leave out --step for the last weights."
        )
    return (
        f"{plain(folder)} holds no weights: no whole checkpoint, and no {MODEL} of a complete run{broken}. A run saves "
        "its first checkpoint after checkpoint.every_seconds or every_steps, and at its end."
    )


def best_of(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str, float] | None:
    """(checkpoint, metric, its value) of the best by the run's configuration; None if it keeps none."""
    settings = config.get("checkpoint") or {}
    if settings.get("best") is None:
        return None
    highest = settings.get("direction") == Direction.maximize.value
    found = checkpoint.best(folder / "checkpoints", settings["best"], highest=highest)
    return None if found is None else (found[0], settings["best"], found[1])


def load_from_run(
    trainer: Trainer, folder: Path, *, step: int | None = None, best: bool = False, ema: bool = False
) -> Weights:
    """Give model and objective a run's weights, the same on every worker; UsageError on all if they do not fit.

    The main worker chooses; see `find`. ema: the moving average instead of the model's own.
    """
    workers = trainer.setup.workers
    told: list[Any] = ["", 0, ""]
    if workers.is_main:
        try:
            found = find(folder, step=step, best=best)
            told = [str(found.path), found.step, ""]
        except UsageError as error:
            told[2] = str(error)
    path, of_step, problem = workers.broadcast(told)
    if problem:
        raise UsageError(problem)
    weights = Weights(Path(path), of_step, ema)
    problems = workers.gather_values(_load(trainer, weights))
    if problem := next(filter(None, problems), ""):
        raise UsageError(problem)
    return weights


def _load(trainer: Trainer, weights: Weights) -> str:
    """Load the weights on this worker; returns the problem, or an empty text."""
    state = TaskState(trainer.setup.task, trainer.setup.buffers)
    try:
        snapshot = checkpoint.read(weights.path)[0] if weights.is_checkpoint else _exported(trainer, state, weights)
        if weights.ema and weights.is_checkpoint:
            snapshot = with_other_weights(snapshot, "ema")
    except UsageError as error:
        return str(error)
    except (OSError, ValueError, SafetensorError) as error:
        return (
            f"{plain(weights.path)} cannot be read on every worker ({plain(error)}). All workers must see the run's "
            "folder: put it on a file system that the hosts share."
        )
    snapshot = _in_own_precision(snapshot, state)
    if found := state.mismatches(snapshot):
        return (
            f"the weights in {plain(weights.path)} do not fit:\n"
            + "\n".join(f"  - {plain(one)}" for one in found)
            + "\nModel and objective must be the run's: are they built from other data, or was their code changed?"
        )
    state.restore(snapshot)
    return ""


def _in_own_precision(snapshot: Snapshot, state: TaskState) -> Snapshot:
    """The snapshot with floating tensors in the model's dtype: another precision may evaluate a run's weights."""
    own = state.tensors()
    tensors = {
        file: {
            name: one.to(own[file][name].dtype) if _are_floating(one, own.get(file, {}).get(name)) else one
            for name, one in named.items()
        }
        for file, named in snapshot.tensors.items()
    }
    return replace(snapshot, tensors=tensors)


def _are_floating(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.is_floating_point() and other.is_floating_point()


def _exported(trainer: Trainer, state: TaskState, weights: Weights) -> Snapshot:
    """The files that a complete run exports, as a snapshot; tied parameters under their first name alone.

    ValueError if the model has state that they do not hold.
    """
    if others := state.values()["extra_state"]:
        raise ValueError(f"{MODEL} does not hold the extra state {', '.join(others)}; a checkpoint does")
    names = {plain_name(name) for name in trainer.setup.model.state_dict()}
    kept = state.tensors()["model"].keys()
    check_regular(weights.file)
    model = {name: one for name, one in load_file(weights.file).items() if name in kept or name not in names}
    tensors: dict[str, Mapping[str, Tensor]] = {"model": model}
    if "objective" in state.tensors():
        check_regular(weights.path.with_name(OBJECTIVE))
        tensors["objective"] = load_file(weights.path.with_name(OBJECTIVE))
    return Snapshot(weights.step, tensors, {})
