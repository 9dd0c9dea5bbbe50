"""Muon for the hidden matrices and AdamW for all other parameters, in one optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mbgd.errors import UsageError
from mbgd.task.parameter_groups import Groups, parameter_groups
from mbgd.text.listing import shown
from mbgd.text.suggestions import did_you_mean, matching_none

NOT_HIDDEN = (
    *("*embed*", "*wte.weight", "*wpe.weight", "tokens.*", "positions.*"),
    *("head.weight", "*.head.weight", "*_head.weight", "classifier.weight", "*.classifier.weight"),
    *("output.weight", "fc.weight", "score.weight"),
)
"""Usual names of embeddings and of the last layer, as patterns."""

OPTIONS_OF_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")
OPTIONS_OF_ADAMW = ("lr", "weight_decay", "betas", "eps")


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for all others.

    Both are torch's own. Embeddings, the last layer, vectors and the kernels of convolutions are not hidden matrices.
    The groups of Muon come first in `param_groups`; their option `use_muon` is true.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-2,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_for: Sequence[str] | None = None,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
        groups: Groups = (),
    ) -> None:
        """adjust_lr_fn: torch's; with match_rms_adamw both take the same `lr` (Liu et al. 2025, arXiv:2502.16982).

        adamw_for: patterns of names of the matrices that AdamW updates; None: `NOT_HIDDEN`, or the last matrix where
        none has such a name. adamw_lr: None: lr. groups: options of some parameters, {"match": patterns, option: …}.
        """
        named = dict(named_parameters)
        self.hidden = _hidden(named, adamw_for)
        """Names of the parameters that Muon updates."""
        of_muon, of_adamw = _split(named, self.hidden, groups)
        rate = lr if adamw_lr is None else adamw_lr
        try:
            self._muon = torch.optim.Muon(
                of_muon, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
            )
            adamw = torch.optim.AdamW
            self._adamw = adamw(of_adamw, rate, betas, eps, weight_decay, fused=fused) if of_adamw else None
        except (ValueError, TypeError) as error:
            raise UsageError(f"optimizer MuonAdamW: {error}.") from error
        made = [{**group, "use_muon": True} for group in self._muon.param_groups]
        if self._adamw is not None:
            made += [{**group, "use_muon": False} for group in self._adamw.param_groups]
        super().__init__(made, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update with the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner, uses_muon in ((self._muon, True), (self._adamw, False)):
            if inner is not None:  # with the groups and the state of now: restoring replaces both
                inner.param_groups = [group for group in self.param_groups if group["use_muon"] is uses_muon]
                inner.state = self.state
                inner.step()  # type: ignore[no-untyped-call, unused-ignore]
        return loss


def _hidden(named: Mapping[str, nn.Parameter], adamw_for: Sequence[str] | None) -> list[str]:
    """The names of the hidden matrices; UsageError if there are none."""
    if isinstance(adamw_for, str):
        adamw_for = [adamw_for]
    for pattern in adamw_for or ():
        if not any(fnmatchcase(name, pattern) for name in named):
            raise UsageError(matching_none("optimizer.adamw_for", pattern, named))
    matrices = [name for name, parameter in named.items() if parameter.dim() == 2]
    patterns = NOT_HIDDEN if adamw_for is None else adamw_for
    hidden = [name for name in matrices if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if adamw_for is None and hidden == matrices:
        hidden = matrices[:-1]
    if not hidden:
        raise UsageError(
            "optimizer MuonAdamW: Muon would update no parameter. It takes matrices that are neither embeddings nor "
            f"the last layer; the model's matrices are {shown(matrices) or 'none'}. Use optimizer=adamw, or name those "
            "that AdamW updates: optimizer.adamw_for=[…]."
        )
    return hidden


def _split(
    named: Mapping[str, nn.Parameter], hidden: Sequence[str], groups: Groups
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of Muon and those of AdamW, each with the options that it knows; UsageError for any other option."""
    of_muon, of_adamw = [], []
    ours = {named[name] for name in hidden}
    made, _ = parameter_groups(named, groups)
    for group in made:
        options = {key: value for key, value in group.items() if key != "params"}
        matrices = [p for p in group["params"] if p in ours]
        others = [p for p in group["params"] if p not in ours]
        known = {*(OPTIONS_OF_MUON if matrices else ()), *(OPTIONS_OF_ADAMW if others else ())}
        for option in options.keys() - known:
            whose = " and ".join(["Muon"] * bool(matrices) + ["AdamW"] * bool(others))
            raise UsageError(
                f"optimizer.groups: {option}={options[option]} is no option of {whose}, which updates what the group "
                f"matches; it has {', '.join(sorted(known))}.{did_you_mean(option, sorted(known))}"
            )
        if matrices:
            of_muon.append({"params": matrices, **{k: v for k, v in options.items() if k in OPTIONS_OF_MUON}})
        if others:
            of_adamw.append({"params": others, **{k: v for k, v in options.items() if k in OPTIONS_OF_ADAMW}})
    return of_muon, of_adamw
