"""The runs that were asked for: a run's folder itself, or those under a folder; and what to call them."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbgd.errors import UsageError
from mbgd.files.job_file import JobRecord
from mbgd.files.reading import Unreadable
from mbgd.files.run_files import METRICS
from mbgd.report.history import History, Reader
from mbgd.text.escaping import plain

MOST_RUNS = 700
"""Of one page; the rest would not fit into it."""


@dataclass
class Runs:
    """Reads the runs in these folders, again and again; a run that has been added since is found."""

    folders: Sequence[Path]
    problems: list[str] = field(default_factory=list)
    """What could not be read of the last time."""
    _readers: dict[Path, Reader] = field(default_factory=dict)

    @property
    def is_one(self) -> bool:
        """Whether a single run was asked for."""
        return len(self.folders) == 1 and is_run(self.folders[0])

    def read(self, *, may_grow: bool = False) -> list[History]:
        """UsageError where a folder is no run's and holds none, or where the one run cannot be read."""
        self.problems = []
        found = [run for folder in self.folders for run in _under(folder)]
        if len(found) > MOST_RUNS:
            self.problems.append(f"Of {len(found):,} runs the {MOST_RUNS:,} newest are shown.")
            found = sorted(sorted(found, key=_when)[-MOST_RUNS:])
        names = _names(self.folders, found)
        histories = []
        for folder, name in zip(found, names, strict=True):
            reader = self._readers.setdefault(folder, Reader(folder))
            reader.name = plain(name)
            try:
                histories.append(reader.read(may_grow=may_grow))
            except UsageError as error:
                if folder in self.folders:
                    raise
                self.problems.append(str(error))
        return histories


def is_run(folder: Path) -> bool:
    return os.path.lexists(folder / METRICS)


def _under(folder: Path) -> list[Path]:
    """The run, or the runs at any depth under the folder; links are not followed."""
    if is_run(folder):
        return [folder]
    found = []
    for path, folders, files in os.walk(folder):
        if METRICS in files:
            found.append(Path(path))
            folders.clear()
        folders.sort()
    if not found:
        raise UsageError(
            f"{plain(folder)} is not the folder of a run and holds none: there is no {METRICS} in it, or in a folder "
            "under it. A run's folder is what train.py names at the end."
        )
    return found


def _when(folder: Path) -> float:
    try:
        return (folder / METRICS).lstat().st_mtime
    except OSError:
        return 0.0


def _names(asked: Sequence[Path], found: Sequence[Path]) -> list[str]:
    """A sweep's jobs by what the sweep gave them, others by their folder; whole paths where those are the same."""
    swept = [_swept(folder) for folder in found]
    keys = {key for values in swept for key in values}
    last_parts = Counter(key.rpartition(".")[2] for key in keys)
    names = []
    for folder, values in zip(found, swept, strict=True):
        parts = [(key.rpartition(".")[2], key, value) for key, value in values.items()]
        by_job = ", ".join(f"{last if last_parts[last] == 1 else key}={value}" for last, key, value in parts)
        names.append(by_job or _by_folder(asked, folder))
    common = Counter(names)
    return [name if common[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, found, strict=True)]


def _by_folder(asked: Sequence[Path], folder: Path) -> str:
    root = next((one for one in asked if one != folder and folder.is_relative_to(one)), None)
    return folder.resolve().name if root is None else folder.relative_to(root).as_posix()


def _swept(folder: Path) -> dict[str, str]:
    try:
        record = JobRecord.read(folder)
    except Unreadable:
        return {}
    return record.swept if record else {}
