"""Replays a recorded run from its newest checkpoint before a step, and compares the bits."""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbgd.building.build import build_trainer, typed
from mbgd.building.composing import from_values
from mbgd.building.recorded import recorded_values
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config import AveragingName
from mbgd.errors import UsageError
from mbgd.files.reading import Unreadable
from mbgd.files.run_files import read_summary
from mbgd.runs.conditions import conditions
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import describe_bad, read_history
from mbgd.trainer import Trainer
from mbgd.workers.group import Workers

WEIGHTS, OF_TRAINING = "eval/weights_sha256", "train/"


@dataclass(frozen=True)
class Replay:
    """The result, the same on every worker."""

    from_step: int
    to_step: int
    num_compared: int
    """Recorded values that were compared."""
    first_difference: str | None
    """The first step that differs, with the values."""
    conditions: list[str]
    """Recorded conditions of the run that differ here."""
    weights_sha256: str
    """After the last replayed step."""


def replay(folder: Path, step: int, workers: Workers) -> Replay:
    """Repeat the run's steps up to `step`; UsageError if the folder does not allow it. Writes nothing."""
    config = typed(from_values(recorded_values(folder)))
    if config.averaging.name is not AveragingName.reproducible:
        raise UsageError(
            f"{plain(folder)} was made with averaging={config.averaging.name.value}; only averaging=reproducible gives "
            "the same bits when it is repeated."
        )
    recorded = _recorded(folder)
    trainer = build_trainer(config, workers)
    if not 1 <= step <= trainer.setup.num_steps:
        raise UsageError(f"--step {step}; the run has the steps 1 to {trainer.setup.num_steps}.")
    snapshot = _newest_before(folder, step)
    if snapshot is not None:
        trainer.restore(snapshot)
    first, num_compared, parted = trainer.state.step, 0, None
    for done, values in _steps(trainer, step):
        wanted = {name: value for name, value in recorded.get(done, {}).items() if name in values}
        num_compared += len(wanted)
        unequal = [name for name in sorted(wanted) if repr(wanted[name]) != repr(values[name])]
        if unequal:
            told = ", ".join(f"{name} {wanted[name]} recorded, {values[name]} now" for name in unequal)
            parted = f"step {done}: {told}"
            break
    parted = next((one for one in workers.gather_values(parted) if one), None)
    return Replay(
        first, trainer.state.step, num_compared, parted, _otherwise(folder, trainer), trainer.weights_sha256()
    )


def _recorded(folder: Path) -> dict[int, dict[str, Any]]:
    """The logged values of each step that a replay can repeat."""
    lines, bad = read_history(folder)
    if bad:
        raise UsageError(f"{plain(folder)}: {describe_bad(bad)}; a damaged history is not compared.")
    recorded: dict[int, dict[str, Any]] = {}
    for line in lines:
        for name, value in line.metrics.items():
            if name == WEIGHTS or name.startswith(OF_TRAINING):
                recorded.setdefault(line.step, {})[name] = value
    return recorded


def _newest_before(folder: Path, step: int) -> Snapshot | None:
    """The newest state before `step`; None: start from the beginning."""
    for path in checkpoint.complete(folder / "checkpoints"):
        if checkpoint.step_of(path) < step and checkpoint.verify(path, whole_run=True) is None:
            snapshot, _ = checkpoint.read(path)
            return snapshot
    return None


def _steps(trainer: Trainer, step: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Make the steps; yield each one's number, counted from 1, and the values to log."""
    shards = trainer.log.clock.laps(trainer.setup.loader.shards(trainer.state.step, step))
    for shard in shards:
        done = trainer.train_step(shard)
        trainer.state.step = shard.step + 1
        values: dict[str, Any] = {}
        if trainer.log.logs(shard.step):
            values |= trainer.log.metrics(done, trainer.train_step.metrics())
            values |= trainer.log.fingerprints(values, trainer.state.step)
        yield trainer.state.step, {**values, WEIGHTS: trainer.weights_sha256()}


def _otherwise(folder: Path, trainer: Trainer) -> list[str]:
    """Recorded versions and conditions that differ here."""
    try:
        summary = read_summary(folder)
    except (FileNotFoundError, Unreadable):
        return ["what the run was made under is not recorded: it has not come to its end"]
    before = {**summary.get("versions", {}), **summary.get("conditions", {})}
    now: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    now |= conditions(trainer.setup)
    return [
        plain(f"{key}: {before[key]} then, {now[key]} now") for key in now if key in before and before[key] != now[key]
    ]


def describe(it: Replay, num_workers: int) -> str:
    """For people."""
    on = f"{num_workers} worker{'s' if num_workers > 1 else ''}"
    made = f"replayed    steps {it.from_step + 1} to {it.to_step} on {on}"
    if it.first_difference is None:
        return f"{made}\nsame bits   {it.num_compared} recorded values\nweights     {it.weights_sha256}"
    otherwise = "; ".join(it.conditions) or "nothing that is recorded"
    return f"{made}\ndifferent   at {plain(it.first_difference)}\nother here  {otherwise}"
