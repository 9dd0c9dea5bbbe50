"""Sums over the minibatch beside the gradients: losses and metrics, noise scale, moving buffers; in one exchange.

Where all of a step's sums are known after its last forward, as the weights are, the exchange runs beside the last
backward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mbgd.averaging import Averager
from mbgd.batches.loader import Shard
from mbgd.batches.plan import MicroBatch, Minibatch, Plan
from mbgd.checks.alarm import Alarm
from mbgd.checks.preflight import Findings
from mbgd.errors import UsageError
from mbgd.task.buffers import Buffers
from mbgd.task.objective import NUM_SUMS, PerExample, Totals


class Summed(Protocol):
    """One kind of sum over all micro-batches of a minibatch."""

    @property
    def needs_backward(self) -> bool:
        """Whether its values are known only after the backward."""

    @property
    def width(self) -> int:
        """Number of values that are added up in this step."""

    def begin(self, step: int) -> bool:
        """Begin step number `step`; returns whether this kind is added up in it."""

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        """Add a micro-batch of this worker; its forward has just been computed."""

    def leaves(self) -> Mapping[int, Tensor]:
        """Number of each micro-batch of this worker → its values: float64, shape (width,)."""

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        """Get the sum of the leaves over all workers."""


class Sums:
    """All kinds of sums in one step."""

    def __init__(self, kinds: Sequence[Summed], averaging: Averager, plan: Plan) -> None:
        self._kinds, self._averaging, self._plan = kinds, averaging, plan
        self._early: list[Summed] = []
        """Added up beside the last backward."""
        self._late: list[Summed] = []
        """Added up after it."""
        self._sum_early: Callable[[], Tensor] | None = None

    def begin(self, shard: Shard) -> None:
        wanted = [kind for kind in self._kinds if kind.begin(shard.step)]
        # All in one exchange: where one kind must wait for the backward, the others wait with it.
        is_late = any(kind.needs_backward for kind in wanted)
        self._early, self._late = ([], wanted) if is_late else (wanted, [])
        self._shard, self._sum_early = shard, None

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        """Add a micro-batch between its forward and its backward; after the last one, start the exchange."""
        if not micro_batch.is_stand_in:
            for kind in self._kinds:
                kind.add(terms, micro_batch)
        if self._early and micro_batch is self._shard.micro_batches[-1].micro_batch:
            self._sum_early = self._averaging.start_sum(
                self._leaves(self._early), num_leaves=self._num_leaves, num_values=_width(self._early)
            )

    def include(self, kind: Summed) -> None:
        """Add this kind up in this step, too, although its `begin` did not ask for it."""
        if kind not in self._late:
            self._late.append(kind)

    def exchange(self, minibatch: Minibatch) -> None:
        """Finish adding up over micro-batches and workers, once the averaging has finished."""
        if self._sum_early is not None:
            _hand_out(self._sum_early(), self._early, minibatch)
        if self._late:
            leaves, num_values = self._leaves(self._late), _width(self._late)
            total = self._averaging.sum(leaves, num_leaves=self._num_leaves, num_values=num_values)
            _hand_out(total, self._late, minibatch)

    @property
    def _num_leaves(self) -> int:
        return self._plan.num_micro_batches(self._shard.minibatch.size)

    def _leaves(self, kinds: Sequence[Summed]) -> list[tuple[int, Tensor]]:
        of_kinds = [kind.leaves() for kind in kinds]
        if len(of_kinds) == 1:
            return list(of_kinds[0].items())
        return [(number, torch.cat([of_kind[number] for of_kind in of_kinds])) for number in of_kinds[0]]


def _width(kinds: Sequence[Summed]) -> int:
    return sum(kind.width for kind in kinds)


def _hand_out(total: Tensor, kinds: Sequence[Summed], minibatch: Minibatch) -> None:
    if len(kinds) == 1:
        kinds[0].take(total, minibatch)
        return
    for kind, part in zip(kinds, torch.split(total, [kind.width for kind in kinds]), strict=True):
        kind.take(part, minibatch)


class Means:
    """Sums of loss, weight and metrics; the last value is > 0 if any worker has noticed a fault."""

    needs_backward = False

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

    def wants(self, step: int) -> bool:
        """Whether the losses are added up in a step."""
        return self._logs(step) or self._measures(step)

    def begin(self, step: int) -> bool:
        self.is_logged, self.is_measured = self._logs(step), self._measures(step)
        self._names = self._findings.metric_names if self.is_logged else ()
        self._is_wanted = self.is_logged or self.is_measured
        self._step, self._leaves, self.totals = step, {}, None
        return self._is_wanted

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        if self._is_wanted:
            self._leaves[micro_batch.number] = terms.sums(self._names)
        elif not self._findings.has_weights:
            self._alarm.check_losses(self._step, terms.losses)

    def leaves(self) -> Mapping[int, Tensor]:
        indicator = self._alarm.here.indicator()
        return {number: torch.cat([sums, indicator]) for number, sums in self._leaves.items()}

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self.totals = Totals(total[:-1], self._names, total[-1:])


class Weights:
    """Sums of the weights in the steps whose losses are not added up."""

    needs_backward = False
    width = NUM_SUMS

    def __init__(self, findings: Findings, adds_losses: Callable[[int], bool]) -> None:
        """adds_losses(step): whether the losses are added up in a step, and the weights with them."""
        self._findings, self._adds_losses = findings, adds_losses
        self._is_wanted, self._step = False, 0
        self._leaves: dict[int, Tensor] = {}
        self.totals: Totals | None = None
        """Of the last step, without the loss; None if nothing was added up."""

    def begin(self, step: int) -> bool:
        self._is_wanted, self._step = self._findings.has_weights and not self._adds_losses(step), step
        self._leaves, self.totals = {}, None
        return self._is_wanted

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        if not self._findings.has_weights:
            self._check_none(terms)
        if self._is_wanted:
            self._leaves[micro_batch.number] = terms.sums_of_weights()

    def _check_none(self, terms: PerExample) -> None:
        """UsageError where the divisor is not the minibatch's size, for which it was taken before training."""
        if terms.weights is not None:
            raise UsageError(
                f"step {self._step + 1}: the objective returned weights, but none for the examples that were tried "
                "before training, so that the sum of the weights was taken for the number of examples. Return weights "
                "for every batch: torch.ones_like(losses) where all examples count alike."
            )
        if terms.losses.dim() > 1:
            raise UsageError(
                f"step {self._step + 1}: the objective returned losses of shape {tuple(terms.losses.shape)}, but one "
                "for each example, shape (N,), for the examples that were tried before training. Return losses of as "
                "many dimensions for every batch."
            )

    def leaves(self) -> Mapping[int, Tensor]:
        return self._leaves

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self.totals = Totals(total, ())


class MovingBuffers:
    """Replaces buffers that forwards change by their means over the minibatch.

    Only once the parameters are updated: where a worker is lost before, the step is made again.
    """

    needs_backward = True  # checkpointed layers run their forward again in it

    def __init__(self, buffers: Buffers, alarm: Alarm) -> None:
        self._buffers, self._alarm, self._step = buffers, alarm, 0
        self._total: tuple[Tensor, int] | None = None

    @property
    def width(self) -> int:
        return self._buffers.num_values

    def begin(self, step: int) -> bool:
        self._step, self._total = step, None
        return bool(self._buffers)

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        pass  # the buffers look at themselves after every forward

    def leaves(self) -> Mapping[int, Tensor]:
        return dict(self._buffers.sums())

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self._total = total, minibatch.size

    def move(self) -> None:
        """Set the buffers to their means over the step's minibatch, if it has moved them."""
        if self._total is not None:
            self._alarm.check_integers(self._step, self._buffers.take(*self._total))
