"""The trained parameters, which are those that the optimizer holds: cleared, averaged, divided, clipped and saved.

Every step checks them for changes by users and forwards: hooks, `requires_grad` and values.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd.errors import UsageError
from mbgd.task.task import Task
from mbgd.text.listing import shown

GradientHook = Callable[[Tensor], Tensor | None]

_requires_grad = attrgetter("requires_grad")
_version = attrgetter("_version")
_hooks = attrgetter("_backward_hooks")
_accumulate_hooks = attrgetter("_post_accumulate_grad_hooks")

AVERAGING_HOOK = "is_averaging_hook"
"""Attribute that marks hooks that an averaging itself has registered."""


class Trained:
    """The optimizer's parameters by name, those of the model first, in the order of the modules."""

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        """UsageError if the optimizer holds a parameter that is neither the model's nor the objective's."""
        of_task = task.parameters_by_name()
        names = {parameter: name for name, parameter in of_task.items()}
        held = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
        if strangers := [p for p in held if p not in names]:
            raise UsageError(_describe_strangers(task, optimizer, strangers, num_held=len(held)))
        self.by_name: dict[str, nn.Parameter] = {name: p for name, p in of_task.items() if p in held}
        self.parameters = list(self.by_name.values())
        self.not_held = [name for name, p in of_task.items() if p.requires_grad and p not in held]
        """Names of parameters that require a gradient but are not in the optimizer: they are not trained."""
        self.pieces: list[tuple[str, Tensor]] | None = None
        """Where each worker updates pieces of the parameters only: this worker's, each with the parameter's name."""
        self._versions: list[int] = []
        self._flags: list[bool] = []
        self._requires_grad = list(map(_requires_grad, self.parameters))

    def with_gradient(self) -> list[nn.Parameter]:
        """The parameters that require a gradient now."""
        return [p for p in self.parameters if p.requires_grad]

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that this worker updates parameters with, by the parameters' names."""
        return {name: one.grad for name, one in self.updated() if one.grad is not None}

    def updated(self) -> list[tuple[str, Tensor]]:
        """What this worker updates, with the parameters' names: all parameters, or its pieces of them."""
        return list(self.by_name.items()) if self.pieces is None else self.pieces

    def start_step(self) -> None:
        """Remember each parameter's `_version`, and clear the gradients."""
        self._versions = list(map(_version, self.parameters))
        for parameter in self.parameters:
            parameter.grad = None

    def changed(self) -> list[str]:
        """Names of parameters whose values have changed since `start_step`, found by `_version` alone."""
        versions = list(map(_version, self.parameters))
        if versions == self._versions:
            return []
        return [name for name, now, then in zip(self.by_name, versions, self._versions, strict=True) if now != then]

    def remember_flags(self) -> None:
        """Call before the first of several micro-batches: each of them starts with `requires_grad` as it is now."""
        self._flags = list(map(_requires_grad, self.parameters))

    def put_back_flags(self) -> None:
        """Restore `requires_grad` after a micro-batch's forward has changed it; the next forward does so again."""
        for parameter, requires_grad in zip(self.parameters, self._flags, strict=True):
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    def moved_on(self) -> bool:
        """Whether `requires_grad` of any parameter has changed since the last call; clears gradients of frozen ones."""
        requires_grad = list(map(_requires_grad, self.parameters))
        if requires_grad == self._requires_grad:
            return False
        self._requires_grad = requires_grad
        for parameter in self.parameters:
            if not parameter.requires_grad:
                parameter.grad = None
        return True


