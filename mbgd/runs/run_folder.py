"""A run's folder: the files that the main worker writes."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mbgd.checkpoints.task_state import TaskState, exported
from mbgd.config import Run
from mbgd.errors import UsageError
from mbgd.files import folder_lock, run_files, strict_json
from mbgd.files import reading as files
from mbgd.files.atomic import write_atomically
from mbgd.files.folder_lock import FolderLock
from mbgd.files.lines import BadLine, keep_bad, lines_of
from mbgd.files.observed import step_of
from mbgd.files.reading import UNREADABLE, Unreadable
from mbgd.files.run_files import CONFIG, METRICS, MODEL, OBJECTIVE, OBSERVED, SUMMARY, of_other_weights
from mbgd.runs.conditions import conditions
from mbgd.runs.names import choose
from mbgd.step.done import Result
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import describe_bad, parse
from mbgd.trainer import Trainer
from mbgd.workers.group import Workers

SECONDS_FOR_ANOTHER_RUN_TO_END = 60.0
"""Time for a worker that lost the others, and has been replaced, to notice that and end."""


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `summary.json`, `model.safetensors` and `logs/` of one run."""

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        """lock: held while this object lives, so that no other run writes into the folder."""
        self.path, self._lock = path, lock

    @property
    def is_held(self) -> bool:
        """Whether this worker holds the folder's lock."""
        return self._lock is not None

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def log_path(self, rank: int) -> Path:
        return self.path / "logs" / f"worker-{rank}.log"

    @property
    def summary_path(self) -> Path:
        return self.path / SUMMARY

    @property
    def has_begun(self) -> bool:
        """Whether a run has begun here, readable or not."""
        return os.path.lexists(self.path / CONFIG)

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run that has begun here, or None; Unreadable if the file is not a configuration."""
        try:
            return run_files.read_config(self.path)
        except FileNotFoundError:
            return None

    def summary_of_complete_run(self) -> dict[str, Any] | None:
        """The summary of the complete run here; None if there is none.

        Unreadable if the summary, or the model whose hash it has, was changed.
        """
        try:
            summary = run_files.read_summary(self.path)
        except FileNotFoundError:
            return None
        if summary.get("steps") is None:
            raise Unreadable(self.summary_path, "it does not say how many steps the run came to")
        self._check_model(summary.get("model_sha256"))
        return summary

    def _check_model(self, sha256: str | None) -> None:
        path = self.path / MODEL
        try:
            if sha256 not in (None, files.sha256(path)):
                raise Unreadable(path, "it has other content than was written")
            with safe_open(path, "pt"):
                pass  # opening it checks its header
        except (FileNotFoundError, SafetensorError) as error:
            raise Unreadable(path, plain(error)) from error

    def keep_aside(self, path: Path, reason: str) -> None:
        """Rename a file that cannot be read, with a warning; do nothing if it is gone already."""
        if os.path.lexists(path):
            print(f"warning: {path} cannot be read ({reason}); it is now {_aside(path).name}", flush=True)

    def reopen(self, step: int) -> None:
        """Prepare to go on after `step` steps: delete the lines of later steps, and the summary."""
        if self.summary_path.is_dir():
            _aside(self.summary_path)
        self.summary_path.unlink(missing_ok=True)
        self._cut(self.metrics_path, step, lambda content: parse(content).step)
        for path in sorted((self.path / OBSERVED).glob("*.jsonl")):
            self._cut(path, step, step_of)

    def _cut(self, path: Path, step: int, step_of_line: Callable[[bytes], int]) -> None:
        """Delete the file's lines of later steps.

        Lines that cannot be read are kept, with their numbers, in a file next to it.
        """
        kept, bad = [], []
        try:
            for line in lines_of(path, step_of_line):
                if isinstance(line, BadLine):
                    bad.append(line)
                elif line.value <= step:
                    kept.append(line)
        except Unreadable as error:
            self.keep_aside(path, error.reason)
        except FileNotFoundError:
            pass
        if bad:
            print(f"warning: {path}: {describe_bad(bad)}; kept in {keep_bad(path, bad).name}", flush=True)
        write_atomically(path, b"".join(line.content for line in kept))

    def write_config(self, yaml: str) -> None:
        self._write({CONFIG: yaml.encode()})

    def write_results(self, result: Result, trainer: Trainer) -> None:
        """Export the model and write the summary, which exists only for a complete run."""
        model, plan = trainer.setup.model, trainer.setup.plan
        content = save(exported(model))
        others = {}
        if objective := TaskState(trainer.setup.task, trainer.setup.buffers).objective():
            others[OBJECTIVE] = save(objective)
        for name, other_weights in trainer.observers.other_weights.items():
            with other_weights():
                others[of_other_weights(name)] = save(exported(model), {"weights": name})
        summary = {
            "metrics": result.metrics,
            "weights_sha256": trainer.weights_sha256(),
            "steps": result.steps,
            "examples_seen": result.examples_seen,
            "examples_per_second": result.examples_per_second,
            "skipped_steps": result.num_skipped_steps,
            "stopped_by": result.stopped_by,
            "weights_step": result.weights_step,
            "num_workers": plan.num_workers,
            "averaging": trainer.train_step.averaging.describe(),
            "num_micro_batches": plan.num_micro_batches(min(plan.minibatch_size, plan.num_examples)),
            "conditions": conditions(trainer.setup),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "model_sha256": hashlib.sha256(content).hexdigest(),
        }
        strict = json.loads(strict_json.dumps(summary))
        sealed = {**strict, "sha256": run_files.seal(strict)}
        self._write({MODEL: content, SUMMARY: (json.dumps(sealed, indent=2) + "\n").encode(), **others})

    def _write(self, contents: Mapping[str, bytes]) -> None:
        """Write files by name; UsageError if one cannot be written."""
        for name, content in contents.items():
            try:
                write_atomically(self.path / name, content)
            except OSError as error:
                raise UsageError(
                    f"{plain(self.path / name)} cannot be written: {error.strerror or error}. The last checkpoint "
                    "is safe: make the folder writable, and the same command goes on from there."
                ) from error


def _aside(path: Path) -> Path:
    return files.set_aside(path, UNREADABLE)


def open_run_folder(run: Run, name: str, workers: Workers, *, may_hold_a_run: bool) -> RunFolder:
    """The run's folder, made by the main worker; the same on every worker. UsageError on all if it cannot be made.

    name: part of a new folder's name. may_hold_a_run: a run that has begun there goes on; otherwise it is refused.
    """
    path, problem = "", ""
    if workers.is_main:
        folder = choose(run, name)
        path, problem = str(folder), _make(folder, may_hold_a_run=may_hold_a_run)
    deadline, told = time.monotonic() + SECONDS_FOR_ANOTHER_RUN_TO_END, False
    # The others wait in a broadcast, which has a timeout of its own, so the main worker waits in shorter intervals.
    seconds = min(SECONDS_FOR_ANOTHER_RUN_TO_END, workers.timeout_seconds / 4)
    while True:
        lock, holder = None, ""
        if workers.is_main and not problem:
            lock, holder, problem = _lock(Path(path), min(deadline, time.monotonic() + seconds), told=told)
            if holder and time.monotonic() >= deadline:
                problem = f"{_held_by(path, holder)}. Wait for its end, end it, or give another run.dir."
        path, problem, holder = workers.broadcast([path, problem, holder])
        if problem:
            raise UsageError(problem)
        if not holder:
            return RunFolder(Path(path), lock)
        told = True


def _make(folder: Path, *, may_hold_a_run: bool) -> str:
    """Make the folder; returns the problem, or an empty text."""
    if os.path.lexists(folder / METRICS) and not may_hold_a_run:
        return (
            f"run.dir={folder} already holds a run, and resume=never. Give another run.dir, use resume=auto to go on "
            "with that run, or delete the folder."
        )
    try:
        _make_durably(folder)
        if not os.path.lexists(folder / METRICS):
            files.open_regular(folder / METRICS, "ab").close()
    except (OSError, ValueError) as error:  # ValueError: for example a name that no folder can have
        return _hindered(folder, error)
    return ""


def _prepare(folder: Path) -> None:
    """Under the lock: make the subfolders that the run writes to, and test that a file can be written."""
    _make_durably(folder / "logs")
    for log in (folder / "logs").glob("worker-*.log"):
        files.check_regular(log)
    if os.path.lexists(folder / "checkpoints") and not (folder / "checkpoints").is_dir():
        raise Unreadable(folder / "checkpoints", "it is not a folder")
    write_atomically(folder / ".writable", b"that a file can be written")
    (folder / ".writable").unlink()


def _hindered(folder: Path, error: OSError | ValueError) -> str:
    why = f"{plain(error.path.name)}: {error.reason}" if isinstance(error, Unreadable) else plain(error)
    why = (isinstance(error, OSError) and error.strerror) or why
    return f"run.dir={plain(folder)} cannot be written: {why}. Give a folder that you may write to."


def _make_durably(folder: Path) -> None:
    """Make the folder and its parents, so that they survive a power failure."""
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        files.flush(folder.parent)


def _lock(folder: Path, deadline: float, *, told: bool) -> tuple[FolderLock | None, str, str]:
    """(the folder's lock, who still holds it at the deadline, the problem): one of them is set.

    told: the message about waiting has been printed.
    """
    while True:
        try:
            holder = folder_lock.take(folder)
            if isinstance(holder, FolderLock):
                _prepare(folder)
                return holder, "", ""
        except (OSError, ValueError) as error:
            return None, "", _hindered(folder, error)
        if not told:
            told = True
            print(f"{_held_by(folder, holder)}; waiting {SECONDS_FOR_ANOTHER_RUN_TO_END:.0f} s for its end", flush=True)
        if time.monotonic() >= deadline:
            return None, holder, ""
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))


def _held_by(folder: Path | str, holder: str) -> str:
    return f"run.dir={plain(folder)} is being written to by another run ({holder})"
