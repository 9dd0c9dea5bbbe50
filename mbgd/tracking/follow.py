"""The process behind a `Follower`: `python -m mbgd.tracking.follow SINK FOLDER START`.

It sends the lines of the run's `metrics.jsonl` as they appear, until it reads from standard input how the run ended. If
standard input closes without a message, the training process is dead. The training process shows what this one prints.
"""

import json
import math
import os
import select
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from mbgd.files.file_lock import locked
from mbgd.files.lines import MOST_LINE_BYTES
from mbgd.files.observed import HISTOGRAMS, HistogramLine, parsed
from mbgd.files.reading import open_regular
from mbgd.files.run_files import METRICS, OBSERVED
from mbgd.text.escaping import plain
from mbgd.tracking.base import Ending, Metrics, Outcome
from mbgd.tracking.json_lines import parse

T = TypeVar("T")

SINKS = {"wandb": "mbgd.tracking.wandb_sink", "tensorboard": "mbgd.tracking.tensorboard_sink"}
"""Modules with a function `open_sink(folder, start)`."""

SECONDS_BETWEEN_LOOKS = 0.5
NICENESS = 10


class Sink(Protocol):
    """Gets a run's whole history, line by line."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def histograms(self, line: HistogramLine) -> None:
        """Called before the metrics of the same step, and of later ones."""

    def flush(self) -> None:
        """Called when there are no more lines for now."""

    def close(self, ending: Ending) -> None: ...


def main(name: str, folder: Path, start: int) -> None:
    """start: 1 for the first process of this run, 2 and more after earlier ones have failed."""
    with suppress(OSError):
        os.nice(NICENESS)  # training goes first
    with locked(folder / name / "lock"):  # the process of a training that was killed may still be sending
        _follow(name, folder, start)


def _follow(name: str, folder: Path, start: int) -> None:
    sink: Sink = import_module(SINKS[name]).open_sink(folder, start)
    histograms = _Histograms(folder)
    with open_regular(folder / METRICS) as file:
        ending = None
        while ending is None:
            ending = _ending(SECONDS_BETWEEN_LOOKS)
            for line in _whole_lines(file, parse):
                for earlier in histograms.up_to(line.step):
                    sink.histograms(earlier)
                sink.log(line.step, line.metrics)
            sink.flush()
    for left in histograms.up_to(math.inf):
        sink.histograms(left)
    sink.close(ending)


class _Histograms:
    """The lines of histograms.jsonl, each given out once its step is reached: W&B takes no step after a later one.

    The training process writes them before the metrics of the same step.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / OBSERVED / f"{HISTOGRAMS}.jsonl"
        self._file: BinaryIO | None = None
        self._waiting: deque[HistogramLine] = deque()

    def up_to(self, step: float) -> Iterator[HistogramLine]:
        """Those of steps up to this one that have not been given out yet."""
        if self._file is None and self._path.exists():
            self._file = open_regular(self._path)
        if self._file is not None:
            self._waiting += _whole_lines(self._file, lambda content: parsed(content, HistogramLine))
        while self._waiting and self._waiting[0].step <= step:
            yield self._waiting.popleft()


def say(message: str) -> None:
    """Print a message through the training process, if it is still alive."""
    with suppress(OSError):
        print(message, flush=True)


def _ending(seconds: float) -> Ending | None:
    """How the run ended, if the message comes within `seconds`."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    if not readable:
        return None
    order = sys.stdin.readline()
    if not order:
        return Ending(Outcome.failed, "the training process died")
    told = json.loads(order)
    return Ending(Outcome(told["outcome"]), told["message"])


def _whole_lines(file: BinaryIO, parse: Callable[[bytes], T]) -> Iterator[T]:
    """The lines written since the last call; one that cannot be read is reported and left out."""
    while True:
        position = file.tell()
        content = file.readline(MOST_LINE_BYTES)
        if not content.endswith(b"\n") and len(content) < MOST_LINE_BYTES:
            file.seek(position)  # the line is not complete yet
            return
        try:
            yield parse(content)
        except ValueError as error:
            say(f"a line of {Path(file.name).name} cannot be read ({plain(error)}) and is left out")


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # everything is written; libraries' exit handlers could block
