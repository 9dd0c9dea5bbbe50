"""Micro-batch → losses → gradients, where each example has a loss of its own: one forward and one backward."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mbgd.averaging import Averager
from mbgd.averaging.batch_norm import MinibatchNorm, Statistics, alone
from mbgd.batches.loader import Examples, Shard
from mbgd.batches.plan import MicroBatch
from mbgd.batches.randomness import key_generators
from mbgd.checks.setup import Setup
from mbgd.measuring.clock import FORWARD
from mbgd.measuring.profiling import part
from mbgd.step.update import Update
from mbgd.task.objective import PerExample
from mbgd.task.precision import autocast
from mbgd.task.torch_calls import backward

AfterForward = Callable[[PerExample, MicroBatch], None]
"""Called with a micro-batch's terms between its forward and its backward."""


class Passes(Protocol):
    """One way from a shard's examples to this worker's part of the gradients."""

    def begin(self, shard: Shard) -> None:
        """Called before the shard's first micro-batch."""

    def forward_backward(self, shard: Shard, examples: Examples, after_forward: AfterForward) -> None:
        """Add Σ w_i ∇L_i over this micro-batch to the parameters' gradients."""

    def end(self) -> None:
        """Called once the parameters are updated, and the buffers that moved have their means."""

    def forward_again(self, step: int, examples: Examples) -> PerExample:
        """Repeat the forward of a micro-batch, with the same buffers and random numbers, to find losses not finite."""

    def gradients_again(self, step: int, examples: Examples) -> dict[Tensor, Tensor]:
        """Compute the gradients of a micro-batch again, as the averaging gets them; this changes no state."""


class OnePass:
    """The losses of a micro-batch are computed and differentiated at once."""

    def __init__(
        self,
        setup: Setup,
        averaging: Averager,
        update: Update,
        norms: dict[str, _BatchNorm],
        check_layers: Callable[[int, Tensor], None],
        lap: Callable[[str], None],
    ) -> None:
        """norms: BatchNorm layers that use the statistics of the whole minibatch; check_layers: see `Alarm`.

        lap: adds the time since the last lap to a part of the step.
        """
        self._setup, self._averaging, self._update, self._lap = setup, averaging, update, lap
        self._minibatch_norm = MinibatchNorm(norms, Statistics(norms, averaging.gather, check_layers))
        self._norm_alone = MinibatchNorm(norms, Statistics(norms, alone))
        self._autocast = autocast(setup.settings.precision, setup.workers.device)

    def begin(self, shard: Shard) -> None:
        pass

    def start(self, shard: Shard, examples: Examples) -> bool:
        """Every micro-batch starts from the same state, with its own random numbers; returns whether it is the last."""
        setup = self._setup
        is_last = examples is shard.micro_batches[-1]
        if examples is not shard.micro_batches[0]:
            setup.buffers.put_back()
            setup.trained.put_back_flags()
        elif not is_last:
            setup.trained.remember_flags()
        key_generators(setup.workers.device, setup.settings.seed, shard.step, examples.micro_batch.number)
        return is_last

    def forward_backward(self, shard: Shard, examples: Examples, after_forward: AfterForward) -> None:
        setup, micro_batch = self._setup, examples.micro_batch
        is_last = self.start(shard, examples)
        statistics = self._minibatch_norm(shard.step, is_stand_in=micro_batch.is_stand_in)
        with self._averaging.micro_batch(micro_batch, is_last=is_last), statistics:
            with part("forward"), self._autocast:
                terms: PerExample = self._averaging.forward(examples.batch, micro_batch.size)
            after_forward(terms, micro_batch)
            if is_last:
                self._lap(FORWARD)
            with part("backward"):
                # backward from the vector of losses, with gradient w_i for L_i, gives the gradient of Σ w_i L_i.
                weights = self._update.backward_weights(terms, is_stand_in=micro_batch.is_stand_in)
                backward([terms.losses], [weights])
        setup.buffers.end_micro_batch(micro_batch.number, micro_batch.size, is_stand_in=micro_batch.is_stand_in)

    def end(self) -> None:
        pass

    def forward_again(self, step: int, examples: Examples) -> PerExample:
        """With batch_norm=minibatch its statistics are this worker's alone, and may be of a single value."""
        self._setup.buffers.put_back()
        key_generators(self._setup.workers.device, self._setup.settings.seed, step, examples.micro_batch.number)
        with self._autocast, self._norm_alone(step):
            terms: PerExample = self._setup.task(examples.batch, examples.micro_batch.size)
            return terms

    def gradients_again(self, step: int, examples: Examples) -> dict[Tensor, Tensor]:
        terms = self.forward_again(step, examples)
        weights = self._update.backward_weights(terms, is_stand_in=False)
        return gradients_of([terms.losses], [weights], self._setup)


def gradients_of(roots: list[Tensor], weights: list[Tensor], setup: Setup) -> dict[Tensor, Tensor]:
    """The trained parameters' gradients, as the averaging gets them; then the buffers are put back."""
    held: list[Tensor] = list(setup.trained.with_gradient())
    found = torch.autograd.grad(roots, held, weights, allow_unused=True)
    setup.buffers.put_back()
    varies = bool(setup.findings.unused_parameters)
    return {p: g + 0.0 if varies else g for p, g in zip(held, found, strict=True) if g is not None}
