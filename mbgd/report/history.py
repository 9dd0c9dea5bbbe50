"""What a run's folder tells: curves by name, and what the run was."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mbgd.files import folder_lock, run_files
from mbgd.files.lines import BadLine, GrowingFile
from mbgd.files.run_files import CONFIG, METRICS, RUN, SUMMARY, read_config, read_run, read_summary
from mbgd.report.curve import Curve
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import Line, describe_bad, of_run, parse

MOST, LEAST = 1e150, 1e-150
"""Beyond, a picture's own arithmetic would overflow."""
EPOCH, SPEED = "train/epoch", "time/examples_per_second"


@dataclass(frozen=True)
class History:
    folder: Path
    name: str
    curves: dict[str, Curve]
    """By the names of metrics.jsonl. Values that are not finite, or beyond ±1e150, are left out."""
    duration: Curve
    """Time of training without evaluations, in seconds of one epoch that had one example; see `examples_per_epoch`."""
    summary: dict[str, Any]
    """Empty where the run is not complete."""
    record: dict[str, Any]
    """run.json: plan, environment, code, and how the run ended."""
    config: dict[str, Any]
    """By dotted keys."""
    problems: list[str]
    """What could not be read."""
    is_running: bool

    @property
    def outcome(self) -> str:
        """finished, failed, preempted, running or unknown."""
        if ending := self.record.get("ending"):
            return str(ending["outcome"])
        if self.is_running:
            return "running"
        return "finished" if self.summary else "unknown"

    @property
    def state(self) -> str:
        """How the run ended, in words."""
        if self.outcome == "unknown":
            return "ended without a word (killed, or its host was lost)"
        message = (self.record.get("ending") or {}).get("message")
        return f"{self.outcome}: {message}" if message else self.outcome

    @property
    def numbers(self) -> dict[str, int]:
        """Counts of the plan; empty for runs of mbgd before 0.3."""
        return dict(self.record.get("numbers") or {})

    @property
    def last_step(self) -> int:
        return max((curve.last.step for curve in self.curves.values()), default=0)

    def last(self, name: str) -> float | None:
        return self.curves[name].last.value if name in self.curves else None


@dataclass(frozen=True)
class _Files:
    summary: dict[str, Any]
    record: dict[str, Any]
    config: dict[str, Any]
    problems: list[str]


class Reader:
    """Reads a run's folder again and again; of metrics.jsonl only the lines that are new."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = folder
        self.name = name or plain(folder.resolve().name)
        self._files: _Files | None = None
        self._stamps: list[tuple[int, ...]] = []
        self._restart()

    def _restart(self) -> None:
        self._file = GrowingFile(self.folder / METRICS, parse)
        self._curves: defaultdict[str, Curve] = defaultdict(Curve)
        self._duration, self._epoch, self._passed = Curve(), 0.0, 0.0
        self._bad: list[BadLine] = []

    def read(self, *, may_grow: bool = False) -> History:
        """Raises UsageError where the folder is not a run's; what else is missing, or cannot be read, is left empty.

        may_grow: a last line that is not complete is still being written.
        """
        with of_run(self.folder):
            if self._file.was_replaced():
                self._restart()
            for line in self._file.lines(whole=may_grow):
                if isinstance(line, BadLine):
                    self._bad.append(line)
                else:
                    self._add(line.value)
        files = self._read_files()
        problems = [f"metrics.jsonl: {describe_bad(self._bad)}"] if self._bad else []
        return History(
            folder=self.folder,
            name=self.name,
            curves=dict(self._curves),
            duration=self._duration,
            summary=files.summary,
            record=files.record,
            config=files.config,
            problems=[*problems, *files.problems],
            is_running=folder_lock.holder(self.folder) is not None,
        )

    def _read_files(self) -> _Files:
        """The small files, read again only where one has changed."""
        found = [_stamp(self.folder / name) for name in (SUMMARY, RUN, CONFIG)]
        if self._files is None or found != self._stamps:
            problems: list[str] = []
            read = partial(run_files.read_or_tell, folder=self.folder, problems=problems)
            self._files = _Files(read(read_summary), read(read_run), _flat(read(read_config)), problems)
            self._stamps = found
        return self._files

    def _add(self, line: Line) -> None:
        step, curves = line.step, self._curves
        for name, value in line.metrics.items():
            if not isinstance(value, str) and abs(value) <= MOST:  # not a number is not
                curves[name].add(step, value if abs(value) >= LEAST else 0.0)
        epoch, speed = line.metrics.get(EPOCH), line.metrics.get(SPEED)
        if isinstance(epoch, float | int) and isinstance(speed, float | int) and speed > 0:
            self._passed += (epoch - self._epoch) / speed
            self._epoch = epoch
            self._duration.add(step, self._passed)


def _stamp(path: Path) -> tuple[int, ...]:
    """Differs where the file has been written again; empty if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
