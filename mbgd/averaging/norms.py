"""How long each micro-batch's gradient is, before it is added to the others: what the noise scale is made of."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class MicroBatchNorms:
    """The squared norms of Σ w_i ∇L_i over each of this worker's micro-batches in one step.

    An averaging gives it the gradients, all at once or bucket by bucket. They are added up in float64 and in the order
    of the parameters, so that the bits do not depend on how they came.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._norms: dict[int, dict[Tensor, Tensor]] = {}

    def take(
        self, number: int, gradients: Mapping[Tensor, Tensor], before: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Some parameters' gradients of micro-batch `number`, each parameter's once; one without counts as zeros.

        before: where gradients add up over micro-batches, copies of what they were before this one.
        """
        if before:
            gradients = {p: grad - before[p] if p in before else grad for p, grad in gradients.items()}
        if gradients:
            # In the gradients' own dtype: on a CPU, norms in another one take twenty times as long.
            norms = torch._foreach_norm(list(gradients.values()))
            self._norms.setdefault(number, {}).update(zip(gradients, norms, strict=True))

    def squared(self, number: int) -> Tensor:
        """Of micro-batch `number`, whose gradients have all been taken: float64, shape ()."""
        norms = self._norms.get(number, {})
        zero = torch.zeros((), device=self._parameters[0].device)
        return torch.stack([norms.get(parameter, zero) for parameter in self._parameters]).double().square().sum()
