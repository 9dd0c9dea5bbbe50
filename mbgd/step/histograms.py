"""Histograms of gradients and parameters by layer, at a few steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbgd.batches.pieces import pieces
from mbgd.errors import UsageError
from mbgd.files.observed import HISTOGRAMS, Histogram, HistogramLine, Layer, plain_values
from mbgd.step.done import Done

LOWEST, HIGHEST = -48, 24
"""Exponents of the powers of two that values are told apart by."""
FEW = 4
"""With fewer layers than 1/4 of those allowed, neighbours of the next finer level are put together instead."""


class Layout(NamedTuple):
    """The bits of a floating point number, IEEE 754: a sign, the exponent plus the bias, the mantissa."""

    integers: torch.dtype
    """Of the same size."""
    mantissa_bits: int
    bias: int


Counts = dict[str, tuple[int, list[list[int]]]]
"""By layer: the number of values, and how many are in each bin, those ≥ 0 and those < 0."""

FLOAT32, FLOAT64 = Layout(torch.int32, 23, 127), Layout(torch.int64, 52, 1023)


class Histograms:
    """Writes histograms of the mean gradient and of the parameters, by layer, into observed/histograms.jsonl.

    Bins are powers of two, so they are the same in every step and for every layer. The gradient is the one that the
    optimizer gets: averaged over the minibatch and clipped. The main worker alone computes them, on its device; where
    each worker has the gradient of its pieces alone, it counts these, and the counts are added up. The workers exchange
    them before the update: none can be lost between a step and the notes of it.
    """

    name = HISTOGRAMS

    def __init__(self, steps: int, layers: int = 16) -> None:
        """steps: at how many, evenly spread from the first to the last. layers: at most; others are put together."""
        for key, value in (("steps", steps), ("layers", layers)):
            if value < 1:
                raise UsageError(f"histograms.{key}={value}; it must be ≥ 1; histograms.steps=null: none.")
        self.steps, self.layers = steps, layers
        self._at: frozenset[int] = frozenset()
        self._is_main = True
        self._layers: list[str] = []
        self._parameters: list[tuple[str, Tensor]] = []
        """(layer, parameter)."""
        self._updated: list[tuple[str, Tensor]] = []
        """(layer, what this worker updates): all parameters, or its pieces of them."""
        self._gradients: Counts = {}
        """Of the whole parameters."""
        self._gather: Callable[[Any], list[Any]] = lambda counts: [counts]
        self._write: Callable[[int, Mapping[str, Any]], None] = lambda step, values: None

    def before_training(self, trainer: Any) -> None:
        trained, workers = trainer.setup.trained, trainer.setup.workers
        layers = by_layer(list(trained.by_name), self.layers)
        layer_of = {name: layer for layer, names in layers.items() for name in names}
        self._layers, self._is_main = list(layers), workers.is_main
        if trained.pieces is not None:
            self._gather = workers.gather_values
        elif not workers.is_main:
            return
        self._at = spread(self.steps, trainer.setup.num_steps)
        self._parameters = [(layer_of[name], one) for name, one in trained.by_name.items()]
        self._updated = [(layer_of[name], one) for name, one in trained.updated()]
        trainer.train_step.update.before_step.append(self._before_step)

    def with_writer(self, write: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._write = write

    def _before_step(self, step: int, divisor: Tensor | None) -> None:
        if step + 1 in self._at:
            gradients = [(layer, one.grad) for layer, one in self._updated if one.grad is not None]
            self._gradients = _added(self._gather(_count_by_layer(gradients, divisor)))

    def after_update(self, done: Done) -> None:
        if not self._is_main or done.step + 1 not in self._at:
            return
        parameters, gradients = _count_by_layer(self._parameters), self._gradients
        layers = [
            Layer(layer, _trimmed(*parameters[layer]), _trimmed(*gradients[layer]) if layer in gradients else None)
            for layer in self._layers
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


def histogram(tensors: Iterable[Tensor], divisor: Tensor | None = None) -> Histogram:
    """Of all values of the tensors, each divided by the divisor; this waits for the device."""
    return _trimmed(*_count(tensors, divisor))


def _count_by_layer(held: Sequence[tuple[str, Tensor]], divisor: Tensor | None = None) -> Counts:
    tensors: dict[str, list[Tensor]] = {}
    for layer, tensor in held:
        tensors.setdefault(layer, []).append(tensor)
    return {layer: _count(of_layer, divisor) for layer, of_layer in tensors.items()}


def _count(tensors: Iterable[Tensor], divisor: Tensor | None) -> tuple[int, list[list[int]]]:
    """(number of values, those ≥ 0 and those < 0 by bin); this waits for the device."""
    total, size = torch.zeros(2, HIGHEST - LOWEST + 1, dtype=torch.int64), 0
    for tensor in tensors:
        values = tensor.detach()
        values = (torch.view_as_real(values) if values.is_complex() else values).flatten()
        size += values.numel()
        total = total.to(values.device)
        for piece in pieces(values):
            total += _counts(piece if divisor is None else piece / divisor)
    return size, total.tolist()


def _added(of_workers: Iterable[Counts]) -> Counts:
    """The workers' counts together."""
    total: Counts = {}
    for counts in of_workers:
        for layer, (size, by_sign) in counts.items():
            before = total.get(layer, (0, [[0] * len(one) for one in by_sign]))
            pairs = zip(before[1], by_sign, strict=True)
            total[layer] = before[0] + size, [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
    return total


def _trimmed(size: int, by_sign: Sequence[Sequence[int]]) -> Histogram:
    """Without the bins at both ends that hold nothing."""
    (zero, *positive), (also_zero, *negative) = by_sign
    used = [number for number, pair in enumerate(zip(positive, negative, strict=True)) if any(pair)]
    if not used:
        return Histogram(size, zero + also_zero)
    kept = slice(used[0], used[-1] + 1)
    return Histogram(size, zero + also_zero, LOWEST + used[0], negative[kept], positive[kept])


def _counts(values: Tensor) -> Tensor:
    """The number of values that are not negative, and of those that are: below 2^LOWEST, then for each power of two.

    The sign and the exponent are the first bits of a number: nothing else is fifteen times as fast.
    """
    layout = FLOAT64 if values.dtype is torch.float64 else FLOAT32
    if layout is FLOAT32:
        values = values.float()
    num_exponents = 2 * (layout.bias + 1)
    bins = (values.view(layout.integers) >> layout.mantissa_bits) & (2 * num_exponents - 1)
    counts = torch.bincount(bins, minlength=2 * num_exponents).view(2, num_exponents)
    lowest, highest = layout.bias + LOWEST, layout.bias + HIGHEST
    return torch.cat([counts[:, :lowest].sum(1, keepdim=True), counts[:, lowest:highest]], dim=1)
