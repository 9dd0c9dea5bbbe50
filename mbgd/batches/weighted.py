"""The order of class imbalance: examples drawn with replacement, in proportion to a number per example."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbgd.batches.order import I64, mix, mix_array
from mbgd.batches.per_example import Given, numbers_of, sha256_of, some
from mbgd.errors import UsageError

_DRAW = 0x64726177  # so that these keys differ from those of shuffling, dropout and augmentation


@dataclass(frozen=True, eq=False)
class WeightedOrder:
    """Each position of an epoch draws an example, with replacement, with probability weight / sum of all weights.

    An epoch has as many draws as there are training examples.
    """

    weights: Given
    """A number ≥ 0 for each training example: a list or array, the name of the dataset's attribute, or a function of
    the dataset. They decide how often an example is drawn; they do not enter the loss."""

    def of(self, dataset: Any) -> "WeightedOrder":
        """The same order with the dataset's weights as float64; UsageError where they break a rule."""
        weights = numbers_of(dataset, self.weights, "the weights of data.order").astype(np.float64)
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            raise UsageError(
                f"the weights of data.order: {int(wrong.sum())} of {len(weights)} negative or not finite; the first "
                f"is {some(weights, wrong)}. A weight must be finite and ≥ 0. Use 0 for examples that must not be "
                "drawn."
            )
        if not weights.any():
            raise UsageError(
                f"the weights of data.order are all 0, for all {len(weights)} training examples, so none can be drawn. "
                "Give at least one a weight > 0."
            )
        return WeightedOrder(weights)

    def described(self) -> str:
        """The same for two orders only if their weights are the same."""
        return f"WeightedOrder with weights {sha256_of(np.asarray(self.weights))}"

    def at_positions(self, seed: int, minibatch_size: int) -> "Draws":
        """What maps positions to examples; only after `of`."""
        return Draws(np.asarray(self.weights), seed)


class Draws:
    """(epoch, position) → example, by the inverse of the cumulated weights: a function of (seed, epoch, position)."""

    repeats = True

    def __init__(self, weights: NDArray[np.float64], seed: int) -> None:
        """weights: finite, ≥ 0, not all 0."""
        self._seed = seed
        weights = weights / weights.max()  # so that the sum is finite
        self._last = np.int64(np.flatnonzero(weights)[-1])
        self._cumulated = np.cumsum(weights)  # numpy adds up one by one: the same bits on every processor

    def at(self, epoch: int, positions: I64) -> I64:
        """The examples at these positions of the epoch: a new array, shape as given."""
        words = mix_array(positions.astype(np.uint64), mix(self._seed, epoch, _DRAW))
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
        # "right": the first example whose cumulated weight is larger, which is never one of weight 0.
        found: I64 = np.searchsorted(self._cumulated, uniform * self._cumulated[-1], side="right").astype(np.int64)
        return np.minimum(found, self._last, out=found)  # the product can be rounded up to the sum


def balanced_classes(dataset: Any) -> NDArray[np.float64]:
    """Weights by which `WeightedOrder` draws every class equally often: 1 / number of the class's examples.

    The classes are the dataset's `targets`: whole numbers, one for each example.
    """
    if not hasattr(dataset, "targets"):
        raise UsageError(
            f"balanced_classes needs the classes of all examples, but {type(dataset).__name__} has no attribute "
            "targets. Let it have one, a whole number for each example, or give data.order weights of your own."
        )
    classes = numbers_of(dataset, dataset.targets, "the targets for balanced_classes")
    if classes.dtype.kind == "f" and (wrong := classes != np.floor(classes)).any():
        raise UsageError(
            f"the targets for balanced_classes: those of {type(dataset).__name__} are not all whole numbers, such as "
            f"{some(classes, wrong)}. Give data.order weights of your own."
        )
    _, numbers, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return 1.0 / counts[numbers]
