"""BatchNorm with the statistics of the whole minibatch, for `batch_norm=minibatch`.

While a worker computes its micro-batch, forward and backward, the forwards of its BatchNorm layers are replaced. The
layers, their names and their state stay, and an evaluation computes as ever. In the forward the workers exchange the
number, the mean and the sum of centred squares of each channel's values, and combine them in float64 by the formula of
Chan, Golub and LeVeque (1979, "Updating formulae and a pairwise algorithm for computing sample variances"); in the
backward they exchange the sums through which an example's loss depends on the others. torch's SyncBatchNorm does not
take CPU tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbgd.errors import UsageError
from mbgd.task.task import plain_name

Gather = Callable[[Tensor], Sequence[Tensor]]
"""This worker's values → every worker's, by rank."""

FORWARD, BACKWARD = 0, 1

_NOTHING: AbstractContextManager[object] = nullcontext()


def layers_of(task: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers by name, a shared one once."""
    return {plain_name(name): part for name, part in task.named_modules() if isinstance(part, _BatchNorm)}


def uses_statistics_of_examples(layer: _BatchNorm) -> bool:
    """Whether the layer normalises with its examples' statistics now, as torch decides it."""
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def alone(values: Tensor) -> Sequence[Tensor]:
    """The `Gather` of one worker."""
    return [values]


