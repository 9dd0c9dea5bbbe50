"""Python's garbage is collected at chosen steps, the same on all workers, and nowhere else.

By itself Python collects wherever a threshold is passed: each worker in another step, while the others wait for it.
"""

import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

YOUNG_EVERY_STEPS = 50
ALL_EVERY_STEPS = 1000


def collected_at_steps(shards: Iterable[T], num_steps_done: int) -> Iterator[T]:
    """What `shards` gives, collecting garbage after some steps; nothing changes where the user has turned it off."""
    if not gc.isenabled():
        yield from shards
        return
    gc.freeze()  # what is there already would be gone through again and again
    gc.disable()
    try:
        for step, shard in enumerate(shards, start=num_steps_done + 1):
            yield shard
            if step % YOUNG_EVERY_STEPS == 0:
                gc.collect(2 if step % ALL_EVERY_STEPS == 0 else 1)
    finally:
        gc.enable()
        gc.unfreeze()
