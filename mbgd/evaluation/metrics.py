"""Metrics that are not means of per-example values, such as AUROC: exact, over the whole evaluation set at once."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.objective import PerExample
from mbgd.workers.group import Workers


class Metric(Protocol):
    """A metric of torchmetrics, or an object with the same methods; it gets tensors on the host."""

    def update(self, outputs: Tensor, targets: Tensor) -> object:
        """Add outputs (n, …) and targets (n, …), in the order of the examples."""

    def compute(self) -> Any:
        """One number."""

    def reset(self) -> object:
        """Forget the examples added so far."""


class WholeSetMetrics:
    """Computed by the main worker, on the host, from every worker's predictions in the order of the examples.

    So a metric gets the same values on any number of workers, and needs no rule for adding up states. The price is that
    the main worker's memory holds the predictions of the whole evaluation set.
    """

    def __init__(self, metrics: Mapping[str, Metric], workers: Workers) -> None:
        self._metrics, self._workers = metrics, workers

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def __call__(self, predictions: Sequence[Tensor]) -> dict[str, float]:
        """Value of each metric by name, the same on every worker.

        predictions: outputs, targets, outputs, targets … of this worker's examples, on the host.
        """
        if not self._metrics:
            return {}
        collected = self._workers.collect(predictions)
        values: dict[str, float] = {}
        problem = ""
        if self._workers.is_main:
            try:
                # In one update: metrics tell probabilities from logits by all values of an update.
                outputs, targets = _whole("outputs", collected[0::2]), _whole("targets", collected[1::2])
                values = {name: _compute(name, metric, outputs, targets) for name, metric in self._metrics.items()}
            except UsageError as error:
                problem = str(error)  # raised on every worker below
        values, problem = self._workers.broadcast((values, problem))
        if problem:
            raise UsageError(problem)
        return values


def _whole(name: str, parts: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise UsageError(
            f"evaluation.metrics: the {name} of one example have shapes {', '.join(map(str, shapes))} in different "
            "parts of the evaluation set; they must be the same in all. Pad them to one length."
        )
    return torch.cat(list(parts))


def check(metrics: Mapping[str, Metric], terms: PerExample) -> None:
    """UsageError if a name is taken, or a metric refuses the objective's predictions for some examples."""
    outputs, targets = (values.cpu() for values in terms.counted_predictions())
    for name, metric in metrics.items():
        if name in ("loss", *terms.metrics):
            raise UsageError(f"evaluation.metrics.{name}: the name eval/{name} is taken. Choose another name.")
        if not all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset")):
            raise UsageError(
                f"evaluation.metrics.{name} is a {type(metric).__name__}; a metric has update(outputs, targets), "
                "compute() and reset(), as the classes of torchmetrics have."
            )
        _keep_alone(metric)
        if len(targets):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about classes that these few examples lack
                _compute(name, metric, outputs, targets, may_be_too_few=True)


def _keep_alone(metric: Metric) -> None:
    """Keep torchmetrics from adding up over workers itself: only the main worker computes metrics, so it would hang."""
    for part in metric.modules() if isinstance(metric, nn.Module) else ():
        if hasattr(part, "distributed_available_fn"):
            part.distributed_available_fn = _never  # type: ignore[assignment]


def _never() -> bool:
    return False


def _compute(name: str, metric: Metric, outputs: Tensor, targets: Tensor, *, may_be_too_few: bool = False) -> float:
    """The metric of only these examples; its exceptions become UsageErrors, because the metric is the user's."""
    doing = "take"
    try:
        metric.reset()
        metric.update(outputs, targets)
        doing = "be computed from"
        value = metric.compute()
        metric.reset()
    except Exception as error:
        if may_be_too_few and doing == "be computed from" and isinstance(error, ValueError):
            return math.nan  # such as R², which needs two examples
        raise UsageError(
            f"evaluation.metrics.{name} ({type(metric).__name__}) cannot {doing} outputs of shape "
            f"{tuple(outputs.shape)} and {outputs.dtype}, targets of shape {tuple(targets.shape)} and {targets.dtype}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.item())
    try:
        return float(value)
    except (TypeError, ValueError):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UsageError(
            f"evaluation.metrics.{name} gives {got}; a metric is one number. Let it average (average=macro in "
            "torchmetrics), or name one metric for each number."
        ) from None
