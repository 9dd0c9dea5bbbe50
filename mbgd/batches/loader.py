"""Plan + order + dataset → this worker's micro-batches, step by step, on its device."""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from mbgd.batches.collating import Collate
from mbgd.batches.order import Order, OrderRule, PositionsToExamples
from mbgd.batches.plan import MicroBatch, Minibatch, Plan, micro_batches
from mbgd.batches.reading import BLOCK_EXAMPLES, Indices, keys, read
from mbgd.errors import UsageError
from mbgd.workers.group import Workers


@dataclass(frozen=True, kw_only=True)
class Data:
    """The examples of a run: map-style datasets (`__len__` and `__getitem__`, `__getitems__` or `gather`).

    Draws of `__getitem__` from torch's, numpy's or Python's global generators are a function of (seed, epoch, index). A
    training dataset with `augmented(index, key)` gives augmented examples: key, an int from 0 to 2**63 − 1, is a
    function of (seed, epoch, index), and the augmentation must draw all its randomness from it. `gather` must not draw.
    """

    train: Any
    evaluation: Any = None
    """A dataset, or several by name, whose metrics are called eval/NAME/loss; None: no evaluation."""
    shuffle: bool = True
    """Shuffle the training examples anew in every epoch, keyed by the seed."""
    order: OrderRule | None = None
    """Another order of the training examples: `WeightedOrder` or `BucketedOrder`; None: as `shuffle` says. It is kept
    with the numbers of the training dataset."""
    num_workers: int = 0
    """Loader processes per worker, for datasets without `gather`."""
    collate: Collate | None = None
    """Makes a batch of a list of examples, such as padded ones, for datasets without `gather`; None: equal shapes are
    stacked. It must keep all examples and their order, and draw nothing."""

    def __post_init__(self) -> None:
        check_dataset("training", self.train)
        for name, dataset in self.evaluation_sets.items():
            check_dataset(f"evaluation ({name})" if name else "evaluation", dataset)
        if self.order is not None:
            object.__setattr__(self, "order", self._checked_order(self.order))
        if self.num_workers < 0:
            raise UsageError(f"data.num_workers={self.num_workers}; it must be ≥ 0.")
        if self.collate is not None and not callable(self.collate):
            raise UsageError(f"data.collate={self.collate!r}; it must be a function of a list of examples.")
        gathering = [one for one in (self.train, *self.evaluation_sets.values()) if hasattr(one, "gather")]
        if self.collate is not None and gathering:
            raise UsageError(
                f"data.collate with {type(gathering[0]).__name__}, whose gather makes the batches: collate would never "
                "be called. Leave out the one or the other."
            )

    def _checked_order(self, order: Any) -> OrderRule:
        if isinstance(order, type) or not all(hasattr(order, name) for name in ("of", "described", "at_positions")):
            raise UsageError(
                f"data.order={order!r}; it must be mbgd.WeightedOrder(weights), mbgd.BucketedOrder(lengths) or None. "
                "Samplers of torch know one process alone, and cannot be resumed in the middle of an epoch."
            )
        if not self.shuffle:
            raise UsageError(
                f"data.shuffle=false with data.order={type(order).__name__}, which does not keep the dataset's order. "
                "Leave out the one or the other."
            )
        rule: OrderRule = order.of(self.train)
        return rule

    @property
    def evaluation_sets(self) -> dict[str, Any]:
        """The evaluation datasets by name; a single one has the name ""."""
        if self.evaluation is None:
            return {}
        if not isinstance(self.evaluation, Mapping):
            return {"": self.evaluation}
        for name in self.evaluation:
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
                raise UsageError(
                    f"data.evaluation has a set named {name!r}; a name has letters, digits, -, _ and . alone, and "
                    "becomes part of its metrics' names: eval/NAME/loss."
                )
        if not self.evaluation:
            raise UsageError("data.evaluation={} names no evaluation set. Name at least one, or use null for none.")
        return dict(self.evaluation)


def check_dataset(name: str, dataset: Any) -> None:
    """Raise UsageError unless the dataset is map-style and not empty."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)  # has a __getitem__ that only raises
    if is_stream or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"the {name} dataset ({type(dataset).__name__}) has no length, or no items by number; a dataset must be "
            "map-style (__len__ and __getitem__), so that every example goes to exactly one worker."
        )
    if len(dataset) == 0:
        raise UsageError(f"the {name} dataset ({type(dataset).__name__}) is empty; it must hold at least 1 example.")


class Examples(NamedTuple):
    """A micro-batch and its examples, on the device."""

    micro_batch: MicroBatch
    batch: Any


class Shard(NamedTuple):
    """This worker's part of one step."""

    step: int
    """Counted from 0."""
    minibatch: Minibatch
    micro_batches: list[Examples]


