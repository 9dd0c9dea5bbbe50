"""Hashes by which two runs can be compared bit for bit."""

import hashlib

import torch
from torch import nn

from mbgd.batches.reading import Indices
from mbgd.task.task import plain_name


def weights_sha256(module: nn.Module) -> str:
    """Hash of the parameters' bytes in name order: equal if and only if the parameters are, bit for bit.

    module: a model, compiled or not, or a `Task`, whose objective's parameters then count too.
    """
    digest = hashlib.sha256()
    for _, parameter in sorted((plain_name(name), parameter) for name, parameter in module.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def examples_sha256(indices: Indices) -> str:
    """Hash of example indices in their order."""
    return hashlib.sha256(indices.tobytes()).hexdigest()
