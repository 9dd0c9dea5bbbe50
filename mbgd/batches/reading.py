"""Reads examples of a dataset by index, as batches on the device."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mbgd.batches.collating import Collate, collated
from mbgd.batches.describing import content
from mbgd.batches.nested import leaves_of, parts_of, with_parts
from mbgd.batches.order import mix, mix_array
from mbgd.batches.randomness import has_drawn_since, key_reading, undisturbed
from mbgd.batches.transfer import Transfer, cast
from mbgd.errors import UsageError

Indices = NDArray[np.int64]
"""Shape (N,): example indices; or (N, 2): example indices, each with the key that seeds the reading of the example."""

# One `gather` reads several micro-batches, so that small ones do not pay for a call each: up to BLOCK_EXAMPLES
# examples, and up to BLOCK_BYTES.
BLOCK_EXAMPLES = 2048
BLOCK_BYTES = 2**25

_READING = 0x72656164  # so that these keys differ from those of order, dropout and augmentation


def keys(indices: Indices, *key: int) -> Indices:
    """For each example index a number from 0 to 2**63 − 1, a function of the index and `key`: shape (N,)."""
    return (mix_array(indices.astype(np.uint64), mix(*key)) >> np.uint64(1)).astype(np.int64)


class Batches:
    """One batch on the device for each array of example indices; may be views of a larger batch unless `own_copies`.

    augment: the arrays hold keys, and examples come from `augmented`, even if the dataset has `gather`.
    seed: for arrays without keys; reading an example is then seeded by (seed, index).
    collate: makes a batch of the examples of a dataset without `gather`; None: equal shapes are stacked.
    keep_processes: the batches are iterated several times; `indices` must allow that, and the loader processes stay
    alive in between.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Iterable[Indices],
        *,
        num_workers: int,
        device: torch.device,
        dtype: torch.dtype,
        own_copies: bool = True,
        augment: bool = False,
        seed: int = 0,
        keep_processes: bool = False,
        collate: Collate | None = None,
    ) -> None:
        self._dataset, self._indices, self._dtype = dataset, indices, dtype
        self._own_copies = own_copies
        self._transfer = Transfer(device)
        self._loader: DataLoader[Any] | None = None
        if augment or not hasattr(dataset, "gather"):
            self._loader = DataLoader(
                _Fetched(dataset, augment),
                batch_sampler=_Wanted(indices, seed),
                num_workers=num_workers,
                collate_fn=partial(_collate, dtype, collate),
                pin_memory=device.type == "cuda",
                generator=torch.Generator(),  # otherwise each pass draws from the default generator
                persistent_workers=keep_processes and num_workers > 0,
            )

    def __iter__(self) -> Iterator[Any]:
        return self._gathered() if self._loader is None else self._loaded(self._loader)

    def _loaded(self, loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            if isinstance(batch, UsageError):
                raise batch
            yield self._transfer(batch)

    def _gathered(self) -> Iterator[Any]:
        gather, limit = partial(_gather_first, self._dataset), _Limit()
        for block in _blocks(self._indices, limit):
            gathered = cast(gather(torch.from_numpy(np.concatenate(block))), self._dtype)
            gather = self._dataset.gather
            sizes = [len(part) for part in block]
            if not self._own_copies:
                limit.num_examples = most_at_once(gathered, sum(sizes))
            yield from _split(self._transfer(gathered), sizes)


def _split(batch: Any, sizes: list[int]) -> Iterable[Any]:
    """The gathered batch in parts of these sizes."""
    if isinstance(batch, Tensor):
        return torch.split(batch, sizes)
    parts = parts_of(batch)
    if parts is None:
        raise UsageError(
            f"gather returned a batch with a {type(batch).__name__}; it must be tensors, in dicts, lists, tuples or "
            "dataclasses, whose first dimension counts the examples. Without gather, the examples go through "
            "__getitem__ and data.collate, where any value may be."
        )
    if not parts:
        return [batch for _ in sizes]
    return (with_parts(batch, split) for split in zip(*(_split(part, sizes) for part in parts), strict=True))


def read(dataset: Any, indices: Iterable[Indices], **how: Any) -> Iterator[Any]:
    """Iterates `Batches` once."""
    return iter(Batches(dataset, indices, **how))


@dataclass(frozen=True)
class _Wanted:
    """The DataLoader's batch sampler: (index, key) of each example."""

    indices: Iterable[Indices]
    seed: int

    def __iter__(self) -> Iterator[list[list[int]]]:
        for part in self.indices:
            keyed = part if part.ndim > 1 else np.stack([part, keys(part, self.seed, _READING)], axis=1)
            yield keyed.tolist()


def _gather_first(dataset: Any, indices: Tensor) -> Any:
    """`dataset.gather(indices)`; UsageError if the result depends on random numbers."""
    with undisturbed():
        key_reading(0)
        gathered = dataset.gather(indices)
        if has_drawn_since(0):
            key_reading(1)
            if content(dataset.gather(indices)) != content(gathered):
                raise UsageError(
                    f"gather of {type(dataset).__name__} draws random numbers; it must give the same examples for the "
                    "same indices, since the number gathered at once depends on the number of workers. Draw in "
                    "augmented(index, key), or leave gather out: __getitem__ is seeded by (seed, epoch, example)."
                )
    return gathered


class _Fetched(Dataset[Any]):
    """The dataset that loader processes read: each example is read with generators seeded by its key.

    Seeding takes longer than reading a tensor's row, so examples are read together until a read draws anything; from
    then on they are read one by one, each after seeding. A UsageError is returned, because DataLoader would raise it
    with the process's traceback as text.
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


def _collate(dtype: torch.dtype, collate: Collate | None, examples: Any) -> Any:
    """Collates in the loader process and casts there, so that the copy to the device need not convert.

    Returns a UsageError, as `_Fetched` does.
    """
    if isinstance(examples, UsageError):
        return examples
    try:
        return cast(collated(examples, collate), dtype)
    except UsageError as error:
        return error


@dataclass
class _Limit:
    num_examples: int = 0
    """Examples that may be gathered at once; 0 (one array at a time) until the first array tells their size."""


def most_at_once(gathered: Any, num_examples: int) -> int:
    """Examples that may be gathered at once, by the size of `gathered`, which holds `num_examples` examples."""
    bytes_of_one = _num_bytes(gathered) / num_examples
    return min(BLOCK_EXAMPLES, int(BLOCK_BYTES / max(bytes_of_one, 1.0)))


def _num_bytes(batch: Any) -> int:
    return sum(leaf.nbytes for _, leaf in leaves_of(batch) if isinstance(leaf, Tensor))


def _blocks(indices: Iterable[Indices], limit: _Limit) -> Iterator[list[Indices]]:
    """Groups consecutive arrays up to the limit, at least one array per group."""
    block: list[Indices] = []
    size = 0
    for part in indices:
        if block and size + len(part) > limit.num_examples:
            yield block
            block, size = [], 0
        block.append(part)
        size += len(part)
    if block:
        yield block