class Statistics:
    """Exchanges what the layers need of the other workers.

    All workers must compute the same layers in the same order. So each exchange carries its number and what it is for,
    and all have one length: workers that compute different layers meet in one exchange and see it.
    """

    def __init__(
        self, layers: dict[str, _BatchNorm], gather: Gather, differ: Callable[[int, Tensor], None] | None = None
    ) -> None:
        """differ(step, are_alike): is told on a GPU, where reading waits, whether all workers computed the same."""
        self._names, self._gather, self._differ = list(layers), gather, differ
        self._width = 2 + 2 * max((layer.num_features for layer in layers.values()), default=0)
        self._num_exchanges = self._step = 0
        self.counts = True
        """False: this worker computes a stand-in, which counts nothing."""

    def begin(self, step: int, *, counts: bool) -> None:
        self._step, self.counts = step, counts

    def of_examples(self, number: int, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(number of values, mean, variance) of each channel over all workers: float64, shapes (), (C,) and (C,).

        number: the layer's.
        """
        channels = inputs.shape[1]
        mine = self._row(number, FORWARD, inputs.device)
        if self.counts:
            is_summed_in_16_bits = inputs.dtype.itemsize < 4 and not inputs.is_cuda
            exact = inputs.float() if is_summed_in_16_bits else inputs
            count = inputs.numel() // channels
            mean, variance = torch.ops.aten.batch_norm_update_stats(exact, None, None, 0.0)
            mine[1].fill_(count)
            mine[2 : 2 + channels] = mean
            torch.mul(variance.double(), count, out=mine[2 + channels : 2 + 2 * channels])
        rows = self._exchange(mine)[:, : 1 + 2 * channels]
        counts, means, squares = torch.split(rows, [1, channels, channels], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        return total, mean, (squares + counts * (means - mean).square()).sum(0) / total

    def sums(self, number: int, values: Tensor) -> Tensor:
        """The values added up over the workers, in float64; number: the layer's, whose backward this is."""
        mine = self._row(number, BACKWARD, values.device)
        mine[1 : 1 + len(values)] = values
        return self._exchange(mine)[:, : len(values)].sum(0)

    def _row(self, number: int, direction: int, device: torch.device) -> Tensor:
        """What this worker sends: the exchange's code, and room for values."""
        row = torch.zeros(self._width, dtype=torch.float64, device=device)
        row[0].fill_((self._num_exchanges * len(self._names) + number) * 2 + direction)
        return row

    def _exchange(self, mine: Tensor) -> Tensor:
        """Every worker's values by rank, without the codes: float64."""
        rows = torch.stack(list(self._gather(mine)))
        if self._differ is None or not rows.is_cuda:
            codes = rows[:, 0].tolist()
            if any(code != codes[0] for code in codes):
                raise UsageError(f"step {self._step + 1}: {self._describe(codes)}")
        else:
            self._differ(self._step, (rows[:, 0] == rows[0, 0]).all())
        self._num_exchanges += 1
        return rows[:, 1:]

    def _describe(self, codes: Sequence[float]) -> str:
        told = []
        for rank, code in enumerate(codes):
            exchange, layer = divmod(int(code), 2 * len(self._names))
            number, direction = divmod(layer, 2)
            computes = f"the {'backward' if direction == BACKWARD else 'forward'} of {self._names[number]}"
            told.append(f"worker {rank} {computes if exchange == self._num_exchanges else 'none of them'}")
        return f"{', '.join(told)}. {OTHER_LAYERS}"


OTHER_LAYERS = (
    "With batch_norm=minibatch the workers compute each BatchNorm layer together. Let every micro-batch pass through "
    "the same layers: which ones may depend on the step, but not on the examples, the rank or random numbers. Or use "
    "batch_norm=micro_batch."
)
"""The rule that a model breaks whose workers do not compute the same layers."""


class MinibatchNorm:
    """Replaces the forwards of the BatchNorm layers of a task."""

    def __init__(self, layers: dict[str, _BatchNorm], statistics: Statistics) -> None:
        self._statistics = statistics
        self._forwards: dict[_BatchNorm, Callable[[Tensor], Tensor]] = {
            layer: partial(_normalise, layer, number, statistics) for number, layer in enumerate(layers.values())
        }

    def __call__(self, step: int = 0, *, is_stand_in: bool = False) -> AbstractContextManager[object]:
        """Inside, the layers use the statistics of all workers; for a forward and its backward."""
        self._statistics.begin(step, counts=not is_stand_in)
        return forwards_replaced(self._forwards) if self._forwards else _NOTHING


@contextmanager
def forwards_replaced(forwards: Mapping[_BatchNorm, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the layers compute by these functions."""
    for layer, forward in forwards.items():
        layer.__dict__["forward"] = forward  # found before the class's, and not part of the state
    try:
        yield
    finally:
        for layer in forwards:
            del layer.__dict__["forward"]


def _normalise(layer: _BatchNorm, number: int, statistics: Statistics, inputs: Tensor) -> Tensor:
    """`_BatchNorm.forward` with the statistics of all workers."""
    if not uses_statistics_of_examples(layer):
        outputs: Tensor = _BatchNorm.forward(layer, inputs)
        return outputs
    layer._check_input_dim(inputs)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        total, mean, variance = statistics.of_examples(number, inputs)
    outputs = _Normalised.apply(  # type: ignore[no-untyped-call]
        inputs, layer.weight, layer.bias, (total, mean, variance), layer.eps, number, statistics
    )
    if layer.training and layer.track_running_stats:
        _update_running(layer, total, mean, variance)
    return outputs


@torch.no_grad()
def _update_running(layer: _BatchNorm, total: Tensor, mean: Tensor, variance: Tensor) -> None:
    factor = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(layer.num_batches_tracked)
    for running, new in ((layer.running_mean, mean), (layer.running_var, variance * (total / (total - 1)))):
        if running is not None:
            running.mul_(1 - (factor or 0.0)).add_(new.to(running.dtype), alpha=factor or 0.0)


class _Normalised(torch.autograd.Function):
    """(x − mean) / sqrt(variance + eps) · weight + bias, where mean and variance depend on all workers' x."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        of_examples: tuple[Tensor, Tensor, Tensor],
        eps: float,
        number: int,
        statistics: Statistics,
    ) -> Tensor:
        total, mean, variance = of_examples
        dtype = torch.promote_types(inputs.dtype, torch.float32) if weight is None else weight.dtype
        scale = mean.new_ones(mean.shape, dtype=dtype) if weight is None else weight
        ctx.save_for_backward(inputs, scale, total, mean, variance)
        ctx.layer = eps, number, statistics, statistics.counts
        normal = torch.native_batch_norm(inputs, scale, bias, mean.to(dtype), variance.to(dtype), False, 0.0, eps)
        return normal[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UsageError(
                "the objective differentiates a gradient through BatchNorm (create_graph=True), which "
                "batch_norm=minibatch cannot do. Use batch_norm=micro_batch, or another normalisation."
            )
        inputs, scale, total, mean, variance = ctx.saved_tensors
        eps, number, statistics, counts = ctx.layer
        # As if mean and variance were constants; the sums are those of the gradient × normalised inputs, and of the
        # gradient.
        known = mean.to(scale.dtype), variance.to(scale.dtype)
        of_inputs, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, inputs, scale, *known, None, None, False, eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            product, plain = statistics.sums(number, torch.cat([of_weight, of_bias])).chunk(2)
            if counts:  # mean and variance depend on these inputs
                inverse = (variance + eps).rsqrt()
                factor = scale * inverse / total
                shape = (1, -1, *[1] * (inputs.dim() - 2))
                shift, slope, centre = (
                    one.to(scale.dtype).view(shape) for one in (-factor * plain, -factor * product * inverse, mean)
                )
                of_inputs = (of_inputs + shift).addcmul_(inputs - centre, slope).to(inputs.dtype)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return (
            of_inputs if ctx.needs_input_grad[0] else None,
            of_weight if needs_weight else None,
            of_bias if needs_bias else None,
            *[None] * 4,
        )
