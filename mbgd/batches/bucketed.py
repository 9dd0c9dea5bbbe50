"""The order of length bucketing: examples of similar length share a minibatch, so that little is padded."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbgd.batches.order import I64, Order, mix, mix_array
from mbgd.batches.per_example import Given, numbers_of, sha256_of, some
from mbgd.errors import UsageError

LARGEST_WINDOW = 50
LEAST_WINDOWS = 4
"""Without `window`, an epoch has at least that many, so that no two epochs have the same minibatches."""

_BUCKETS = 0x6275636B  # so that these keys differ from those of shuffling, dropout and augmentation


@dataclass(frozen=True, eq=False)
class BucketedOrder:
    """Every example once an epoch, shuffled, then sorted by length within each window of `window` minibatches.

    The minibatches of a window come in a shuffled order.
    """

    lengths: Given = "lengths"
    """A whole number ≥ 0 for each training example: a list or array, the name of the dataset's attribute, or a function
    of the dataset."""
    window: int | None = None
    """Minibatches that are sorted together: more leave less padding, fewer mix the examples better. None: 50, or fewer
    where the epoch would have less than 4 windows."""

    def of(self, dataset: Any) -> "BucketedOrder":
        """The same order with the dataset's lengths as int64; UsageError where they, or `window`, break a rule."""
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise UsageError(
                f"window={self.window!r} of data.order; it must be a whole number of minibatches ≥ 1, or null for "
                f"{LARGEST_WINDOW} or a quarter of the epoch."
            )
        lengths = numbers_of(dataset, self.lengths, "the lengths of data.order")
        if lengths.dtype.kind not in "iu":
            raise UsageError(
                f"the lengths of data.order: got type {lengths.dtype}; a length must be a whole number. Give int64."
            )
        if (wrong := lengths < 0).any():
            raise UsageError(
                f"the lengths of data.order: {int(wrong.sum())} of {len(lengths)} negative; the first is "
                f"{some(lengths, wrong)}. A length must be ≥ 0. Give each example its number of tokens, or the like."
            )
        return BucketedOrder(lengths.astype(np.int64), self.window)

    def described(self) -> str:
        """The same for two orders only if their lengths and windows are the same."""
        return f"BucketedOrder(window={self.window}) with lengths {sha256_of(np.asarray(self.lengths))}"

    def at_positions(self, seed: int, minibatch_size: int) -> "Buckets":
        """What maps positions to examples; only after `of`."""
        lengths = np.asarray(self.lengths)
        a_part = len(lengths) // (LEAST_WINDOWS * minibatch_size)
        window = self.window or max(1, min(LARGEST_WINDOW, a_part))
        return Buckets(lengths, seed, minibatch_size, window)


class Buckets:
    """(epoch, position) → example, a function of the seed too; looks at one window alone."""

    repeats = False

    def __init__(self, lengths: NDArray[np.int64], seed: int, minibatch_size: int, window: int) -> None:
        """window: in minibatches."""
        self._lengths, self._seed, self._minibatch_size = lengths, seed, minibatch_size
        self._window_size = window * minibatch_size
        self._shuffled = Order(len(lengths), seed)
        self._of_window = lru_cache(maxsize=2)(self._sort)  # successive calls ask for the same window

    def at(self, epoch: int, positions: I64) -> I64:
        """The examples at these positions of the epoch: a new array, shape as given."""
        windows, places = np.divmod(positions, self._window_size)
        found = np.empty(positions.shape, dtype=np.int64)
        for window in np.unique(windows).tolist():
            is_there = windows == window
            found[is_there] = self._of_window(epoch, window)[places[is_there]]
        return found

    def _sort(self, epoch: int, window: int) -> I64:
        """The examples of a window in their order."""
        start, size = window * self._window_size, self._minibatch_size
        examples = self._shuffled.indices(epoch, start, min(start + self._window_size, len(self._lengths)))
        examples = examples[np.argsort(self._lengths[examples], kind="stable")]
        num_whole, rest = divmod(len(examples), size)
        keys = mix_array(np.arange(num_whole + 1, dtype=np.uint64), mix(self._seed, epoch, window, _BUCKETS))
        # The epoch's short last minibatch holds examples of any length, because drop_last leaves it out.
        first = int(keys[num_whole] % np.uint64(num_whole + 1)) * size
        short = examples[first : first + rest]
        whole = np.concatenate([examples[:first], examples[first + rest :]]).reshape(num_whole, size)
        return np.concatenate([whole[np.argsort(keys[:num_whole], kind="stable")].reshape(-1), short])