def move_(task: Task, optimizer: Optimizer, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast the task, and the state that the optimizer has of its parameters already, as Adagrad's sums."""
    before = {parameter: (parameter.dtype, parameter.device) for parameter in task.parameters()}
    task.move_(device, dtype)
    for parameter in before.keys() & optimizer.state.keys():
        of_parameter, (old_dtype, old_device) = optimizer.state[parameter], before[parameter]
        for name, value in of_parameter.items() if isinstance(of_parameter, dict) else ():
            if name == "step" or not isinstance(value, Tensor) or value.device != old_device:
                continue  # torch keeps the number of steps on the host, in float32
            of_parameter[name] = value.to(device, parameter.dtype if value.dtype == old_dtype else value.dtype)


class GradientHooks:
    """Users' parameter hooks, called once per step with the mean gradient of the whole minibatch.

    In the backward they would see one micro-batch's part of a sum, unlike in plain torch. So they are removed for the
    forwards and backwards of a step, and called after the gradients are averaged and divided: first those of
    `Tensor.register_hook`, then those of `register_post_accumulate_grad_hook`, each in the order of registration.
    """

    def __init__(self, trained: Trained) -> None:
        self._parameters = trained.parameters
        self._taken: list[tuple[nn.Parameter, dict[int, Any], dict[int, Any]]] = []

    def __bool__(self) -> bool:
        return bool(self._taken)

    def take_off(self) -> None:
        if not any(map(_hooks, self._parameters)) and not any(map(_accumulate_hooks, self._parameters)):
            return
        for parameter in self._parameters:
            on_gradient, on_accumulated = _take(_hooks(parameter)), _take(_accumulate_hooks(parameter))
            if on_gradient or on_accumulated:
                self._taken.append((parameter, on_gradient, on_accumulated))

    def put_back(self) -> None:
        """Register the hooks again, also after a failed step."""
        for parameter, on_gradient, on_accumulated in self._taken:
            if on_gradient:
                _hooks(parameter).update(on_gradient)
            if on_accumulated:
                _accumulate_hooks(parameter).update(on_accumulated)
        self._taken.clear()

    def call(self) -> None:
        """Call the removed hooks; every gradient is a mean now."""
        for parameter, on_gradient, on_accumulated in self._taken:
            if parameter.grad is None:
                continue
            for hook in on_gradient.values():
                changed = hook(parameter.grad)
                if changed is not None:
                    parameter.grad = changed
            for hook in on_accumulated.values():
                hook(parameter)


def _take(hooks: dict[int, Any] | None) -> dict[int, Any]:
    """Remove and return users' hooks from `hooks`; their handles work again after `put_back`."""
    if not hooks:
        return {}
    taken = {key: hook for key, hook in hooks.items() if not getattr(hook, AVERAGING_HOOK, False)}
    for key in taken:
        del hooks[key]
    return taken


def check_module_hooks(task: Task) -> None:
    """UsageError if a module has a backward hook, which would see gradients of a sum instead of a mean."""
    for name, module in task.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise UsageError(
                f"the module {name.removeprefix('model.') or 'model'} ({type(module).__name__}) has a backward hook; "
                "it would see gradients of the sum of the losses of one micro-batch, not of the minibatch's mean. Put "
                "the hook on the parameters (p.register_hook), where it gets the mean gradient, or use max_grad_norm."
            )


def _describe_strangers(task: Task, optimizer: Optimizer, strangers: list[Tensor], *, num_held: int) -> str:
    shapes = shown((str(tuple(p.shape)) for p in strangers), most=3)
    model = type(task.model).__name__
    own = task.parameters_by_name()
    return (
        f"{len(strangers)} of the {num_held} parameters that the optimizer ({type(optimizer).__name__}) holds, of "
        f"shapes {shapes}, belong neither to the model ({model}, with {', '.join(list(own)[:3]) or 'no parameters'}"
        f"{', …' if len(own) > 3 else ''}) nor to the objective; nothing would train them. Make the optimizer from the "
        "parameters of the same model object that the trainer gets; an objective with parameters of its own must be an "
        "nn.Module."
    )


def describe_not_held(names: list[str]) -> str:
    """The warning about trainable parameters that no optimizer holds."""
    return (
        f"warning: {len(names)} parameters require a gradient, but the optimizer does not hold them, so they are not "
        f"trained: {shown(names)}. Give them to the optimizer, or set requires_grad=False."
    )
