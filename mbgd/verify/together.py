"""Forwards of several micro-batches whose BatchNorm layers use the statistics of all, in one process in plain torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mbgd.averaging.batch_norm import forwards_replaced, uses_statistics_of_examples

T = TypeVar("T")


class _Reached(BaseException):
    """A layer whose outputs are not known yet; not an Exception, which a model might catch."""

    def __init__(self, layer: _BatchNorm, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs


def together(layers: Mapping[str, _BatchNorm], forwards: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the forwards, one for each micro-batch.

    Each is run up to the first layer whose outputs are not known. They are computed for all micro-batches at once, as
    part of one graph, and then each forward is repeated up to the next layer. So a forward must draw the same random
    numbers whenever it runs.
    """
    known: list[list[Tensor]] = []  # of each layer that is reached, in order: the outputs for each micro-batch
    while True:
        results: list[T] = []
        reached: list[_Reached] = []
        for number, forward in enumerate(forwards):
            outputs = iter([of_layer[number] for of_layer in known])
            with forwards_replaced({layer: partial(_next, outputs, layer) for layer in layers.values()}):
                try:
                    results.append(forward())
                except _Reached as end:
                    reached.append(end)
        if not reached:
            return results
        assert len(reached) == len(forwards), "the trainer refuses micro-batches that pass through different layers"
        known.append(_normalised(reached[0].layer, [one.inputs for one in reached]))


def _next(outputs: Iterator[Tensor], layer: _BatchNorm, inputs: Tensor) -> Tensor:
    if not uses_statistics_of_examples(layer):
        plain: Tensor = _BatchNorm.forward(layer, inputs)
        return plain
    found = next(outputs, None)
    if found is None:
        raise _Reached(layer, inputs)
    return found


def _normalised(layer: _BatchNorm, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Each micro-batch's outputs; the micro-batches may differ in every dimension but that of the channels."""
    rows = [one.movedim(1, -1).reshape(-1, one.shape[1]) for one in inputs]
    outputs = F.batch_norm(torch.cat(rows), None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    parts = torch.split(outputs, [len(of_one) for of_one in rows])
    return [part.view(one.movedim(1, -1).shape).movedim(-1, 1) for part, one in zip(parts, inputs, strict=True)]
