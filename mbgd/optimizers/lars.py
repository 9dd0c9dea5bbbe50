"""LARS: SGD with momentum and a ratio of norms for each layer (You, Gitman & Ginsburg 2017, arXiv:1708.03888)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbgd.optimizers.layerwise import Layerwise, check_at_least_zero, is_adapted, norms, where_both


class Lars(Layerwise):
    """Algorithm 1 of the paper: v ← momentum v + lr λ (g + weight_decay w); w ← w − v for each layer w.

    λ = trust_coefficient ‖w‖ / (‖g‖ + weight_decay ‖w‖); where ‖w‖ or ‖g‖ is 0 it is 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 1e-3,
        adapt_vectors: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt_vectors": adapt_vectors,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_at_least_zero("momentum", group["momentum"], below=1.0)
        check_at_least_zero("trust_coefficient", group["trust_coefficient"])

    def _update(self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        momenta = [self._momentum_of(parameter) for parameter in parameters]
        updates = list(torch._foreach_mul(gradients, 1.0))  # copies
        pairs = [(p, u) for p, u in zip(parameters, updates, strict=True) if is_adapted(group, p)]
        if pairs:
            _adapt([p for p, _ in pairs], [u for _, u in pairs], group)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates, alpha=group["lr"])
        torch._foreach_sub_(parameters, momenta)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def _adapt(parameters: list[Tensor], updates: list[Tensor], group: Mapping[str, Any]) -> None:
    """Turn each gradient into λ (g + weight_decay w), in place."""
    decay, trust = group["weight_decay"], group["trust_coefficient"]
    of_parameters, of_gradients = norms(parameters), norms(updates)
    ratios = trust * of_parameters / (of_gradients + decay * of_parameters)
    ratios = where_both(of_parameters, of_gradients, ratios)
    if decay != 0:
        torch._foreach_add_(updates, parameters, alpha=decay)
    torch._foreach_mul_(updates, ratios.unbind())
