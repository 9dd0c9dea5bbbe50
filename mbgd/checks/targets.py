"""Whether data, model and objective fit, as far as they tell without computing."""

from typing import Any

import torch
from torch import Tensor

from mbgd.errors import UsageError


def check_skipping(dataset: Any, objective: Any) -> None:
    """UsageError unless the objective gives weight 0 to examples that the dataset skips."""
    skipped = getattr(dataset, "skipped_target", None)
    ignored = getattr(objective, "ignore_index", None)
    if skipped is not None and skipped != ignored:
        raise UsageError(
            f"data.on_error=skip gives unreadable examples the target {skipped}, so that they have weight 0, but "
            f"objective.ignore_index={ignored}. Use objective=cross_entropy objective.ignore_index={skipped}; an "
            "objective of your own does the same and has an attribute ignore_index."
        )


def check_targets(dataset: Any, objective: Any, output_shape: torch.Size | None) -> None:
    """UsageError where a target in memory is not one of the model's classes, if the objective can check that."""
    check, targets = getattr(objective, "check_targets", None), getattr(dataset, "targets", None)
    if check is not None and isinstance(targets, Tensor) and output_shape is not None:
        check(targets, num_classes=output_shape[getattr(objective, "class_dim", None) or -1])


def check_vocabulary(dataset: Any, model: Any) -> None:
    """UsageError where a dataset of token ids says, or holds in memory, more than the model has vectors for."""
    of_data, of_model = getattr(dataset, "vocabulary", None), getattr(model, "vocabulary", None)
    if not isinstance(of_model, int):
        return
    ids = getattr(dataset, "inputs", None)
    if isinstance(ids, Tensor) and ids.numel() and ids.dtype in (torch.int32, torch.int64):  # what embeddings take
        if ids.min() < 0:
            raise UsageError(f"the data's inputs hold {int(ids.min())}; a token id is at least 0.")
        of_data = int(ids.max()) + 1
    if isinstance(of_data, int) and of_data > of_model:
        raise UsageError(
            f"the {type(model).__name__} has a vocabulary of {of_model} tokens, but the data of {of_data}: larger ids "
            "have no vector. Set model.num_outputs to that number, or null to take it from the data."
        )
