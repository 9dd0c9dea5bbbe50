"""Answers that all workers act on at the same step, such as whether one of them was asked to stop.

About once a second the workers exchange them, all at the same step: it costs next to nothing, and what only one worker
knows, a signal or the time that has passed, is known to all before any acts on it.
"""

import time

import torch

from mbgd.workers.group import Workers

SECONDS_BETWEEN = 1.0


class Agreement:
    """Asked by every worker after every step; the exchanges are at the same steps on all."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._next_step: int | None = None
        self._last_step, self._last_time, self._interval = 0, 0.0, 1

    def __call__(self, step: int, mine: bool) -> bool:
        """Whether any worker's answer is yes; False in steps without an exchange."""
        if self._workers.num_workers == 1:
            return mine
        if self._next_step is not None and step < self._next_step:
            return False
        if self._workers.device.type == "cuda":
            torch.cuda.synchronize(self._workers.device)  # else the time would be that of launching the steps
        now = time.monotonic()
        if self._next_step is not None:
            seconds_per_step = (now - self._last_time) / (step - self._last_step)
            # Never more than twice the last: the first steps may have been faster than those that come.
            self._interval = max(1, min(int(SECONDS_BETWEEN / max(seconds_per_step, 1e-6)), 2 * self._interval))
        self._last_step, self._last_time = step, now
        # The shortest interval that any worker proposes, the same on all.
        told = torch.tensor([int(mine), -self._interval], device=self._workers.device)
        answer, negative_interval = self._workers.max_(told).tolist()
        self._interval = -negative_interval
        self._next_step = step + self._interval
        return bool(answer)
