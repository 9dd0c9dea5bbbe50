"""Plan + order + dataset → this worker's micro-batches, step by step, on its device."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mbgd.describing import content
from mbgd.errors import UsageError
from mbgd.order import Order, mix, mix_array
from mbgd.plan import MicroBatch, Minibatch, Plan, micro_batches
from mbgd.precision import move
from mbgd.randomness import has_drawn_since, key_reading, undisturbed
from mbgd.workers import Workers

Indices = NDArray[np.int64]
"""Shape (N,): numbers of examples; or (N, 2): numbers of examples, and the keys that all randomness in reading them
follows from."""

# Examples in memory are gathered for several micro-batches at once, up to this many, so that small ones do not pay
# the price of a gathering each.
BLOCK_EXAMPLES = 2048


@dataclass(frozen=True, kw_only=True)
class Data:
    """The examples of a run: map-style datasets (`__len__` and `__getitem__`, `__getitems__` or `gather`).

    What `__getitem__` draws from torch's, numpy's or Python's global generators follows from (seed, epoch, index). A
    training dataset with `augmented(index, key)` gives altered examples: key, an int from 0 to 2**63 − 1, follows from
    (seed, epoch, index), and all randomness of the alteration must follow from it. `gather` draws nothing.
    """

    train: Any
    evaluation: Any = None
    """None: no evaluation."""
    shuffle: bool = True
    """A new keyed order of the training examples in every epoch."""
    num_workers: int = 0
    """Loader processes per worker, for datasets without `gather`."""

    def __post_init__(self) -> None:
        check_dataset("training", self.train)
        if self.evaluation is not None:
            check_dataset("evaluation", self.evaluation)
        if self.num_workers < 0:
            raise UsageError(f"data.num_workers={self.num_workers}; it must be ≥ 0.")


def check_dataset(name: str, dataset: Any) -> None:
    """Raise UsageError unless the dataset is map-style and holds an example."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
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
    """What this worker computes in one step."""

    step: int
    """Counted from 0."""
    minibatch: Minibatch
    micro_batches: list[Examples]


