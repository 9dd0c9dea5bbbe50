"""When checkpoints are taken, where they are kept, and who writes them: a thread beside training."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from mbgd import checkpoint
from mbgd.config import Checkpoint, Direction
from mbgd.errors import UsageError
from mbgd.snapshot import Snapshot
from mbgd.workers import Workers

HOST_MEMORY = "/dev/shm"

Take = Callable[[], Snapshot]


class Checkpoints(Protocol):
    """Takes snapshots of a run where they are due."""

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take) -> None:
        """Take one if one is due after so many steps.

        evaluation: metrics of an evaluation at this very step; empty if there was none.
        """

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        """Take one and wait until everything is written; whether it could be."""


class NoCheckpoints:
    """Takes none."""

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take) -> None:
        pass

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        return True


class CheckpointFolder:
    """The checkpoints of one run on disk: the newest few, and the best."""

    def __init__(self, path: Path, settings: Checkpoint, identity: Mapping[str, Any], *, durable: bool = True) -> None:
        """identity: what the run's course depends on, kept in the manifest; a resumed run's must be the same.

        durable: each is flushed to the disk.
        """
        self._path, self._settings, self._identity, self._durable = path, settings, dict(identity), durable
        self._writer: threading.Thread | None = None
        self._failure: OSError | SafetensorError | None = None
        self._last_step, self._last_time = -1, time.monotonic()
        found = self._find_best()
        self._best = None if found is None else found[1]

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take) -> None:
        """Raises UsageError where an earlier one could not be written and `checkpoint.required` is set."""
        if self._is_best(evaluation) or self._is_due(step):
            self._save(step, evaluation, take)

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        if not self._wait() or step != self._last_step:
            self._save(step, evaluation, take)
        return self._wait()

    def _is_due(self, step: int) -> bool:
        every_steps, every_seconds = self._settings.every_steps, self._settings.every_seconds
        if every_steps is not None and step % every_steps == 0:
            return True
        return every_seconds is not None and time.monotonic() - self._last_time >= every_seconds

    def _is_best(self, evaluation: Mapping[str, float]) -> bool:
        if self._settings.best is None or not evaluation:
            return False
        value = evaluation[self._settings.best]
        is_better = checkpoint.is_better(value, self._best, highest=self._highest)
        if is_better:
            self._best = value
        return is_better

    @property
    def _highest(self) -> bool:
        return self._settings.direction is Direction.maximize

    def _find_best(self) -> tuple[Path, float] | None:
        if self._settings.best is None:
            return None
        return checkpoint.best(self._path, self._settings.best, highest=self._highest)

    def _save(self, step: int, evaluation: Mapping[str, float], take: Take) -> None:
        self._wait()  # one at a time: where the disk is slower than the schedule, training waits for it
        self._last_step, self._last_time = step, time.monotonic()
        self._writer = threading.Thread(target=self._write, args=(take(), dict(evaluation)), name="checkpoint writer")
        self._writer.start()

    def _wait(self) -> bool:
        """For what is being written; whether it could be."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            message = (
                f"a checkpoint could not be written to {self._path}: {failure}. Older checkpoints are as they were."
            )
            if self._settings.required:
                raise UsageError(f"{message} Training stops because of checkpoint.required=true.")
            print(f"warning: {message} Training goes on.", flush=True)
        return failure is None

    def _write(self, snapshot: Snapshot, evaluation: Mapping[str, float]) -> None:
        with_evaluation = replace(snapshot, values={**snapshot.values, "evaluation": evaluation})
        try:
            checkpoint.write(self._path, with_evaluation, self._identity, durable=self._durable)
            best = self._find_best()
            for path in checkpoint.complete(self._path)[self._settings.keep :]:
                if best is None or path != best[0]:
                    checkpoint.remove(path)
        except (OSError, SafetensorError) as error:
            self._failure = error


class MemoryFolder:
    """The newest two snapshots in this host's memory, for workers that restart there.

    One worker of each host writes them. They outlive the workers, but not the host, and go once all is on disk.
    """

    def __init__(self, path: Path, every_steps: int, identity: Mapping[str, Any]) -> None:
        """UsageError where the folder belongs to another user."""
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise UsageError(
                f"{path} belongs to another user. Set checkpoint.memory_every=null, or give another run.dir."
            )
        settings = Checkpoint(every_steps=every_steps, every_seconds=None, keep=2)
        self._path, self._folder = path, CheckpointFolder(path, settings, identity, durable=False)

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take) -> None:
        self._folder.after_step(step, evaluation, take)

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        return self._folder.at_end(step, evaluation, take)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class DiskAndMemory:
    """Both, on the worker that writes both; memory alone, on the first worker of another host."""

    def __init__(self, disk: Checkpoints, memory: MemoryFolder) -> None:
        self._disk, self._memory = disk, memory

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take) -> None:
        take = cache(take)  # one copy for both
        self._memory.after_step(step, evaluation, take)
        self._disk.after_step(step, evaluation, take)

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        take = cache(take)
        is_safe = self._disk.at_end(step, evaluation, take)
        if is_safe:
            self._memory.remove()
        else:
            self._memory.at_end(step, evaluation, take)
        return is_safe


def memory_path(run: Path) -> Path:
    """Where the snapshots of a run lie in this host's memory."""
    key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    return Path(HOST_MEMORY, f"mbgd-{os.getuid()}-{key}")


def newest_in_memory(run: Path, workers: Workers) -> Path | None:
    """The newest snapshot that every host has in its memory, the same on every worker."""
    path, names = memory_path(run), None
    if workers.local_rank == 0:
        names = [one.name for one in checkpoint.complete(path) if checkpoint.verify(one) is None]
    of_hosts = [set(names) for names in workers.gather(names) if names is not None]
    on_all = set.intersection(*of_hosts)
    return path / max(on_all) if on_all else None


def remove_memory(run: Path, workers: Workers) -> None:
    """Forget what this host's memory has of the run."""
    if workers.local_rank == 0:
        shutil.rmtree(memory_path(run), ignore_errors=True)


def check(settings: Checkpoint, evaluation_names: Sequence[str]) -> None:
    """UsageError where the best checkpoint is asked for by a metric that evaluations do not give."""
    if settings.best is not None and settings.best not in evaluation_names:
        known = f"one of {', '.join(evaluation_names)}" if evaluation_names else "null: there is no evaluation dataset"
        raise UsageError(f"checkpoint.best={settings.best}, which no evaluation gives; it must be {known}.")


def create(settings: Checkpoint, run: Path, disk: Path, identity: Mapping[str, Any], workers: Workers) -> Checkpoints:
    """What this worker keeps of the run in folder `run`, whose checkpoints lie in `disk`."""
    kept: Checkpoints = NoCheckpoints()
    if workers.is_main:
        kept = CheckpointFolder(disk, settings, identity)
    if settings.memory_every is not None and workers.local_rank == 0:
        kept = DiskAndMemory(kept, MemoryFolder(memory_path(run), settings.memory_every, identity))
    return kept
