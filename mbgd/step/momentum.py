"""Where the momentum of torch's fused SGD begins.

Its first step takes memory as it is found (torch/optim/sgd.py, `_fused_sgd`: `empty_like`), which a step that fp16
skips never writes to: the next step would add whatever lay there. It also fails where some parameters of a group have a
momentum and others, trained later, have none. From a momentum of 0 both begin as torch's SGD that is not fused does.
"""

from typing import Any

import torch
from torch.optim import SGD, Optimizer

from mbgd.errors import UsageError


class Momentum:
    """Of an optimizer's groups; nothing for other optimizers than fused SGD."""

    def __init__(self, optimizer: Optimizer, *, may_skip: bool) -> None:
        """may_skip: as in fp16. UsageError for dampening, which an SGD that begins from 0 would also take off."""
        self._optimizer, self._may_skip = optimizer, may_skip
        for group in self._groups() if may_skip else ():
            if group["dampening"]:
                raise UsageError(
                    f"precision=fp16 with optimizer.fused=true, momentum and dampening={group['dampening']}: torch's "
                    "fused SGD has no defined momentum after a first step that fp16 skips. Use optimizer.fused=null, "
                    "or no dampening."
                )
        self._is_fused = bool(self._groups())

    def begin(self) -> None:
        """Call before the optimizer's step, while `.grad` is what it gets."""
        for group in self._groups() if self._is_fused else ():
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            state = self._optimizer.state
            lacking = [p for p in held if state.get(p, {}).get("momentum_buffer") is None]
            if lacking and not group["dampening"] and (self._may_skip or len(lacking) < len(held)):
                for parameter in lacking:
                    state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _groups(self) -> list[dict[str, Any]]:
        groups = self._optimizer.param_groups if isinstance(self._optimizer, SGD) else []
        return [group for group in groups if group["fused"] and group["momentum"]]
