"""The result of a sweep from its jobs' folders: a table sorted by the metric, sweep.csv and a plot."""

import argparse
import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from mbgd.cli.tools.sweep_plot import plot
from mbgd.config import Direction
from mbgd.files.atomic import write_atomically
from mbgd.runs.sweeps import LOG, Job, Ranking, read_ranking
from mbgd.text.escaping import plain

_STATE = "state"
GAP = 2
"""Spaces between columns."""
CUT_SAVES = 1
"""A column's name is cut where that saves more characters than this."""
MOST_STATE = 16
"""Characters in the table of what is wrong with a job; all of it stands below."""

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
    """The table for people: a header, and a row for each job; the most important columns first."""
    columns = [["job", *(str(job.record.number) for job in ranking.jobs)]]
    if any(job.state != "complete" for job in ranking.jobs):
        columns += [[_STATE, *(_cut(job.state) for job in ranking.jobs)]]
    columns += [[key, *(_short(job.record.swept.get(key, "")) for job in ranking.jobs)] for key in ranking.keys]
    others = [name for name in _metric_names(ranking.jobs) if name.startswith("eval/") and name != ranking.metric]
    columns += [[name, *(_value(job.metrics.get(name)) for job in ranking.jobs)] for name in (ranking.metric, *others)]
    if ranking.target is not None:
        columns += [["steps to target", *(_count(ranking.steps(job)) for job in ranking.jobs)]]
        columns += [["examples to target", *(_count(ranking.examples(job)) for job in ranking.jobs)]]
    for name, fact in (("steps", "steps"), ("examples/s", "examples_per_second")):
        columns += [[name, *(_count(job.summary.get(fact)) for job in ranking.jobs)]]
    return [list(row) for row in zip(*columns, strict=True)]


def fitting(rows: Sequence[Sequence[str]], width: float) -> tuple[list[list[str]], list[str]]:
    """(the table without its last columns that do not fit, the names of those); the first two are always kept."""
    columns = list(zip(*rows, strict=True))
    widths = [
        max(len(line) for cell in (_header(column[0]), *column[1:]) for line in cell.split("\n")) for column in columns
    ]
    num = len(columns)
    while num > 2 and sum(widths[:num]) + GAP * (num - 1) > width:
        num -= 1
    return [list(row[:num]) for row in rows], list(rows[0][num:])


def _header(name: str) -> str:
    """The name in two lines, cut where it has parts: optimizer.lr as optimizer. and lr."""
    parts = re.split(r"(?<=[./ ])", plain(name))
    cuts = ["".join(parts[:number]).rstrip() + "\n" + "".join(parts[number:]) for number in range(1, len(parts))]
    return min(["".join(parts), *cuts], key=lambda cut: max(map(len, cut.split("\n"))) + CUT_SAVES * ("\n" in cut))


def _cut(state: str) -> str:
    return state if len(state) <= MOST_STATE else state[: MOST_STATE - 1] + "…"


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
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    better = "lowest" if ranking.direction is Direction.minimize else "highest"
    title = f"{ranking.metric}, {better} first"
    if ranking.target is not None:
        title += f"; target {ranking.target:g}"
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 500  # a file or a pipe has no width limit
    rows, left_out = fitting(rows, console.width)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, GAP - 1, 0, 0), pad_edge=False)
    for name in rows[0]:
        shown.add_column(Text(_header(name)), justify="left" if name == _STATE else "right", no_wrap=True)
    for row, job in zip(rows[1:], ranking.jobs, strict=True):
        shown.add_row(*(Text(plain(cell)) for cell in row), style=None if job.state == "complete" else "red")
    console.print(Text(plain(title), style="bold"), soft_wrap=True)
    console.print(shown)
    if left_out:
        console.print(f"no room for {', '.join(map(plain, left_out))}: see sweep.csv", markup=False)
    for job in ranking.jobs:
        if job.record.exit_code:
            failed = f"job {job.record.number} failed: {plain(job.folder / LOG)}"
            console.print(failed, style="red", soft_wrap=True, markup=False)
        elif len(job.state) > MOST_STATE:
            told = f"job {job.record.number}: {plain(job.state)}"
            console.print(told, style="red", soft_wrap=True, markup=False)


def _metric_names(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(name for job in jobs for name in job.metrics))


def _short(value: str) -> str:
    """The value as given; long numbers, which a sweeper has drawn, are rounded."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def _value(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"
