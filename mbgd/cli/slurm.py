"""SLURM's commands, as `mbgd launch slurm` and the sweep launcher use them: a job's script, sbatch, squeue, scancel."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbgd.errors import FAILED, UsageError
from mbgd.text.escaping import plain

TEMPLATE = Path(__file__).parent / "slurm.sbatch"
SETTINGS = re.compile(r"^TRAIN=\(\).*$", re.MULTILINE)
"""The line of the template that the settings replace."""

SECONDS_FOR_A_COMMAND = 60
GONE_NAME = "a state that SLURM no longer knows"
ENDED = {
    GONE_NAME,
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "RECONFIG_FAIL",
    "REVOKED",
    "TIMEOUT",
}
"""SLURM's states of jobs that do not start again."""


@dataclass(frozen=True)
class State:
    """A job in SLURM's queue."""

    name: str
    """Such as RUNNING."""
    reason: str
    """Why it waits; "None" if it does not."""

    @property
    def has_ended(self) -> bool:
        return self.name in ENDED


GONE = State(GONE_NAME, "None")
"""An ended job that SLURM has forgotten; it remembers them for minutes (MinJobAge)."""


def script(options: Sequence[str], *, workers: str, program: Sequence[str], settings: Iterable[str]) -> str:
    """The template with these options of sbatch after its own.

    workers: of each node; program: the command that trains, such as `python -m mbgd train`; settings: further lines of
    bash, which set the command's arguments. UsageError for an option that sbatch could not read.
    """
    for one in options:
        if not re.fullmatch(r"--[\w-]+(=[^\s#\"']+)?", one):
            raise UsageError(f"sbatch option {plain(one)!r}; an option is --NAME=VALUE, without spaces and quotes.")
    lines = [
        *(f"#SBATCH {one}" for one in options),
        f"WORKERS={shlex.quote(workers)}",
        f"TRAIN=({shlex.join([sys.executable, *program])}) LOG='' EXIT_CODE=''",
        *settings,
    ]
    return SETTINGS.sub(lambda _: "\n".join(lines), TEMPLATE.read_text(), count=1)


def submit(path: Path) -> str:
    """Submit the script; the job's number. UsageError if there is no SLURM, or it refuses."""
    if shutil.which("sbatch") is None:
        raise UsageError(f"sbatch is not installed here. Where it is: sbatch {shlex.quote(str(path))}")
    done = _call(["sbatch", "--parsable", str(path)], without_a_job(os.environ))
    if done.returncode:
        refused = UsageError(f"sbatch refused the job: {plain(done.stderr.strip())}")
        refused.exit_code = FAILED
        raise refused
    return done.stdout.strip().split(";")[0]


def states(jobs: Sequence[str]) -> dict[str, State] | None:
    """The states of these jobs that SLURM still knows, and of their tasks as `JOB_TASK`; None if it does not answer."""
    listing = ["squeue", "--array", "--noheader", "--states=all", "--format=%F|%K|%T|%r", f"--jobs={','.join(jobs)}"]
    try:
        done = _call(listing, os.environ)
    except (subprocess.TimeoutExpired, OSError):
        return None
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else None
    found = {}
    for line in done.stdout.splitlines():
        job, task, name, reason = line.split("|", 3)
        found[f"{job}_{task}" if task.isdigit() else job] = State(name, reason)
    return found


def ended_as(job: str) -> str:
    """The state of an ended job, from SLURM's accounting; empty if there is none."""
    try:
        done = _call(["sacct", "-X", "--noheader", "--parsable2", "--format=State", f"--jobs={job}"], os.environ)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    return plain(next((line.strip() for line in reversed(lines) if line.strip()), ""))


def cancel(jobs: Sequence[str]) -> None:
    """End these jobs, and no others; their workers may save their state."""
    _call(["scancel", *jobs], os.environ)


def without_a_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of the job in which this process runs: a new job would inherit them."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {key: value for key, value in environment.items() if not key.startswith("SLURM_") or key in kept}


def _call(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    # In a session of its own: Ctrl-C on the terminal must not end a command whose answer is waited for.
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=SECONDS_FOR_A_COMMAND,
        start_new_session=True,
    )
