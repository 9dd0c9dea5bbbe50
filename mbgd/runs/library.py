"""Checkpoints for a program that uses mbgd as a library; train.py has the keys `checkpoint` and `resume`."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import saving
from mbgd.checkpoints.keeper import Take
from mbgd.config import Batch, Checkpoint, Run, Settings, resolved
from mbgd.config.must_match import marked
from mbgd.errors import UsageError
from mbgd.runs.resume import restore
from mbgd.runs.run_folder import open_run_folder
from mbgd.trainer import Trainer


class Checkpoints:
    """The checkpoints of a trainer in a folder that no other run writes to; made on every worker."""

    def __init__(self, folder: str | Path, trainer: Trainer, settings: Checkpoint | None = None) -> None:
        """UsageError, on every worker, if the folder cannot be made or another run writes to it."""
        settings = resolved(settings or Checkpoint(), trainer.setup.plan)
        saving.check(settings, trainer.evaluations.names)
        self._trainer, workers = trainer, trainer.setup.workers
        self._folder = open_run_folder(Run(dir=str(folder)), "", workers, may_hold_a_run=True)
        self._identity = _identity(trainer.setup.settings)
        path = self._folder.checkpoints_path
        self._kept = saving.create(settings, self._folder.path, path, self._identity, workers)

    def resume(self) -> bool:
        """Restore the newest whole checkpoint; False if there is none.

        UsageError, on every worker, if it is of a run with other settings or does not fit the trainer.
        """
        told = ["", ""]
        if self._trainer.setup.workers.is_main:
            path = checkpoint.newest(self._folder.checkpoints_path, whole_run=True)
            if path is not None:
                _, before = checkpoint.read_manifest(path)
                told = [str(path), "\n".join(f"  - {one}" for one in checkpoint.differences(before, self._identity))]
        path_found, differing = self._trainer.setup.workers.broadcast(told)
        if differing:
            raise UsageError(f"{path_found} is of a run with other settings:\n{differing}\nUse another folder.")
        if path_found:
            restore(self._trainer, Path(path_found))
        return bool(path_found)

    def check(self, problems: Sequence[str]) -> None:
        self._kept.check(problems)

    def every_steps(self) -> list[int]:
        return self._kept.every_steps()

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        self._kept.after_step(step, evaluation, take, is_time=is_time)

    def due_by_time(self) -> bool:
        return self._kept.due_by_time()

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        return self._kept.at_end(step, evaluation, take)

    def alone(self, step: int, take: Take) -> None:
        self._kept.alone(step, take)

    def newest_step(self) -> int | None:
        return self._kept.newest_step()

    def settle(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_on_disk: bool) -> None:
        self._kept.settle(step, evaluation, take, is_on_disk=is_on_disk)


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings that the course depends on, as JSON holds them; a schedule by its type."""
    schedule = settings.schedule
    of_run = {key: getattr(settings, key) for key in marked(Settings)}
    of_run = {key: value.value if isinstance(value, Enum) else value for key, value in of_run.items()}
    of_batch = {f"batch.{key}": getattr(settings.batch, key) for key in marked(Batch)}
    named = None if schedule is None else f"{type(schedule).__module__}.{type(schedule).__qualname__}"
    return {**of_batch, **of_run, "schedule": named}
