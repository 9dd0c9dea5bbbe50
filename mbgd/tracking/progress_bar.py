"""The progress bar on a terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mbgd.tracking.base import Ending, Metrics
from mbgd.tracking.wording import describe, is_evaluation

SECONDS_BETWEEN_UPDATES = 0.25
BAR_WIDTH = 16
"""With a million steps and a loss, the line still fits 80 columns."""


class ProgressBar:
    """A bar with the steps done, the time left, the newest loss and speed; evaluations stay above it.

    The training thread draws it a few times a second; a thread of its own would compete with training for the GIL.
    """

    def __init__(self, num_steps: int, first_step: int = 0) -> None:
        self._num_steps = num_steps
        self._bar = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[metrics]}"),
            console=Console(highlight=False),
            transient=True,
            auto_refresh=False,
        )
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
            self._bar.console.print(f"step {step}/{self._num_steps} · {describe(metrics)}", markup=False)
        elif metrics:
            shown = {k: v for k, v in metrics.items() if k == "train/loss" or k.endswith("/examples_per_second")}
            self._bar.update(self._task, completed=step, metrics=describe(shown))

    def close(self, ending: Ending) -> None:
        self._bar.stop()
