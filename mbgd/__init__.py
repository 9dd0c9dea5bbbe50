"""mbgd: distributed data-parallel training whose update is exactly the gradient of the whole minibatch.

The public names. Each is imported when it is first used, so that `import mbgd` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbgd.batches.bucketed import BucketedOrder
    from mbgd.batches.loader import Data
    from mbgd.batches.weighted import WeightedOrder, balanced_classes
    from mbgd.config import Averaging, AveragingName, Batch, Check, Evaluation, NoiseScale, Precision, Settings
    from mbgd.data import InMemory
    from mbgd.errors import UsageError
    from mbgd.task.losses import CrossEntropy, MeanSquaredError
    from mbgd.task.objective import PerExample
    from mbgd.trainer import Result, Trainer
    from mbgd.workers.group import Workers, start_workers

    __version__: str

__all__ = [
    "Averaging",
    "AveragingName",
    "Batch",
    "BucketedOrder",
    "Check",
    "CrossEntropy",
    "Data",
    "Evaluation",
    "InMemory",
    "MeanSquaredError",
    "NoiseScale",
    "PerExample",
    "Precision",
    "Result",
    "Settings",
    "Trainer",
    "UsageError",
    "WeightedOrder",
    "Workers",
    "balanced_classes",
    "start_workers",
]

_HOMES = (
    "batches.bucketed",
    "batches.loader",
    "batches.weighted",
    "config",
    "data",
    "errors",
    "task.losses",
    "task.objective",
    "trainer",
    "workers.group",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mbgd.versions import of_mbgd

        return of_mbgd()
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"mbgd.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'mbgd' has no attribute {name!r}")
