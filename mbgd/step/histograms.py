"""Histograms of gradients and parameters by layer, at a few steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mbgd.batches.pieces import pieces
from mbgd.errors import UsageError
from mbgd.files.observed import HISTOGRAMS, Histogram, HistogramLine, Layer, plain_values
from mbgd.step.done import Done

LOWEST, HIGHEST = -48, 24
"""Exponents of the powers of two that values are told apart by."""
EDGES = [2.0**exponent for exponent in range(LOWEST, HIGHEST + 1)]
FEW = 4
"""With fewer layers than 1/4 of those allowed, neighbours of the next finer level are put together instead."""

Parameters = Mapping[str, Tensor]


class Histograms:
    """Writes histograms of the mean gradient and of the parameters, by layer, into observed/histograms.jsonl.

    Bins are powers of two, so they are the same in every step and for every layer. The gradient is the one that the
    optimizer gets: averaged over the minibatch and clipped. The main worker alone computes them, on its device.
    """

    name = HISTOGRAMS

    def __init__(self, steps: int, layers: int = 16) -> None:
        """steps: at how many, evenly spread from the first to the last. layers: at most; others are put together."""
        for key, value in (("steps", steps), ("layers", layers)):
            if value < 1:
                raise UsageError(f"histograms.{key}={value}; it must be ≥ 1.")
        self.steps, self.layers = steps, layers
        self._at: frozenset[int] = frozenset()
        self._by_layer: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, Histogram] = {}
        self._write: Callable[[int, Mapping[str, Any]], None] = lambda step, values: None

    def before_training(self, trainer: Any) -> None:
        if trainer.setup.workers.is_main:
            self._at = spread(self.steps, trainer.setup.num_steps)
            self._by_layer = {
                layer: [trainer.setup.trained.by_name[name] for name in names]
                for layer, names in by_layer(list(trainer.setup.trained.by_name), self.layers).items()
            }
            trainer.train_step.update.before_step.append(self._before_step)

    def with_writer(self, write: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._write = write

    def _before_step(self, step: int, divisor: int) -> None:
        if step + 1 not in self._at:
            return
        self._gradients = {}
        for layer, parameters in self._by_layer.items():
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                self._gradients[layer] = histogram(gradients, divisor)

    def after_update(self, done: Done) -> None:
        if done.step + 1 not in self._at:
            return
        layers = [
            Layer(layer, histogram(parameters), self._gradients.get(layer))
            for layer, parameters in self._by_layer.items()
        ]
        self._write(done.step + 1, plain_values(HistogramLine(done.step + 1, layers)))


def spread(number: int, num_steps: int) -> frozenset[int]:
    """At most this number of steps, evenly spread from the first to the last; the last alone where it is 1."""
    if number == 1:
        return frozenset([num_steps])
    return frozenset(max(1, round(one * num_steps / (number - 1))) for one in range(number))


def by_layer(names: Sequence[str], most: int) -> dict[str, list[str]]:
    """The parameters' names by layer: the modules that hold them, or, where those are too many, what holds these.

    If that leaves few, as of a model with one long list of blocks, neighbours are put together.
    """
    finer: dict[str, list[str]] = {}
    for depth in range(max(name.count(".") for name in names) or 1, 0, -1):
        layers = _at_depth(names, depth)
        if len(layers) <= most:
            return layers if not finer or FEW * len(layers) >= most else _neighbours(finer, most)
        finer = layers
    return _neighbours(finer, most)


def _at_depth(names: Iterable[str], depth: int) -> dict[str, list[str]]:
    """The parameters' names by the first `depth` parts of their module's name; their own where they have no module."""
    layers: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0] or name
        layers.setdefault(".".join(module.split(".")[:depth]), []).append(name)
    return layers


def _neighbours(layers: Mapping[str, list[str]], most: int) -> dict[str, list[str]]:
    """The layers put together into `most` of nearly equal numbers."""
    groups = groupby(enumerate(layers), key=lambda numbered: numbered[0] * most // len(layers))
    together = [[layer for _, layer in group] for _, group in groups]
    return {
        group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}": [one for layer in group for one in layers[layer]]
        for group in together
    }


def histogram(tensors: Iterable[Tensor], divisor: int = 1) -> Histogram:
    """Of all values of the tensors, each divided by the divisor; this waits for the device."""
    total, size = torch.zeros(2, len(EDGES) + 1, dtype=torch.int64), 0
    for tensor in tensors:
        values = tensor.detach()
        values = (torch.view_as_real(values) if values.is_complex() else values).flatten()
        edges = torch.tensor(EDGES, dtype=values.dtype, device=values.device)
        size += values.numel()
        total = total.to(values.device)
        for piece in pieces(values):
            total += _counts(piece if divisor == 1 else piece / divisor, edges)
    (zero, *positive, _), (also_zero, *negative, _) = total.tolist()
    used = [number for number, pair in enumerate(zip(positive, negative, strict=True)) if any(pair)]
    if not used:
        return Histogram(size, zero + also_zero)
    kept = slice(used[0], used[-1] + 1)
    return Histogram(size, zero + also_zero, LOWEST + used[0], negative[kept], positive[kept])


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    """The number of values, shape (2, len(edges) + 1): those that are not negative and those that are, by magnitude.

    The first of a row are below the first edge; the last are the last edge or more, or not a number.
    """
    num_bins = len(edges) + 1
    bins = torch.bucketize(values.abs(), edges, out_int32=True, right=True)
    return torch.bincount(bins + num_bins * (values < 0), minlength=2 * num_bins).view(2, num_bins)
