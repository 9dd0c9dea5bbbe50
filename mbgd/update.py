"""From the gradients' sum to the optimizer's step. The one division of the program is here."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd.config import Precision, Settings


class Update:
    """Divide by the minibatch's weight, clip, set the learning rate, and step the optimizer.

    With precision fp16 the loss is scaled so that small gradients do not vanish: `scale_loss` before backward, and
    gradients are unscaled before anything looks at them. A step whose gradients overflowed leaves the parameters
    as they are and is counted in `num_skipped`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._optimizer = optimizer
        self._clip_norm = settings.clip_norm
        self._schedule = settings.schedule
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._scaler: torch.amp.GradScaler | None = None
        if settings.precision is Precision.fp16:
            # torch's usual first scale is for a mean loss; ours is a sum over up to the whole minibatch.
            first_scale = 2.0 ** (16 - (settings.batch.size - 1).bit_length())
            self._scaler = torch.amp.GradScaler(device.type, init_scale=max(first_scale, 1.0))
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far because of an overflow in fp16; this waits for the device."""
        return int(self._num_skipped.item())

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def scale_loss(self, loss_sum: Tensor) -> Tensor:
        return loss_sum if self._scaler is None else self._scaler.scale(loss_sum)

    def __call__(self, step: int, weight: float | Tensor, *, want_norm: bool) -> Tensor | None:
        """Make step number `step` with gradients that are sums over a minibatch of this weight.

        Returns the mean gradient's norm before clipping, if wanted or needed.
        """
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm: Tensor | None = None
        if gradients:
            torch._foreach_div_(gradients, weight)
            if want_norm or self._clip_norm is not None or self._scaler is not None:
                norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None and norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        if self._schedule is not None:
            factor = self._schedule(step)
            for group, base_rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = base_rate * factor
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            if norm is not None:
                self._num_skipped += ~norm.isfinite()
        return norm
