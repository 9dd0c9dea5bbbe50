"""What LAMB and LARS share: each layer's step is scaled by a ratio of norms, computed on whole parameters.

All arithmetic on parameters is torch's for lists of tensors (`torch._foreach_…`): few kernels, and nothing waits for
the device. Every worker has the whole parameters and the same gradient, so all compute the same ratios.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.config.field_types import converted
from mbgd.errors import UsageError


class Layerwise(Optimizer):
    """An optimizer whose groups have the option `adapt_vectors`.

    Where that is false, parameters of fewer than two dimensions (biases, norms) have ratio 1 and no weight decay: the
    authors' code of LAMB leaves them out by name, and so do many recipes with LARS.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update with the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for pairs in _alike((p, p.grad) for p in group["params"] if p.grad is not None):
                self._update(group, [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs])
        return loss

    @abstractmethod
    def _update(self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Update parameters of one group, one device and one dtype."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        kind = type(self).__name__
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if parameter.is_complex():
                raise UsageError(f"optimizer {kind} takes real parameters; one is {parameter.dtype}. Use AdamW for it.")
        converted(f"optimizer.adapt_vectors={group['adapt_vectors']}", group["adapt_vectors"], bool)
        for name in ("lr", "weight_decay"):
            check_at_least_zero(name, group[name])


def check_at_least_zero(name: str, value: Any, *, below: float = float("inf")) -> None:
    """UsageError unless 0 ≤ value < below."""
    if not 0 <= converted(f"optimizer.{name}={value}", value, float) < below:
        rule = "be a finite number ≥ 0" if below == float("inf") else f"be from 0 to below {below:g}"
        raise UsageError(f"optimizer.{name}={value}; it must {rule}.")


def is_adapted(group: Mapping[str, Any], parameter: Tensor) -> bool:
    return bool(group["adapt_vectors"]) or parameter.dim() >= 2


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, on the device: shape (N,)."""
    return torch.stack(torch._foreach_norm(tensors))


def where_both(some: Tensor, others: Tensor, ratios: Tensor) -> Tensor:
    """The ratios where both norms are above 0, otherwise 1."""
    ones = torch.ones_like(ratios)  # by a kernel: torch.where would copy a number from the host and wait for the GPU
    return torch.where((some > 0) & (others > 0), ratios, ones)


def _alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[list[tuple[Tensor, Tensor]]]:
    """(parameter, gradient) in lists of one device and one dtype, which kernels for lists need."""
    found: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for parameter, gradient in pairs:
        found.setdefault((parameter.device, parameter.dtype), []).append((parameter, gradient))
    return found.values()
