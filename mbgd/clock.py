"""Training speed: examples per second, without the time of evaluations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mbgd.plan import Plan


class Clock:
    """Runs from step `first_step` on, and stands still while paused."""

    def __init__(self, plan: Plan, first_step: int) -> None:
        self._plan = plan
        self._examples_before = plan.examples_seen(first_step)
        self._started = time.perf_counter()

    def examples_per_second(self, step: int) -> float:
        """Mean speed, all workers together, from the first step to the end of step number `step`."""
        seconds = time.perf_counter() - self._started
        return (self._plan.examples_seen(step) - self._examples_before) / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began
