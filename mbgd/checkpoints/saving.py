"""When checkpoints are taken and where they are kept. A thread beside training writes them."""

import shutil
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import memory_tier
from mbgd.checkpoints.keeper import CheckpointsElsewhere, Keeper, Take, refuse
from mbgd.checkpoints.memory_tier import memory_path
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config import Checkpoint, Direction
from mbgd.config.duration import whole
from mbgd.errors import UsageError
from mbgd.workers.group import Workers
from mbgd.workers.log import write_to_log
from mbgd.workers.process_group import is_of_exchange


class CheckpointFolder:
    """The checkpoints of one run on disk: the newest `keep`, and the best."""

    def __init__(self, path: Path, settings: Checkpoint, identity: Mapping[str, Any], *, durable: bool = True) -> None:
        """identity: the settings that the run's course depends on, kept in the manifest; they must match on resume.

        durable: flush each checkpoint to the disk.
        """
        self._path, self._settings, self._identity, self._durable = path, settings, dict(identity), durable
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last_step, self._last_time, self._last_is_written = -1, time.monotonic(), False
        found = self._find_best()
        self._best = None if found is None else found[1]
        self._consequence = " Training goes on."

    def check(self, problems: Sequence[str]) -> None:
        refuse(problems)

    def every_steps(self) -> list[int]:
        every_steps = self._settings.every_steps
        return [] if every_steps is None else [whole(every_steps)]

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        """UsageError where an earlier checkpoint could not be written and `checkpoint.required` is set."""
        if self._writer is not None and not self._writer.is_alive():
            self.wait()  # reports a failure as soon as it is known
        if self._is_best(evaluation) or self._is_due(step) or (is_time and self.due_by_time()):
            self._save(step, evaluation, take)
            if self._failure is not None and self._writer is None:
                self.wait()

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        if not self.wait() or step != self._last_step or not self._last_is_written:
            self._save(step, evaluation, take)
        return self.wait()

    def alone(self, step: int, take: Take) -> None:
        self._consequence = ""
        try:
            self.at_end(step, {}, take)
        except UsageError as error:  # of checkpoint.required; the run ends with the other error
            print(f"warning: {error}", flush=True)

    def newest_step(self) -> int | None:
        whole = (path for path in checkpoint.complete(self._path) if checkpoint.verify(path) is None)
        newest = next(whole, None)
        return None if newest is None else checkpoint.step_of(newest)

    def settle(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_on_disk: bool) -> None:
        pass

    def _is_due(self, step: int) -> bool:
        return any(step % every == 0 for every in self.every_steps())

    def due_by_time(self) -> bool:
        every_seconds = self._settings.every_seconds
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
        self.wait()  # one at a time: if the disk is slower than the schedule, training waits for it
        self._last_step, self._last_time, self._last_is_written = step, time.monotonic(), False
        try:
            writer = threading.Thread(target=self._write, args=(take(), dict(evaluation)), name="checkpoint writer")
            writer.start()
        except Exception as error:  # no memory for the snapshot, state that cannot be saved, no more threads
            if is_of_exchange(error):
                raise  # the state lies on workers of which some are lost
            self._failure = error
        else:
            self._writer = writer

    def wait(self) -> bool:
        """Wait until the writer is done; returns whether it succeeded."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is None:
            return True
        found = self._find_best()
        self._best = None if found is None else found[1]  # the one that was not written may have been the best
        write_to_log("".join(traceback.format_exception(failure)).rstrip())
        message = (
            f"a checkpoint could not be written to {self._path}: {_in_words(failure)}. Older checkpoints are unchanged."
        )
        if self._settings.required:
            raise UsageError(f"{message} Training stops because of checkpoint.required=true.")
        print(f"warning: {message}{self._consequence}", flush=True)
        return False

    def _write(self, snapshot: Snapshot, evaluation: Mapping[str, float]) -> None:
        try:
            with_evaluation = replace(snapshot, values={**snapshot.values, "evaluation": evaluation})
            checkpoint.write(self._path, with_evaluation, self._identity, durable=self._durable)
            self._last_is_written = True
        except BaseException as error:  # whatever it is, nothing was saved, and an exception would end only this thread
            self._failure = error
            return
        try:
            best = self._find_best()
            for path in checkpoint.complete(self._path)[self._settings.keep :]:
                if best is None or path != best[0]:
                    checkpoint.remove(path)
        except Exception as error:
            print(f"warning: an old checkpoint could not be removed: {_in_words(error)}", flush=True)


class MemoryFolder:
    """The newest two snapshots in this host's memory, for workers that restart there.

    One worker of each host writes them. They are kept across worker restarts, lost with the host, and deleted at the
    end once the disk has the last state.
    """

    def __init__(self, path: Path, every_steps: int, identity: Mapping[str, Any]) -> None:
        """path: a folder of this user's own."""
        settings = Checkpoint(every_steps=every_steps, every_seconds=None, keep=2)
        self._path, self._folder = path, CheckpointFolder(path, settings, identity, durable=False)

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        self._folder.after_step(step, evaluation, take)

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        return self._folder.at_end(step, evaluation, take)

    def every_steps(self) -> list[int]:
        return self._folder.every_steps()

    def remove(self) -> None:
        self._folder.wait()  # or the writer would make the folder again
        shutil.rmtree(self._path, ignore_errors=True)


