"""The buffers of model and objective, looked up by name in every step, so that none moves unseen.

Rule: every micro-batch starts from the buffers as they were before the step. After it a floating buffer is the mean of
what the micro-batches made of it, each weighing as many examples as it has; an integer buffer, such as
`num_batches_tracked`, is what every single micro-batch made of it. So buffers, like parameters, do not depend on which
worker computed what. A buffer for which this makes no sense is refused by name.

Whether a forward changed a buffer in place or assigned it anew is seen by its version and its identity, without
looking at the values: a GPU is not waited for. torch's batch and instance normalisation move their running statistics
without raising the version; these move in training mode. Others of this kind are found by value: in the trial before
training, and wherever the state is checked.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mbgd.errors import UsageError
from mbgd.task.task import Task, plain_name


class Buffer:
    """One place in a module where a buffer lies, and what lay there before the step."""

    def __init__(self, name: str, module: nn.Module, key: str) -> None:
        self.name, self._module, self._owner, self._key = name, module, module._buffers, key
        self.is_persistent = key not in module._non_persistent_buffers_set
        self._is_of_norm = isinstance(module, _NormBase) and key in ("running_mean", "running_var")
        self.moves_unseen = False
        """Forwards change it without raising its version."""
        self.is_averaged = False
        self.is_cache = False
        """A forward made it of another shape: it holds what can be computed again, and every worker has its own."""
        self.remember()

    @property
    def now(self) -> Tensor | None:
        return self._owner[self._key]

    def is_another(self) -> bool:
        """Whether it was assigned or changed in place, as far as its version tells."""
        now = self._owner[self._key]
        return now is not self.tensor or (now is not None and now._version != self.version)

    def has_changed(self) -> bool:
        """Whether the last forward changed it, or may have."""
        return self.is_another() or self.moves_unseen or (self._is_of_norm and self._module.training)

    def remember(self) -> None:
        """Take what lies there now for what lies there before the step."""
        self.tensor = self._owner[self._key]
        self.version = -1 if self.tensor is None else self.tensor._version
        self.before = _copied(self.tensor)
        self.is_floating = self.tensor is not None and (self.tensor.is_floating_point() or self.tensor.is_complex())

    def put_in_place(self) -> None:
        """Let the tensor lie there that did before the step, with whatever values."""
        self._owner[self._key] = self.tensor


class Buffers:
    """All buffers of a task; those that move are averaged over the minibatch."""

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
        """Names of buffers that have moved in this step without being known to; the workers agree on them."""
        self._find()

    def __bool__(self) -> bool:
        """Whether any is known to move."""
        return bool(self._floating or self._integers)

    @property
    def num_values(self) -> int:
        """Length of what `sums` gives for a micro-batch."""
        num_floating = sum(_real(_known(buffer.before)).numel() for buffer in self._floating)
        return num_floating + 2 * sum(_known(buffer.before).numel() for buffer in self._integers)

    def expect(self, names: Iterable[str]) -> None:
        """Buffers of these names move. The order in which they are named is the same on all workers."""
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
        """Undo what forwards have made of the buffers since the step's start, or since the last step.

        but: names of buffers that stay as they are, as if they had been so before.
        """
        for name in but:
            self._all[name].remember()
        changed = [buffer for buffer in self._all.values() if buffer.has_changed() and not buffer.is_cache]
        for buffer in changed:
            buffer.put_in_place()
        _copy([buffer for buffer in changed if buffer.tensor is not None])

    def marks(self) -> dict[str, tuple[int, int]]:
        """By name, what is another one once a forward has changed the buffer."""
        tensors = {name: buffer.now for name, buffer in self._all.items()}
        return {name: (id(now), 0 if now is None else now._version) for name, now in tensors.items()}

    def find_unseen(self) -> list[str]:
        """Names of buffers whose values have changed although nothing showed it, and from now on may at any time."""
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
        """Names of the buffers that forwards have changed; UsageError where one has become what cannot be averaged."""
        found = [buffer for buffer in self._all.values() if not buffer.is_cache and buffer.has_changed()]
        for buffer in found:
            _check(buffer)
        return [buffer.name for buffer in found if not buffer.is_cache]

    def end_micro_batch(self, number: int, num_examples: int, *, is_stand_in: bool) -> None:
        """Take in what the micro-batch made of the buffers.

        is_stand_in: what it made is left out.
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
        """For each micro-batch its number and what is added up over all of them: float64, shape (num_values,)."""
        before = self._cat([_known(buffer.before) for buffer in self._integers])
        vectors = []
        for moved in self._moved:
            floating = [moved.floating, self._late(self._floating, len(moved.floating), moved)]
            integers = [moved.integers, self._late(self._integers, len(moved.integers), moved)]
            change = torch.cat(integers) - before
            vectors.append((moved.number, torch.cat([*floating, change, change.square()]).mul_(moved.num_examples)))
        return vectors

    def _late(self, buffers: Sequence[Buffer], num_values: int, moved: "_Moved") -> Tensor:
        """The values of those buffers that come behind `num_values` values: known to move only since this step."""
        late = []
        for buffer in buffers:
            if num_values <= 0:
                late.append(moved.late.get(buffer.name, _known(buffer.before)))
            num_values -= _real(_known(buffer.before)).numel()
        return self._cat(late)

    def take(self, totals: Tensor, num_examples: int) -> Tensor:
        """Give the buffers their new values; whether every micro-batch made the same of the integer ones: shape ().

        totals: of `sums` over the minibatch of `num_examples` examples.
        """
        before = self._cat([_known(buffer.before) for buffer in self._integers])
        means = totals / num_examples
        floating, change, square = torch.split(means, [len(totals) - 2 * len(before), len(before), len(before)])
        _set(self._floating, floating)
        _set(self._integers, before + change)
        self._moved.clear()
        are_alike: Tensor = (change.square() == square).all()
        return are_alike  # only of equal values the square of the mean is the mean of squares

    def unlike(self) -> str:
        """The refusal of an integer buffer of which micro-batches made different values."""
        names = ", ".join(buffer.name for buffer in self._integers)
        return (
            f"the micro-batches of one minibatch made different values of an integer buffer ({names}). Integers cannot "
            "be averaged: what a forward makes of one must depend neither on the examples nor on their number. Count "
            "minibatches instead of examples, or make it a floating buffer, which is averaged."
        )

    def tensors(self, *, caches: bool = False) -> dict[str, Tensor]:
        """Every buffer by name, as they lie, with or without those that are caches."""
        return {b.name: b.now for b in self._all.values() if b.now is not None and (caches or not b.is_cache)}

    def recomputable(self) -> set[str]:
        """Names of non-persistent buffers: a checkpoint without them, or with others, fits all the same."""
        return {buffer.name for buffer in self._all.values() if not buffer.is_persistent}

    def _cat(self, tensors: Sequence[Tensor]) -> Tensor:
        """All values in one vector, float64, which holds integers up to 2^53."""
        return torch.cat([_real(tensor.detach()) for tensor in tensors]).double() if tensors else self._nothing

    def _find(self) -> None:
        """Look for buffers that modules have registered since."""
        self._num_found = sum(map(len, self._owners))
        known, self._all = self._all, {}
        for prefix, module in self._modules:
            for key in module._buffers:
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                self._all[name] = known.get(name) or Buffer(name, module, key)


class _Moved(NamedTuple):
    """What one micro-batch made of the buffers that move."""

    number: int
    num_examples: int
    floating: Tensor
    """Of those that were known to move before: float64, one dimension."""
    integers: Tensor
    late: dict[str, Tensor]
    """Of those that were not."""


def _set(buffers: Sequence[Buffer], values: Tensor) -> None:
    """Give buffers the values of a vector, float64, and take them for those before the next step."""
    parts = torch.split(values, [_real(_known(buffer.before)).numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        before = _known(buffer.before)
        buffer.put_in_place()
        (torch.view_as_real(before) if before.is_complex() else before).view(-1).copy_(part)
    _copy(buffers)


def _copy(buffers: Sequence[Buffer]) -> None:
    """Give buffers the values that they have in `before`."""
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
    """The values in one dimension, complex ones as pairs."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _check(buffer: Buffer) -> None:
    """UsageError where a forward has made of a buffer what cannot be averaged."""
    now, before = buffer.now, buffer.before
    if now is not None and before is not None and now.requires_grad:
        raise UsageError(
            f"a forward assigned the buffer {buffer.name} a tensor that requires a gradient; its graph would grow from "
            "step to step. Assign what detach() gives."
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
