"""The result of a sweep: a table sorted by the metric, the same as sweep.csv, and a plot, from the jobs' folders."""

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mbgd.config import Direction
from mbgd.errors import UsageError
from mbgd.sweep import LOG, Job, read_jobs, unknown_metric

DESCRIPTION = "show what the jobs of a sweep came to: a table, sweep.csv and sweep.png in its folder"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", type=Path, help="the sweep's folder")
    parser.add_argument("--metric", help="what to rank the jobs by; the sweep's own if left out")
    parser.add_argument("--direction", choices=[one.value for one in Direction], help="which values are better")
    parser.add_argument("--target", type=float, help="value of the metric to tell the steps and examples to")


def main(parsed: argparse.Namespace) -> int:
    show(parsed.sweep, parsed.metric, parsed.direction, parsed.target)
    return 0


@dataclass(frozen=True)
class Result:
    """A sweep's jobs and the question they are ranked by."""

    jobs: list[Job]
    """Best first; those without a value last."""
    keys: list[str]
    """What was swept."""
    metric: str
    direction: Direction
    target: float | None

    def value(self, job: Job) -> float:
        """The metric; not a number where the job has none."""
        return job.metrics.get(self.metric, math.nan)

    def steps(self, job: Job) -> int | None:
        """Steps to the target; None if it was not reached or there is none."""
        return None if self.target is None else job.steps_to(self.metric, self.target, self.direction)

    def examples(self, job: Job) -> int | None:
        """Examples to the target; None if it was not reached or there is none."""
        steps = self.steps(job)
        return None if steps is None else job.examples_after(steps)


def show(folder: Path, metric: str | None = None, direction: str | None = None, target: float | None = None) -> Result:
    """Print the table, write sweep.csv and sweep.png; UsageError where no job has the metric."""
    result = read_result(folder, metric, direction, target)
    rows = table(result)
    _print(rows, result)
    with (folder / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows(full_table(result))
    print(f"table       {folder / 'sweep.csv'}")
    if any(math.isfinite(result.value(job)) for job in result.jobs) and result.keys:
        from mbgd.tools.sweep_plot import plot  # matplotlib takes a second to import

        plot(result, folder / "sweep.png")
        print(f"plot        {folder / 'sweep.png'}")
    return result


def read_result(folder: Path, metric: str | None, direction: str | None, target: float | None) -> Result:
    """The sweep in this folder, ranked; what is None is as its jobs' configurations have it."""
    jobs = read_jobs(folder)
    configured = next((dict(job.config["sweep"]) for job in jobs if "sweep" in job.config), {})
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
    return Result(sorted(jobs, key=rank), keys, metric, ascending, target)


def table(result: Result) -> list[list[str]]:
    """What a person wants to see, a header and a row for each job."""
    others = [name for name in _metric_names(result.jobs) if name.startswith("eval/") and name != result.metric]
    to_target = ["steps to target", "examples to target"] if result.target is not None else []
    rows = [["job", *result.keys, result.metric, *others, *to_target, "steps", "examples/s", "state"]]
    for job in result.jobs:
        values = [job.metrics.get(name) for name in (result.metric, *others)]
        row = [str(job.record.number), *(_short(job.record.swept.get(key, "")) for key in result.keys)]
        row += ["" if value is None else f"{value:.4g}" for value in values]
        if to_target:
            row += [_count(result.steps(job)), _count(result.examples(job))]
        row += [_count(job.summary.get("steps")), _count(job.summary.get("examples_per_second")), job.state]
        rows.append(row)
    return rows


def full_table(result: Result) -> list[list[object]]:
    """Everything, for other programs: numbers as they are, nothing where there is none."""
    names = _metric_names(result.jobs)
    facts = ["steps", "examples_seen", "examples_per_second", "num_workers"]
    header = ["job", *result.keys, *names, "steps_to_target", "examples_to_target", *facts, "state", "folder"]
    rows: list[list[object]] = [list(header)]
    for job in result.jobs:
        swept = [job.record.swept.get(key) for key in result.keys]
        row = [job.record.number, *swept, *(job.metrics.get(name) for name in names)]
        row += [result.steps(job), result.examples(job), *(job.summary.get(fact) for fact in facts)]
        rows.append([*row, job.state, job.folder])
    return rows


def _print(rows: Sequence[Sequence[str]], result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    better = "lowest" if result.direction is Direction.minimize else "highest"
    title = f"{result.metric}, {better} first"
    if result.target is not None:
        title += f"; target {result.target:g}"
    shown = Table(title=title, title_justify="left", title_style="bold")
    for name in rows[0]:
        shown.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for row in rows[1:]:
        shown.add_row(*row, style=None if row[-1] == "complete" else "red")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 500  # a file or a pipe has no width to fit in
    console.print(shown)
    for job in result.jobs:
        if job.record.exit_code:
            console.print(f"job {job.record.number} failed: {job.folder / LOG}", style="red", soft_wrap=True)


def _metric_names(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(name for job in jobs for name in job.metrics))


def _short(value: str) -> str:
    """A value as it was given, but for numbers that a sweeper has drawn."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def _count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"
