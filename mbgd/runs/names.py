"""Which folder a run gets."""

import glob
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from mbgd.config import Run


def choose(run: Run, name: str) -> Path:
    """The folder that `run` names, or a new one; the same when the run's workers start again."""
    if run.dir is not None:
        return Path(run.dir)
    if run.id is not None:
        return Path(run.root, run.id)
    shared_id = id_of_restarts(os.environ)
    end = f"{name}-{shared_id or os.urandom(3).hex()}"
    begun = sorted(Path(run.root).glob(f"*_{glob.escape(end)}")) if shared_id else []
    return begun[-1] if begun else Path(run.root, f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{end}")


def id_of_restarts(environment: Mapping[str, str]) -> str:
    """The id that stays the same when the run's workers start again, SLURM's or torchrun's; empty if there is none.

    A SLURM job keeps its number when it is queued again; in an interactive allocation (no SLURM_PROCID) the number does
    not identify a run. Each step of a job is a run of its own.
    """
    if "SLURM_PROCID" in environment and "SLURM_JOB_ID" in environment:
        step = environment.get("SLURM_STEP_ID", "")
        return f"slurm{environment['SLURM_JOB_ID']}" + (f".{step}" if step.isdigit() else "")
    torchrun_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    if torchrun_id == "none":
        return ""
    is_random = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", torchrun_id)  # --standalone makes a UUID
    return torchrun_id[:8] if is_random else re.sub(r"[^\w.-]", "-", torchrun_id)
