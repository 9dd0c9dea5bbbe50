"""The result of a sweep from its jobs' folders: a table sorted by the metric, sweep.csv and a plot."""

import argparse
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from mbgd.cli.tools.sweep_plot import plot
from mbgd.config import Direction
from mbgd.files.atomic import write_atomically
from mbgd.runs.sweeps import LOG, Job, Ranking, read_ranking
from mbgd.text.escaping import plain

DESCRIPTION = "show the results of a sweep's jobs: a table, sweep.csv and sweep.svg in its folder"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", type=Path, help="the sweep's folder")
    parser.add_argument("--metric", help="what to rank the jobs by; the sweep's own if left out")
    parser.add_argument("--direction", choices=[one.value for one in Direction], help="which values are better")
    parser.add_argument("--target", type=float, help="value of the metric; show the steps and examples to it")


def main(parsed: argparse.Namespace) -> int:
    show(parsed.sweep, parsed.metric, parsed.direction, parsed.target)
    return 0


def show(folder: Path, metric: str | None = None, direction: str | None = None, target: float | None = None) -> Ranking:
    """Print the table, write sweep.csv and sweep.svg; UsageError if no job has the metric."""
    ranking = read_ranking(folder, metric, direction, target)
    rows = table(ranking)
    _print(rows, ranking)
    text = io.StringIO(newline="")
    csv.writer(text).writerows(full_table(ranking))
    write_atomically(folder / "sweep.csv", text.getvalue().encode())
    print(f"table       {folder / 'sweep.csv'}")
    if any(math.isfinite(ranking.value(job)) for job in ranking.jobs) and ranking.keys:
        plot(ranking, folder / "sweep.svg")
        print(f"plot        {folder / 'sweep.svg'}")
    return ranking


def table(ranking: Ranking) -> list[list[str]]:
    """The table for people: a header, and a row for each job."""
    others = [name for name in _metric_names(ranking.jobs) if name.startswith("eval/") and name != ranking.metric]
    to_target = ["steps to target", "examples to target"] if ranking.target is not None else []
    rows = [["job", *ranking.keys, ranking.metric, *others, *to_target, "steps", "examples/s", "state"]]
    for job in ranking.jobs:
        values = [job.metrics.get(name) for name in (ranking.metric, *others)]
        row = [str(job.record.number), *(_short(job.record.swept.get(key, "")) for key in ranking.keys)]
        row += ["" if value is None else f"{value:.4g}" for value in values]
        if to_target:
            row += [_count(ranking.steps(job)), _count(ranking.examples(job))]
        row += [_count(job.summary.get("steps")), _count(job.summary.get("examples_per_second")), job.state]
        rows.append(row)
    return rows


def full_table(ranking: Ranking) -> list[list[object]]:
    """The full table for other programs: numbers not rounded, empty cells for missing ones."""
    names = _metric_names(ranking.jobs)
    facts = ["steps", "examples_seen", "examples_per_second", "num_workers"]
    header = ["job", *ranking.keys, *names, "steps_to_target", "examples_to_target", *facts, "state", "folder"]
    rows: list[list[object]] = [list(header)]
    for job in ranking.jobs:
        swept = [job.record.swept.get(key) for key in ranking.keys]
        row = [job.record.number, *swept, *(job.metrics.get(name) for name in names)]
        row += [ranking.steps(job), ranking.examples(job), *(job.summary.get(fact) for fact in facts)]
        rows.append([*row, job.state, job.folder])
    return rows


def _print(rows: Sequence[Sequence[str]], ranking: Ranking) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    better = "lowest" if ranking.direction is Direction.minimize else "highest"
    title = f"{ranking.metric}, {better} first"
    if ranking.target is not None:
        title += f"; target {ranking.target:g}"
    shown = Table(title=Text(plain(title)), title_justify="left", title_style="bold")
    for name in rows[0]:
        shown.add_column(Text(plain(name)), justify="left" if name == "state" else "right", no_wrap=True)
    for row in rows[1:]:
        shown.add_row(*(Text(plain(cell)) for cell in row), style=None if row[-1] == "complete" else "red")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 500  # a file or a pipe has no width limit
    console.print(shown)
    for job in ranking.jobs:
        if job.record.exit_code:
            failed = f"job {job.record.number} failed: {plain(job.folder / LOG)}"
            console.print(failed, style="red", soft_wrap=True, markup=False)


def _metric_names(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(name for job in jobs for name in job.metrics))


def _short(value: str) -> str:
    """The value as given; long numbers, which a sweeper has drawn, are rounded."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def _count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"
