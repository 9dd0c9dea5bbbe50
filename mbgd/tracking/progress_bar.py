"""The progress bar on a terminal."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mbgd.text.numbers import short
from mbgd.tracking.base import Ending, Metrics
from mbgd.tracking.wording import Lines, is_evaluation

SECONDS_BETWEEN_UPDATES = 0.25
BAR_WIDTH = 10
"""With a million steps, a loss, a speed and the memory, the line still fits 80 columns."""
SMOOTHING = 0.9
"""Share of the earlier losses in the smoothed one, at each logged step."""
LOSS, SPEED, MEMORY = "train/loss", "time/examples_per_second", "time/peak_memory_bytes"


class ProgressBar:
    """A bar with the steps done, the time left, the smoothed loss, speed and memory; evaluations stay above it.

    The training thread draws it a few times a second; a thread of its own would compete with training for the GIL.
    """

    def __init__(self, num_steps: int, first_step: int = 0) -> None:
        self._bar = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[metrics]}"),
            console=Console(highlight=False),
            transient=True,
            auto_refresh=False,
        )
        self._lines, self._loss = Lines(num_steps), Smoothed()
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, metrics="")
        self._bar.start()
        self._next_update = 0.0

    def progress(self, step: int) -> None:
        now = time.monotonic()
        if now >= self._next_update:
            self._bar.update(self._task, completed=step, refresh=True)
            self._next_update = time.monotonic() + SECONDS_BETWEEN_UPDATES

    def log(self, step: int, metrics: Metrics) -> None:
        if is_evaluation(metrics):
            console = self._bar.console
            console.print(self._lines.line(step, metrics, console.width), markup=False)
        elif metrics:
            self._bar.update(self._task, completed=step, metrics=self._describe(metrics))

    def close(self, ending: Ending) -> None:
        self._bar.stop()

    def _describe(self, metrics: Metrics) -> str:
        loss, speed, memory = (metrics.get(name) for name in (LOSS, SPEED, MEMORY))
        parts = []
        if isinstance(loss, int | float):
            parts.append(f"loss {self._loss(loss):.4g}")
        if isinstance(speed, int | float):
            parts.append(f"{speed:,.0f} examples/s" if speed < 1e6 else f"{speed / 1e6:.3g}M examples/s")
        if isinstance(memory, int | float):
            parts.append(short(memory, "bytes"))
        return " · ".join(parts)


class Smoothed:
    """The mean of all values so far, with weights that fall exponentially with their age.

    A value that is not finite is left out of the later means.
    """

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """The mean with this value."""
        if not math.isfinite(value):
            return value
        self._sum = SMOOTHING * self._sum + value
        self._weight = SMOOTHING * self._weight + 1
        return self._sum / self._weight
