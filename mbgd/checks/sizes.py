"""Whether a model takes the smallest micro-batch of a plan, and counts nothing that depends on the size."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from mbgd.averaging.batch_norm import MinibatchNorm, Statistics, alone, layers_of
from mbgd.batches.plan import Plan
from mbgd.batches.reading import Indices
from mbgd.checks.batch_norm import functions_refused
from mbgd.config import BatchNormOver, Settings
from mbgd.errors import UsageError
from mbgd.task.buffers import Buffers
from mbgd.task.task import Task
from mbgd.text.listing import shown

NUM_EXAMPLES = 4
"""Examples in the other forwards of the trial."""


class Sizes:
    """Tries forwards of a few examples; UsageError where the model cannot take a micro-batch of the plan."""

    def __init__(
        self, task: Task, buffers: Buffers, plan: Plan, settings: Settings, forward: Callable[[Indices], object]
    ) -> None:
        self._buffers, self._plan, self._settings, self._forward = buffers, plan, settings, forward
        layers = layers_of(task) if settings.batch_norm is BatchNormOver.minibatch else {}
        self._over_minibatch = MinibatchNorm(layers, Statistics(layers, alone)) if layers else None

    def __call__(self, first_minibatch: Indices, moving: Sequence[str]) -> None:
        """moving: names of the buffers that forwards change."""
        plan = self._plan
        if self._settings.steps == 0 or (plan.most_forwards == 1 and plan.smallest_micro_batch > 1):
            return  # nothing is trained, or every forward has a whole minibatch
        smallest = plan.smallest_micro_batch
        if smallest < NUM_EXAMPLES and smallest <= len(first_minibatch):
            self._try(first_minibatch[:smallest])
        elif (moving or self._over_minibatch) and len(first_minibatch) > 1:
            self._run(first_minibatch[: min(NUM_EXAMPLES, len(first_minibatch)) - 1])
        self._buffers.changed()
        if plan.most_forwards > 1:
            self._check_integers(first_minibatch, moving)
        if self._over_minibatch is not None and min(plan.minibatch_sizes) == 1:
            self._try(first_minibatch[:1], is_minibatch=True)

    def _check_integers(self, first_minibatch: Indices, moving: Sequence[str]) -> None:
        """Compare the integers after the last forward with those after one of other size."""
        before = self._integers(moving)
        if not before:
            return
        self._run(first_minibatch[:NUM_EXAMPLES])
        self._buffers.changed()
        after = self._integers(moving)
        if found := [name for name in before if not torch.equal(before[name], after[name])]:
            raise UsageError(
                f"the forward's new value of the integer buffer {shown(found)} depends on the number of examples. A "
                "minibatch is cut into micro-batches, and each would count its own examples. Count minibatches (+= 1) "
                "instead of examples, or use one worker and batch.micro_batch_size=null."
            )

    def _try(self, examples: Indices, *, is_minibatch: bool = False) -> None:
        try:
            self._run(examples, is_minibatch=is_minibatch)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(self._describe(error, is_minibatch=is_minibatch)) from error

    def _run(self, examples: Indices, *, is_minibatch: bool = False) -> None:
        """A forward as a worker of several makes it: with batch_norm=minibatch, BatchNorm takes a single value, too.

        is_minibatch: the examples are the whole minibatch.
        """
        self._buffers.put_back()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._over_minibatch is not None and not is_minibatch:
                stack.enter_context(self._over_minibatch())
                stack.enter_context(functions_refused())
            self._forward(examples)

    def _integers(self, moving: Sequence[str]) -> dict[str, Tensor]:
        tensors = self._buffers.tensors(caches=True)
        known = {name: tensors[name] for name in moving if name in tensors}
        return {n: t.clone() for n, t in known.items() if not (t.is_floating_point() or t.is_complex())}

    def _describe(self, error: Exception, *, is_minibatch: bool) -> str:
        plan = self._plan
        cut, size = f"are cut into micro-batches for {plan.num_workers} workers", plan.smallest_micro_batch
        if is_minibatch:
            plan, cut, size = replace(plan, num_workers=1, default_num_micro_batches=1), "are planned", 1
        remedies = [
            f"batch.size={fits.minibatch_size}" if fits.drop_last == plan.drop_last else "batch.drop_last=true"
            for fits in plan.with_micro_batches_of(size + 1)
        ]
        return (
            f"the model cannot take the smallest {'minibatch' if is_minibatch else 'micro-batch'} of this plan, of "
            f"{size} examples: {type(error).__name__}: {error} (BatchNorm needs at least 2 values of each channel.) "
            f"Minibatches of {' and '.join(map(str, plan.minibatch_sizes))} examples {cut}. "
            f"What works: {' or '.join(remedies) or 'fewer workers'}."
        )
