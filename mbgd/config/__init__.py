"""The settings of a run: types, units, and the rules between them. Pure: no Hydra, no torch.distributed."""

from mbgd.config.duration import Duration, in_steps
from mbgd.config.must_match import must_match
from mbgd.config.resolved import resolved
from mbgd.config.rules import profiled_steps, validate
from mbgd.config.settings import (
    Averaging,
    AveragingName,
    Backend,
    BackendName,
    Batch,
    Check,
    Checkpoint,
    Config,
    DeviceName,
    Direction,
    Evaluation,
    Init,
    NoiseScale,
    Precision,
    Resume,
    Run,
    Settings,
    Sweep,
    Tracking,
    Wandb,
    WandbMode,
)

__all__ = [
    "Averaging",
    "AveragingName",
    "Backend",
    "BackendName",
    "Batch",
    "Check",
    "Checkpoint",
    "Config",
    "DeviceName",
    "Direction",
    "Duration",
    "Evaluation",
    "Init",
    "NoiseScale",
    "Precision",
    "Resume",
    "Run",
    "Settings",
    "Sweep",
    "Tracking",
    "Wandb",
    "WandbMode",
    "in_steps",
    "must_match",
    "profiled_steps",
    "resolved",
    "validate",
]