class Loader:
    """Gives this worker's shards of the training data in the plan's order, from any step on."""

    def __init__(
        self, data: Data, plan: Plan, seed: int, workers: Workers, *, dtype: torch.dtype, own_copies: bool
    ) -> None:
        """own_copies: each micro-batch has its own memory, so that it is aligned alike on any worker."""
        self._data, self._plan, self._rank = data, plan, workers.rank
        self._device, self._dtype, self._own_copies = workers.device, dtype, own_copies
        self._seed = seed
        self._order: PositionsToExamples = Order(plan.num_examples, seed, data.shuffle)
        if data.order is not None:
            self._order = data.order.at_positions(seed, plan.minibatch_size)
        self._augments = hasattr(data.train, "augmented")
        self._is_keyed = self._augments or not hasattr(data.train, "gather")

    def minibatch_indices(self, step: int) -> Indices:
        """The example indices of a step, over all workers."""
        minibatch = self._plan.minibatch(step)
        return self._order.at(minibatch.epoch, np.arange(minibatch.start, minibatch.stop))

    def shards(self, first: int, stop: int) -> Iterator[Shard]:
        """This worker's shards of steps [first, stop)."""
        planned: deque[tuple[int, Minibatch, list[MicroBatch]]] = deque()  # as far ahead as the reading
        batches = read(
            self._data.train,
            self._indices(first, stop, planned),
            num_workers=self._data.num_workers,
            device=self._device,
            dtype=self._dtype,
            own_copies=self._own_copies,
            augment=self._augments,
            collate=self._data.collate,
        )
        for batch in batches:
            step, minibatch, micro_batches = planned.popleft()
            first_examples, *others = micro_batches
            yield Shard(
                step,
                minibatch,
                [Examples(first_examples, batch), *(Examples(other, next(batches)) for other in others)],
            )

    def micro_batch(self, step: int, number: int) -> Examples:
        """Micro-batch `number` of a step, of any worker."""
        minibatch = self._plan.minibatch(step)
        num_parts = self._plan.num_micro_batches(minibatch.size)
        wanted = micro_batches(minibatch.start, minibatch.stop, num_parts, 0, 1)[number]
        indices = self._order_of(minibatch.epoch, [wanted])
        (batch,) = read(
            self._data.train,
            indices,
            num_workers=0,
            device=self._device,
            dtype=self._dtype,
            augment=self._augments,
            collate=self._data.collate,
        )
        return Examples(wanted, batch)

    def _indices(
        self, first: int, stop: int, planned: deque[tuple[int, Minibatch, list[MicroBatch]]]
    ) -> Iterator[Indices]:
        """The example indices of each of this worker's micro-batches; appends each step's plan to `planned`."""
        plan = self._plan
        block_steps = max(1, BLOCK_EXAMPLES * plan.num_workers // plan.minibatch_size)
        for epoch, steps in groupby(range(first, stop), plan.epoch_of):
            while block := list(islice(steps, block_steps)):
                micro_batches: list[MicroBatch] = []
                for step in block:
                    minibatch = plan.minibatch(step)
                    shard = plan.shard(minibatch, self._rank)
                    planned.append((step, minibatch, shard))
                    micro_batches += shard
                yield from self._order_of(epoch, micro_batches)

    def _order_of(self, epoch: int, micro_batches: Sequence[MicroBatch]) -> list[Indices]:
        """The example indices of each micro-batch, permuted in one call."""
        starts = np.array([micro_batch.start for micro_batch in micro_batches])
        stops = np.array([micro_batch.stop for micro_batch in micro_batches])
        ends = np.cumsum(stops - starts)
        positions = np.arange(ends[-1]) + np.repeat(stops - ends, stops - starts)
        indices = self._order.at(epoch, positions)
        if self._is_keyed:
            # An example that comes twice in an epoch is augmented anew.
            keyed_by = positions if self._order.repeats else indices
            indices = np.stack([indices, augmentation_keys(self._seed, epoch, keyed_by)], axis=1)
        return [indices[end - mb.size : end] for end, mb in zip(ends.tolist(), micro_batches, strict=True)]


def augmentation_keys(seed: int, epoch: int, indices: Indices) -> Indices:
    """For each example, or position, a key from 0 to 2**63 − 1, the same in any worker or process: shape (N,)."""
    return keys(indices, seed, epoch, _AUGMENTATION)


_AUGMENTATION = 0x61756721  # so that these keys differ from those of order, dropout and reading
