"""The curves of runs as CSV, every value of them."""

import csv
from collections.abc import Sequence
from pathlib import Path

from mbgd.files.atomic import replaced
from mbgd.files.run_files import METRICS
from mbgd.report.finding import Runs
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import Line, read_lines


def write_csv(folders: Sequence[Path], path: Path) -> None:
    """A line for each line of metrics.jsonl: run, step, and a column for each metric; texts are left out."""
    runs = Runs(folders).read()
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    with replaced(path) as temporary, temporary.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", *map(plain, names)])
        for run in runs:
            for line in read_lines(run.folder / METRICS):
                if isinstance(line, Line):
                    values = [line.metrics.get(name, "") for name in names]
                    writer.writerow([run.name, line.step, *("" if isinstance(one, str) else one for one in values)])
