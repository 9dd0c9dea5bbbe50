"""The norm of each micro-batch's gradient, before it is added to the others; the noise scale is computed from them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mbgd.averaging.gradients import by_themselves


class MicroBatchNorms:
    """The squared norms of Σ w_i ∇L_i over each of this worker's micro-batches in one step.

    An averaging passes in the gradients, all at once or bucket by bucket. Their norms are summed in float64 and in the
    order of the parameters, so that the bits do not depend on the buckets, as each is aligned alike.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._norms: dict[int, dict[Tensor, Tensor]] = {}

    def take(
        self, number: int, gradients: Mapping[Tensor, Tensor], before: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Record gradients of micro-batch `number`, each parameter's once; a parameter without one counts as zeros.

        before: where gradients accumulate over micro-batches, copies from before this one.
        """
        if before:
            gradients = {p: grad - before[p] if p in before else grad for p, grad in gradients.items()}
        if gradients:
            # In the gradients' own dtype: on a CPU, norms in another dtype take twenty times as long.
            norms = torch._foreach_norm(list(by_themselves(dict(gradients)).values()))
            self._norms.setdefault(number, {}).update(zip(gradients, norms, strict=True))

    def squared(self, number: int) -> Tensor:
        """The squared norm of micro-batch `number`, once all its gradients are recorded: float64, shape ()."""
        norms = self._norms.get(number, {})
        zero = torch.zeros((), device=self._parameters[0].device)
        return torch.stack([norms.get(parameter, zero) for parameter in self._parameters]).double().square().sum()
