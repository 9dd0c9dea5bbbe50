"""The variance of a minibatch's mean gradient against its size k, measured and compared with 1/k."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
NUM_MINIBATCHES = 64
"""Of each size; fewer if time runs out, but at least LEAST_MINIBATCHES."""
LEAST_MINIBATCHES = 4


@dataclass(frozen=True)
class Point:
    """Minibatches of one size."""

    size: int
    num_minibatches: int
    variance: float
    """E|g − E g|², summed over all weights: the trace of the covariance."""


@dataclass(frozen=True)
class Variance:
    points: list[Point]
    of_one: float
    """The variance of one example's gradient, estimated from all points; the line is of_one / k."""
    gradient_squared: float
    """|E g|², the squared norm of the mean loss's gradient, with the noise's contribution subtracted."""
    noise_scale: float
    """The k at which variance and squared gradient are equal: of_one / gradient_squared (McCandlish et al. 2018)."""
    is_whole: bool
    """Whether there was time for every size."""


def measure(gradient: Callable[[Tensor], Tensor], num_examples: int, seconds: float) -> Variance:
    """gradient: example numbers → the flat gradient of their mean loss. Draws examples with replacement."""
    generator = torch.Generator().manual_seed(0)
    points: list[Point] = []
    start = time.monotonic()
    total, num_seen = torch.zeros(0), 0
    for number, size in enumerate(SIZES, start=1):
        end = start + seconds * number / len(SIZES)
        mean, squares = torch.zeros(0), 0.0
        done = 0
        while done < NUM_MINIBATCHES and (time.monotonic() < end or done < LEAST_MINIBATCHES):
            one = gradient(torch.randint(num_examples, (size,), generator=generator)).double()
            mean = torch.zeros_like(one) if done == 0 else mean
            total = torch.zeros_like(one) if not len(total) else total
            done += 1  # Welford's algorithm avoids cancellation
            off = one - mean
            mean += off / done
            squares += float(off @ (one - mean))
            total += one * size
            num_seen += size
        points.append(Point(size, done, squares / (done - 1)))
        if time.monotonic() > start + seconds:
            break
    degrees = sum(point.num_minibatches - 1 for point in points)
    of_one = sum(point.variance * point.size * (point.num_minibatches - 1) for point in points) / degrees
    gradient_squared = max(float(total.square().sum()) / num_seen**2 - of_one / num_seen, 0.0)
    noise_scale = of_one / gradient_squared if gradient_squared else float("inf")
    return Variance(points, of_one, gradient_squared, noise_scale, len(points) == len(SIZES))
