"""A run's folder: what the main worker leaves on disk."""

import glob
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping
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
from mbgd.files.reading import UNREADABLE, Unreadable
from mbgd.files.run_files import CONFIG, METRICS, MODEL, OBJECTIVE, SUMMARY
from mbgd.runs.conditions import conditions
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import BadLine, describe_bad, read_lines
from mbgd.trainer import Result, Trainer
from mbgd.workers.group import Workers

SECONDS_FOR_ANOTHER_RUN_TO_END = 60.0
"""What a worker that was cut off from the others, and is replaced, may still need to notice it."""


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `summary.json`, `model.safetensors` and `logs/` of one run."""

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        """lock: held as long as this folder is open here, so that no other run writes into it."""
        self.path, self._lock = path, lock

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
        """The configuration of the run that has begun here, if one has; Unreadable where it is none."""
        try:
            return run_files.read_config(self.path)
        except FileNotFoundError:
            return None

    def steps_of_complete_run(self) -> int | None:
        """How many steps the run here came to; None where there is none, or one that is not complete.

        Unreadable where the results are not those that were written: the summary, or the model that it is of.
        """
        try:
            summary = run_files.read_summary(self.path)
        except FileNotFoundError:
            return None
        if summary.get("steps") is None:
            raise Unreadable(self.summary_path, "it does not say how many steps the run came to")
        self._check_model(summary.get("model_sha256"))
        steps: int = summary["steps"]
        return steps

    def _check_model(self, sha256: str | None) -> None:
        path = self.path / MODEL
        try:
            if sha256 not in (None, files.sha256(path)):
                raise Unreadable(path, "it has other content than was written")
            with safe_open(path, "pt"):
                pass  # that it is one
        except (FileNotFoundError, SafetensorError) as error:
            raise Unreadable(path, plain(error)) from error

    def keep_aside(self, path: Path, reason: str) -> None:
        """Rename what cannot be read, and say so; where it is gone already, nothing."""
        if os.path.lexists(path):
            print(f"warning: {path} cannot be read ({reason}); it is now {_aside(path).name}", flush=True)

    def reopen(self, step: int) -> None:
        """Go on after so many steps: what came later is taken out of the metrics, and the run is not complete.

        Lines that cannot be read are kept in a file beside, with their numbers.
        """
        if self.summary_path.is_dir():
            _aside(self.summary_path)
        self.summary_path.unlink(missing_ok=True)
        kept, bad = [], []
        try:
            for line in read_lines(self.metrics_path):
                if isinstance(line, BadLine):
                    bad.append(line)
                elif line.step <= step:
                    kept.append(line)
        except Unreadable as error:
            self.keep_aside(self.metrics_path, error.reason)
        except FileNotFoundError:
            pass
        if bad:
            aside = files.free_name(self.path / (METRICS + UNREADABLE))
            write_atomically(aside, _as_json(bad))
            print(f"warning: {self.metrics_path}: {describe_bad(bad)}; kept in {aside.name}", flush=True)
        write_atomically(self.metrics_path, b"".join(line.content for line in kept))

    def write_config(self, yaml: str) -> None:
        self._write({CONFIG: yaml.encode()})

    def write_results(self, result: Result, trainer: Trainer) -> None:
        """Export the model and write the summary, which is there only once the run is complete."""
        model, plan = trainer.setup.model, trainer.setup.plan
        content = save(exported(model))
        others = {}
        if objective := TaskState(trainer.setup.task, trainer.setup.buffers).objective():
            others[OBJECTIVE] = save(objective)
        summary = {
            "metrics": result.metrics,
            "weights_sha256": trainer.weights_sha256(),
            "steps": result.steps,
            "examples_seen": result.examples_seen,
            "examples_per_second": result.examples_per_second,
            "skipped_steps": result.num_skipped_steps,
            "num_workers": plan.num_workers,
            "averaging": trainer.train_step.averaging.describe(),
            "num_micro_batches": plan.num_micro_batches(min(plan.minibatch_size, plan.num_examples)),
            "conditions": conditions(plan, trainer.setup.workers.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "model_sha256": hashlib.sha256(content).hexdigest(),
        }
        strict = json.loads(strict_json.dumps(summary))
        sealed = {**strict, "sha256": run_files.seal(strict)}
        self._write({MODEL: content, SUMMARY: (json.dumps(sealed, indent=2) + "\n").encode(), **others})

    def _write(self, contents: Mapping[str, bytes]) -> None:
        """UsageError where they cannot be written."""
        for name, content in contents.items():
            try:
                write_atomically(self.path / name, content)
            except OSError as error:
                raise UsageError(
                    f"{plain(self.path / name)} cannot be written: {error.strerror or error}. What is in the last "
                    "checkpoint is safe: see to the folder, and the same command goes on from there."
                ) from error


def _as_json(lines: list[BadLine]) -> bytes:
    """A JSON object for each; bytes that are not UTF-8 as Python's surrogateescape has them, so that none is lost."""
    told = [(line.number, line.reason, line.content.decode(errors="surrogateescape")) for line in lines]
    keys = ("line", "reason", "content")
    return b"".join(json.dumps(dict(zip(keys, one, strict=True))).encode() + b"\n" for one in told)


