"""Position in an epoch → example index: a keyed pseudo-random permutation with random access and O(1) memory.

A Feistel network (Luby & Rackoff 1988) with halves of unequal width permutes the smallest power-of-two domain that
holds all examples; cycle walking (Black & Rogaway 2002) stays within the examples: an index out of range is permuted
again until it is in range. The round function is the finalizer of splitmix64 (Steele, Lea & Flood 2014).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 8

_MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15  # splitmix64's step
_FACTOR_1, _FACTOR_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*values: int) -> int:
    """One well-mixed 64-bit number from whole numbers; their order matters."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + GAMMA & _MASK
        state = (state ^ (state >> 30)) * _FACTOR_1 & _MASK
        state = (state ^ (state >> 27)) * _FACTOR_2 & _MASK
        state ^= state >> 31
    return state


def mix_array(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """`mix(key, value)` for each value: a new array of the same shape."""
    return scramble((values ^ np.uint64(mix(key))) + np.uint64(GAMMA))


def scramble(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer, in place: a bijection of 64-bit words in which every bit moves every other."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(_FACTOR_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_FACTOR_2)
    words ^= words >> np.uint64(31)
    return words


@dataclass(frozen=True)
class Order:
    """The order of the examples in every epoch: a function of (seed, epoch, position)."""

    num_examples: int
    seed: int
    shuffle: bool = True
    """False: in every epoch as they lie."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_examples <= 2**62:
            raise ValueError(f"num_examples={self.num_examples}; an order needs from 1 to 2**62 examples.")

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The example indices at these positions of the epoch, shape as given; each from 0 to num_examples − 1."""
        if len(positions) and not (positions.min() >= 0 and positions.max() < self.num_examples):
            raise ValueError(
                f"positions {positions.min()} to {positions.max()}; an epoch has positions 0 to {self.num_examples - 1}."
            )
        if not self.shuffle:
            return positions
        values = self._permute(positions.astype(np.uint64), epoch)
        outside = np.flatnonzero(values >= np.uint64(self.num_examples))
        while len(outside):
            again = self._permute(values[outside], epoch)
            values[outside] = again
            outside = outside[again >= np.uint64(self.num_examples)]
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        """One pass of the network over the power-of-two domain."""
        num_bits = max(2, (self.num_examples - 1).bit_length())
        right_bits = num_bits // 2
        left_bits = num_bits - right_bits
        left = values >> np.uint64(right_bits)
        right = values & np.uint64(2**right_bits - 1)
        for number in range(NUM_ROUNDS):
            # The halves change places, and widths with them; after an even number of rounds they are back.
            left_bits, right_bits = right_bits, left_bits
            scrambled = mix_array(right, mix(self.seed, epoch, number))
            left, right = right, (left ^ scrambled) & np.uint64(2**right_bits - 1)
        return (left << np.uint64(right_bits)) | right
