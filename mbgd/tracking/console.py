"""A run's progress for people: a progress bar on a terminal, plain lines elsewhere."""

import math
import os
import shutil
import sys
import time
from datetime import timedelta
from typing import TextIO

from mbgd.tracking.base import Ending, Metrics, Tracker
from mbgd.tracking.wording import Lines, is_evaluation

LEAST_SECONDS_BETWEEN_LINES, MOST_SECONDS_BETWEEN_LINES = 2.0, 60.0
SHARE_BETWEEN_LINES = 0.01
"""The interval between lines is 1 % of the time so far, so that a long run's log stays short."""


class PlainLines:
    """A line for every evaluation, and for logged steps now and then."""

    def __init__(self, num_steps: int, first_step: int = 0, file: TextIO | None = None) -> None:
        self._num_steps, self._first_step, self._file = num_steps, first_step, file or sys.stdout
        self._lines = Lines(num_steps)
        self._started = time.monotonic()
        self._next_line = self._started

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if metrics and (is_evaluation(metrics) or now >= self._next_line):
            print(f"{self._lines.line(step, metrics)}{self._left(step)}", file=self._file, flush=True)
            interval = SHARE_BETWEEN_LINES * (now - self._started)
            self._next_line = now + min(max(interval, LEAST_SECONDS_BETWEEN_LINES), MOST_SECONDS_BETWEEN_LINES)

    def close(self, ending: Ending) -> None:
        pass

    def _left(self, step: int) -> str:
        """The time left; empty in the first seconds and at the end."""
        elapsed = time.monotonic() - self._started
        steps_done, steps_left = step - self._first_step, self._num_steps - step
        if elapsed < LEAST_SECONDS_BETWEEN_LINES or not steps_done or not steps_left:
            return ""
        return f" · {timedelta(seconds=round(elapsed / steps_done * steps_left))} left"


def width() -> float:
    """The columns of the terminal; without one, lines may be as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


def tracker(num_steps: int, first_step: int) -> Tracker:
    """A progress bar where standard output is a terminal, plain lines elsewhere."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from mbgd.tracking.progress_bar import ProgressBar  # rich is slow to import

        return ProgressBar(num_steps, first_step)
    return PlainLines(num_steps, first_step)
