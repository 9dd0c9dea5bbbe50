"""The momentum of torch's fused SGD, for parameters that have none yet.

torch's fused SGD makes the momentum of all its parameters in one first step, and the kernel fills it. In fp16 the
kernel may skip this step: then it fills nothing, and the next step reads memory that nobody has written. Parameters
that have their first gradient in a later step stop it with a TypeError.
"""

import torch
from torch.optim import Optimizer

from mbgd.errors import UsageError


class FirstMomentum:
    """Gives such parameters the momentum 0, with which a step computes the bits of a first one."""

    def __init__(self, optimizer: Optimizer, *, may_skip: bool) -> None:
        """may_skip: the kernel may skip a step, as in fp16."""
        self._optimizer, self._may_skip = optimizer, may_skip
        self._can_need_it = isinstance(optimizer, torch.optim.SGD)

    def before_step(self) -> None:
        """Called in each step with the gradients there; UsageError where a first step would not begin with 0."""
        if not self._can_need_it:
            return
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            if not group["fused"] or group["momentum"] == 0:
                continue
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            without = [parameter for parameter in held if state.get(parameter, {}).get("momentum_buffer") is None]
            if not without or (len(without) == len(held) and not self._may_skip):
                continue
            if group["dampening"] != 0:
                raise UsageError(
                    f"optimizer SGD has fused=True and dampening={group['dampening']}; torch's fused SGD cannot begin "
                    "the momentum of single parameters, or in a step that fp16 may skip, with dampening. Use "
                    "optimizer.fused=false, or no dampening."
                )
            for parameter in without:
                assert parameter.grad is not None
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
