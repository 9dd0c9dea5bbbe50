"""Examples → gradients where losses look at several examples: two passes over the micro-batches.

Pass 1 encodes each micro-batch without a graph. The encodings are gathered, and every worker computes the losses of the
whole minibatch and the gradient of Σ w_i L_i at the encodings. Pass 2 encodes each micro-batch again, with the same
random numbers, and backs up its rows of that gradient. By the chain rule the sum over all micro-batches is the gradient
of the whole minibatch, in the memory of one micro-batch's graph.

Source: Gao, Zhang, Han and Callan, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
arXiv:2101.06983.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from mbgd.averaging import Averager
from mbgd.batches.loader import Examples, Shard
from mbgd.batches.plan import MicroBatch
from mbgd.batches.randomness import key_generators
from mbgd.checks.pairs import check_repeated
from mbgd.checks.setup import Setup
from mbgd.config import AveragingName
from mbgd.measuring.clock import FORWARD
from mbgd.measuring.profiling import part
from mbgd.step.gathering import Gathering
from mbgd.step.one_pass import AfterForward, gradients_of
from mbgd.step.update import Update
from mbgd.task.coupled import Pair, WholeLoss
from mbgd.task.objective import PerExample
from mbgd.task.precision import autocast
from mbgd.task.task import OBJECTIVE
from mbgd.task.torch_calls import backward

OF_LOSSES = 0x6C6F7373
"""In the place of a micro-batch's number, it keys what `losses` draws."""

CHECKED_EVERY_STEPS = 100
"""On a GPU, where comparing the encodings of both passes waits for the device; on a CPU it is done in every step."""


