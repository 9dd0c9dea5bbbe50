"""Learning rates that follow the minibatch's size, from the size for which they were chosen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from mbgd.config.field_types import converted
from mbgd.errors import UsageError
from mbgd.optimizers.muon import MuonAdamW
from mbgd.text.suggestions import did_you_mean

RULES = ("linear", "sqrt")


@dataclass(frozen=True)
class Scale:
    """The setting `optimizer.lr_scale_with`."""

    batch: int
    """Size of the minibatch for which the optimizer's values were chosen."""
    rule: str

    @classmethod
    def of(cls, node: Any) -> "Scale | None":
        """From the setting; UsageError if it is not null and does not have the form."""
        if node is None:
            return None
        name = "optimizer.lr_scale_with"
        if not isinstance(node, Mapping) or set(node) != {"batch", "rule"}:
            raise UsageError(
                f"{name}={node}; it takes the size of the minibatch for which lr was chosen, and a rule, linear or "
                "sqrt, such as {batch: 256, rule: linear}, or null."
            )
        batch = converted(f"{name}.batch={node['batch']}", node["batch"], int)
        if batch < 1:
            raise UsageError(f"{name}.batch={batch}; a minibatch has at least 1 example.")
        if node["rule"] not in RULES:
            meant = did_you_mean(str(node["rule"]), RULES)
            raise UsageError(f"{name}.rule={node['rule']}; it is one of {', '.join(RULES)}.{meant}")
        return cls(batch, node["rule"])

    def described(self, optimizer: Optimizer, size: int) -> str:
        """What an optimizer that was scaled to a minibatch of `size` examples has become.

        For example: scaled by 2 (linear: batch.size 512 / 256).
        """
        factor = f"scaled by {_factor(size / self.batch, self.rule):.4g}"
        told = f"{factor} ({self.rule}: batch.size {size} / {self.batch})"
        for group in [one for one in optimizer.param_groups if self.rule == "sqrt" and _is_adams(optimizer, one)][:1]:
            values = {name: group[name] for name in ("betas", "alpha", "eps") if name in group}
            of_names = {name: one if isinstance(one, tuple) else (one,) for name, one in values.items()}
            told += "".join(f", {name} {', '.join(f'{x:.4g}' for x in one)}" for name, one in of_names.items())
        return told


def scale_lr(optimizer: Optimizer, *, size: int, batch: int, rule: str) -> None:
    """Change the optimizer's rates, chosen for minibatches of `batch` examples, to those for `size` examples.

    With κ = size / batch. linear: lr × κ (Goyal et al. 2017, arXiv:1706.02677). sqrt: lr × √κ (Malladi et al. 2022,
    arXiv:2205.10287), and in Adam, AdamW and RMSprop, for which it was derived, also β → 1 − κ (1 − β) for each decay
    rate β, and eps → eps / √κ. UsageError where that leaves the range of β.
    """
    scale = Scale.of({"batch": batch, "rule": rule})
    assert scale is not None
    ratio = size / scale.batch
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * _factor(ratio, scale.rule)
        if scale.rule == "sqrt" and _is_adams(optimizer, group):
            if "betas" in group:
                group["betas"] = tuple(_decay("betas", beta, ratio) for beta in group["betas"])
            if "alpha" in group:
                group["alpha"] = _decay("alpha", group["alpha"], ratio)
            group["eps"] = group["eps"] / math.sqrt(ratio)


def _factor(ratio: float, rule: str) -> float:
    return ratio if rule == "linear" else math.sqrt(ratio)


def _is_adams(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the square root rule was derived for the group's update."""
    if isinstance(optimizer, MuonAdamW):
        return not group["use_muon"]
    return isinstance(optimizer, torch.optim.Adam | torch.optim.RMSprop)


def _decay(name: str, beta: float, ratio: float) -> float:
    scaled = 1 - ratio * (1 - beta)
    if not 0 <= scaled < 1:
        raise UsageError(
            f"optimizer.lr_scale_with: for a minibatch {ratio:.4g} times as large the rule sqrt turns {beta} in "
            f"optimizer.{name} into {scaled:.4g}; it must be from 0 to below 1. The rule holds while {ratio:.4g} × "
            f"(1 − {beta}) is small: use a smaller batch.size, a decay rate nearer to 1, or rule: linear."
        )
    return scaled