def _aside(path: Path) -> Path:
    return files.set_aside(path, UNREADABLE)


def open_run_folder(run: Run, name: str, workers: Workers, *, may_hold_a_run: bool) -> RunFolder:
    """The run's folder, made by the main worker and the same on every worker; UsageError on all if it can't be.

    name: what a new folder's name contains. may_hold_a_run: a run that has begun there goes on; otherwise it is
    left alone.
    """
    path, problem = "", ""
    if workers.is_main:
        folder = _choose(run, name)
        path, problem = str(folder), _make(folder, may_hold_a_run=may_hold_a_run)
    deadline, told = time.monotonic() + SECONDS_FOR_ANOTHER_RUN_TO_END, False
    # The others wait in an exchange, which has a limit of its own: there is one after each part of the time.
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


def _choose(run: Run, name: str) -> Path:
    if run.dir is not None:
        return Path(run.dir)
    if run.id is not None:
        return Path(run.root, run.id)
    shared_id = id_of_restarts(os.environ)
    end = f"{name}-{shared_id or os.urandom(3).hex()}"
    begun = sorted(Path(run.root).glob(f"*_{glob.escape(end)}")) if shared_id else []
    return begun[-1] if begun else Path(run.root, f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{end}")


def id_of_restarts(environment: Mapping[str, str]) -> str:
    """What stays the same when the run's workers are started again: SLURM's or torchrun's id; empty if nothing does.

    SLURM's job keeps its number when it is queued again; in an interactive allocation (no SLURM_PROCID) it says nothing
    about a run. A job's steps are runs of their own.
    """
    if "SLURM_PROCID" in environment and "SLURM_JOB_ID" in environment:
        step = environment.get("SLURM_STEP_ID", "")
        return f"slurm{environment['SLURM_JOB_ID']}" + (f".{step}" if step.isdigit() else "")
    torchrun_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    if torchrun_id == "none":
        return ""
    is_random = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", torchrun_id)  # --standalone makes a UUID
    return torchrun_id[:8] if is_random else re.sub(r"[^\w.-]", "-", torchrun_id)


def _make(folder: Path, *, may_hold_a_run: bool) -> str:
    """Make the folder; what hinders, or nothing."""
    if os.path.lexists(folder / METRICS) and not may_hold_a_run:
        return (
            f"run.dir={folder} already holds a run, and resume=never. Give another run.dir, use resume=auto to go on "
            "with that run, or delete the folder."
        )
    try:
        _make_durably(folder)
        if not os.path.lexists(folder / METRICS):
            files.open_regular(folder / METRICS, "ab").close()
    except (OSError, ValueError) as error:  # ValueError: also a name that no folder can have
        return _hindered(folder, error)
    return ""


def _prepare(folder: Path) -> None:
    """Under the lock: make what the run writes to, and try whether a file can be written."""
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
    """Make the folder and those above, so that they outlive a power failure."""
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        files.flush(folder.parent)


def _lock(folder: Path, deadline: float, *, told: bool) -> tuple[FolderLock | None, str, str]:
    """(the folder's lock, who holds it until the deadline, what hinders): one of them.

    told: that it is waited for has been said.
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
