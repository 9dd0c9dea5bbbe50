"""The exponential moving average of the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mbgd.config.duration import Duration, check_duration, in_steps, whole
from mbgd.errors import UsageError
from mbgd.step.done import Done


class EMA:
    """Keeps an exponential moving average of the trained parameters (Polyak & Juditsky 1992).

    It begins as a copy of the parameters after `start` steps. From then on, after every `every_steps` steps:
    average ← d · average + (1 − d) · parameters, in fp32 or the parameters' wider dtype. A step that fp16 has skipped
    leaves it as it is. Buffers are not averaged: the average is evaluated and exported with the model's own.
    """

    name = "ema"

    def __init__(
        self,
        decay: float = 0.999,
        every_steps: Duration = 1,
        start: Duration = 0,
        warmup_steps: Duration = 0,
        power: float | None = None,
        evaluate: bool = True,
    ) -> None:
        """d is `decay`, but smaller at first with one of these, for t steps since `start`:

        warmup_steps: d = decay · min(1, t / warmup_steps). power: d = min(decay, 1 − (1 + t)^−power), as for weights
        of a polynomial. evaluate: every evaluation also gives the metrics of the average, as eval/ema/….
        """
        if not 0 <= decay < 1:
            raise UsageError(f"ema.decay={decay}; it must be at least 0 and less than 1, such as 0.999.")
        check_duration("ema.every_steps", every_steps, least=1)
        check_duration("ema.start", start)
        check_duration("ema.warmup_steps", warmup_steps)
        if power is not None and not power > 0:
            raise UsageError(f"ema.power={power}; it must be greater than 0, such as 2/3, or null for no such warm-up.")
        if power is not None and warmup_steps:
            raise UsageError(f"ema.power={power} and ema.warmup_steps={warmup_steps}: choose one kind of warm-up.")
        self.decay, self.power, self.evaluate = decay, power, evaluate
        self._durations = {"every_steps": every_steps, "start": start, "warmup_steps": warmup_steps}
        self._trained: list[nn.Parameter] = []
        self._parameters: dict[str, Tensor] = {}
        """Their values by name, complex ones as pairs of real numbers."""
        self._average: list[Tensor] = []
        """Empty until it begins."""
        self._is_skipped: Callable[[], Tensor | None] = lambda: None
        """Gives whether fp16 has skipped the last step."""
        self._tell: Callable[[str], None] | None = None

    @property
    def start(self) -> int:
        return whole(self._durations["start"])

    def before_training(self, trainer: Any) -> None:
        """UsageError where the run ends before the average is updated once."""
        given = dict(self._durations)
        self._durations = {name: in_steps(one, trainer.setup.plan) for name, one in self._durations.items()}
        first, num_steps = self.start + whole(self._durations["every_steps"]), trainer.setup.num_steps
        if 0 < num_steps < first:
            raise UsageError(
                f"ema.start={given['start']} and ema.every_steps={given['every_steps']} first update the average after "
                f"step {first}, but the run ends after step {num_steps}: it would be no average. Make them smaller, or "
                "train longer."
            )
        self._tell = trainer.setup.tell
        self._trained = list(trainer.setup.trained.parameters)
        self._parameters = {name: _real(p.detach()) for name, p in trainer.setup.trained.by_name.items()}
        update = trainer.train_step.update
        self._is_skipped = lambda: update.is_skipped

    def at_start(self, step: int) -> None:
        if not self._average and step >= self.start:
            self._begin()

    def after_update(self, done: Done) -> None:
        step = done.step + 1
        if not self._average:
            if step >= self.start:
                self._begin()
            return
        if (step - self.start) % whole(self._durations["every_steps"]):
            return
        share, parameters = 1 - self.decay_after(step), list(self._parameters.values())
        if any(p.dtype != average.dtype for p, average in zip(parameters, self._average, strict=True)):
            parameters = [p.to(average.dtype) for p, average in zip(parameters, self._average, strict=True)]
        if (is_skipped := self._is_skipped()) is not None:
            torch._foreach_lerp_(self._average, parameters, [(share * ~is_skipped).to(p.dtype) for p in parameters])
        else:
            torch._foreach_lerp_(self._average, parameters, share)

    def at_end(self) -> None:
        if not self._average and self._tell is not None:
            self._tell(
                f"warning: the run ended before ema.start={self.start}: the moving average has not begun, and "
                "model_ema.safetensors holds the model's own weights."
            )

    def decay_after(self, step: int) -> float:
        """The decay d of the update after `step` steps."""
        since, warmup_steps = step - self.start, whole(self._durations["warmup_steps"])
        if self.power is not None:
            return float(min(self.decay, 1 - (1 + since) ** -self.power))
        return self.decay * min(1.0, since / warmup_steps) if warmup_steps else self.decay

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Inside, the parameters are the average, rounded to their dtype; before it begins they stay as they are."""
        if not self._average:
            yield
            return
        kept = [parameter.data for parameter in self._trained]
        try:
            # Other memory, not other values in it: the workers of a host may share the parameters' own.
            for parameter, average in zip(self._trained, self._average, strict=True):
                parameter.data = _like(parameter, average)
            yield
        finally:
            for parameter, own in zip(self._trained, kept, strict=True):
                parameter.data = own

    def state_dict(self) -> dict[str, Any]:
        """The average by the parameters' names, complex ones as pairs of real numbers; None before it begins."""
        return {"average": dict(zip(self._parameters, self._average, strict=True)) if self._average else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average = []
        if state["average"] is not None:
            self._begin()
            for name, average in zip(self._parameters, self._average, strict=True):
                average.copy_(state["average"][name])

    def _begin(self) -> None:
        # A copy in every case, with the parameter's strides: elementwise kernels are fastest where they agree.
        self._average = [
            p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._parameters.values()
        ]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(parameter: Tensor, average: Tensor) -> Tensor:
    if parameter.is_complex():
        average = torch.view_as_complex(average)
    return average.to(parameter.dtype)
