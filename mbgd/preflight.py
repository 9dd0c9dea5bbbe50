"""What can be found out about a task before the first collective, on every worker alike.

The first examples go forward and backward once through the plain model; parameters, buffers and random state are
as before afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbgd.config import AveragingName, Settings
from mbgd.errors import UsageError
from mbgd.loader import Data, Indices, read
from mbgd.metrics import check
from mbgd.objective import PerExample, Totals
from mbgd.precision import autocast, parameter_dtype
from mbgd.randomness import key_generators
from mbgd.task import Task

NUM_EXAMPLES = 4


@dataclass(frozen=True)
class Findings:
    """What the trial run showed."""

    has_weights: bool
    """The objective gives weights, or losses per token: the minibatch's weight is not known from the plan."""
    has_tokens: bool
    """The objective gives losses per token."""
    metric_names: tuple[str, ...]
    moving_buffers: tuple[str, ...]
    """Names of the model's buffers that a forward in training mode changes."""
    unused_parameters: tuple[str, ...]
    """Names of trainable parameters that got no gradient."""


def try_out(task: Task, data: Data, first_minibatch: Indices, settings: Settings, device: torch.device) -> Findings:
    """Run some examples of the first minibatch through the task; UsageError where the contract is broken."""
    for dataset in (data.train, data.evaluation):
        _check_skipping(dataset, task.objective)

    def compute(indices: Indices) -> PerExample:
        dtype = parameter_dtype(settings.precision)
        (batch,) = read(data.train, [indices], num_workers=0, device=device, dtype=dtype, seed=settings.seed)
        key_generators(device, settings.seed)
        with autocast(settings.precision, device):
            terms: PerExample = task(batch, len(indices))
            return terms

    with _restored(task) as buffers_before, _output_widths(task.model) as widths, _refused_operations():
        terms = compute(first_minibatch[:NUM_EXAMPLES])
        if settings.averaging.name is AveragingName.reproducible:
            _check_repeatable(terms.losses, compute(first_minibatch[:NUM_EXAMPLES]).losses)
        _check_differentiable(terms.losses, task)
        metric_names = tuple(sorted(terms.metrics))
        totals = Totals(terms.sums(metric_names), metric_names)
        torch.autograd.backward(terms.losses, torch.ones_like(terms.losses))
        _check_dense(task.model)
        moving = tuple(name for name, b in task.model.named_buffers() if not torch.equal(b, buffers_before[name]))
        unused = tuple(name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None)
        if totals.weight == 0:
            with torch.no_grad():
                totals = Totals(compute(first_minibatch).sums(metric_names), metric_names)
        totals.check_weights("in the first minibatch")
        if settings.evaluation.metrics:
            check(settings.evaluation.metrics, terms, has_evaluation=data.evaluation is not None)
    check_targets = getattr(task.objective, "check_targets", None)
    targets = getattr(data.train, "targets", None)
    if check_targets is not None and targets is not None and widths:
        check_targets(targets, num_classes=widths[-1])
    return Findings(_has_weights(terms), terms.losses.dim() > 1, metric_names, moving, unused)


def _check_skipping(dataset: Any, objective: Any) -> None:
    """Examples that the dataset leaves out must weigh nothing in the objective."""
    skipped = getattr(dataset, "skipped_target", None)
    ignored = getattr(objective, "ignore_index", None)
    if skipped is not None and skipped != ignored:
        raise UsageError(
            f"data.on_error=skip gives examples that cannot be read the target {skipped}, to have weight 0, but "
            f"objective.ignore_index={ignored}. Use objective=cross_entropy objective.ignore_index={skipped}; an "
            "objective of your own does likewise and has an attribute ignore_index."
        )


def _check_repeatable(once: torch.Tensor, again: torch.Tensor) -> None:
    if not torch.equal(once, again):
        raise UsageError(
            "averaging=reproducible, but two computations of the same examples differ: "
            f"losses {once[:2].tolist()} and {again[:2].tolist()}. The model or the objective draws random numbers "
            "from a generator of its own, or keeps state between calls. Draw from torch's default generators, which "
            "the trainer keys by (seed, step, micro-batch)."
        )


@contextmanager
def _refused_operations() -> Iterator[None]:
    """torch's own refusal, in words for users; averaging=reproducible has asked torch to refuse."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UsageError(
            f"averaging=reproducible, but the model or the objective uses an operation of which torch has no "
            f"deterministic version on this device: {str(error).split(' does not')[0]}. Replace the operation, or use "
            "averaging=ddp."
        ) from error


def _has_weights(terms: PerExample) -> bool:
    return terms.weights is not None or terms.losses.dim() > 1


def _check_differentiable(losses: torch.Tensor, task: Task) -> None:
    if not losses.requires_grad:
        trainable = sum(p.requires_grad for p in task.parameters())
        raise UsageError(
            f"the objective's losses do not depend on any of the model's {trainable} trainable parameters; "
            "there is nothing to train. Compute the losses from the model's output without detach() or no_grad()."
        )


def _check_dense(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise UsageError(
                f"the gradient of parameter {name} is sparse; only dense ones can be averaged, clipped and measured. "
                "Make the layer with sparse=False."
            )


@contextmanager
def _restored(task: Task) -> Iterator[dict[str, torch.Tensor]]:
    """Gives the buffers as they are, and puts buffers and gradients back to that state at the end."""
    before = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, buffer in task.model.named_buffers():
                buffer.copy_(before[name])
        for parameter in task.parameters():
            parameter.grad = None


@contextmanager
def _output_widths(model: nn.Module) -> Iterator[list[int]]:
    """Collects the size of the last dimension of what the model gives."""
    widths: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() > 1:
            widths.append(output.shape[-1])

    handle = model.register_forward_hook(note)
    try:
        yield widths
    finally:
        handle.remove()