class TwoPass:
    """Both passes of a coupled objective; one where no worker has more than one micro-batch, whose graph is kept."""

    def __init__(
        self, setup: Setup, pair: Pair, averaging: Averager, update: Update, lap: Callable[[str], None]
    ) -> None:
        """averaging: of an `Encoder`."""
        self._setup, self._pair, self._averaging, self._update, self._lap = setup, pair, averaging, update, lap
        self._autocast = autocast(setup.settings.precision, setup.workers.device)
        self._gather = Gathering(setup.workers, setup.plan)
        # With a graph, torch may compute other bits, and a worker with one micro-batch always has one.
        self._has_graph = setup.settings.averaging.name is AveragingName.reproducible
        varies = setup.settings.averaging.find_unused_parameters
        self._parameters_vary = bool(setup.findings.unused_parameters) if varies is None else varies
        self._whole: WholeLoss | None = None
        self._moved: dict[str, tuple[Tensor, Tensor]] = {}
        """Buffers that `losses` has changed in this step: where, and the new values."""

    def begin(self, shard: Shard) -> None:
        self._setup.trained.remember_flags()
        self._whole = None
        if not self._keeps_graph(shard):
            with torch.set_grad_enabled(self._has_graph), part("encode"):
                parts = [[one.detach() for one in self._encode(shard.step, one_of)] for one_of in shard.micro_batches]
            self._whole = self._losses(shard, parts)

    def _keeps_graph(self, shard: Shard) -> bool:
        """Whether one pass is enough in this step; the same on all workers, as DDP's forward may exchange messages."""
        plan = self._setup.plan
        if plan.num_micro_batches(shard.minibatch.size) > plan.num_workers:
            return False
        # DDP must know in the forward which parameters get a gradient, and `losses` its buffers as they were before.
        return not self._parameters_vary and not self._has_buffers

    @property
    def _has_buffers(self) -> bool:
        objective = self._setup.task.objective
        return objective is not None and any(True for _ in objective.buffers())

    def forward_backward(self, shard: Shard, examples: Examples, after_forward: AfterForward) -> None:
        micro_batch, start = examples.micro_batch, examples.micro_batch.start - shard.minibatch.start
        is_last = examples is shard.micro_batches[-1]
        self._start(shard.step, micro_batch)
        with self._averaging.micro_batch(micro_batch, is_last=is_last):
            with part("forward"), self._autocast:
                roots: list[Tensor] = self._averaging.forward((examples.batch, self._whole), micro_batch.size)
            if self._whole is None:
                self._whole = self._losses(shard, [roots])
                roots = self._whole.roots(roots)
            elif self._setup.workers.device.type == "cpu" or shard.step % CHECKED_EVERY_STEPS == 0:
                for once, again in zip(self._whole.rows(start, start + micro_batch.size), roots, strict=False):
                    check_repeated("encodings", once, again.detach())
            after_forward(self._whole.terms.rows(start, start + micro_batch.size), micro_batch)
            if is_last:
                self._lap(FORWARD)
            with part("backward"):
                backward(*_that_count(roots, self._gradients(self._whole, micro_batch, start)))
        self._setup.buffers.end_micro_batch(micro_batch.number, micro_batch.size, is_stand_in=micro_batch.is_stand_in)

    def end(self) -> None:
        """Set the buffers that `losses` has changed: alike on every worker, so there is nothing to average."""
        self._whole = None
        buffers = self._setup.buffers.tensors()
        for name, (is_new, values) in self._moved.items():
            buffers[name].copy_(torch.where(is_new, values, buffers[name]))
        self._moved.clear()

    def forward_again(self, step: int, examples: Examples) -> PerExample:
        """Not the losses, all of which one example can spoil, but nan for the examples with such encodings."""
        is_wrong = torch.zeros(examples.micro_batch.size, dtype=torch.bool, device=self._setup.workers.device)
        for one in self._encode(step, examples):
            is_wrong |= ~one.isfinite().reshape(len(one), -1).all(1)
        return PerExample(torch.zeros(len(is_wrong), device=is_wrong.device).masked_fill(is_wrong, torch.nan))

    def gradients_again(self, step: int, examples: Examples) -> dict[Tensor, Tensor]:
        assert self._whole is not None
        start = examples.micro_batch.start - self._setup.plan.minibatch(step).start
        roots = self._whole.roots(self._encode(step, examples))
        pairs = _that_count(roots, self._gradients(self._whole, examples.micro_batch, start))
        return gradients_of(*pairs, self._setup)

    def _encode(self, step: int, examples: Examples) -> list[Tensor]:
        self._start(step, examples.micro_batch)
        with self._autocast:
            return self._pair.encode(self._setup.model, examples.batch, examples.micro_batch.size)

    def _start(self, step: int, micro_batch: MicroBatch) -> None:
        """Every forward begins with the same state, and those of one micro-batch draw alike."""
        self._setup.buffers.put_back()
        self._setup.trained.put_back_flags()
        key_generators(self._setup.workers.device, self._setup.settings.seed, step, micro_batch.number)

    def _gradients(self, whole: WholeLoss, micro_batch: MicroBatch, start: int) -> list[Tensor]:
        """At the roots of a micro-batch that begins with example `start` of the minibatch; 0 for a stand-in."""
        has_parameters = micro_batch.number == 0 and not micro_batch.is_stand_in
        found = whole.at_roots(start, start + micro_batch.size, has_parameters=has_parameters)
        return [torch.zeros_like(one) for one in found] if micro_batch.is_stand_in else found

    def _losses(self, shard: Shard, parts: Sequence[Sequence[Tensor]]) -> WholeLoss:
        """The losses of the whole minibatch and their gradient. parts: the encodings of this worker's micro-batches."""
        setup, device = self._setup, self._setup.workers.device
        self._lap(FORWARD)
        encodings = self._gather(shard, parts)
        self._lap("forward_backward")  # waiting for other workers is not this worker's own time
        if self._has_buffers:
            setup.buffers.put_back()
        key_generators(device, setup.settings.seed, shard.step, OF_LOSSES)
        with part("losses"), self._autocast:
            terms = self._pair.losses(encodings)
        weights = self._update.backward_weights(terms, is_stand_in=False)
        leaves = [one for one in encodings if one.requires_grad]
        held = setup.trained.with_gradient()
        found = iter(torch.autograd.grad(terms.losses, [*leaves, *held], weights, allow_unused=True))
        of_encodings = [next(found) if one.requires_grad else None for one in encodings]
        of_parameters = {p: g for p, g in zip(held, found, strict=True) if g is not None}
        if self._has_buffers:
            self._take_moved()
        return WholeLoss(_kept(terms), [one.detach() for one in encodings], of_encodings, of_parameters)

    def _take_moved(self) -> None:
        """Keep the values that `losses` gave the objective's buffers for the step's end."""
        buffers = self._setup.buffers
        names = [name for name in buffers.changed() if name.startswith(OBJECTIVE)]
        values = {name: buffers.tensors()[name].clone() for name in names}
        buffers.put_back()
        # torch's normalisations change their statistics unseen, so that those of `encode` count as changed here, too.
        self._moved = {name: (values[name] != buffers.tensors()[name], values[name]) for name in names}


def _kept(terms: PerExample) -> PerExample:
    """Without a graph; a metric that is a function is computed once, not for every micro-batch."""
    metrics = {name: one if isinstance(one, Tensor) else cache(one) for name, one in terms.metrics.items()}
    weights = None if terms.weights is None else terms.weights.detach()
    return PerExample(terms.losses.detach(), weights, metrics)


def _that_count(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Without those whose gradient goes nowhere, such as labels."""
    pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if root.requires_grad]
    return [root for root, _ in pairs], [gradient for _, gradient in pairs]
