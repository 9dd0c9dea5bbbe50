"""The optimizer of a configuration, with its groups of parameters."""

from typing import Any

import torch

from mbgd.building import targets
from mbgd.building.make import make
from mbgd.checks import optimizers
from mbgd.errors import UsageError
from mbgd.optimizers.scaling import Scale, scale_lr
from mbgd.task.parameter_groups import check_options, parameter_groups
from mbgd.task.task import Task
from mbgd.task.torch_calls import put_off_dynamo
from mbgd.text.listing import shown

KEYS_OF_OURS = ("groups", "lr_scale_with")
"""Keys of the node that are not arguments of the target."""


def make_optimizer(node: Any, task: Task, minibatch_size: int) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer of all parameters of model and objective, and notes for the user.

    It also gets parameters that do not require a gradient: they may be unfrozen later. A function that takes
    `named_parameters` gets (name, parameter) pairs, and the groups if it takes `groups`. UsageError if the trainer does
    not support the optimizer.
    """
    named, notes = task.parameters_by_name(), list[str]()
    parameters: list[Any] = list(named.values())
    ours = {key: node[key] for key in KEYS_OF_OURS if key in node} if isinstance(node, dict) else {}
    node = {key: value for key, value in node.items() if key not in ours} if isinstance(node, dict) else node
    groups, scale = ours.get("groups") or [], Scale.of(ours.get("lr_scale_with"))
    kind = targets.find(node) if isinstance(node, dict) else None
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        optimizers.check(kind)  # first: correcting its keys would be in vain
    takes_names, takes_groups = (targets.takes(kind, name) for name in ("named_parameters", "groups"))
    if groups and takes_names and not takes_groups:
        raise UsageError(
            f"optimizer.groups with {node['_target_']}, which takes named_parameters and so makes groups itself. Leave "
            "out the one or the other, or let it have a parameter groups."
        )
    if groups:
        parameters, notes = parameter_groups(named, groups)
    more = {"named_parameters": list(named.items())} if takes_names else {}
    if takes_names and takes_groups:
        more["groups"] = groups
    put_off_dynamo()
    optimizer = _made(node, task, *([] if more else [parameters]), **more)
    optimizers.check(optimizer)
    if not takes_groups:
        check_options(optimizer, groups)
    if scale is not None:
        scale_lr(optimizer, size=minibatch_size, batch=scale.batch, rule=scale.rule)
    return optimizer, notes


def _made(node: Any, task: Task, *arguments: Any, **more: Any) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = make("optimizer", node, *arguments, **more)
        return optimizer
    except UsageError as error:
        if "2D parameters" not in str(error):  # torch.optim.Muon
            raise
        others = optimizers.not_matrices(task.model)
        raise UsageError(
            f"optimizer ({node['_target_']}) takes only matrices, and {len(others)} parameters of the model are not: "
            f"{shown(others)}. Use optimizer=muon, which gives the hidden matrices to Muon and all others to AdamW, or "
            "another optimizer, such as optimizer=adamw."
        ) from error
