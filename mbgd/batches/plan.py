"""How a minibatch is cut: minibatch → micro-batches → workers. Integers only.

Words: the *minibatch* is the examples of one optimizer step, over all workers; a *micro-batch* is the
examples of one forward/backward on one worker; a worker's *shard* is its contiguous run of micro-batches.
Positions count along the epoch's order; `order.py` maps a position to an example.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from mbgd.config import AveragingName, Settings, in_steps
from mbgd.errors import UsageError

NUM_REPRODUCIBLE_LEAVES = 8
"""Micro-batches per minibatch with averaging=reproducible and no `batch.micro_batch_size`. The result depends on it, so
it must not depend on the number of workers."""

MOST_SIZES_TRIED = 500
"""How far below and above a minibatch size `with_micro_batches_of` searches."""


def cut(size: int, num_parts: int, part: int) -> int:
    """The start of part `part` when `size` items are cut into `num_parts` nearly equal parts."""
    return part * size // num_parts


class MicroBatch(NamedTuple):
    """Positions [start, stop) of one epoch, computed by one worker in one forward/backward."""

    number: int
    """Its number within its minibatch, the same on any number of workers."""
    num_micro_batches: int
    """Micro-batches of the whole minibatch."""
    start: int
    stop: int
    is_stand_in: bool = False
    """Computed with weight 0 by a worker without a shard, so that it takes part in the exchange."""

    @property
    def size(self) -> int:
        return self.stop - self.start


class Minibatch(NamedTuple):
    """Positions [start, stop) of one epoch: the examples of one optimizer step."""

    epoch: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The examples that each worker computes in each step: a pure function of the step and the rank."""

    num_examples: int
    minibatch_size: int
    num_workers: int
    micro_batch_size: int | None = None
    """Examples in the largest micro-batch; None: cut every minibatch into `default_num_micro_batches`."""
    default_num_micro_batches: int = 1
    drop_last: bool = False
    """Leave out an epoch's short last minibatch."""

    @cached_property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.num_examples, self.minibatch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    @property
    def examples_per_epoch(self) -> int:
        return min(self.steps_per_epoch * self.minibatch_size, self.num_examples)

    def num_micro_batches(self, size: int) -> int:
        """Number of micro-batches that a minibatch of `size` examples is cut into; none of them is empty."""
        if self.micro_batch_size is None:
            return min(self.default_num_micro_batches, size)
        return -(-size // self.micro_batch_size)

    @cached_property
    def minibatch_sizes(self) -> tuple[int, ...]:
        """The one or two sizes that an epoch's minibatches have; the last may be short."""
        return tuple({self.minibatch(step).size for step in (0, self.steps_per_epoch - 1)})

    @property
    def smallest_micro_batch(self) -> int:
        """Examples in the smallest micro-batch of any step."""
        return min(size // self.num_micro_batches(size) for size in self.minibatch_sizes)

    @property
    def most_forwards(self) -> int:
        """The most forwards of one step over all workers; each begins with the same state."""
        return max(self.num_workers, *(self.num_micro_batches(size) for size in self.minibatch_sizes))

    def with_micro_batches_of(self, least: int) -> list["Plan"]:
        """Up to three plans near this one whose micro-batches all have at least `least` examples."""
        first = max(1, self.minibatch_size - MOST_SIZES_TRIED)
        nearby = range(first, self.minibatch_size + MOST_SIZES_TRIED)
        sizes = sorted(nearby, key=lambda size: abs(size - self.minibatch_size))
        plans = [replace(self, drop_last=True), *(replace(self, minibatch_size=size) for size in sizes)]
        fits = [plan for plan in plans if plan.steps_per_epoch and plan.smallest_micro_batch >= least]
        return fits[:3]

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def minibatch(self, step: int) -> Minibatch:
        """The minibatch of step number `step`, counted from 0."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.minibatch_size
        return Minibatch(epoch, start, min(start + self.minibatch_size, self.num_examples))

    def shard(self, minibatch: Minibatch, rank: int) -> list[MicroBatch]:
        """Worker `rank`'s micro-batches of a minibatch; a stand-in if there is none for this worker."""
        num_parts = self.num_micro_batches(minibatch.size)
        return micro_batches(minibatch.start, minibatch.stop, num_parts, rank, self.num_workers)

    def examples_seen(self, steps: int) -> int:
        """Number of training examples in the first `steps` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.examples_per_epoch + min(rest * self.minibatch_size, self.num_examples)


def micro_batches(start: int, stop: int, num_parts: int, rank: int, num_workers: int) -> list[MicroBatch]:
    """Worker `rank`'s share of positions [start, stop) cut into `num_parts` micro-batches."""
    parts = _parts(stop - start, num_parts, rank, num_workers)
    if parts is None:
        return [MicroBatch(0, num_parts, start, start + cut(stop - start, num_parts, 1), is_stand_in=True)]
    return [MicroBatch(number, num_parts, start + begin, start + end) for number, begin, end in parts]


@lru_cache(maxsize=16)  # minibatches have one or two sizes
def _parts(size: int, num_parts: int, rank: int, num_workers: int) -> list[tuple[int, int, int]] | None:
    """(number, start, stop) of a worker's micro-batches in a minibatch of `size` examples; None if it has none."""
    first, last = cut(num_parts, num_workers, rank), cut(num_parts, num_workers, rank + 1)
    if first == last:
        return None
    edges = [cut(size, num_parts, part) for part in range(first, last + 1)]
    return [(number, *edge) for number, edge in zip(range(first, last), pairwise(edges), strict=True)]


def make_plan(settings: Settings, num_examples: int, num_workers: int) -> Plan:
    """The plan by which the settings cut `num_examples` training examples for `num_workers` workers."""
    if settings.batch.drop_last and num_examples < settings.batch.size:
        raise UsageError(
            f"batch.drop_last=true with batch.size={settings.batch.size} leaves none of the {num_examples} training "
            "examples. Use batch.drop_last=false or a smaller batch.size."
        )
    is_reproducible = settings.averaging.name is AveragingName.reproducible
    return Plan(
        num_examples=num_examples,
        minibatch_size=settings.batch.size,
        num_workers=num_workers,
        micro_batch_size=settings.batch.micro_batch_size,
        default_num_micro_batches=NUM_REPRODUCIBLE_LEAVES if is_reproducible else num_workers,
        drop_last=settings.batch.drop_last,
    )


def count_steps(settings: Settings, plan: Plan) -> int:
    """Optimizer steps of the whole run."""
    if settings.steps is not None:
        return in_steps(settings.steps, plan)
    assert settings.epochs is not None
    return settings.epochs * plan.steps_per_epoch
