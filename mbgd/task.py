"""What one worker computes: the model under its objective, as one module that DistributedDataParallel can wrap.

The objective gets the user's own model, never a wrapper, so that it may call any method of it on any number of
workers.
"""

from typing import Any

from torch import nn

from mbgd.errors import UsageError
from mbgd.objective import Objective, PerExample


class Task(nn.Module):
    """A micro-batch → its per-example losses."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._parts = (objective, model)  # nn.Module's own way to `self.model` costs microseconds in every step

    def forward(self, batch: Any, num_examples: int) -> PerExample:
        objective, model = self._parts
        terms = objective(model, batch)
        if not isinstance(terms, PerExample):
            raise UsageError(
                f"objective returned {type(terms).__name__}; it must return mbgd.PerExample(losses=…) with one "
                "unreduced loss per example (reduction='none'): the trainer does the averaging."
            )
        terms.check(num_examples)
        return terms
