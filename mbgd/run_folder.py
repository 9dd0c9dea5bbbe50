"""A run's folder: what the main worker leaves on disk."""

import fcntl
import glob
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors.torch import save

from mbgd.atomic_file import write_atomically
from mbgd.conditions import conditions
from mbgd.config import Run
from mbgd.errors import UsageError
from mbgd.task_state import exported
from mbgd.trainer import Result, Trainer
from mbgd.workers import Workers

SECONDS_FOR_ANOTHER_RUN_TO_END = 60.0
"""What a worker that was cut off from the others, and is replaced, may still need to notice it."""


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `summary.json`, `model.safetensors` and `logs/` of one run."""

    def __init__(self, path: Path, lock: IO[str] | None = None) -> None:
        """lock: held as long as this folder is open here, so that no other run writes into it."""
        self.path, self._lock = path, lock

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def log_path(self, rank: int) -> Path:
        return self.path / "logs" / f"worker-{rank}.log"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the run that has begun here, if one has."""
        try:
            config: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text())
        except FileNotFoundError:
            return None
        return config

    def steps_of_complete_run(self) -> int | None:
        """How many steps the run here came to; None where there is none, or one that is not complete."""
        try:
            steps: int = json.loads(self.summary_path.read_text())["steps"]
        except FileNotFoundError:
            return None
        return steps

    def reopen(self, step: int) -> None:
        """Go on after so many steps: what came later is taken out of the metrics, and the run is not complete."""
        self.summary_path.unlink(missing_ok=True)
        kept = []
        for line in self.metrics_path.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
            except ValueError:
                pass  # cut off by a crash
        write_atomically(self.metrics_path, "".join(kept).encode())

    def write_config(self, yaml: str) -> None:
        write_atomically(self.path / "config.yaml", yaml.encode())

    def write_results(self, result: Result, trainer: Trainer) -> None:
        """Export the model and write the summary, which is there only once the run is complete."""
        model, plan = trainer.model, trainer.plan
        write_atomically(self.path / "model.safetensors", save(exported(model)))
        summary = {
            "metrics": result.metrics,
            "weights_sha256": trainer.weights_sha256(),
            "steps": result.steps,
            "examples_seen": result.examples_seen,
            "examples_per_second": result.examples_per_second,
            "skipped_steps": result.num_skipped_steps,
            "num_workers": plan.num_workers,
            "averaging": trainer.averaging_description,
            "num_micro_batches": plan.num_micro_batches(min(plan.minibatch_size, plan.num_examples)),
            "conditions": conditions(plan, trainer.workers.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_atomically(self.summary_path, (json.dumps(summary, indent=2) + "\n").encode())


def open_run_folder(run: Run, name: str, workers: Workers, *, may_hold_a_run: bool) -> RunFolder:
    """The run's folder, made by the main worker and the same on every worker; UsageError on all if it can't be.

    name: what a new folder's name contains. may_hold_a_run: a run that has begun there goes on; otherwise it is
    left alone.
    """
    path, problem, lock = "", "", None
    if workers.is_main:
        folder = _choose(run, name)
        path, problem = str(folder), _make(folder, may_hold_a_run=may_hold_a_run)
        if not problem:
            lock, problem = _lock(folder)
    path, problem = workers.broadcast((path, problem))
    if problem:
        raise UsageError(problem)
    return RunFolder(Path(path), lock)


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
    if (folder / "metrics.jsonl").exists() and not may_hold_a_run:
        return (
            f"run.dir={folder} already holds a run, and resume=never. Give another run.dir, use resume=auto to go on "
            "with that run, or delete the folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        return f"run.dir={folder} cannot be written: {error.strerror}. Give a folder that you may write to."
    return ""


def _lock(folder: Path) -> tuple[IO[str] | None, str]:
    """The folder's lock, or what hinders. It ends with this process, however that ends."""
    lock = (folder / "lock").open("a+")
    deadline = time.monotonic() + SECONDS_FOR_ANOTHER_RUN_TO_END
    waits = False
    while True:
        try:
            # A record lock: it holds across the hosts of a shared file system, and child processes do not keep it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = f"run.dir={folder} is being written to by another run ({lock.read().strip() or 'unknown'})"
            if time.monotonic() >= deadline:
                lock.close()
                return None, f"{holder}. Wait for its end, end it, or give another run.dir."
            if not waits:
                waits = True
                print(f"{holder}; waiting {SECONDS_FOR_ANOTHER_RUN_TO_END:.0f} s for its end", flush=True)
            time.sleep(0.5)
        except OSError:
            break  # a file system without locks
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()
    return lock, ""
