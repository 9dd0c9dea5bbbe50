"""The optimizer of a configuration, with its groups of parameters."""

from typing import Any

import torch

from mbgd.building import targets
from mbgd.building.make import make
from mbgd.checks import optimizers
from mbgd.errors import UsageError
from mbgd.task.parameter_groups import check_options, parameter_groups
from mbgd.task.task import Task


def make_optimizer(node: Any, task: Task) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer of all parameters of model and objective, and notes for the user.

    It also gets parameters that do not require a gradient: they may be unfrozen later. A function that takes
    `named_parameters` gets (name, parameter) pairs. UsageError if the trainer does not support the optimizer.
    """
    named, notes = task.parameters_by_name(), list[str]()
    parameters: list[Any] = list(named.values())
    groups = node.get("groups") or [] if isinstance(node, dict) else []
    node = {key: value for key, value in node.items() if key != "groups"} if isinstance(node, dict) else node
    kind = targets.find(node) if isinstance(node, dict) else None
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        optimizers.check(kind)  # first: correcting its keys would be in vain
    takes_names = targets.takes(kind, "named_parameters")
    if groups and takes_names:
        raise UsageError(
            f"optimizer.groups with {node['_target_']}, which takes named_parameters and so makes groups itself. Leave "
            "out the one or the other."
        )
    if groups:
        parameters, notes = parameter_groups(named, groups)
    more = {"named_parameters": list(named.items())} if takes_names else {}
    try:
        optimizer: torch.optim.Optimizer = make("optimizer", node, *([] if more else [parameters]), **more)
    except UsageError as error:
        if "2D parameters" not in str(error):  # torch.optim.Muon
            raise
        others = optimizers.not_matrices(task.model)
        raise UsageError(
            f"optimizer ({node['_target_']}) takes only matrices, and {len(others)} parameters of the model are "
            f"not: {', '.join(others[:5])}{' …' if len(others) > 5 else ''}. Use another optimizer, such as "
            "optimizer=adamw, or one of your own that gives it the matrices and the rest to another "
            "(optimizer=own optimizer._target_=…)."
        ) from error
    optimizers.check(optimizer)
    check_options(optimizer, groups)
    return optimizer, notes
