"""Optimizers that torch lacks, in float arithmetic without host syncs, and how rates follow the minibatch's size."""

from mbgd.optimizers.lamb import Lamb
from mbgd.optimizers.lars import Lars
from mbgd.optimizers.muon import MuonAdamW
from mbgd.optimizers.scaling import scale_lr

__all__ = ["Lamb", "Lars", "MuonAdamW", "scale_lr"]
