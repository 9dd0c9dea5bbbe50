"""The gradient noise scale: how noisy a minibatch's gradient is, and so which minibatch size pays off.

With G the gradient over all examples and Σ the covariance of one example's gradient, the mean gradient g of n examples
has variance E|g − G|² = tr Σ / n. Where n is far below B_simple = tr Σ / |G|², twice the examples make a step almost
twice as good; far above it they are wasted (McCandlish et al. 2018, arXiv 1812.06162, section 2.2 and appendix A.1).

Both parts follow from the gradients of the micro-batches, which are computed anyway. With N of them, of weights
b_k, Σ b_k = B, mean gradients g_k, and Q = Σ (b_k / B) |g_k|²,

    (Q − |g|²) / (N − 1)      has the mean E|g − G|², and
    (N|g|² − Q) / (N − 1)     has the mean |G|²,

however uneven the micro-batches are; the paper's formulas are those for one micro-batch against the whole.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mbgd.averaging.norms import MicroBatchNorms
from mbgd.batches.plan import MicroBatch, Minibatch, Plan
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config import NoiseScale
from mbgd.config.duration import whole
from mbgd.step.done import Done
from mbgd.task.objective import PerExample

NUM_NOISE_SUMS = 2


def noise_sums(squared_norm: Tensor, weight: Tensor) -> Tensor:
    """A micro-batch's part in the sums over the minibatch: |Σ w_i ∇L_i|² / Σ w_i, and 1 if its weight is not 0.

    Arguments and result are float64; shapes (), () and (NUM_NOISE_SUMS,).
    """
    has_weight = weight > 0
    return torch.stack([torch.where(has_weight, squared_norm / weight, 0.0), has_weight.double()])


def estimate(sums: Tensor, weight: float | Tensor, gradient_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of (E|g − G|², |G|²) from one minibatch; not finite where fewer than two micro-batches count.

    sums: `noise_sums` added up over its micro-batches; weight: B; gradient_norm: |g|.
    """
    mean_of_squares, num_parts = sums[0] / weight, sums[1]
    square_of_mean = gradient_norm.double().square()
    variance = (mean_of_squares - square_of_mean).clamp(min=0.0) / (num_parts - 1)  # < 0 only by rounding
    return variance, (num_parts * square_of_mean - mean_of_squares) / (num_parts - 1)


class NoiseMeter:
    """Measures the noise in some steps and smooths it over them.

    One minibatch says little about |G|², which its noise may hide. So n·E|g − G|² = tr Σ and |G|² are averaged
    separately, with exponentially falling weights for older steps, and then divided.
    """

    needs_backward = True

    def __init__(
        self,
        settings: NoiseScale,
        plan: Plan,
        parameters: Sequence[Tensor],
        loss_scale: Callable[[], Tensor],
        *,
        is_defined: bool = True,
    ) -> None:
        """loss_scale(): the factor that the micro-batches' gradients are scaled by: float64, shape ().

        is_defined: whether each example has a loss of its own; otherwise nothing is measured.
        """
        self._is_defined = is_defined
        every_steps = settings.every_steps if is_defined else None
        self._every_steps = None if every_steps is None else whole(every_steps)
        self._plan = plan
        self._parameters, self._loss_scale = parameters, loss_scale
        self._size = min(plan.minibatch_size, plan.num_examples)
        self._decay = 1.0 - 1.0 / settings.smoothing
        device = parameters[0].device
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # sums of tr Σ, |G|² and the smoothing weights
        self.norms: MicroBatchNorms | None = None
        """Norms of the micro-batches' gradients; None in a step that is not measured."""
        self._weights: dict[int, Tensor] = {}
        """Of this worker's micro-batches, by number."""
        self._total: Tensor | None = None

    def measures(self, step: int) -> bool:
        """Whether step number `step`, counted from 0, is measured; its minibatch must have 2 or more micro-batches."""
        if self._every_steps is None or (step + 1) % self._every_steps:
            return False
        return self._plan.num_micro_batches(self._plan.minibatch(step).size) > 1

    @property
    def width(self) -> int:
        return NUM_NOISE_SUMS

    def begin(self, step: int) -> bool:
        self.norms, self._weights, self._total = None, {}, None
        if self.measures(step):
            self.norms = MicroBatchNorms(self._parameters)
        return self.norms is not None

    def add(self, terms: PerExample, micro_batch: MicroBatch) -> None:
        if self.norms is not None:
            self._weights[micro_batch.number] = terms.total_weight()

    def leaves(self) -> Mapping[int, Tensor]:
        assert self.norms is not None
        square = self._loss_scale().square()
        return {n: noise_sums(self.norms.squared(n) / square, weight) for n, weight in self._weights.items()}

    def take(self, total: Tensor, minibatch: Minibatch) -> None:
        self._total = total  # used in after_update, which knows the gradient's norm

    def after_update(self, done: Done) -> None:
        """Add the minibatch's noise. A minibatch whose gradients overflowed is left out."""
        if self._total is None or done.norms is None:
            return
        norms = done.norms  # those of the micro-batches are of gradients that no hook has changed
        gradient_norm = norms.gradient if norms.before_hooks is None else norms.before_hooks
        variance, squared_gradient = estimate(self._total, done.weight, gradient_norm)
        new = torch.stack([done.minibatch.size * variance, squared_gradient, torch.ones_like(variance)])
        self._sums = torch.where(new.isfinite().all(), self._decay * self._sums + new, self._sums)

    def metrics(self) -> dict[str, float]:
        """Metrics for the log, empty before the first measurement; this waits for the device.

        noise_scale: B_simple in examples, left out while the estimate of |G|² is not positive. gradient_variance:
        E|g − G|² of a whole minibatch.
        """
        if self._num_parts < 2 or self._every_steps is None:
            return {}
        noise, squared_gradient, weight = self._sums.tolist()
        metrics = {"noise_scale": noise / squared_gradient} if squared_gradient > 0 else {}
        return {**metrics, "gradient_variance": noise / weight / self._size} if weight else {}

    def describe(self) -> str:
        """In words: whether the noise is measured, and from how many micro-batches."""
        if not self._is_defined:
            return "not measured: examples have no losses of their own"
        if self._every_steps is None:
            return "not measured"
        if self._num_parts < 2:
            remedy = f" (batch.micro_batch_size={self._size // 2})" if self._size > 1 else ""
            return f"not measured: needs 2 micro-batches{remedy}"
        return f"every {self._every_steps} steps, from {self._num_parts} micro-batches"

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {}

    def values(self) -> Mapping[str, Any]:
        """The state as JSON can hold it; this waits for the device."""
        return {"noise_scale": self._sums.tolist()}

    def mismatches(self, snapshot: Snapshot) -> list[str]:
        return []

    def restore(self, snapshot: Snapshot) -> None:
        self._sums = self._sums.new_tensor(snapshot.values["noise_scale"])

    @property
    def _num_parts(self) -> int:
        return self._plan.num_micro_batches(self._size)
