"""The optimizer's state where each worker has that of its own pieces: together the state of one whole optimizer."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.averaging.host_memory.layout import LINE_BYTES, whole_lines
from mbgd.averaging.pieces import Owned, cut_out
from mbgd.files.state_tree import Flattening, unflatten
from mbgd.workers.group import Workers
from mbgd.workers.messages import message

LENGTH_BYTES = 8
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
    """Keeps the tensors of all pieces' state in memory that all workers map, where it is whole.

    State that is not tensors is written there after each step, too. So every worker can read the whole state between
    steps, without asking the others.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        owned: Owned,
        allocate: Callable[[int], Tensor],
        workers: Workers,
        *,
        stays_in_place: bool,
    ) -> None:
        """allocate(bytes): memory of all workers.

        stays_in_place: the optimizer keeps each tensor of its state, and has no other state, once it has made it.
        """
        self._optimizer, self._owned, self._allocate, self._workers = optimizer, owned, allocate, workers
        self._stays_in_place = stays_in_place
        self.whole: Optimizer = object.__new__(type(optimizer))
        """As if the optimizer held the parameters; its `state_dict()` is that of now."""
        vars(self.whole).update(vars(optimizer))
        self.whole.state_dict = self._whole_state_dict  # type: ignore[method-assign]
        self._holds_pieces = False
        self._places: dict[tuple[int, str], tuple[_Kind, Tensor]] = {}
        """(number of the parameter, path) → where that tensor of its state lies."""
        self._has_moved = allocate(LINE_BYTES * workers.num_workers)[::LINE_BYTES].numpy()
        """For each worker, whether its state has something that is not in its place."""
        self._num_placed = 0
        """Number of this worker's pieces in the optimizer's state when all of it lay in its places."""
        self._boards: list[Tensor] = []
        """What each worker's state is beside tensors: the length in bytes, and JSON."""
        self.hold()

    def hold(self) -> None:
        """Give the optimizer this worker's pieces in place of the parameters, until `release`."""
        if self._holds_pieces:
            return
        self._holds_pieces = True
        self.whole.param_groups = [dict(group) for group in self._optimizer.param_groups]
        self.whole.state = defaultdict(dict, self._optimizer.state)
        hold_pieces(self._optimizer, self._owned)
        self._optimizer.state_dict = self._whole_state_dict  # type: ignore[method-assign]
        self.distribute()

    def release(self) -> None:
        """Give the optimizer the parameters and the whole state back."""
        self._read()
        self._holds_pieces = False
        del self._optimizer.state_dict
        for group, whole in zip(self._optimizer.param_groups, self.whole.param_groups, strict=True):
            group.update(whole)
        self._optimizer.state = defaultdict(dict, self.whole.state)

    def after_update(self) -> None:
        """Tell the others of this worker's new state; before all wait for each other."""
        if self._stays_in_place:
            self._has_moved[self._workers.rank] = len(self._optimizer.state) != self._num_placed
        else:
            self._has_moved[self._workers.rank] = not self._write_board(*self._described())

    def settle(self) -> None:
        """Find places for new state; every worker calls this once all have called `after_update`.

        Raises CannotShareError, on every worker alike, where there is too little memory.
        """
        if self._has_moved.any():
            self._place()

    def _read(self) -> None:
        """Put together the state of `whole`; its tensors are shared with the pieces."""
        if not self._holds_pieces:
            self.whole.state = defaultdict(dict, self._optimizer.state)
            self._copy_options(self._optimizer, self.whole)
            return
        self.whole.state.clear()
        entries = [entry for board in self._boards for entry in json.loads(_content(board))]
        for number, _, tree, kinds in sorted(entries, key=_order):
            parameter = self._owned.parameters[number]
            if parameter not in self.whole.state:  # that of the first piece
                views = {path: kind.view(memory) for path in kinds for kind, memory in [self._places[number, path]]}
                self.whole.state[parameter] = _nested(tree, views)
        self._copy_options(self._optimizer, self.whole)

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
        self._copy_options(self.whole, self._optimizer)
        self.whole.state.clear()
        self._place()

    @staticmethod
    def _copy_options(optimizer: Optimizer, to: Optimizer) -> None:
        for group, other in zip(optimizer.param_groups, to.param_groups, strict=True):
            other.update({name: value for name, value in group.items() if name not in NOT_COPIED})

    def _whole_state_dict(self) -> dict[str, Any]:
        self._read()
        return type(self.whole).state_dict(self.whole)

    def _place(self) -> None:
        """Let all workers' state lie in shared memory."""
        mine, tensors = self._described()
        of_workers = self._workers.gather_values(mine)
        first: dict[int, Any] = {}
        for number, start, _, kinds in sorted((one for entries in of_workers for one in entries), key=_order):
            first.setdefault(number, (start, kinds))
        self._make_places({number: kinds for number, (_, kinds) in first.items()})
        for (number, start, _, _), of_piece in zip(mine, tensors, strict=True):
            for path, tensor in of_piece.items():
                place = self._place_of(number, start, path, tensor)
                if place is not None and tensor.data_ptr() != place.data_ptr():
                    tensor.data = place.copy_(tensor)  # whoever refers to the tensor
        self._num_placed = len(self._optimizer.state)
        longest = max(len(message(entries)) for entries in of_workers)
        if not self._boards or longest > len(self._boards[0]) - LENGTH_BYTES:
            room = whole_lines(LENGTH_BYTES + 2 * longest)  # numbers get longer
            self._boards = list(self._allocate(room * self._workers.num_workers).chunk(self._workers.num_workers))
        self._write_board(mine, tensors)
        self._has_moved[self._workers.rank] = False
        self._workers.barrier()  # all have moved theirs

    def _place_of(self, number: int, start: int, path: str, tensor: Tensor) -> Tensor | None:
        """Where a tensor of a piece's state lies; None if that of another piece of the parameter counts."""
        kind, memory = self._places[number, path]
        if kind.is_cut:
            return memory.view(tensor.dtype)[start : start + tensor.numel()]
        return kind.view(memory) if start == 0 else None

    def _write_board(self, mine: list[Any], tensors: list[dict[str, Tensor]]) -> bool:
        """Write this worker's state beside tensors; False if a tensor is not in its place, or there is no room."""
        for (number, start, _, kinds), of_piece in zip(mine, tensors, strict=True):
            for path, tensor in of_piece.items():
                known = self._places.get((number, path))
                if known is None or known[0] != _kind_of(kinds[path]):
                    return False
                place = self._place_of(number, start, path, tensor)
                if place is not None and place.data_ptr() != tensor.data_ptr():
                    return False
        content = message(mine)
        if not self._boards or len(content) > len(self._boards[0]) - LENGTH_BYTES:
            return False
        board = self._boards[self._workers.rank]
        board[:LENGTH_BYTES].view(torch.int64)[0] = len(content)
        board[LENGTH_BYTES : LENGTH_BYTES + len(content)] = content
        return True

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

    def _make_places(self, wanted: Mapping[int, Mapping[str, Any]]) -> None:
        """Allocate memory for the tensors that have none of their kind. wanted: for each parameter, path → kind."""
        kinds = {(number, path): _kind_of(kind) for number, paths in wanted.items() for path, kind in paths.items()}
        new = {key: kind for key, kind in kinds.items() if key not in self._places or self._places[key][0] != kind}
        if not new:
            return
        memory = self._allocate(sum(whole_lines(kind.num_bytes) for kind in new.values()))
        offset = 0
        for key, kind in new.items():
            self._places[key] = kind, memory[offset : offset + kind.num_bytes]
            offset += whole_lines(kind.num_bytes)


def _kind_of(values: Any) -> _Kind:
    dtype, shape, strides, is_cut = values
    return _Kind(dtype, tuple(shape), tuple(strides), is_cut)


def _content(board: Tensor) -> bytes:
    length = int(board[:LENGTH_BYTES].view(torch.int64)[0])
    return board[LENGTH_BYTES : LENGTH_BYTES + length].numpy().tobytes()


def _nested(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    return unflatten(tree, lambda path, _: tensors[path])


def _order(entry: Any) -> tuple[int, int]:
    """Of a piece: its parameter's number, and where it starts."""
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