class Loader:
    """Gives this worker's shards of the training data in the plan's order, from any step."""

    def __init__(
        self, data: Data, plan: Plan, seed: int, workers: Workers, *, dtype: torch.dtype, own_copies: bool
    ) -> None:
        """own_copies: every micro-batch lies in memory of its own, aligned alike wherever it is computed."""
        self._data, self._plan, self._rank = data, plan, workers.rank
        self._device, self._dtype, self._own_copies = workers.device, dtype, own_copies
        self._order = Order(plan.num_examples, seed, data.shuffle)
        self._augments = hasattr(data.train, "augmented")
        self._is_keyed = self._augments or not hasattr(data.train, "gather")

    def minibatch_indices(self, step: int) -> Indices:
        """The example indices of a step, all workers together."""
        minibatch = self._plan.minibatch(step)
        return self._order.at(minibatch.epoch, np.arange(minibatch.start, minibatch.stop))

    def shards(self, first: int, stop: int) -> Iterator[Shard]:
        """This worker's shards of steps [first, stop)."""
        planned: deque[tuple[int, Minibatch, list[MicroBatch]]] = deque()  # runs ahead as far as reading does
        batches = read(
            self._data.train,
            self._indices(first, stop, planned),
            num_workers=self._data.num_workers,
            device=self._device,
            dtype=self._dtype,
            own_copies=self._own_copies,
            augment=self._augments,
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
        """Micro-batch `number` of a step, whichever worker's it is."""
        minibatch = self._plan.minibatch(step)
        num_parts = self._plan.num_micro_batches(minibatch.size)
        wanted = micro_batches(minibatch.start, minibatch.stop, num_parts, 0, 1)[number]
        indices = self._order_of(minibatch.epoch, [wanted])
        device, dtype = self._device, self._dtype
        (batch,) = read(self._data.train, indices, num_workers=0, device=device, dtype=dtype, augment=self._augments)
        return Examples(wanted, batch)

    def _indices(
        self, first: int, stop: int, planned: deque[tuple[int, Minibatch, list[MicroBatch]]]
    ) -> Iterator[Indices]:
        """The example indices of each of this worker's micro-batches; each step's plan is put into `planned`."""
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
        """The example indices of each micro-batch, permuted all at once."""
        starts = np.array([micro_batch.start for micro_batch in micro_batches])
        stops = np.array([micro_batch.stop for micro_batch in micro_batches])
        ends = np.cumsum(stops - starts)
        positions = np.arange(ends[-1]) + np.repeat(stops - ends, stops - starts)
        indices = self._order.at(epoch, positions)
        if self._is_keyed:
            indices = np.stack([indices, augmentation_keys(self._order.seed, epoch, indices)], axis=1)
        return [indices[end - mb.size : end] for end, mb in zip(ends.tolist(), micro_batches, strict=True)]


def augmentation_keys(seed: int, epoch: int, indices: Indices) -> Indices:
    """For each example a key, shape (N,), from 0 to 2**63 − 1, whatever worker or process reads it."""
    return _keys(indices, seed, epoch, _AUGMENTATION)


def _keys(indices: Indices, *key: int) -> Indices:
    return (mix_array(indices.astype(np.uint64), mix(*key)) >> np.uint64(1)).astype(np.int64)


_AUGMENTATION, _READING = 0x61756721, 0x72656164  # apart from each other, and from the keys of the order and of dropout


def read(
    dataset: Any,
    indices: Iterable[Indices],
    *,
    num_workers: int,
    device: torch.device,
    dtype: torch.dtype,
    own_copies: bool = True,
    augment: bool = False,
    seed: int = 0,
) -> Iterator[Any]:
    """The batch of each array of example indices, on the device; a view of a larger one unless `own_copies`.

    augment: the arrays hold keys, and examples come from `augmented`, even where the dataset has `gather`.
    seed: where the arrays hold no keys, what reading an example draws follows from (seed, example).
    """
    if hasattr(dataset, "gather") and not augment:
        gather = partial(_gather_first, dataset)
        for block in _blocks(indices, 0 if own_copies else BLOCK_EXAMPLES):
            gathered = move(gather(torch.from_numpy(np.concatenate(block))), device, dtype)
            gather = dataset.gather
            sizes = [len(part) for part in block]
            yield from zip(*(tensor.split(sizes) for tensor in gathered), strict=True)
    else:
        keyed = (part if part.ndim > 1 else np.stack([part, _keys(part, seed, _READING)], axis=1) for part in indices)
        loader: DataLoader[Any] = DataLoader(
            _Fetched(dataset, augment),
            batch_sampler=(part.tolist() for part in keyed),
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each pass would draw from the default one
        )
        for batch in loader:
            if isinstance(batch, UsageError):
                raise batch
            yield move(batch, device, dtype)


def _gather_first(dataset: Any, indices: Tensor) -> Any:
    """`dataset.gather(indices)`; UsageError where it depends on random numbers."""
    with undisturbed():
        key_reading(0)
        gathered = dataset.gather(indices)
        if has_drawn_since(0):
            key_reading(1)
            if content(dataset.gather(indices)) != content(gathered):
                raise UsageError(
                    f"gather of {type(dataset).__name__} draws random numbers; it must give the same examples for the "
                    "same indices, since how many are gathered at once depends on the number of workers. Draw in "
                    "augmented(index, key); or leave gather out, for what __getitem__ draws follows from (seed, epoch, "
                    "example)."
                )
    return gathered


class _Fetched(Dataset[Any]):
    """A dataset as loader processes see it: what reading an example draws follows from its key alone.

    Examples are read one by one, each after its generators are seeded, from the first read on that draws anything;
    seeding takes longer than reading a tensor's row does. A mistake of the user's comes back as it is, not as a
    traceback in text.
    """

    def __init__(self, dataset: Any, augment: bool) -> None:
        self._dataset, self._augment = dataset, augment
        self._draws: bool | None = None
        """None until an example is read."""

    def __getitems__(self, wanted: list[tuple[int, int]]) -> Any:
        try:
            with undisturbed():
                return self._read(wanted)
        except UsageError as error:
            return error

    def _read(self, wanted: list[tuple[int, int]]) -> list[Any]:
        examples: list[Any] = []
        if self._draws is None:
            examples = self._read_each(wanted[:1])
            self._draws = has_drawn_since(wanted[0][1])
        rest = wanted[len(examples) :]
        if rest and not self._draws:
            first_key = rest[0][1]
            key_reading(first_key)
            together = self._read_together(rest)
            self._draws = has_drawn_since(first_key)
            if not self._draws:
                return examples + together
        return examples + self._read_each(rest)

    def _read_each(self, wanted: list[tuple[int, int]]) -> list[Any]:
        examples = []
        for one in wanted:
            key_reading(one[1])
            examples += self._read_together([one])
        return examples

    def _read_together(self, wanted: list[tuple[int, int]]) -> list[Any]:
        dataset = self._dataset
        if self._augment:
            return [dataset.augmented(index, key) for index, key in wanted]
        if hasattr(dataset, "__getitems__"):
            return list(dataset.__getitems__([index for index, _ in wanted]))
        return [dataset[index] for index, _ in wanted]


def _collate(examples: Any) -> Any:
    return examples if isinstance(examples, UsageError) else default_collate(examples)


def _blocks(indices: Iterable[Indices], most_examples: int) -> Iterator[list[Indices]]:
    """Group consecutive arrays up to so many examples, at least one array a group."""
    block: list[Indices] = []
    size = 0
    for part in indices:
        if block and size + len(part) > most_examples:
            yield block
            block, size = [], 0
        block.append(part)
        size += len(part)
    if block:
        yield block
