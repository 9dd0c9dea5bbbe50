"""Position in an epoch → example index: a keyed pseudo-random permutation with random access and O(1) memory.

A Feistel network (Luby & Rackoff 1988) with halves of unequal width permutes the smallest power-of-two
domain that holds all examples; cycle walking (Black & Rogaway 2002) stays within the examples: an index out
of range is permuted again until it is in range. The round function is the finalizer of splitmix64 (Steele,
Lea & Flood 2014).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

NUM_ROUNDS = 8  # even, so that halves of unequal width end in their own places
MAX_EXAMPLES = 2**62
BLOCK_POSITIONS = 2**13  # permuted at once: the five arrays of a pass fit into a processor's L2 cache

_MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15  # splitmix64's step
_FACTOR_1, _FACTOR_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Numpy before 2.0 turns uint64 arrays with Python ints of this size into floats, hence the typed constants.
_GAMMA_64, _FACTOR_1_64, _FACTOR_2_64 = np.uint64(GAMMA), np.uint64(_FACTOR_1), np.uint64(_FACTOR_2)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(*values: int) -> int:
    """A 64-bit hash of integers, 0 ≤ hash < 2**64; their order matters.

    Values are taken modulo 2**64, so any Python int will do. One splitmix64 step (Steele, Lea & Flood 2014)
    per value; every bit of the result depends on every bit of every value.
    """
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + GAMMA & _MASK
        state = (state ^ (state >> 30)) * _FACTOR_1 & _MASK
        state = (state ^ (state >> 27)) * _FACTOR_2 & _MASK
        state ^= state >> 31
    return state


def mix_array(values: U64, key: int) -> U64:
    """`mix(key, value)` for each value: a new array of the same shape."""
    mixed = values ^ np.uint64(mix(key))
    mixed += _GAMMA_64
    return scramble(mixed)


def scramble(words: U64, scratch: U64 | None = None) -> U64:
    """splitmix64's finalizer, in place: a bijection of 64-bit words in which every bit affects every other.

    `scratch`, of the same shape, is overwritten; without it, temporary arrays are allocated.
    """
    words ^= np.right_shift(words, _30, out=scratch)
    words *= _FACTOR_1_64
    words ^= np.right_shift(words, _27, out=scratch)
    words *= _FACTOR_2_64
    words ^= np.right_shift(words, _31, out=scratch)
    return words


class PositionsToExamples(Protocol):
    """The order of a run's examples: a function of (seed, epoch, position)."""

    repeats: ClassVar[bool]
    """Whether an example can come several times in an epoch."""

    def at(self, epoch: int, positions: I64) -> I64:
        """The example indices at these positions of the epoch: a new array, shape as given."""


class OrderRule(Protocol):
    """What `data.order` takes: `mbgd.WeightedOrder`, `mbgd.BucketedOrder`."""

    def of(self, dataset: Any) -> "OrderRule":
        """The rule with the numbers of this dataset, checked; UsageError where they break a rule."""

    def described(self) -> str:
        """Compared between workers, and when a run is resumed."""

    def at_positions(self, seed: int, minibatch_size: int) -> PositionsToExamples:
        """The order itself; only after `of`."""


@dataclass(frozen=True)
class Order:
    """The order of the examples in every epoch: a function of (seed, epoch, position).

    Any int is a seed or an epoch, modulo 2**64. Raises ValueError unless 1 ≤ num_examples ≤ 2**62.
    """

    num_examples: int
    seed: int
    shuffle: bool = True
    """False: every epoch in the dataset's order."""
    repeats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_examples <= MAX_EXAMPLES:
            raise ValueError(f"num_examples={self.num_examples}; an order needs from 1 to 2**62 examples.")

    def indices(self, epoch: int, start: int, stop: int) -> I64:
        """The example indices at positions [start, stop) of the epoch: a new array, shape (stop − start,).

        Raises ValueError unless 0 ≤ start ≤ stop ≤ num_examples.
        """
        if not 0 <= start <= stop <= self.num_examples:
            raise ValueError(
                f"positions [{start}, {stop}) of {self.num_examples} examples; "
                "the rule is 0 ≤ start ≤ stop ≤ number of examples."
            )
        indices = np.arange(start, stop, dtype=np.int64)
        self._shuffle(indices, epoch)
        return indices

    def at(self, epoch: int, positions: I64) -> I64:
        """The example indices at these positions of the epoch: a new array, shape as given.

        Raises ValueError unless every position is from 0 to num_examples − 1.
        """
        if positions.size and not (positions.min() >= 0 and positions.max() < self.num_examples):
            raise ValueError(
                f"positions {positions.min()} to {positions.max()}; "
                f"an epoch has positions 0 to {self.num_examples - 1}."
            )
        indices = np.array(positions, dtype=np.int64, order="C")
        self._shuffle(indices.reshape(-1), epoch)
        return indices

    def _shuffle(self, values: I64, epoch: int) -> None:
        """Turn positions into example indices, in place; `values` is contiguous, shape (N,)."""
        if not self.shuffle:
            return
        keys = [np.uint64(mix(mix(self.seed, epoch, number))) for number in range(NUM_ROUNDS)]
        words = values.view(np.uint64)
        for first in range(0, len(words), BLOCK_POSITIONS):
            self._walk(words[first : first + BLOCK_POSITIONS], keys)

    def _walk(self, words: U64, keys: Sequence[np.uint64]) -> None:
        """Permute within the examples, in place: what lands outside is permuted again until it is inside."""
        num_examples = np.uint64(self.num_examples)
        domain_size = 2**self._num_bits
        if domain_size <= 4 * len(words):
            # Most of the domain is wanted: permute all of it once, then walk by table lookup.
            table = np.arange(domain_size, dtype=np.uint64)
            self._permute(table, keys)
            words[:] = table[words]
            while len(outside := np.flatnonzero(words >= num_examples)):
                words[outside] = table[words[outside]]
            return
        self._permute(words, keys)
        outside = np.flatnonzero(words >= num_examples)
        while len(outside):
            again = words[outside]
            self._permute(again, keys)
            words[outside] = again
            outside = outside[again >= num_examples]

    @property
    def _num_bits(self) -> int:
        """Width of the network: the domain has 2**_num_bits words."""
        return max(2, (self.num_examples - 1).bit_length())

    def _permute(self, words: U64, keys: Sequence[np.uint64]) -> None:
        """One pass of the network over the power-of-two domain, in place."""
        right_bits = self._num_bits // 2
        left_bits = self._num_bits - right_bits
        shift = np.uint64(right_bits)
        left_mask, right_mask = np.uint64(2**left_bits - 1), np.uint64(2**right_bits - 1)
        left, right = words >> shift, words & right_mask
        scrambled, scratch = np.empty_like(left), np.empty_like(left)
        for key in keys:
            np.bitwise_xor(right, key, out=scrambled)
            scrambled += _GAMMA_64
            scramble(scrambled, scratch)
            scrambled &= left_mask
            left ^= scrambled
            # The halves swap places, and their masks with them.
            left, right = right, left
            left_mask, right_mask = right_mask, left_mask
        np.left_shift(left, shift, out=words)
        words |= right
