"""A coupled objective: its two methods, checked, and their module, which DistributedDataParallel can wrap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.objective import Coupled, PerExample

Encodings = list[Tensor]
"""Each of shape (N, …)."""


class Pair:
    """The objective's two methods, whose results are checked."""

    def __init__(self, objective: Coupled) -> None:
        self._objective = objective

    def encode(self, model: nn.Module, batch: Any, num_examples: int) -> Encodings:
        """The batch's encodings; UsageError unless each has one row for each example."""
        given = self._objective.encode(model, batch)
        encodings = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, list | tuple) else []
        if not encodings or not all(isinstance(one, Tensor) for one in encodings):
            raise UsageError(
                f"the objective's encode returned {_kinds(given)}; it must return a tensor of shape (N, …) for a batch "
                "of N examples, or a tuple of such tensors."
            )
        if wrong := [one for one in encodings if one.dim() == 0 or len(one) != num_examples]:
            raise UsageError(
                f"the objective's encode returned a tensor of shape {tuple(wrong[0].shape)} for {num_examples} "
                f"examples; the first dimension counts the examples: ({num_examples}, …). What belongs to no example, "
                "such as a temperature, is an attribute of the objective."
            )
        return encodings

    def losses(self, encodings: Sequence[Tensor]) -> PerExample:
        """The losses of all examples, checked."""
        terms = self._objective.losses(*encodings)
        if not isinstance(terms, PerExample):
            raise UsageError(
                f"the objective's losses returned {type(terms).__name__}; it must return mbgd.PerExample(losses=…) "
                "with one unreduced loss per example (reduction='none'): the trainer does the averaging."
            )
        terms.check(len(encodings[0]))
        return terms


def _kinds(given: Any) -> str:
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {', '.join(type(one).__name__ for one in given) or 'nothing'}"
    return f"a {type(given).__name__}"


@dataclass(frozen=True)
class WholeLoss:
    """The losses of a whole minibatch, and the gradient of Σ w_i L_i at what they were computed from."""

    terms: PerExample
    encodings: Sequence[Tensor]
    """Of the whole minibatch, without a graph."""
    of_encodings: Sequence[Tensor | None]
    """The gradient at each encoding, of its shape; None: the losses do not depend on it."""
    of_parameters: dict[nn.Parameter, Tensor]
    """The gradient at the parameters that `losses` itself uses, such as a temperature."""

    def roots(self, encodings: Sequence[Tensor]) -> list[Tensor]:
        """Where a micro-batch's backward begins: its encodings, and the parameters in `of_parameters`."""
        used = [one for one, gradient in zip(encodings, self.of_encodings, strict=True) if gradient is not None]
        return used + [parameter.view_as(parameter) for parameter in self.of_parameters]

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """The encodings of examples [start, stop) to which there is a gradient."""
        pairs = zip(self.encodings, self.of_encodings, strict=True)
        return [one[start:stop] for one, gradient in pairs if gradient is not None]

    def at_roots(self, start: int, stop: int, *, has_parameters: bool) -> list[Tensor]:
        """The gradient at each root of the micro-batch of examples [start, stop) of the minibatch.

        has_parameters: the gradient at the parameters counts with this micro-batch; elsewhere it is 0, so that the sum
        over the minibatch holds it once.
        """
        rows = [gradient[start:stop] for gradient in self.of_encodings if gradient is not None]
        return rows + [one if has_parameters else torch.zeros_like(one) for one in self.of_parameters.values()]


class Encoder(nn.Module):
    """The task whose forward gives the roots of a micro-batch's backward."""

    def __init__(self, task: nn.Module, pair: Pair, model: nn.Module) -> None:
        """task: the module of all parameters, those of model and objective."""
        super().__init__()
        self.task = task
        self._parts = (pair, model)

    def forward(self, batch: tuple[Any, WholeLoss | None], num_examples: int) -> list[Tensor]:
        """batch: the micro-batch, and the minibatch's losses; without them, the encodings are returned."""
        examples, whole = batch
        pair, model = self._parts
        encodings = pair.encode(model, examples, num_examples)
        return encodings if whole is None else whole.roots(encodings)
