"""The optimizer's state where each worker has that of its own pieces: together the state of one whole optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.averaging.host_memory.layout import whole_lines
from mbgd.averaging.pieces import Owned, cut_out
from mbgd.errors import UsageError
from mbgd.files.state_tree import Flattening, unflatten
from mbgd.workers.group import Workers

NOT_COPIED = ("params", "param_names")
"""Entries of a group that differ between the whole optimizer and that of the pieces."""


@dataclass(frozen=True)
class _Kind:
    """One tensor of a parameter's state."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Without gaps."""
    is_cut: bool
    """Whether each piece has its part of it; otherwise the first piece's counts."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self._type.itemsize

    @property
    def _type(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def view(self, memory: Tensor) -> Tensor:
        return memory.view(self._type).as_strided(self.shape, self.strides)


class ShardedState:
    """Keeps the tensors of all pieces' state in memory that all workers map, where it is whole."""

    def __init__(self, optimizer: Optimizer, owned: Owned, allocate: Callable[[int], Tensor], workers: Workers) -> None:
        """allocate(bytes): memory of all workers."""
        self._optimizer, self._owned, self._allocate, self._workers = optimizer, owned, allocate, workers
        self.whole: Optimizer = object.__new__(type(optimizer))
        """As if the optimizer held the parameters; its state is empty except after `collect`."""
        vars(self.whole).update(vars(optimizer))
        self.is_whole = self._holds_pieces = False
        """Whether the state of `whole` is that of now; whether the optimizer holds pieces."""
        self._places: dict[tuple[int, str], tuple[_Kind, Tensor]] = {}
        """(number of the parameter, path) → where that tensor of its state lies."""
        self.hold()

    def hold(self) -> None:
        """Give the optimizer this worker's pieces in place of the parameters, until `release`."""
        if self._holds_pieces:
            return
        self._holds_pieces = True
        self.whole.param_groups = [dict(group) for group in self._optimizer.param_groups]
        self.whole.state = defaultdict(dict, self._optimizer.state)
        hold_pieces(self._optimizer, self._owned)
        self._optimizer.state_dict = _refuse  # type: ignore[method-assign]
        self.distribute()

    def release(self) -> None:
        """Give the optimizer the parameters and the whole state back, after `collect`."""
        self._holds_pieces = False
        del self._optimizer.state_dict
        for group, whole in zip(self._optimizer.param_groups, self.whole.param_groups, strict=True):
            group.update(whole)
        self._optimizer.state = defaultdict(dict, self.whole.state)

    def collect(self) -> None:
        """Put together the state of `whole`, on all workers; its tensors are shared with the pieces.

        Raises CannotShareError, on every worker alike, where state is new and there is too little memory for it.
        """
        mine, tensors = self._described()
        entries = sorted((entry for of_worker in self._workers.gather_values(mine) for entry in of_worker), key=_order)
        first: dict[int, Any] = {}
        for number, start, tree, kinds in entries:
            first.setdefault(number, (start, tree, kinds))
        self._make_places(first)
        for (number, start, _, _), of_piece in zip(mine, tensors, strict=True):
            for path, tensor in of_piece.items():
                kind, memory = self._places[number, path]
                if kind.is_cut:
                    self._move(tensor, memory.view(tensor.dtype)[start : start + tensor.numel()])
                elif start == first[number][0]:
                    self._move(tensor, kind.view(memory))
        self._workers.barrier()  # all tensors are there
        self._fill(first)
        for group, whole in zip(self._optimizer.param_groups, self.whole.param_groups, strict=True):
            whole.update({name: value for name, value in group.items() if name not in NOT_COPIED})
        self.is_whole = True

    def distribute(self) -> None:
        """Take the pieces' state and the groups' options from `whole`, whose state may be given away."""
        self._optimizer.state.clear()
        for piece, tensor in zip(self._owned.pieces, self._owned.tensors, strict=True):
            parameter = self._owned.parameters[piece.parameter]
            if of_parameter := self.whole.state.get(parameter):
                flattening = Flattening()
                tree = flattening(of_parameter, "state")
                parts = {
                    name: (cut_out(one, piece) if one.shape == parameter.shape else one).clone()
                    for name, one in flattening.tensors.items()
                }
                self._optimizer.state[tensor] = _nested(tree, parts)
        for group, whole in zip(self._optimizer.param_groups, self.whole.param_groups, strict=True):
            group.update({name: value for name, value in whole.items() if name not in NOT_COPIED})
        self.forget()

    def forget(self) -> None:
        """The state has changed: that of `whole` is none until `collect`."""
        if self.is_whole or self.whole.state:
            self.whole.state.clear()
            self.is_whole = False

    def _described(self) -> tuple[list[Any], list[dict[str, Tensor]]]:
        """Each piece with state, as JSON values, and its tensors by path."""
        entries, tensors = [], []
        for piece, tensor in zip(self._owned.pieces, self._owned.tensors, strict=True):
            if not (state := self._optimizer.state.get(tensor)):
                continue
            parameter, flattening = self._owned.parameters[piece.parameter], Flattening()
            tree = flattening(state, str(piece.parameter))
            kinds = {}
            for path, one in flattening.tensors.items():
                is_cut = tensor.shape != parameter.shape and one.shape == tensor.shape
                like = parameter if is_cut else one
                strides = torch.empty_like(like, device="meta").stride()
                kinds[path] = [str(one.dtype).removeprefix("torch."), list(like.shape), list(strides), is_cut]
            entries.append([piece.parameter, piece.start, tree, kinds])
            tensors.append(flattening.tensors)
        return entries, tensors

    def _make_places(self, first: Mapping[int, Any]) -> None:
        """Allocate memory for the tensors that have none of their kind."""
        wanted = {
            (number, path): _Kind(dtype, tuple(shape), tuple(strides), is_cut)
            for number, (_, _, kinds) in first.items()
            for path, (dtype, shape, strides, is_cut) in kinds.items()
        }
        new = {key: kind for key, kind in wanted.items() if key not in self._places or self._places[key][0] != kind}
        if not new:
            return
        memory = self._allocate(sum(whole_lines(kind.num_bytes) for kind in new.values()))
        offset = 0
        for key, kind in new.items():
            self._places[key] = kind, memory[offset : offset + kind.num_bytes]
            offset += whole_lines(kind.num_bytes)

    def _fill(self, first: Mapping[int, Any]) -> None:
        self.whole.state.clear()
        for number, (_, tree, kinds) in first.items():
            views = {path: kind.view(memory) for path in kinds for kind, memory in [self._places[number, path]]}
            parameter = self._owned.parameters[number]
            self.whole.state[parameter] = _nested(tree, views)

    @staticmethod
    def _move(tensor: Tensor, place: Tensor) -> None:
        """Let the tensor, whoever refers to it, lie in `place`."""
        if tensor.data_ptr() != place.data_ptr():
            tensor.data = place.copy_(tensor)


def _refuse() -> NoReturn:
    raise UsageError(
        "optimizer.state_dict() during training: with sharding each worker's optimizer holds the state of its own "
        "pieces of the parameters. Once training has ended it holds all again; mbgd's checkpoints hold all; "
        "sharding=none leaves the optimizer as it is."
    )


def _nested(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    return unflatten(tree, lambda path, _: tensors[path])


def _order(entry: Any) -> tuple[int, int]:
    return entry[0], entry[1]


def hold_pieces(optimizer: Optimizer, owned: Owned) -> None:
    """Give the optimizer the pieces in place of the parameters."""
    pieces: dict[Tensor, list[Tensor]] = defaultdict(list)
    for piece, tensor in zip(owned.pieces, owned.tensors, strict=True):
        pieces[owned.parameters[piece.parameter]].append(tensor)
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        named = [(name, one) for name, p in zip(names, group["params"], strict=True) for one in pieces.get(p, ())]
        group["params"] = [one for _, one in named]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in named]
