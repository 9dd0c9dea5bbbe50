"""A sweep's jobs: made from its overrides, checked, and told to the sweeper. The launchers share it."""

import dataclasses
import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from mbgd.building import configuration
from mbgd.cli.launching import quoted
from mbgd.errors import FAILED, UsageError
from mbgd.files.job_file import JobRecord
from mbgd.runs import sweeps
from mbgd.text.escaping import plain

LINES_SHOWN = 15
"""Lines shown from a failed job's log."""

OF_THE_SWEEP = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|mode)\b")
"""Hydra's overrides that are for the sweep, not for its jobs."""

ERROR = re.compile(r"^(error\b.*:|Traceback \(most recent call last\):|[\w.]*Error: )")
"""The first line of an error in a log."""


class JobFailed(CompactHydraException):
    """The job has no value for the sweeper."""

    exit_code = FAILED


@dataclass(frozen=True)
class Job:
    """A job to run."""

    record: JobRecord
    config: DictConfig
    folder: Path

    def __str__(self) -> str:
        swept = " ".join(f"{key}={value}" for key, value in self.record.swept.items())
        return f"{self.record.number} · {swept}" if swept else str(self.record.number)

    @property
    def log(self) -> Path:
        return self.folder / sweeps.LOG

    def environment(self) -> dict[str, str]:
        """The job's own environment variables."""
        # Trackers group the jobs by MBGD_SWEEP.
        own = {key: str(value) for key, value in self.config.hydra.job.env_set.items()}
        return {"MBGD_SWEEP": self.folder.parent.name, "PYTHONUNBUFFERED": "1", **own}


@dataclass(frozen=True)
class End:
    """How a job has ended."""

    exit_code: int
    note: str
    """For the job's line of output, such as its time."""
    cause: str = ""
    """Why it failed, if the exit code is not the job's own."""


Ended = Callable[[int, End], None]
"""Called with a job's index when it has ended."""


