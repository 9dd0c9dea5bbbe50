"""`metrics.jsonl`: one JSON object for each logged step and each evaluation. Only this module writes and reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mbgd.errors import UsageError
from mbgd.files import strict_json
from mbgd.files.lines import BadLine, lines_of
from mbgd.files.reading import Unreadable, convert, open_regular, parse_json
from mbgd.files.run_files import METRICS
from mbgd.text.escaping import plain
from mbgd.tracking.base import Ending, Metrics

MOST_STEPS = 2**53

Step = Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)]
Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Values = dict[str, Integer | float | str | None]

_DECODER = msgspec.json.Decoder(Values)


class JsonLines:
    """Appends {"step": …, "train/loss": …} lines to a file, each written at once, so that a crash loses none.

    A power failure loses lines that are not flushed; a checkpoint flushes the file before it is complete.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path, "ab")

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        if metrics:
            self._file.write((strict_json.dumps({"step": step, **metrics}) + "\n").encode())
            self._file.flush()

    def close(self, ending: Ending) -> None:
        self._file.close()


@dataclass(frozen=True)
class Line:
    step: int
    metrics: dict[str, float | str]
    number: int = 0
    """Line number in the file, counted from 1."""
    content: bytes = field(default=b"", repr=False)
    """The bytes in the file, with the newline."""


def parse(content: bytes) -> Line:
    """A line of the file; ValueError says what is wrong with it. null becomes nan."""
    values = _parse_quickly(content)
    if values is None:
        values = parse_json(content)
        if not isinstance(values, dict) or "step" not in values:
            raise ValueError("it is not an object with a step")
        convert(values["step"], Step)
        convert(values, Values)
    step = values.pop("step")
    return Line(step, strict_json.numbers(values) if None in values.values() else values)


def _parse_quickly(content: bytes) -> dict[str, Any] | None:
    """A line that is right, ten times as fast; None for one that must be judged."""
    try:
        values = _DECODER.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if content.count(b":") != len(values):  # more colons: perhaps a key is there twice
        return None
    step = values.get("step")
    return values if isinstance(step, int) and 0 <= step <= MOST_STEPS else None


def read_lines(path: Path) -> Iterator[Line | BadLine]:
    """The lines of a run's history in their order; FileNotFoundError, or Unreadable if the file cannot be read."""
    for line in lines_of(path, parse):
        if isinstance(line, BadLine):
            yield line
        else:
            yield Line(line.value.step, line.value.metrics, line.number, line.content)


def read_history(folder: Path) -> tuple[list[Line], list[BadLine]]:
    """(lines of the run's metrics, lines that cannot be read); UsageError if the folder is not a run's."""
    good, bad = [], []
    with of_run(folder):
        for line in read_lines(folder / METRICS):
            if isinstance(line, Line):
                good.append(line)
            else:
                bad.append(line)
    return good, bad


@contextmanager
def of_run(folder: Path) -> Iterator[None]:
    """Turns the errors of reading a run's history into a UsageError: the folder is not a run's."""
    try:
        yield
    except (FileNotFoundError, Unreadable) as error:
        reason = error.reason if isinstance(error, Unreadable) else error.strerror
        raise UsageError(
            f"{plain(folder)} is not the folder of a run: {METRICS} cannot be read ({reason}). A run's folder is what "
            "train.py names at the start."
        ) from error


def describe_bad(lines: list[BadLine]) -> str:
    """In words: which lines cannot be read."""
    first, num_more = lines[0], len({line.number for line in lines}) - 1
    more = f", and {num_more} more" if num_more else ""
    return f"line {first.number} cannot be read ({first.reason}){more}"
