"""Yes/no decisions that all workers take at the same step, such as to stop because one of them got a signal.

About once a second, all at the same step, the workers exchange their answers. That costs next to nothing, and a signal
or an elapsed time that only one worker knows of is known to all before any acts on it.
"""

import time

import torch

from mbgd.workers.group import Workers

SECONDS_BETWEEN = 1.0


class Agreement:
    """Called by every worker after every step; all exchange at the same steps."""

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
            torch.cuda.synchronize(self._workers.device)  # else only the launches would be timed
        now = time.monotonic()
        if self._next_step is not None:
            seconds_per_step = (now - self._last_time) / (step - self._last_step)
            # At most twice the last interval: later steps may be slower than the first.
            self._interval = max(1, min(int(SECONDS_BETWEEN / max(seconds_per_step, 1e-6)), 2 * self._interval))
        self._last_step, self._last_time = step, now
        # The shortest interval that any worker proposes, the same on all.
        told = torch.tensor([int(mine), -self._interval], device=self._workers.device)
        answer, negative_interval = self._workers.max_(told).tolist()
        self._interval = -negative_interval
        self._next_step = step + self._interval
        return bool(answer)
