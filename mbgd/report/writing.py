"""Writes the page of a run, or of several."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from mbgd.files.atomic import write_atomically
from mbgd.files.run_files import REPORT
from mbgd.report.data import page_data
from mbgd.report.finding import Runs
from mbgd.report.history import History
from mbgd.report.page import render


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write a page about the runs in these folders, or under them; UsageError where there is none."""
    runs = Runs(folders)
    found = runs.read()

    def link(run: History) -> str:
        page = run.folder / REPORT
        own = page.is_file() and len(found) > 1 and page.resolve() != path.resolve()
        return "./" + quote(os.fsencode(os.path.relpath(page, path.parent))) if own else ""

    data = page_data(found, title_of(found, folders), link=link, problems=runs.problems)
    write_atomically(path, render(data).encode())


def title_of(found: Sequence[History], folders: Sequence[Path]) -> str:
    """The run, the folder, or the number of runs."""
    if len(found) == 1:
        return found[0].name
    return folders[0].resolve().name if len(folders) == 1 else f"{len(found)} runs"
