"""Linear regression with noise, of any size: examples are computed when they are read and never stored."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbgd.batches.order import GAMMA, mix, scramble
from mbgd.errors import UsageError

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

BELL_STD = float(2 * np.sqrt((2**32 - 1) / 3))  # of twice the sum of four uniform 16-bit values
MAX_FEATURES = 2**17  # so that the sum of MAX_FEATURES products of two 19-bit values stays below 2^53


@dataclass(frozen=True)
class Regression:
    """A map-style dataset: targets = inputs @ coefficients + noise, example i a pure function of (seed, first + i).

    Inputs have shape (num_features,) and unit variance; targets have shape (num_targets,) and about unit variance
    before the noise. The values are bell-shaped: each a sum of four uniform ones. They have the same bits on every
    machine and in every batch, because the products are summed as integers that float64 holds exactly.

    Datasets with the same seed and different `first` have the same coefficients and different examples.
    """

    num_examples: int
    num_features: int
    num_targets: int = 1
    noise: float = 0.1
    """Standard deviation of the noise added to the targets."""
    seed: int = 0
    first: int = 0
    """Number of the first example, ≥ 0: an evaluation set begins where the training set ends."""

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_features", "num_targets"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}; it must be ≥ 1.")
        if self.num_features > MAX_FEATURES:
            raise UsageError(f"num_features={self.num_features}; it must be ≤ {MAX_FEATURES}.")
        if not 0 <= self.noise < float("inf"):
            raise UsageError(f"noise={self.noise}; it is a standard deviation and must be ≥ 0.")
        if self.first < 0:
            raise UsageError(f"first={self.first}; it must be ≥ 0.")

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(torch.tensor([index]))
        return inputs[0], targets[0]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at these indices, in float64; `indices` is int64, shape (N,), from 0 to num_examples − 1."""
        numbers = indices.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_examples:
            raise IndexError(f"examples {numbers.min()} to {numbers.max()}; there are {self.num_examples}.")
        # Number 0 belongs to the coefficients.
        values = _bell(self.seed, numbers + (self.first + 1), self.num_features + self.num_targets)
        inputs, noise = values[:, : self.num_features], values[:, self.num_features :]
        targets = (inputs @ self._whole_coefficients) * (BELL_STD**-2 * self.num_features**-0.5)
        targets += noise * (self.noise / BELL_STD)
        return torch.from_numpy(inputs / BELL_STD), torch.from_numpy(targets)

    @property
    def coefficients(self) -> Tensor:
        """The true coefficients, which a model should learn: float64, shape (num_features, num_targets)."""
        return torch.from_numpy(self._whole_coefficients * (self.num_features**-0.5 / BELL_STD))

    @cached_property
    def _whole_coefficients(self) -> NDArray[np.float64]:
        """The coefficients, unscaled: integers with standard deviation BELL_STD."""
        count = self.num_features * self.num_targets
        return _bell(self.seed, np.zeros(1, np.int64), count).reshape(self.num_features, self.num_targets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's input."""
        return (self.num_features,)

    @property
    def num_outputs(self) -> int:
        """Values in one example's target."""
        return self.num_targets


def _bell(seed: int, numbers: I64, count: int) -> NDArray[np.float64]:
    """`count` integers for each number: mean 0, standard deviation BELL_STD, shape (len(numbers), count).

    Each is twice the sum of four uniform 16-bit values, less its mean: outputs of splitmix64, one stream per
    number.
    """
    seed_key = scramble(np.array([mix(seed)], np.uint64))
    keys = scramble(seed_key + numbers.astype(np.uint64) * np.uint64(GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    words = scramble(keys[:, None] + steps)
    total = np.zeros(words.shape, np.uint64)
    for shift in (0, 16, 32, 48):
        total += (words >> np.uint64(shift)) & np.uint64(0xFFFF)
    return 2.0 * total.astype(np.float64) - 4 * 0xFFFF