class DiskAndMemory:
    """Checkpoints on disk and in memory. On the first worker of another host `disk` is CheckpointsElsewhere."""

    def __init__(self, disk: Keeper, memory: MemoryFolder) -> None:
        self._disk, self._memory = disk, memory

    def check(self, problems: Sequence[str]) -> None:
        self._disk.check(problems)

    def after_step(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_time: bool = True) -> None:
        take = cache(take)  # one copy for both
        self._memory.after_step(step, evaluation, take)
        self._disk.after_step(step, evaluation, take, is_time=is_time)

    def at_end(self, step: int, evaluation: Mapping[str, float], take: Take) -> bool:
        return self._disk.at_end(step, evaluation, take)

    def every_steps(self) -> list[int]:
        return [*self._memory.every_steps(), *self._disk.every_steps()]

    def due_by_time(self) -> bool:
        return self._disk.due_by_time()

    def alone(self, step: int, take: Take) -> None:
        self._disk.alone(step, take)

    def newest_step(self) -> int | None:
        return self._disk.newest_step()

    def settle(self, step: int, evaluation: Mapping[str, float], take: Take, *, is_on_disk: bool) -> None:
        if is_on_disk:
            self._memory.remove()
        else:
            self._memory.at_end(step, evaluation, take)


def save_last(checkpoints: Keeper, workers: Workers, step: int, evaluation: Mapping[str, float], take: Take) -> str:
    """Save the last state and wait until it is written; returns the problem if it could not be, else an empty text.

    The same on every worker. With `checkpoint.required` a problem is a UsageError, on every worker, too.
    """
    told = ["", ""]
    try:
        if not checkpoints.at_end(step, evaluation, take):
            newest = checkpoints.newest_step()
            there = "there is none of this run" if newest is None else f"the newest one is of step {newest}"
            told[0] = f"the state after step {step} is in no checkpoint on disk; {there}"
            if newest == step:  # renamed, but not flushed
                told[0] = f"the checkpoint of step {step} could be lost in a power failure"
    except UsageError as error:
        told[1] = str(error)
    problem, refusal = (str(text) for text in workers.broadcast(told))
    checkpoints.settle(step, evaluation, take, is_on_disk=not problem and not refusal)
    if refusal:
        raise UsageError(refusal)
    return problem


def check(settings: Checkpoint, evaluation_names: Sequence[str]) -> None:
    """UsageError if `checkpoint.best` names a metric that evaluations do not give."""
    if settings.best is not None and settings.best not in evaluation_names:
        known = f"one of {', '.join(evaluation_names)}" if evaluation_names else "null: there is no evaluation dataset"
        raise UsageError(f"checkpoint.best={settings.best}, which no evaluation gives; it must be {known}.")


def create(settings: Checkpoint, run: Path, disk: Path, identity: Mapping[str, Any], workers: Workers) -> Keeper:
    """This worker's checkpoints, by resolved settings, of the run in folder `run`; those on disk are in `disk`."""
    kept: Keeper = CheckpointsElsewhere()
    if workers.is_main:
        kept = CheckpointFolder(disk, settings, identity)
    if settings.memory_every_steps is not None and workers.local_rank == 0:
        path = memory_path(run)
        if problem := memory_tier.make(path):
            print(f"warning: {problem}; no snapshots are kept in this host's memory.", flush=True)
        else:
            kept = DiskAndMemory(kept, MemoryFolder(path, whole(settings.memory_every_steps), identity))
    return kept


def _in_words(error: BaseException) -> str:
    is_told_by_itself = isinstance(error, OSError | SafetensorError | UsageError)
    return str(error) if is_told_by_itself else f"{type(error).__name__}: {error}"