class JobsLauncher(Launcher):
    """What the launchers have in common; a subclass says in `run` where and how the jobs run."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        for note in configuration.which_wins(config.hydra):
            print(f"note: {note}", flush=True)
        self.folder = Path(str(config.hydra.sweep.dir))
        wanted = OmegaConf.select(config, "hydra.sweeper.direction")
        if wanted is not None and getattr(wanted, "name", wanted) != config.sweep.direction:
            sys.exit(
                f"error: hydra.sweeper.direction={getattr(wanted, 'name', wanted)}, but sweep.direction="
                f"{config.sweep.direction}; give both the same."
            )

    @abstractmethod
    def describe(self) -> str:
        """Size and place of a job, such as "of 2 workers"."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], ended: Ended) -> Signals | None:
        """Run the jobs, and call `ended` for each; returns the signal that stopped them, None if all have ended."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; returns each job's `sweep.metric`, or a JobFailed that says why it has none."""
        jobs = [self._job(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        for job in jobs:
            refuse_folders(job.record.overrides)
            refuse_another_sweeps(job)
        if initial_job_idx == 0:
            print(f"sweep {self.folder} · {len(jobs)} job{'s' * (len(jobs) > 1)} {self.describe()}", flush=True)
        results: dict[int, JobReturn] = {}

        def ended(index: int, end: End) -> None:
            job = jobs[index]
            before = JobRecord.read(job.folder) or job.record
            dataclasses.replace(before, exit_code=end.exit_code).write(job.folder)
            results[index], text = self._result(job, end)
            print(f"job {job} · {text} · {end.note}", flush=True)
            if end.exit_code:
                print(f"    log {job.log}\n{first_error(job.log)}", flush=True)

        stopped = self.run(jobs, ended)
        if stopped:
            sweeps.to_show.clear()
            print(f"stopped by {stopped.name}; `python -m mbgd sweep {self.folder}` shows what there is", flush=True)
            if self.config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # others try other values next time
                print(f"the same command with hydra.sweep.dir={self.folder} goes on", flush=True)
            sys.exit(128 + stopped)
        sweeps.to_show[:] = [self.folder]
        return [results[index] for index in range(len(jobs))]

    def arguments(self, job: Job) -> list[str]:
        """The arguments of `mbgd train` that train this job."""
        hydra = self.config.hydra
        options = ["--config-name", hydra.job.config_name]
        for source in hydra.runtime.config_sources:
            if source.provider == "command-line":
                options += ["--config-dir", source.path]
        own = [one for one in hydra.overrides.hydra if not OF_THE_SWEEP.match(one)]
        return [*options, *job.record.overrides, *own, f"run.dir={quoted(str(job.folder))}"]

    def _job(self, number: int, overrides: Sequence[str]) -> Job:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        # By key: sweepers write values in their own way, such as True for true.
        given = OverridesParser.create().parse_overrides(list(self.config.hydra.overrides.task))
        constant = {one.key_or_group for one in given if not one.is_sweep_override()}
        values = dict(one.lstrip("+").split("=", 1) for one in overrides if one[0] != "~")
        swept = {key: value for key, value in values.items() if key not in constant}
        record = JobRecord(number, swept, list(overrides))
        return Job(record, config, self.folder / str(config.hydra.sweep.subdir))

    def _result(self, job: Job, end: End) -> tuple[JobReturn, str]:
        """The result of a job that has ended, for the sweeper and in words."""
        parts = [str(key) for key in job.config if key != "hydra"]
        result = JobReturn(
            overrides=job.record.overrides,
            cfg=OmegaConf.masked_copy(job.config, parts),
            hydra_cfg=OmegaConf.masked_copy(job.config, "hydra"),
            working_dir=str(job.folder),
        )
        metric = self.config.sweep.metric
        try:
            if end.exit_code:
                raise UsageError(end.cause or f"failed with exit code {end.exit_code}")
            value = sweeps.metric_value(job.folder, metric)
        except UsageError as error:
            result.status, result.return_value = JobStatus.FAILED, JobFailed(f"{job.folder}: {error}")
            return result, str(error)
        result.status, result.return_value = JobStatus.COMPLETED, value
        return result, f"{metric} {value:.4g}"


def refuse_settings(settings: Mapping[str, object]) -> None:
    """Exit unless each of these settings of the launcher is a whole number ≥ 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < 1:
            sys.exit(f"error: hydra.launcher.{name}={value}; it must be a whole number ≥ 1.")


def refuse_folders(overrides: Sequence[str]) -> None:
    for one in overrides:
        if one.lstrip("+").startswith(("run.dir=", "run.id=")):
            sys.exit(
                f"error: {one} in a sweep would give every job the same folder. Set hydra.sweep.dir, the folder that "
                "holds one for each job."
            )


def refuse_another_sweeps(job: Job) -> None:
    """Exit if a job's folder holds anything but the same job, which would go on there."""
    try:
        before = JobRecord.read(job.folder)
    except UsageError as error:
        sys.exit(f"error: {error}")
    is_other = before is not None and before.overrides != job.record.overrides
    if is_other or (before is None and (job.folder / "config.yaml").exists()):
        what = f"the job {' '.join(before.overrides)}" if before is not None else "a run that no sweep has started"
        sys.exit(
            f"error: {job.folder} holds {what}, not {' '.join(job.record.overrides)}. Give another hydra.sweep.dir, or "
            "none for a new folder."
        )


def first_error(log: Path) -> str:
    """The first error of the log's last start, or its last lines if there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"    {log} cannot be read: {error.strerror}"
    start = max((number for number, line in enumerate(lines, 1) if sweeps.START.match(line)), default=0)
    of_last = lines[start:]
    first = next(
        (number for number, line in enumerate(of_last) if ERROR.match(line)), max(0, len(of_last) - LINES_SHOWN)
    )
    return "\n".join(f"    {plain(line)}" for line in of_last[first : first + LINES_SHOWN])
