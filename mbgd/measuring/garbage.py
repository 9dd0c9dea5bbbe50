"""Collects Python's garbage at fixed steps, the same on all workers, and nowhere else.

By itself Python collects whenever a threshold is passed: each worker in another step, while the others wait for it.
"""

import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

YOUNG_EVERY_STEPS = 50
ALL_EVERY_STEPS = 1000


def collected_at_steps(shards: Iterable[T], num_steps_done: int) -> Iterator[T]:
    """Yields from `shards` and collects garbage after some steps; does nothing if the user has turned it off."""
    if not gc.isenabled():
        yield from shards
        return
    gc.freeze()  # so that collections do not visit the objects that exist already
    gc.disable()
    try:
        for step, shard in enumerate(shards, start=num_steps_done + 1):
            yield shard
            if step % YOUNG_EVERY_STEPS == 0:
                gc.collect(2 if step % ALL_EVERY_STEPS == 0 else 1)
    finally:
        gc.enable()
        gc.unfreeze()
