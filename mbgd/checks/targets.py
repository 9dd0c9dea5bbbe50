"""Whether targets and objective fit, as far as both tell without computing."""

from typing import Any

import torch
from torch import Tensor

from mbgd.errors import UsageError


def check_skipping(dataset: Any, objective: Any) -> None:
    """Examples that the dataset leaves out must weigh nothing in the objective."""
    skipped = getattr(dataset, "skipped_target", None)
    ignored = getattr(objective, "ignore_index", None)
    if skipped is not None and skipped != ignored:
        raise UsageError(
            f"data.on_error=skip gives examples that cannot be read the target {skipped}, to have weight 0, but "
            f"objective.ignore_index={ignored}. Use objective=cross_entropy objective.ignore_index={skipped}; an "
            "objective of your own does likewise and has an attribute ignore_index."
        )


def check_targets(dataset: Any, objective: Any, output_shape: torch.Size | None) -> None:
    """Targets that lie in memory must all be classes that the model has, where the objective can tell."""
    check, targets = getattr(objective, "check_targets", None), getattr(dataset, "targets", None)
    if check is not None and isinstance(targets, Tensor) and output_shape is not None:
        check(targets, num_classes=output_shape[getattr(objective, "class_dim", None) or -1])
