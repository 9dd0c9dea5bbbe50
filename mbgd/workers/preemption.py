"""Graceful stop when the cluster asks: signals set a flag, and the workers agree at the end of a step.

A signal may reach some workers only, or come after a peer has died, so the handler does nothing but set the flag. The
workers exchange it (`agreement.py`); a worker whose peers are gone cannot agree and does not save.
"""

import os
import signal
from types import FrameType
from typing import Protocol

from mbgd.errors import GroupChanged
from mbgd.workers.agreement import Agreement
from mbgd.workers.group import Workers
from mbgd.workers.membership import Membership

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h, "try again later": a launcher may requeue on it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Stop(Protocol):
    def agreed(self, step: int) -> bool:
        """Whether all workers stop after step `step`; called after every step."""


class NoStop:
    def agreed(self, step: int) -> bool:
        return False


class StopOnSignal:
    """Stops all workers once SIGTERM, SIGUSR1, SIGINT or SIGHUP has reached one; a second SIGINT ends at once."""

    def __init__(self, workers: Workers, membership: Membership | None = None) -> None:
        """membership: when it changes, all raise GroupChanged at the same step, to take newcomers in."""
        self._asked, self._membership = False, membership
        self.meet(workers)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            os._exit(128 + signal.SIGINT)  # the user insists: exit without waiting for anything
        self._asked = True

    def is_asked(self) -> bool:
        """Whether a signal has reached this worker."""
        return self._asked

    def meet(self, workers: Workers) -> None:
        """From now on these workers agree."""
        self._stops, self._changes = Agreement(workers), Agreement(workers)

    def agreed(self, step: int) -> bool:
        if self._membership is not None and self._changes(step, self._membership.has_changed()):
            raise GroupChanged
        return self._stops(step, self._asked)
