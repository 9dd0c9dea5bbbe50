"""An optimizer in words, for the plan of a run."""

from collections.abc import Iterable

from torch.optim import Optimizer

from mbgd.optimizers.muon import MuonAdamW
from mbgd.optimizers.scaling import Scale
from mbgd.text.listing import shown


def described(optimizer: Optimizer, rates: Iterable[float], scale: Scale | None, minibatch_size: int) -> str:
    """For example: AdamW, lr 0.02, scaled by 2 (linear: batch.size 512 / 256).

    rates: of its groups, before the schedule's factor. scale: by which they were scaled to the minibatch's size.
    """
    told = f"{type(optimizer).__name__}, lr {shown(dict.fromkeys(f'{rate:.4g}' for rate in rates))}"
    if scale is not None:
        told += f", {scale.described(optimizer, minibatch_size)}"
    if isinstance(optimizer, MuonAdamW):
        told += f"; Muon for {shown(optimizer.hidden)}, AdamW for all others"
    return told
