"""Collectives that run beside other work.

Some may still be under way when another one fails, because a worker is lost. The threads of gloo that work on them need
the GIL to let go of their tensors, and freeing the process group, which holds the GIL, waits for these threads. So
whoever leaves the group lets them end before, which shutting down the group's connections (connections.py) makes soon.
"""

from contextlib import suppress
from weakref import WeakSet

import torch.distributed as dist

_all: "WeakSet[UnderWay]" = WeakSet()


class UnderWay:
    """Collectives that this worker has started, in the same order as all others."""

    def __init__(self) -> None:
        self._works: list[dist.Work] = []
        _all.add(self)

    def add(self, work: dist.Work | None) -> None:
        """work: as torch returns it for `async_op=True`."""
        if work is not None:
            self._works.append(work)

    def wait(self) -> None:
        """Wait until all are done."""
        for work in self._works:
            work.wait()
        self._works.clear()

    def let_end(self) -> None:
        for work in self._works:
            with suppress(RuntimeError):
                work.wait()
        self._works.clear()


def let_end() -> None:
    """Wait until all collectives of this process have ended, also those that fail."""
    for one in list(_all):
        one.let_end()
