"""Error messages for steps whose loss, gradient, weights or buffers cannot be trained on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mbgd.averaging.batch_norm import OTHER_LAYERS
from mbgd.batches.loader import Examples, Shard
from mbgd.batches.reading import Indices
from mbgd.checks.finite import Wrong, not_finite
from mbgd.errors import UsageError
from mbgd.task.objective import PerExample
from mbgd.task.trained import Trained
from mbgd.text.listing import shown
from mbgd.workers.group import Workers

MOST_EXAMPLES = 5
REMEDIES = "Usual remedies: a smaller optimizer.lr, max_grad_norm=1, precision=fp32, or a look at these examples."
DOUBLE_WHERE = (
    "A weight of 0 does not mask it: 0 times an infinite derivative is nan. Keep such values out of the function, not "
    "only out of the sum: f(torch.where(mask, x, 1.0)) before torch.where(mask, …, 0.0); docs/what_is_accounted_for.md."
)
LEFT = "The step was not made; checkpoints hold the state before it."


def stop(
    step: int,
    found: tuple[int, Wrong] | None,
    trained: Trained,
    has_weights: bool,
    examples: Sequence[int],
    workers: Workers,
) -> UsageError:
    """The error of a run that cannot go on, the same on every worker; all workers call this at the end of `step`.

    found: the first wrong step that this worker knows of, counted from 0. examples: numbers of this worker's examples
    whose loss is not finite.
    """
    order = list(Wrong)
    mine = {
        "found": [] if found is None else [found[0], order.index(found[1])],
        "examples": list(examples),
        "gradients": not_finite(trained.gradients()),
    }
    of_workers = workers.gather_values(mine)
    first, number = min(one["found"] for one in of_workers if one["found"])
    examples = sorted({example for one in of_workers for example in one["examples"]})
    spoilt = {name for one in of_workers for name in one["gradients"]}
    gradients = [name for name in trained.by_name if name in spoilt]
    return UsageError(describe(first, step, order[number], trained, has_weights, examples, gradients))


def remedy(has_weights: bool) -> str:
    """How to fix a gradient that is not finite although the loss is."""
    return DOUBLE_WHERE if has_weights else REMEDIES


def describe(
    first: int,
    step: int,
    wrong: Wrong,
    trained: Trained,
    has_weights: bool,
    examples: Sequence[int],
    gradients: Sequence[str],
) -> str:
    """gradients: names of parameters whose gradient is not finite."""
    noticed = f" (noticed after step {step + 1})" if step > first else ""
    if wrong is Wrong.no_weight:
        return (
            f"objective returned only zero weights in the minibatch of step {first + 1}{noticed}: the weighted mean of "
            "no example is undefined. Give at least one example of every minibatch a weight > 0 (with ignore_index: a "
            f"target that counts), or use a larger batch.size. {LEFT}"
        )
    if wrong is Wrong.negative_weights:
        return (
            f"objective returned negative weights in the minibatch of step {first + 1}{noticed}; weights must be ≥ 0 "
            f"(0 leaves an example out). {LEFT}"
        )
    if wrong is Wrong.layers:
        return f"in step {first + 1}{noticed} the workers did not compute the same layers. {OTHER_LAYERS}"
    spoilt = not_finite(trained.by_name)
    if wrong is Wrong.gradient:
        names = gradients or spoilt
        of = f" of {shown(names)}" if names else ""
        return (
            f"the gradient{of} is not finite at step {first + 1}{noticed}, although the loss is. "
            f"{remedy(has_weights)} {LEFT}"
        )
    if spoilt and first > 0 and first == step:
        return (
            f"the loss is not finite at step {first + 1} because the parameters are not: {shown(spoilt)}. The gradient "
            f"of step {first} was not finite, although its loss was. {remedy(has_weights)}"
        )
    which = f"; it is not for the examples {shown(map(str, examples), MOST_EXAMPLES)}" if examples else ""
    return f"the loss is not finite at step {first + 1}{noticed}{which}. {REMEDIES} {LEFT}"


def examples_not_finite(shard: Shard, forward: Callable[[int, Examples], PerExample], indices: Indices) -> list[int]:
    """Numbers of this worker's examples whose loss, times its weight, is not finite; computes micro-batches again.

    indices: the numbers of all examples of the minibatch.
    """
    found: list[int] = []
    for examples in shard.micro_batches:
        if examples.micro_batch.is_stand_in:
            continue
        with torch.no_grad():
            terms = forward(shard.step, examples)
        losses: Tensor = terms.losses
        if terms.weights is not None:
            losses = losses.where(terms.weights != 0, 0.0) * terms.weights
        wrong = (~losses.isfinite()).flatten(1).any(1) if losses.dim() > 1 else ~losses.isfinite()
        start = examples.micro_batch.start - shard.minibatch.start
        found += [int(indices[start + position]) for position in wrong.nonzero().flatten().tolist()]
    return found
