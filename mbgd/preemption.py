"""Stopping in good order when the cluster asks: signals set a flag, and the workers agree at a step's end.

A signal may reach some workers only, and also when a peer has died; so it never starts anything by itself. About once
a second the workers exchange the flag, all at the same step; who is alone cannot agree and does not save.
"""

import os
import signal
import time
from types import FrameType
from typing import Protocol

import torch

from mbgd.workers import Workers

SECONDS_BETWEEN_AGREEMENTS = 1.0
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. What a launcher may requeue on."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Stop(Protocol):
    def agreed(self, step: int) -> bool:
        """Whether all workers stop after so many steps; asked after every step."""


class NoStop:
    def agreed(self, step: int) -> bool:
        return False


class StopOnSignal:
    """Stops all workers once SIGTERM, SIGUSR1, SIGINT or SIGHUP has reached one; a second SIGINT ends at once."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._asked = False
        self._next_step: int | None = None
        self._last_step, self._last_time = 0, 0.0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            os._exit(128 + signal.SIGINT)  # the user insists; nothing is waited for
        self._asked = True

    def agreed(self, step: int) -> bool:
        if self._workers.num_workers == 1:
            return self._asked
        if self._next_step is not None and step < self._next_step:
            return False
        now = time.monotonic()
        interval = 1
        if self._next_step is not None:
            seconds_per_step = (now - self._last_time) / (step - self._last_step)
            interval = max(1, int(SECONDS_BETWEEN_AGREEMENTS / max(seconds_per_step, 1e-6)))
        self._last_step, self._last_time = step, now
        # Whether any worker was asked, and the shortest interval that any proposes: the same on all.
        mine = torch.tensor([int(self._asked), -interval], device=self._workers.device)
        asked, negative_interval = self._workers.max_(mine).tolist()
        self._next_step = step - negative_interval
        return bool(asked)
