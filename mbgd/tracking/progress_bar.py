"""What a person sees on a terminal while a run goes: a progress bar."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mbgd.tracking.base import Metrics
from mbgd.tracking.console import describe

SECONDS_BETWEEN_UPDATES = 0.1


class ProgressBar:
    """A bar with the steps done, the time left and the newest training metrics; evaluations stay above it."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=Console(highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=num_steps, metrics="")
        self._bar.start()
        self._next_update = 0.0

    def progress(self, step: int) -> None:
        now = time.monotonic()
        if now >= self._next_update:
            self._next_update = now + SECONDS_BETWEEN_UPDATES
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Metrics) -> None:
        if any(name.startswith("eval/") for name in metrics):
            self._bar.console.print(f"step {step}/{self._num_steps} · {describe(metrics)}")
        elif metrics:
            shown = {k: v for k, v in metrics.items() if k in ("train/loss", "time/examples_per_second")}
            self._bar.update(self._task, completed=step, metrics=describe(shown))

    def close(self) -> None:
        self._bar.stop()
