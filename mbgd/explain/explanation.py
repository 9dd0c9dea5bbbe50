"""Everything that explain shows, as plain values."""

from dataclasses import asdict, dataclass
from typing import Any

from mbgd.explain.variance import Variance


@dataclass(frozen=True)
class Example:
    number: int
    """In the dataset."""
    loss: float
    """The weighted mean over its elements, if it has several."""
    weight: float
    gradient: list[float]
    """Of its loss with respect to the shown weights."""
    norm: float
    """Of its loss's gradient with respect to all weights."""
    cosine: float
    """Between its gradient and the mean gradient: 1 is the same direction, below 0 pulls against it."""


@dataclass(frozen=True)
class Weight:
    name: str
    before: float
    mean: float
    """The weighted mean of the examples' gradients."""
    backward: float
    """Gradient of the mean loss, by one backward."""
    after: float
    """After a step of the optimizer."""


@dataclass(frozen=True)
class Share:
    """One of the workers that the minibatch is split over."""

    worker: int
    first: int
    last: int
    """Its examples, counted from 1."""
    weight: float
    sums: list[float]
    """Σ w ∇L over its examples, for the shown weights."""


@dataclass(frozen=True)
class Opposite:
    """The first two examples, with losses shifted by constants to 2 and −2."""

    mean_loss: float
    gradient: list[float]
    """Of that mean loss with respect to the shown weights."""
    norm: float
    """With respect to all weights."""


@dataclass(frozen=True)
class Next:
    """The first example before and after the step."""

    loss_before: float
    loss_after: float
    gradient_before: list[float]
    gradient_after: list[float]


@dataclass(frozen=True)
class Explanation:
    about: dict[str, str]
    notes: list[str]
    method: str
    """How the examples' gradients were computed."""
    examples: list[Example]
    weights: list[Weight]
    mean_loss: float
    difference: float
    """Between the mean of the examples' gradients and backward's gradient, over all weights, relative to the latter."""
    shares: list[Share]
    total: list[float]
    """The all-reduce: Σ of the shares."""
    total_weight: float
    opposite: Opposite | None
    """None with one example."""
    next: Next
    variance: Variance

    def values(self) -> dict[str, Any]:
        return asdict(self)
