"""mbgd: distributed data-parallel training whose update is exactly the gradient of the whole minibatch.

The public names. Each is imported when it is first used, so that `import mbgd` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbgd import optimizers, schedule
    from mbgd.batches.bucketed import BucketedOrder
    from mbgd.batches.loader import Data
    from mbgd.batches.weighted import WeightedOrder, balanced_classes
    from mbgd.config import (
        ActivationCheckpointing,
        Averaging,
        AveragingName,
        Batch,
        BatchNormOver,
        Check,
        Checkpoint,
        Evaluation,
        NoiseScale,
        Precision,
        Settings,
        in_steps,
    )
    from mbgd.data import InMemory
    from mbgd.errors import NotSaved, ObserverFailed, Preempted, UsageError, WorkersLost
    from mbgd.evaluation.shown_predictions import ShownPredictions
    from mbgd.runs.library import Checkpoints
    from mbgd.step.done import Done, Result
    from mbgd.step.early_stopping import EarlyStopping
    from mbgd.step.ema import EMA
    from mbgd.step.freezing import Freeze
    from mbgd.step.histograms import Histograms
    from mbgd.task.distillation import Distillation
    from mbgd.task.elementwise import BinaryCrossEntropy, Huber, MeanSquaredError
    from mbgd.task.info_nce import InfoNCE, RandomCrops
    from mbgd.task.losses import CrossEntropy
    from mbgd.task.objective import Coupled, PerExample
    from mbgd.tracking.base import Tracker, Trackers
    from mbgd.tracking.json_lines import JsonLines
    from mbgd.tracking.observed_lines import ObservedLines
    from mbgd.trainer import Trainer
    from mbgd.workers.group import Workers, start_workers
    from mbgd.workers.preemption import StopOnSignal

    __version__: str

__all__ = [
    "EMA",
    "ActivationCheckpointing",
    "Averaging",
    "AveragingName",
    "Batch",
    "BatchNormOver",
    "BinaryCrossEntropy",
    "BucketedOrder",
    "Check",
    "Checkpoint",
    "Checkpoints",
    "Coupled",
    "CrossEntropy",
    "Data",
    "Distillation",
    "Done",
    "EarlyStopping",
    "Evaluation",
    "Freeze",
    "Histograms",
    "Huber",
    "InMemory",
    "InfoNCE",
    "JsonLines",
    "MeanSquaredError",
    "NoiseScale",
    "NotSaved",
    "ObservedLines",
    "ObserverFailed",
    "PerExample",
    "Precision",
    "Preempted",
    "RandomCrops",
    "Result",
    "Settings",
    "ShownPredictions",
    "StopOnSignal",
    "Tracker",
    "Trackers",
    "Trainer",
    "UsageError",
    "WeightedOrder",
    "Workers",
    "WorkersLost",
    "balanced_classes",
    "in_steps",
    "optimizers",
    "schedule",
    "start_workers",
]

_HOMES = (
    "batches.bucketed",
    "batches.loader",
    "batches.weighted",
    "config",
    "data",
    "errors",
    "evaluation.shown_predictions",
    "step.done",
    "step.early_stopping",
    "step.ema",
    "step.freezing",
    "step.histograms",
    "task.distillation",
    "task.elementwise",
    "task.info_nce",
    "task.losses",
    "task.objective",
    "tracking.base",
    "tracking.json_lines",
    "tracking.observed_lines",
    "trainer",
    "workers.group",
    "workers.preemption",
    "runs.library",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mbgd.versions import of_mbgd

        return of_mbgd()
    if name in ("optimizers", "schedule"):
        return import_module(f"mbgd.{name}")
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"mbgd.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'mbgd' has no attribute {name!r}")
