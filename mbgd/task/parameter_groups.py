"""Groups of parameters by patterns of their names, each with options of its own for the optimizer."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mbgd.errors import UsageError
from mbgd.text.listing import shown
from mbgd.text.suggestions import did_you_mean, matching_none

Groups = Sequence[Mapping[str, Any]]
"""Each {"match": a pattern or a list of them, option: value, …}; patterns as in a shell: *.bias, head.*"""


def parameter_groups(named: Mapping[str, nn.Parameter], groups: Groups) -> tuple[list[dict[str, Any]], list[str]]:
    """What torch's optimizers take: the parameters that no pattern matches first, then each group; and what to tell.

    A parameter belongs to the first group that matches its name. UsageError where a pattern matches none.
    """
    owner: dict[str, int] = {}
    told = []
    for number, group in enumerate(groups):
        for pattern in _patterns(number, group):
            matched = [name for name in named if fnmatchcase(name, pattern)]
            if not matched:
                raise UsageError(matching_none(f"optimizer.groups[{number}].match", pattern, named))
            if taken := [name for name in matched if owner.setdefault(name, number) != number]:
                told.append(
                    f"note: optimizer.groups[{number}] also matches {shown(taken)}, which an earlier group has: the "
                    "first one counts."
                )
    made = []
    for number, group in enumerate([{}, *groups], start=-1):
        parameters = [parameter for name, parameter in named.items() if owner.get(name, -1) == number]
        options = {key: value for key, value in group.items() if key != "match"}
        if parameters:
            made.append({"params": parameters, **options})
    return made, told


def check_options(optimizer: Optimizer, groups: Groups) -> None:
    """UsageError where a group has an option that the optimizer does not know; torch itself would keep it unused."""
    for number, group in enumerate(groups):
        for option in group.keys() - {"match", *optimizer.defaults}:
            raise UsageError(
                f"optimizer.groups[{number}].{option}: {type(optimizer).__name__} has no such option; it has "
                f"{', '.join(optimizer.defaults)}.{did_you_mean(option, optimizer.defaults)}"
            )


def _patterns(number: int, group: Any) -> list[str]:
    if not isinstance(group, Mapping) or "match" not in group or len(group) < 2 or "params" in group:
        raise UsageError(
            f"optimizer.groups[{number}]={group!r}; a group has the key match, with patterns of parameters' names, and "
            'options for them, such as {match: ["*.bias", "*norm*"], weight_decay: 0}.'
        )
    patterns = [group["match"]] if isinstance(group["match"], str) else group["match"]
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(one, str) for one in patterns):
        raise UsageError(f"optimizer.groups[{number}].match={group['match']!r}; it takes a pattern or a list of them.")
    return list(patterns)
