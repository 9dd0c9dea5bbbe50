"""The buffers of model and objective, looked up by name in every step, so that no change goes unnoticed.

Rule: every micro-batch starts from the buffers as they were before the step. After the step a floating buffer is the
mean of its values after each micro-batch, weighted by the micro-batch's number of examples; an integer buffer, such as
`num_batches_tracked`, is the value that every micro-batch gave it. So buffers, like parameters, do not depend on which
worker computed what. A buffer that cannot follow this rule is refused by name.

A buffer that a forward changed in place or assigned is noticed by its `_version` and its identity, without reading the
values, so a GPU need not be synchronised. torch's batch and instance normalisation change their running statistics
without raising `_version`; they count as changed after every forward in training mode. Other such buffers are found by
value: in the trial before training, and wherever the state is checked.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mbgd.errors import UsageError
from mbgd.task.task import Task, plain_name


class Buffer:
    """One buffer slot of a module, and the buffer's value before the step."""

    def __init__(self, name: str, module: nn.Module, key: str) -> None:
        self.name, self._module, self._owner, self._key = name, module, module._buffers, key
        self.is_persistent = key not in module._non_persistent_buffers_set
        self._is_of_norm = isinstance(module, _NormBase) and key in ("running_mean", "running_var")
        self.moves_unseen = False
        """Forwards change it without raising its `_version`."""
        self.is_averaged = False
        self.is_cache = False
        """Not persistent, and a forward changed its shape or dtype: can be recomputed, so each worker has its own."""
        self.remember()

    @property
    def now(self) -> Tensor | None:
        return self._owner[self._key]

    def is_another(self) -> bool:
        """Whether it was assigned or changed in place, judged by identity and `_version`."""
        now = self._owner[self._key]
        return now is not self.tensor or (now is not None and now._version != self.version)

    def has_changed(self) -> bool:
        """Whether the last forward changed it, or may have."""
        moves = self._is_of_norm and self.tensor is not None and self._module.training
        return moves or self.is_another() or self.moves_unseen

    def remember(self) -> None:
        """Take the buffer's current value as its value before the step."""
        self.tensor = self._owner[self._key]
        self.version = -1 if self.tensor is None else self.tensor._version
        self.before = _copied(self.tensor)
        self.is_floating = self.tensor is not None and (self.tensor.is_floating_point() or self.tensor.is_complex())

    def put_in_place(self) -> None:
        """Put the tensor from before the step back into its slot; its values are not restored."""
        self._owner[self._key] = self.tensor


