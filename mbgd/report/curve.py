"""A metric's values over the steps, in bounded memory however long the run was."""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 4096
"""Of one curve; twice as many are merged in pairs."""
FOLDED_AT_ONCE = 8192

Column = NDArray[np.float64]


class Point(NamedTuple):
    step: int
    value: float


@dataclass(frozen=True)
class Thinned:
    """What a picture needs of a curve."""

    steps: Column
    values: Column
    """Every value; where there are too many, the least and the greatest of each bucket, at their own steps."""
    mean_steps: Column
    means: Column
    """The mean of each bucket, which smoothing starts from; empty where every value is there."""


class Curve:
    """Values are added in the order of their steps; there is at least one when it is asked for anything.

    Each bucket holds the same number of values, a power of 2: its least, its greatest and its mean.
    """

    def __init__(self) -> None:
        self._size, self._num_folded, self._total = 1, 0, 0.0
        self._least, self._greatest, self._mean = (np.empty((2, 0)) for _ in range(3))  # rows: steps, values
        self._steps: list[int] = []
        self._values: list[float] = []
        self._last: Point | None = None

    def add(self, step: int, value: float) -> None:
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) >= FOLDED_AT_ONCE and len(self._steps) >= self._size:
            self._fold()

    @property
    def num(self) -> int:
        return self._num_folded + len(self._steps)

    @property
    def mean(self) -> float:
        return (self._total + sum(self._values)) / self.num

    @property
    def last(self) -> Point:
        return Point(self._steps[-1], self._values[-1]) if self._steps else cast(Point, self._last)

    @property
    def least(self) -> Point:
        """The first of the least values."""
        steps, values = self._buckets(self._size)[0]
        return Point(int(steps[np.argmin(values)]), float(values.min()))

    @property
    def greatest(self) -> Point:
        """The first of the greatest values."""
        steps, values = self._buckets(self._size)[1]
        return Point(int(steps[np.argmax(values)]), float(values.max()))

    @property
    def is_flat(self) -> bool:
        return self.least.value == self.greatest.value

    def thinned(self, most: int) -> Thinned:
        """At most about this many values, and half as many means."""
        if self.num <= most and self._size == 1:
            steps, values = self._buckets(1)[0]
            return Thinned(steps, values, np.empty(0), np.empty(0))
        size = self._size
        while 2 * math.ceil(self.num / size) > most:
            size *= 2
        least, greatest, mean = self._buckets(size)
        low_first = least[0] <= greatest[0]
        pairs = np.where(low_first, [least, greatest], [greatest, least])  # (2, 2, buckets): which, row, bucket
        steps, values = (pairs[:, row].T.reshape(-1) for row in (0, 1))
        differs = np.append(True, (np.diff(steps) != 0))
        return Thinned(steps[differs], values[differs], *mean)

    def _fold(self) -> None:
        self._num_folded, self._total, self._last = self.num, self._total + sum(self._values), self.last
        self._least, self._greatest, self._mean = self._buckets(self._size)
        self._steps, self._values = [], []
        while self._least.shape[1] >= 2 * MOST_BUCKETS:
            self._size *= 2
            self._least, self._greatest, self._mean = self._merged(2)

    def _buckets(self, size: int) -> tuple[Column, Column, Column]:
        """Buckets of `size` values, a multiple of the present size; the last may hold fewer."""
        least, greatest, mean = self._merged(size // self._size)
        if not self._steps:
            return least, greatest, mean
        points = np.array([self._steps, self._values], dtype=np.float64)
        starts = _starts(points.shape[1], size)
        new_least, new_greatest = _extremes(points, points, starts)
        new_mean = np.add.reduceat(points, starts, axis=1) / np.diff([*starts, points.shape[1]])
        joined = [(least, new_least), (greatest, new_greatest), (mean, new_mean)]
        least, greatest, mean = (np.concatenate(pair, axis=1) for pair in joined)
        return least, greatest, mean

    def _merged(self, number: int) -> tuple[Column, Column, Column]:
        """The folded buckets, each `number` of them in one."""
        if number == 1 or not self._mean.shape[1]:
            return self._least, self._greatest, self._mean
        starts = _starts(self._mean.shape[1], number)
        least, greatest = _extremes(self._least, self._greatest, starts)
        mean = np.add.reduceat(self._mean, starts, axis=1) / np.diff([*starts, self._mean.shape[1]])
        return least, greatest, mean


def _starts(num: int, size: int) -> NDArray[np.int64]:
    return np.arange(0, num, size)


def _extremes(low: Column, high: Column, starts: NDArray[np.int64]) -> tuple[Column, Column]:
    """The points with the least of `low` and the greatest of `high` in each stretch."""
    stretch = np.repeat(np.arange(len(starts)), np.diff([*starts, low.shape[1]]))
    order_low, order_high = np.lexsort((low[1], stretch)), np.lexsort((-high[1], stretch))
    return low[:, order_low[starts]], high[:, order_high[starts]]
