"""Modules' extra state: the result of `get_extra_state`, restored with `set_extra_state`.

A tensor is kept among the checkpoint's tensors; anything else must be JSON, because reading a checkpoint runs no code.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.task import Task, plain_name

KEY = "_extra_state"
"""torch's own key for it in a state_dict."""


def _modules(task: Task) -> dict[str, nn.Module]:
    """Modules with extra state, by the state's key in a state_dict."""
    return {
        plain_name(f"{name}.{KEY}"): module
        for name, module in task.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def extra_state(task: Task) -> dict[str, Any]:
    """Each module's extra state now, by key."""
    return {name: module.get_extra_state() for name, module in _modules(task).items()}


def set_extra_state(task: Task, state: Mapping[str, Any]) -> None:
    for name, module in _modules(task).items():
        if name in state:
            module.set_extra_state(state[name])


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, other values), each by key."""
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def check(task: Task) -> None:
    """UsageError if a module's extra state cannot be kept in a checkpoint."""
    for name, value in extra_state(task).items():
        if isinstance(value, Tensor):
            continue
        try:
            is_kept = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            is_kept = False
        if not is_kept:
            raise UsageError(
                f"{name}: get_extra_state returns a {type(value).__name__} that JSON cannot hold; checkpoints hold "
                "tensors and JSON, so that reading one runs no code. Return a tensor, or numbers, strings, lists and "
                "dicts with str keys."
            )


@contextmanager
def extra_state_kept(task: Task) -> Iterator[None]:
    """Restores the extra state after forwards inside."""
    before = copy.deepcopy(extra_state(task))
    try:
        yield
    finally:
        if before:
            set_extra_state(task, before)
