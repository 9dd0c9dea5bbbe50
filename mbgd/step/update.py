"""The sum of gradients → the optimizer's step. The one division of the program is here."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mbgd.checks.finite import Watch, Wrong
from mbgd.checks.setup import Setup
from mbgd.config import Precision
from mbgd.errors import UsageError
from mbgd.step.done import Norms
from mbgd.step.momentum import FirstMomentum
from mbgd.step.norms import TotalNorm
from mbgd.step.sharding import Sharded
from mbgd.step.update_state import UpdateState
from mbgd.task.objective import PerExample
from mbgd.task.torch_calls import step_of
from mbgd.task.trained import GradientHooks

BeforeStep = Callable[[int, Tensor | None], None]
"""Called with the step's number and a divisor of shape (): each `.grad`, of the parameters or of this worker's pieces,
divided by it is what the optimizer gets; None: they are divided already."""

MOST_SKIPPED = 50
"""Steps skipped in a row, in fp16, after which training stops: each has halved the loss scale in vain."""


class Update:
    """Divide by the minibatch's weight, clip, set the learning rate, and step the optimizer.

    With precision fp16 the losses are scaled, so that small gradients do not underflow, and the gradients are unscaled
    before they are clipped or measured. A step whose gradients overflow is skipped and counted.
    """

    def __init__(self, setup: Setup, watch: Watch, sharded: Sharded | None = None) -> None:
        """watch: notes a gradient that is not finite. sharded: this worker's pieces; None: it updates all."""
        optimizer, settings, device = setup.optimizer, setup.settings, setup.workers.device
        self._watch, self._trained, self._optimizer, self._sharded = watch, setup.trained, optimizer, sharded
        self._held: Sequence[Tensor] = setup.trained.parameters if sharded is None else sharded.tensors
        """What the optimizer holds and updates: the trained parameters, or this worker's pieces of them."""
        self._norm_of_whole = TotalNorm(setup.trained.parameters)
        self._norm = self._norm_of_whole if sharded is None else sharded.norm
        self._norm_before_hooks: Tensor | None = None
        self._optimizer_step = step_of(optimizer)
        self.hooks = GradientHooks(setup.trained)
        self.before_step: list[BeforeStep] = []
        """Called in each step just before the optimizer's, with the gradients averaged, unscaled and clipped."""
        self._clip_norm, self._clip_value = settings.max_grad_norm, settings.max_grad_value
        self._clips = self._clip_norm is not None or self._clip_value is not None
        self._schedule = settings.schedule
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._scaler: torch.amp.GradScaler | None = None
        if settings.precision is Precision.fp16:
            # torch's default first scale, 2^16, is for a mean loss; ours is a sum over up to the whole minibatch.
            first_scale = 2.0 ** (16 - (settings.batch.size * setup.findings.losses_per_example - 1).bit_length())
            self._scaler = torch.amp.GradScaler(device.type, init_scale=first_scale)
        self._first_momentum = FirstMomentum(optimizer, may_skip=self.may_skip)
        self._is_fused = all(group.get("fused") for group in optimizer.param_groups)
        # A fused optimizer divides the gradients by its attribute `grad_scale` as it reads them, at no cost. The
        # attribute is meant for torch.amp.GradScaler and is float32: exact for whole numbers up to 2^24.
        self._divides_in_kernel = (
            self._scaler is None
            and not self._clips
            and settings.batch.size <= 2**24
            and getattr(optimizer, "_step_supports_amp_scaling", False)
            and self._is_fused
        )
        self._is_float32 = all(parameter.dtype is torch.float32 for parameter in setup.trained.parameters)
        self._ones: dict[int, Tensor] = {}
        self._scales: dict[int, Tensor] = {}
        self._device = device
        self.is_skipped: Tensor | None = None
        """Whether fp16 has skipped the last step: bool, shape (); None where no step is skipped."""
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.state = UpdateState(setup, sharded, self._scaler, self._num_skipped)

    @property
    def base_rates(self) -> list[float]:
        """The learning rate of each of the optimizer's groups, before the schedule's factor."""
        return [float(rate) for rate in self._base_rates]

    @property
    def num_skipped(self) -> int:
        """Number of steps skipped so far because gradients overflowed in fp16; this waits for the device."""
        return int(self._num_skipped.item())

    @property
    def may_skip(self) -> bool:
        """Whether a step whose gradient is not finite is skipped, as in fp16."""
        return self._scaler is not None

    def metrics(self) -> dict[str, float]:
        """Metrics for the log; this waits for the device."""
        return {} if self._scaler is None else {"skipped_steps": self.num_skipped}

    def check_skipped(self, step: int) -> None:
        """UsageError if `MOST_SKIPPED` or more steps in a row before step number `step` were skipped."""
        if self._scaler is None:
            return
        num_skipped = int(self._skipped_in_a_row.item())
        if num_skipped >= MOST_SKIPPED:
            raise UsageError(
                f"step {step + 1}: the gradients of the last {num_skipped} steps were not finite in fp16, although "
                "each halved the loss scale. Use precision=bf16 or fp32, or a smaller optimizer.lr."
            )

    def backward_weights(self, terms: PerExample, *, is_stand_in: bool) -> Tensor:
        """The gradient of each loss for the backward: its weight times the loss scale; 0 for a stand-in."""
        weights = terms.weights.to(terms.losses.dtype) if terms.weights is not None else self._ones_like(terms.losses)
        if is_stand_in:
            weights = torch.zeros_like(weights)
        return weights if self._scaler is None else self._scaler.scale(weights)

    def loss_scale(self) -> Tensor:
        """The current loss scale, 1 without fp16: float64, shape ()."""
        one = torch.ones((), dtype=torch.float64, device=self._device)
        return one if self._scaler is None else self._scaler.scale(one)

    def _ones_like(self, losses: Tensor) -> Tensor:
        if losses.dim() > 1:
            return torch.ones_like(losses)
        if losses.shape[0] not in self._ones:
            self._ones[losses.shape[0]] = torch.ones_like(losses)
        return self._ones[losses.shape[0]]

    def __call__(self, step: int, weight: int | Tensor, *, want_norm: bool, want_change: bool) -> Norms | None:
        """Make step number `step` with gradients that are sums over a minibatch of this weight.

        weight: an int where the plan knows it, otherwise a tensor of shape () on the device.
        Returns the norms that are wanted or needed anyway; the change's norm needs a copy of the parameters.
        """
        if self._sharded is not None:
            self._sharded.before_update(step)
        updated = [p.detach() if p.requires_grad else None for p in self._held] if want_change else []
        before = [None if p is None else p.clone() for p in updated]
        gradient_norm = self._step(step, weight, want_norm=want_norm or want_change)
        if self._sharded is not None:
            self.state.keep(step + 1)
            self._sharded.share()
        if gradient_norm is None:
            return None
        if not want_change:
            return Norms(gradient_norm, None, self._norm_before_hooks)
        parameter_norm = self._norm(before)
        pairs = [(then, now) for then, now in zip(before, updated, strict=True) if then is not None and now is not None]
        if pairs:
            torch._foreach_sub_([then for then, _ in pairs], [now for _, now in pairs])
        return Norms(gradient_norm, (parameter_norm, self._norm(before)), self._norm_before_hooks)

    def _step(self, step: int, weight: int | Tensor, *, want_norm: bool) -> Tensor | None:
        """Returns the mean gradient's norm before clipping, if wanted or needed."""
        if self._scaler is not None:
            self.is_skipped = self._unscale(self._scaler)
        in_kernel = self._divides_in_kernel and not self.hooks
        if isinstance(weight, Tensor):
            # Both divide by the weight in float32, to the same bits, but a norm is that of the quotients.
            in_kernel = in_kernel and self._is_float32 and not want_norm
        if in_kernel:
            norm = self._norm_of_gradients() / weight if want_norm else None
        else:
            norm = self._divide_and_clip(weight, want_norm=want_norm)
        if norm is not None and self._scaler is None:
            self._watch.check_finite(Wrong.gradient, step, norm)
            if self._watch.found():
                return norm  # before the optimizer changes anything
        self._set_learning_rate(step)
        self._first_momentum.before_step()
        for look in self.before_step:
            look(step, self._scale(weight) if in_kernel else None)
        if in_kernel:
            self._optimizer.grad_scale = self._scale(weight)  # type: ignore[attr-defined]
            self._optimizer_step()
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]  # the optimizer is the user's
        elif self._scaler is None:
            self._optimizer_step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            assert self.is_skipped is not None
            self._count_skipped(self.is_skipped)
        return norm

    def _unscale(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Unscale what the optimizer gets; returns whether a gradient overflowed on any worker: bool, shape ().

        Not judged by the norm, because users' hooks may make gradients finite again.
        """
        if self._sharded is not None and self.hooks:
            for piece in self._held:  # views of the whole gradients, which all stay scaled until the hooks get them
                piece.grad = None if piece.grad is None else piece.grad.clone()
        scaler.unscale_(self._optimizer)
        if self._sharded is not None:
            self._sharded.found_inf(scaler, self._optimizer)
        found = scaler._per_optimizer_states[id(self._optimizer)]["found_inf_per_device"]
        return torch.stack([one.to(self._device) for one in found.values()]).amax() > 0

    def _count_skipped(self, is_skipped: Tensor) -> None:
        self._num_skipped += is_skipped
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * is_skipped

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._held if p.grad is not None]

    def _norm_of_gradients(self) -> Tensor:
        return self._norm([p.grad for p in self._held])

    def _scale(self, weight: int | Tensor) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.float()
        if weight not in self._scales:
            # torch.full fills it by a kernel; torch.tensor would copy from the host and wait for the GPU.
            self._scales[weight] = torch.full((), float(weight), dtype=torch.float32, device=self._device)
        return self._scales[weight]

    def _divide_and_clip(self, weight: int | Tensor, *, want_norm: bool) -> Tensor | None:
        self._norm_before_hooks = None
        if self.hooks:
            gradients = [p.grad for p in self._trained.parameters if p.grad is not None]
            if self._scaler is not None and self._sharded is not None:
                _divide(gradients, self.loss_scale())
            _divide(gradients, weight)
            if want_norm:
                self._norm_before_hooks = self._norm_of_whole([p.grad for p in self._trained.parameters])
            self.hooks.call()
            if self._sharded is not None:
                self._sharded.parameters.owned.take_gradients()
        else:
            _divide(self._gradients(), weight)
        if not want_norm and not self._clips and self._scaler is None:
            return None
        norm = self._norm_of_gradients()  # also to clip by value: infinity is noticed before it is cut
        # First by value, so that one huge element does not shrink all others.
        if self._clip_value is not None and self._gradients():
            torch.nn.utils.clip_grad_value_(self._held, self._clip_value)
        if self._clip_norm is not None:
            clipped = norm if self._clip_value is None else self._norm_of_gradients()
            torch.nn.utils.clip_grads_with_norm_(self._held, self._clip_norm, clipped)
        return norm

    def _set_learning_rate(self, step: int) -> None:
        if self._schedule is not None:
            factor = self._schedule(step)
            for group, base_rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = base_rate * factor


def _divide(gradients: list[Tensor], weight: int | Tensor) -> None:
    if not gradients:
        return
    if not isinstance(weight, Tensor):
        torch._foreach_div_(gradients, float(weight))
        return
    # On a GPU a divisor of another dtype needs one kernel for each gradient. It is rounded to their dtype anyway.
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for dtype, of_dtype in by_dtype.items():
        torch._foreach_div_(of_dtype, weight.to(dtype))
