"""Sums over the minibatch beside the gradients: losses and metrics, noise scale, moving buffers; in one exchange."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mbgd.averaging import Averager
from mbgd.batches.plan import MicroBatch, Minibatch, Plan
from mbgd.checks.alarm import Alarm
from mbgd.checks.preflight import Findings
from mbgd.task.buffers import Buffers
from mbgd.task.objective import NUM_SUMS, PerExample, Totals


class Summed(Protocol):
    """One kind of sum over all micro-batches of a minibatch."""

    @property
    def width(self) -> int:
        """Number of values that are added up in this step."""

    def begin(self, step: int) -> bool:
        """Begin step number `step`; returns whether this kind is added up in it."""

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        """Add a micro-batch of this worker; its gradient has just been computed."""

    def leaves(self) -> Mapping[int, Tensor]:
        """Number of each micro-batch of this worker → its values: float64, shape (width,)."""

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        """Get the sum of the leaves over all workers."""


class Sums:
    """All kinds of sums in one step."""

    def __init__(self, kinds: Sequence[Summed], averaging: Averager, plan: Plan) -> None:
        self._kinds, self._averaging, self._plan = kinds, averaging, plan
        self._wanted: list[Summed] = []

    def begin(self, step: int) -> None:
        self._wanted = [kind for kind in self._kinds if kind.begin(step)]

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        for kind in self._kinds:
            kind.add(terms, micro_batch)

    def include(self, kind: Summed) -> None:
        """Add this kind up in this step, too, although its `begin` did not ask for it."""
        if kind not in self._wanted:
            self._wanted.append(kind)

    def exchange(self, minibatch: Minibatch) -> None:
        """Add up over micro-batches and workers."""
        if not self._wanted:
            return
        widths = [kind.width for kind in self._wanted]
        of_kinds = [kind.leaves() for kind in self._wanted]
        leaves = [(number, torch.cat([of_kind[number] for of_kind in of_kinds])) for number in of_kinds[0]]
        num_leaves = self._plan.num_micro_batches(minibatch.size)
        total = self._averaging.sum(leaves, num_leaves=num_leaves, num_values=sum(widths))
        for kind, part in zip(self._wanted, torch.split(total, widths), strict=True):
            kind.take(part, minibatch)


class Means:
    """Sums of loss, weight and metrics; the last value is > 0 if any worker has noticed a fault."""

    def __init__(
        self, findings: Findings, alarm: Alarm, logs: Callable[[int], bool], measures: Callable[[int], bool]
    ) -> None:
        """logs(step), measures(step): whether a step is logged, and whether its noise is measured."""
        self._findings, self._alarm, self._logs, self._measures = findings, alarm, logs, measures
        self.is_logged = self.is_measured = False
        """Of the step that has begun last."""
        self._leaves: dict[int, Tensor] = {}
        self._names: tuple[str, ...] = ()
        self._is_wanted, self._step = False, 0
        self.totals: Totals | None = None
        """Totals of the last step; None if nothing was added up."""

    @property
    def width(self) -> int:
        return NUM_SUMS + len(self._names) + 1

    def begin(self, step: int) -> bool:
        self.is_logged, self.is_measured = self._logs(step), self._measures(step)
        self._names = self._findings.metric_names if self.is_logged else ()
        self._is_wanted = self.is_logged or self.is_measured or self._findings.has_weights
        self._step, self._leaves, self.totals = step, {}, None
        return self._is_wanted

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        if self._is_wanted:
            self._leaves[micro_batch.number] = terms.sums(self._names)
        else:
            self._alarm.check_losses(self._step, terms.losses)

    def leaves(self) -> Mapping[int, Tensor]:
        indicator = self._alarm.here.indicator()
        return {number: torch.cat([sums, indicator]) for number, sums in self._leaves.items()}

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self.totals = Totals(total[:-1], self._names, total[-1:])


class MovingBuffers:
    """Replaces buffers that forwards change by their means over the minibatch."""

    def __init__(self, buffers: Buffers, alarm: Alarm) -> None:
        self._buffers, self._alarm, self._step = buffers, alarm, 0

    @property
    def width(self) -> int:
        return self._buffers.num_values

    def begin(self, step: int) -> bool:
        self._step = step
        return bool(self._buffers)

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        pass  # the buffers look at themselves after every forward

    def leaves(self) -> Mapping[int, Tensor]:
        return dict(self._buffers.sums())

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self._alarm.check_integers(self._step, self._buffers.take(total, minibatch.size))
