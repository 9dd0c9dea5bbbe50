"""A node with a `_target_` → the object; mistakes are told in our words."""

import sys
from typing import Any

from hydra.utils import instantiate

from mbgd.building import targets
from mbgd.errors import UsageError
from mbgd.text.suggestions import did_you_mean


def make(name: str, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call the node's `_target_`; its exceptions become UsageErrors, because the target is the user's.

    Unless the node sets `_convert_`, Hydra converts containers to plain lists and dicts, nested ones, too.
    """
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str) or not node["_target_"]:
        raise UsageError(f"{name} has no _target_; it must name the class or function that makes it.")
    node = {"_convert_": "all", **node, **{key: keywords.pop(key) for key in targets.OF_HYDRA if key in keywords}}
    added = [key for key in keywords if key not in node]
    if found := list(targets.mistakes(name, node, len(arguments), added)):
        raise UsageError("\n".join(found))
    try:
        return instantiate(node, *arguments, **keywords)
    except Exception as error:  # a part of the user's can raise anything
        reason: BaseException = error  # Hydra's own message says less than the original exception
        while reason.__cause__ is not None and not isinstance(reason, UsageError):
            reason = reason.__cause__
        if isinstance(reason, UsageError):
            raise reason from None
        remedy = _remedy(reason) if isinstance(reason, ModuleNotFoundError) else ""
        said = "; ".join(targets.mismatches(name, {**node, **keywords})) or f"{type(reason).__name__}: {reason}"
        raise UsageError(f"{name} ({node['_target_']}) cannot be made: {said}{remedy}") from error


def _remedy(error: ModuleNotFoundError) -> str:
    """What to do about a `_target_` that leads to no module."""
    if error.name == "torchmetrics":
        return ". Use pip install 'mbgd[metrics]'."
    module, _, last = (error.name or "").rpartition(".")
    if module in sys.modules:  # there is the module, without anything of that name
        return f".{did_you_mean(last, dir(sys.modules[module]))}"
    return ". Is its folder on PYTHONPATH?"
