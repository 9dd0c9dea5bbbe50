"""LAMB: Adam with a ratio of norms for each layer (You et al. 2020, arXiv:1904.00962)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mbgd.errors import UsageError
from mbgd.optimizers.layerwise import Layerwise, check_at_least_zero, is_adapted, norms, where_both


class Lamb(Layerwise):
    """Algorithm 2 of the paper: x ← x − lr φ(‖x‖) / ‖u‖ u, with u = m̂ / (√v̂ + eps) + weight_decay x for each layer x.

    φ limits the norm to the range `norm_bounds`; None: it does not. Where ‖x‖ or ‖u‖ is 0 the ratio is 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        norm_bounds: tuple[float, float] | None = None,
        adapt_vectors: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "norm_bounds": norm_bounds,
            "adapt_vectors": adapt_vectors,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_at_least_zero("eps", group["eps"])
        for name, beta in zip(("betas[0]", "betas[1]"), _two("betas", group["betas"]), strict=True):
            check_at_least_zero(name, beta, below=1.0)
        if group["norm_bounds"] is not None:
            least, most = _two("norm_bounds", group["norm_bounds"])
            if not 0 <= least < most:
                raise UsageError(f"optimizer.norm_bounds={[least, most]}; it must be two numbers, 0 ≤ least < most.")

    def _update(self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        beta_1, beta_2 = group["betas"]
        states = [self._state_of(parameter) for parameter in parameters]
        for state in states:
            state["step"] += 1
        firsts, seconds = [one["exp_avg"] for one in states], [one["exp_avg_sq"] for one in states]
        torch._foreach_lerp_(firsts, gradients, 1 - beta_1)
        torch._foreach_mul_(seconds, beta_2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta_2)
        updates = torch._foreach_div(firsts, [1 - beta_1 ** one["step"] for one in states])
        roots = torch._foreach_div(seconds, [1 - beta_2 ** one["step"] for one in states])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(updates, roots)
        pairs = [(p, u) for p, u in zip(parameters, updates, strict=True) if is_adapted(group, p)]
        if pairs:
            _adapt([p for p, _ in pairs], [u for _, u in pairs], group)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _adapt(parameters: list[Tensor], updates: list[Tensor], group: Mapping[str, Any]) -> None:
    """Add the weight decay, and scale each update to the norm of its parameter; in place."""
    if group["weight_decay"] != 0:
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
    of_parameters, of_updates = norms(parameters), norms(updates)
    wanted = of_parameters if group["norm_bounds"] is None else of_parameters.clamp(*group["norm_bounds"])
    ratios = where_both(of_parameters, of_updates, wanted / of_updates)
    torch._foreach_mul_(updates, ratios.unbind())


def _two(name: str, values: Any) -> tuple[Any, Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise UsageError(f"optimizer.{name}={values}; it takes two numbers.")
    return values[0], values[1]
