"""Layers whose activations are not kept, but computed again in the backward (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from mbgd.errors import UsageError
from mbgd.text.listing import shown
from mbgd.text.suggestions import matching_none


def checkpoint_(model: nn.Module, patterns: Sequence[str], moving_buffers: Sequence[str]) -> list[str]:
    """Let the layers whose names match a pattern compute their forward again in the backward; returns their names.

    Where a layer and a layer inside it match, the outer one counts. The random state is that of the first forward, so
    dropout drops the same. moving_buffers: names of buffers that a forward changes. UsageError where a pattern matches
    no layer, or a layer changes a buffer, which computing it again would change twice.
    """
    layers = {name: module for name, module in model.named_modules() if name}
    chosen: list[str] = []
    for pattern in patterns:
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(matching_none("activation_checkpointing.layers", pattern, layers, "layer", "Layers"))
        chosen += matched
    outermost = [name for name in dict.fromkeys(chosen) if not any(name.startswith(f"{one}.") for one in chosen)]
    for name in outermost:
        layer = layers[name]
        if type(layer).forward in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward):
            raise UsageError(
                f"activation_checkpointing.layers: {name} is a {type(layer).__name__}, which computes nothing itself. "
                f"Name the layers in it: {name}.*"
            )
        if moved := [one for one in moving_buffers if one.startswith(f"{name}.")]:
            raise UsageError(
                f"activation_checkpointing.layers: the forward of {name} changes the buffers {shown(moved)}; computing "
                "it again would change them twice. Leave it out, or choose layers inside it without such buffers."
            )
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return outermost
