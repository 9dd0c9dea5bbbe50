"""A sweep on disk: one folder for each job, the job's run folder, which also holds a record of the job."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mbgd.config import Direction
from mbgd.errors import UsageError
from mbgd.files import run_files
from mbgd.files.job_file import JOB, JobRecord
from mbgd.files.run_files import METRICS, read_config, read_summary
from mbgd.text.escaping import plain
from mbgd.text.suggestions import did_you_mean
from mbgd.tracking.json_lines import Line, describe_bad, read_history

LOG = "job.log"
START = re.compile(r"^--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d job ")
"""The line that each start of a job adds to its log first."""

to_show: list[Path] = []
"""Folders of the sweeps that this process has run; it shows their results at its end."""


@dataclass(frozen=True)
class Job:
    """The result of a job, read from its folder."""

    folder: Path
    record: JobRecord
    config: Mapping[str, Any]
    """Empty if the job ended before it wrote its configuration."""
    summary: Mapping[str, Any]
    """Empty unless the run is complete."""
    history: list[Line] = field(repr=False)
    """The lines of metrics.jsonl."""
    problem: str = ""
    """Which files of the folder could not be read, and why."""

    @property
    def state(self) -> str:
        if self.record.exit_code:
            return f"failed ({self.record.exit_code})"
        if self.problem:
            return self.problem
        return "complete" if self.summary else "not ended"

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric of a complete run, if it is a number."""
        found = self.summary.get("metrics", {})
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def steps_to(self, metric: str, target: float, direction: Direction) -> int | None:
        """Optimizer steps until the metric was first logged at the target or better; None if it never was."""
        sign = 1 if direction is Direction.minimize else -1
        logged = ((line.step, line.metrics.get(metric)) for line in self.history)
        reached = (step for step, value in logged if isinstance(value, int | float) and sign * value <= sign * target)
        return next(reached, None)

    def examples_after(self, steps: int) -> int | None:
        """Examples seen after `steps` steps of this run; None if the folder does not tell."""
        epochs_of_lines = (line.metrics.get("train/epoch") for line in reversed(self.history))
        last = next((epoch for epoch in epochs_of_lines if isinstance(epoch, int | float) and epoch > 0), None)
        seen, size = self.summary.get("examples_seen"), (self.config.get("batch") or {}).get("size")
        if last is None or not seen or size is None:
            return None
        per_epoch = max(1, round(seen / last))
        epochs, more_steps = divmod(steps, math.ceil(per_epoch / size))
        return int(epochs * per_epoch + more_steps * size)


def read_job(folder: Path) -> Job | None:
    """The job that was started in this folder; None if none was. Files that cannot be read are named in `problem`."""
    record = JobRecord.read(folder)
    if record is None:
        return None
    problems: list[str] = []

    read = partial(run_files.read_or_tell, folder=folder, problems=problems)
    config, summary = read(read_config), read(read_summary)
    lines: list[Line] = []
    if os.path.lexists(folder / METRICS):
        try:
            lines, bad = read_history(folder)
            problems += [f"{METRICS}: {describe_bad(bad)}"] if bad else []
        except UsageError as error:
            problems.append(plain(error))
    return Job(folder, record, config, summary, lines, "; ".join(problems))


def read_jobs(sweep: Path) -> list[Job]:
    """The jobs of a sweep, by number; UsageError if there are none."""
    found = [read_job(path.parent) for path in sweep.glob(f"**/{JOB}")]
    jobs = sorted((job for job in found if job is not None), key=lambda job: job.record.number)
    if not jobs:
        raise UsageError(f"{sweep} holds no jobs of a sweep. Name the folder that `mbgd train -m …` printed.")
    return jobs


@dataclass(frozen=True)
class Ranking:
    """A sweep's jobs, ranked by a metric."""

    jobs: list[Job]
    """Best first; jobs without a value last."""
    keys: list[str]
    """The swept keys."""
    metric: str
    direction: Direction
    target: float | None

    def value(self, job: Job) -> float:
        """The metric; nan if the job has none."""
        return job.metrics.get(self.metric, math.nan)

    def steps(self, job: Job) -> int | None:
        """Steps to the target; None if it was not reached or there is none."""
        return None if self.target is None else job.steps_to(self.metric, self.target, self.direction)

    def examples(self, job: Job) -> int | None:
        """Examples to the target; None if it was not reached or there is none."""
        steps = self.steps(job)
        return None if steps is None else job.examples_after(steps)


def read_ranking(folder: Path, metric: str | None, direction: str | None, target: float | None) -> Ranking:
    """The sweep in this folder, ranked; arguments that are None come from its jobs' configurations."""
    jobs = read_jobs(folder)
    configured = next((dict(job.config["sweep"]) for job in jobs if job.config.get("sweep")), {})
    metric = metric or configured.get("metric", "eval/loss")
    ascending = Direction(direction or configured.get("direction", "minimize"))
    target = configured.get("target") if target is None else target
    complete = [job for job in jobs if job.summary]
    if complete and not any(metric in job.metrics for job in complete):
        raise UsageError(f"no job has the metric. {unknown_metric(metric, complete[0].metrics)}")
    sign = 1 if ascending is Direction.minimize else -1

    def rank(job: Job) -> tuple[bool, float]:
        value = job.metrics.get(metric, math.nan)
        return (not math.isfinite(value), sign * value if math.isfinite(value) else 0.0)

    values: dict[str, set[str]] = {}
    for job in jobs:
        for key, value in job.record.swept.items():
            values.setdefault(key, set()).add(value)
    keys = [key for key in values if len(values[key]) > 1] or list(values)
    return Ranking(sorted(jobs, key=rank), keys, metric, ascending, target)


def metric_value(folder: Path, metric: str) -> float:
    """The metric of the job in this folder; if it has none, a UsageError names the metrics that it has."""
    job = read_job(folder)
    if job is None or not job.summary:
        raise UsageError("ended without a summary")
    if metric not in job.metrics:
        raise UsageError(unknown_metric(metric, job.metrics))
    return job.metrics[metric]


def unknown_metric(metric: str, metrics: Mapping[str, float]) -> str:
    """The message for a metric that a run does not have."""
    names = ", ".join(plain(name) for name in sorted(metrics)) or "none"
    return f"sweep.metric={plain(metric)}, but the metrics are {names}.{did_you_mean(metric, metrics)}"