class Buffers:
    """All buffers of a task; those that change in training are averaged over the minibatch."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._nothing = torch.zeros(0, dtype=torch.float64, device=device)
        self._modules = list(task.named_modules())
        self._owners = [module._buffers for _, module in self._modules]
        self._num_found = 0
        self._all: dict[str, Buffer] = {}
        self._floating: list[Buffer] = []
        self._integers: list[Buffer] = []
        self._moved: list[_Moved] = []
        self.late_names: set[str] = set()
        """Names of buffers that changed for the first time in this step; the workers agree on them."""
        self._find()

    def __bool__(self) -> bool:
        """Whether any buffer is known to change."""
        return bool(self._floating or self._integers)

    @property
    def num_values(self) -> int:
        """Length of the vector that `sums` gives for a micro-batch."""
        num_floating = sum(_real(_known(buffer.before)).numel() for buffer in self._floating)
        return num_floating + 2 * sum(_known(buffer.before).numel() for buffer in self._integers)

    def expect(self, names: Iterable[str]) -> None:
        """Average the buffers of these names from now on; the names come in the same order on all workers."""
        for buffer in (self._all[name] for name in names):
            buffer.is_averaged = True
            (self._floating if buffer.is_floating else self._integers).append(buffer)

    def start_step(self) -> None:
        """Every micro-batch of the step starts from the buffers as they are now."""
        if sum(map(len, self._owners)) != self._num_found:
            self._find()
        for buffer in self._all.values():
            if buffer.is_another():
                buffer.remember()
        self._moved.clear()
        self.late_names.clear()

    def put_back(self, but: Collection[str] = ()) -> None:
        """Restore the buffers that forwards have changed since the step's start, or since the last step.

        but: names of buffers that keep their current value, which then counts as the value before the step.
        """
        for name in but:
            self._all[name].remember()
        changed = [buffer for buffer in self._all.values() if buffer.has_changed() and not buffer.is_cache]
        for buffer in changed:
            buffer.put_in_place()
        _copy([buffer for buffer in changed if buffer.tensor is not None])

    def marks(self) -> dict[str, tuple[int, int]]:
        """(id, _version) of each buffer, by name; it differs once a forward has changed the buffer."""
        tensors = {name: buffer.now for name, buffer in self._all.items()}
        return {name: (id(now), 0 if now is None else now._version) for name, now in tensors.items()}

    def find_unseen(self) -> list[str]:
        """Names of buffers that changed unnoticed, found by value; from now on they count as changed by any forward."""
        found = []
        for buffer in self._all.values():
            now = buffer.now
            if now is None or buffer.before is None or buffer.has_changed() or buffer.is_cache:
                continue
            if not torch.equal(_bytes(now), _bytes(buffer.before)):
                buffer.moves_unseen = True
                found.append(buffer.name)
        return found

    def changed(self) -> list[str]:
        """Names of the buffers that forwards have changed; UsageError if one cannot be averaged any more."""
        found = [buffer for buffer in self._all.values() if not buffer.is_cache and buffer.has_changed()]
        for buffer in found:
            _check(buffer)
        return [buffer.name for buffer in found if not buffer.is_cache]

    def end_micro_batch(self, number: int, num_examples: int, *, is_stand_in: bool) -> None:
        """Record the buffers after a micro-batch.

        is_stand_in: the micro-batch is not recorded.
        """
        if not self._all:
            return
        changed = self.changed()
        if is_stand_in:
            return
        known = {buffer.name for buffer in (*self._floating, *self._integers)}
        late = {name: _known(self._all[name].now).detach().clone() for name in changed if name not in known}
        self.late_names |= late.keys()
        floating, integers = (self._cat([_known(b.now) for b in kind]) for kind in (self._floating, self._integers))
        self._moved.append(_Moved(number, num_examples, floating, integers, late))

    def sums(self) -> list[tuple[int, Tensor]]:
        """For each micro-batch its number and the vector to be summed over all: float64, shape (num_values,)."""
        before = self._cat([_known(buffer.before) for buffer in self._integers])
        vectors = []
        for moved in self._moved:
            floating = [moved.floating, self._late(self._floating, len(moved.floating), moved)]
            integers = [moved.integers, self._late(self._integers, len(moved.integers), moved)]
            change = torch.cat(integers) - before
            vectors.append((moved.number, torch.cat([*floating, change, change.square()]).mul_(moved.num_examples)))
        return vectors

    def _late(self, buffers: Sequence[Buffer], num_values: int, moved: "_Moved") -> Tensor:
        """Values of the buffers after the first `num_values` values: those known to change only since this step."""
        late = []
        for buffer in buffers:
            if num_values <= 0:
                late.append(moved.late.get(buffer.name, _known(buffer.before)))
            num_values -= _real(_known(buffer.before)).numel()
        return self._cat(late)

    def take(self, totals: Tensor, num_examples: int) -> Tensor:
        """Set the buffers' new values; returns whether all micro-batches gave the same integers: bool, shape ().

        totals: `sums` added up over the minibatch of `num_examples` examples.
        """
        before = self._cat([_known(buffer.before) for buffer in self._integers])
        means = totals / num_examples
        floating, change, square = torch.split(means, [len(totals) - 2 * len(before), len(before), len(before)])
        _set(self._floating, floating)
        _set(self._integers, before + change)
        self._moved.clear()
        are_alike: Tensor = (change.square() == square).all()
        return are_alike  # the square of the mean is the mean of the squares only if all values are equal

    def unlike(self) -> str:
        """The error's text for an integer buffer to which micro-batches gave different values."""
        names = ", ".join(buffer.name for buffer in self._integers)
        return (
            f"the micro-batches of one minibatch gave an integer buffer different values ({names}). Integers cannot "
            "be averaged: the new value must depend neither on the examples nor on their number. Count minibatches "
            "instead of examples, or make it a floating buffer, which is averaged."
        )

    def tensors(self, *, caches: bool = False) -> dict[str, Tensor]:
        """Every buffer by name, not copied, with or without the caches."""
        return {b.name: b.now for b in self._all.values() if b.now is not None and (caches or not b.is_cache)}

    def recomputable(self) -> set[str]:
        """Names of non-persistent buffers: a checkpoint fits with or without them."""
        return {buffer.name for buffer in self._all.values() if not buffer.is_persistent}

    def _cat(self, tensors: Sequence[Tensor]) -> Tensor:
        """All values in one vector, float64, which holds integers up to 2^53."""
        return torch.cat([_real(tensor.detach()) for tensor in tensors]).double() if tensors else self._nothing

    def _find(self) -> None:
        """Look for buffers that modules have registered since the last look."""
        self._num_found = sum(map(len, self._owners))
        known, self._all = self._all, {}
        for prefix, module in self._modules:
            for key in module._buffers:
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                self._all[name] = known.get(name) or Buffer(name, module, key)


class _Moved(NamedTuple):
    """The values of the averaged buffers after one micro-batch."""

    number: int
    num_examples: int
    floating: Tensor
    """Floating buffers known to change before this micro-batch: float64, one dimension."""
    integers: Tensor
    late: dict[str, Tensor]
    """Buffers not known to change before, by name."""


def _set(buffers: Sequence[Buffer], values: Tensor) -> None:
    """Set buffers to the values of a float64 vector, which also become their values before the next step."""
    parts = torch.split(values, [_real(_known(buffer.before)).numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        before = _known(buffer.before)
        buffer.put_in_place()
        (torch.view_as_real(before) if before.is_complex() else before).view(-1).copy_(part)
    _copy(buffers)


def _copy(buffers: Sequence[Buffer]) -> None:
    """Set buffers to their values in `before`."""
    if buffers:
        with torch.no_grad():
            torch._foreach_copy_([_known(b.tensor) for b in buffers], [_known(b.before) for b in buffers])
    for buffer in buffers:
        buffer.version = _known(buffer.tensor)._version


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _real(tensor: Tensor) -> Tensor:
    """The values in one dimension, complex ones as (real, imaginary) pairs."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _check(buffer: Buffer) -> None:
    """UsageError if a forward has changed a buffer so that it cannot be averaged."""
    now, before = buffer.now, buffer.before
    if now is not None and before is not None and now.requires_grad:
        raise UsageError(
            f"a forward assigned the buffer {buffer.name} a tensor that requires a gradient; its graph would grow from "
            "step to step. Assign tensor.detach()."
        )
    if now is not None and before is not None and now.shape == before.shape and now.dtype == before.dtype:
        return
    if not (buffer.is_persistent or buffer.is_averaged):
        buffer.is_cache = True
        return
    raise UsageError(
        f"a forward changed the buffer {buffer.name} from {_kind(before)} to {_kind(now)}; workers' copies of it could "
        "not be averaged. Give it its final shape when it is registered, or register it with persistent=False if it "
        "only holds what can be computed again."
    )


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
