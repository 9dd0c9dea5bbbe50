"""`job.json`: the launcher's record of a sweep's job, in the folder of the job's run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mbgd.files.atomic import write_atomically
from mbgd.files.reading import convert, read_json

JOB = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """The launcher's record of a job."""

    number: int
    swept: dict[str, str]
    """The values that the sweep gave this job, by key."""
    overrides: list[str]
    exit_code: int | None = None
    """None: it has not ended, or was stopped."""
    slurm_job: str = ""
    """The SLURM job that trains it, such as 12_3; empty: none."""

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / JOB, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> "JobRecord | None":
        """The record of the job that was started there; None if none was."""
        try:
            return convert(read_json(folder / JOB, JobRecord), JobRecord)
        except FileNotFoundError:
            return None
