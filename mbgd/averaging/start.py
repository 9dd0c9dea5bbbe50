"""Gives all workers the same model to begin with."""

from itertools import chain

import torch
from torch import nn

from mbgd.errors import UsageError
from mbgd.workers.group import Workers


def start_alike(module: nn.Module, workers: Workers) -> None:
    """Broadcast the main worker's parameters and buffers; UsageError if shapes or dtypes differ between workers.

    torch's DistributedDataParallel does so too, but over gloo not for every dtype, such as the bool of masks.
    """
    tensors = [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
    kinds = workers.gather_if_unlike([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
    if others := [rank for rank, of_worker in enumerate(kinds) if of_worker != kinds[0]]:
        raise UsageError(
            f"worker {others[0]} has other parameters or buffers than worker 0; every worker must build the same "
            "model. Does it depend on the rank, or on random numbers?"
        )
    for tensor in tensors:
        values = tensor.contiguous()
        workers.broadcast_(values.view(-1).view(torch.uint8))
        tensor.copy_(values)
