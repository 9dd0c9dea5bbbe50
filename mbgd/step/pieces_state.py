"""The optimizer's state where each worker has that of its own pieces: together the state of one whole optimizer."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.averaging.pieces import Owned, cut_out, with_strides
from mbgd.checkpoints.keeper import Keeper
from mbgd.checks.optimizers import HOLDS_PIECES
from mbgd.errors import UsageError
from mbgd.files.state_tree import Flattening, unflatten
from mbgd.workers.group import Workers

NOT_COPIED = ("params", "param_names")
"""Entries of a group that differ between the whole optimizer and that of the pieces."""


@dataclass(frozen=True)
class StateKind:
    """One tensor of a parameter's state."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Without gaps."""
    is_cut: bool
    """Whether each piece has its part of it; otherwise the first piece's counts."""
    device: str
    """Its type: torch keeps some state of parameters on a GPU on the host."""

    @classmethod
    def of(cls, values: Any) -> "StateKind":
        """From JSON values, as in `PiecesState.described`."""
        name, shape, strides, is_cut, device = values
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return cls(dtype, tuple(shape), tuple(strides), is_cut, device)

    @property
    def is_on_host(self) -> bool:
        return self.device == "cpu"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PiecesState(ABC):
    """Gives the optimizer this worker's pieces to hold, and puts all workers' state together where that is asked for.

    Of state that is not cut, that of a parameter's first piece counts.
    """

    def __init__(self, optimizer: Optimizer, owned: Owned, workers: Workers) -> None:
        self._optimizer, self._owned, self._workers = optimizer, owned, workers
        self.whole: Optimizer = object.__new__(type(optimizer))
        """As if the optimizer held the parameters; its `state_dict()` is that of now."""
        vars(self.whole).update(vars(optimizer))
        self.whole.state_dict = self._whole_state_dict  # type: ignore[method-assign]
        self.holds_pieces = False
        """Whether the optimizer holds them in place of the parameters."""
        self._num_known = 0
        """Number of entries of the pieces' state when each was found to belong to a piece."""

    def hold(self) -> None:
        """Give the optimizer this worker's pieces in place of the parameters, until `release`; every worker calls this.

        Raises CannotShareError, on every worker alike.
        """
        if self.holds_pieces:
            return
        self.holds_pieces = True
        self.whole.param_groups = [dict(group) for group in self._optimizer.param_groups]
        self.whole.state = defaultdict(dict, self._optimizer.state)
        hold_pieces(self._optimizer, self._owned)
        self._optimizer.state_dict = self._whole_state_dict  # type: ignore[method-assign]
        setattr(self._optimizer, HOLDS_PIECES, True)
        self._optimizer.load_state_dict = _refuse_to_load  # type: ignore[method-assign]
        self._distribute()

    def release(self) -> None:
        """Give the optimizer the parameters and the whole state back; every worker calls this."""
        self._read()
        self._give_back()

    def release_with(self, state: Mapping[Tensor, Any]) -> None:
        """Give the optimizer the parameters back, and this whole state, without the other workers."""
        self.whole.state = defaultdict(dict, state)
        self._copy_options(self._optimizer, self.whole)
        self._give_back()

    def _give_back(self) -> None:
        self.holds_pieces = False
        del self._optimizer.state_dict, self._optimizer.load_state_dict
        delattr(self._optimizer, HOLDS_PIECES)
        for group, whole in zip(self._optimizer.param_groups, self.whole.param_groups, strict=True):
            group.update(whole)
        self._optimizer.state.clear()  # an optimizer around another may share it
        self._optimizer.state.update(self.whole.state)

    def replace(self, restore: Callable[[], None]) -> None:
        """Let `restore` give `whole` another state, and keep the pieces' parts of it."""
        self.hold()
        restore()
        self._distribute()

    @property
    @abstractmethod
    def is_everywhere(self) -> bool:
        """Whether each worker can read the whole state now, without the others."""

    @abstractmethod
    def problems(self, find: Callable[[], list[str]]) -> list[str]:
        """What `find` finds wrong with the state of `whole`, the same on every worker; every worker calls this."""

    @abstractmethod
    def together(self, checkpoints: Keeper) -> Keeper:
        """The checkpoints, taken while the whole state is there."""

    def after_update(self) -> None:
        """Called when this worker has updated its pieces, before all wait for each other.

        UsageError if the optimizer has made state that belongs to none of its pieces, and so to no checkpoint.
        """
        if len(self._optimizer.state) == self._num_known:
            return
        pieces = set(map(id, self._owned.tensors))
        if strangers := [key for key in self._optimizer.state if id(key) not in pieces]:
            key = strangers[0]
            told = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
            raise UsageError(
                f"the optimizer {type(self._optimizer).__name__} has made state for {told}, which is none of its "
                "parameters. With sharding=optimizer each worker has the state of its parameters alone, and no "
                "checkpoint would have this. Use sharding=none."
            )
        self._num_known = len(self._optimizer.state)

    @abstractmethod
    def settle(self) -> None:
        """Called once all workers have called `after_update`. Raises CannotShareError, on every worker alike."""

    @abstractmethod
    def _read_pieces(self) -> None:
        """Put together the state of `whole` while the optimizer holds pieces."""

    @abstractmethod
    def _place(self) -> None:
        """Called by every worker once the pieces have another state."""

    def _read(self) -> None:
        if self.holds_pieces:
            self._read_pieces()
        else:
            self.whole.state = defaultdict(dict, self._optimizer.state)
        self._copy_options(self._optimizer, self.whole)

    def _distribute(self) -> None:
        """Take the pieces' state and the groups' options from `whole`, whose state may be given away."""
        self._optimizer.state.clear()
        self._optimizer.state.update(state_of_pieces(self.whole.state, self._owned))
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

    def described(self) -> tuple[list[Any], list[dict[str, Tensor]]]:
        """Of this worker: each piece with state, as JSON values, and its tensors by path."""
        entries, tensors = [], []
        for piece, tensor in zip(self._owned.pieces, self._owned.tensors, strict=True):
            if (state := self._optimizer.state.get(tensor)) is None:
                continue
            parameter, flattening = self._owned.parameters[piece.parameter], Flattening()
            tree = flattening(state, str(piece.parameter))
            kinds = {}
            for path, one in flattening.tensors.items():
                is_cut = tensor.shape != parameter.shape and one.shape == tensor.shape
                like = parameter if is_cut else one
                strides = torch.empty_like(like, device="meta").stride()
                dtype = str(one.dtype).removeprefix("torch.")
                kinds[path] = [dtype, list(like.shape), list(strides), is_cut, one.device.type]
            entries.append([piece.parameter, piece.start, tree, kinds])
            tensors.append(flattening.tensors)
        return entries, tensors


def _refuse_to_load(*_: Any, **__: Any) -> None:
    raise UsageError(
        "optimizer.load_state_dict during training: with sharding=optimizer the optimizer then holds pieces of the "
        "parameters. Load the state before Trainer.fit or after it, or use sharding=none."
    )


def state_of_pieces(whole: Mapping[Tensor, Any], owned: Owned) -> dict[Tensor, Any]:
    """The state of this worker's pieces, in memory of its own. whole: that of the parameters."""
    found: dict[Tensor, Any] = {}
    for piece, tensor in zip(owned.pieces, owned.tensors, strict=True):
        parameter = owned.parameters[piece.parameter]
        if parameter not in whole:
            continue
        flattening = Flattening()
        tree = flattening(whole[parameter], "state")
        is_part = tensor.shape != parameter.shape
        parts = {
            name: (
                cut_out(with_strides(one, parameter.stride()), piece)
                if is_part and one.shape == parameter.shape
                else one
            ).clone()
            for name, one in flattening.tensors.items()
        }
        found[tensor] = nested(tree, parts)
    return found


def nested(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state of a piece or parameter, from its nesting and its tensors by path."""
    return unflatten(tree, lambda path, _: tensors[path])


def lacking(of_workers: Sequence[Iterable[Any]], owned: Owned) -> str:
    """Why the pieces' state is not that of whole parameters; empty if it is.

    of_workers: each worker's pieces with state, as `PiecesState.described` gives them.
    """
    paths = {(number, start): set(kinds) for entries in of_workers for number, start, _, kinds in entries}
    wanted: dict[int, set[str]] = {}
    for (number, _), of_piece in paths.items():
        wanted[number] = wanted.get(number, set()) | of_piece
    for pieces in owned.of_workers:
        for piece in pieces:
            has = paths.get((piece.parameter, piece.start))
            if piece.parameter in wanted and (has is None or has != wanted[piece.parameter]):
                return (
                    f"the optimizer has made other state for some elements of trained parameter number "
                    f"{piece.parameter} than for others, so it cannot be that of the whole parameter"
                )
    return ""


def of_parameters(
    entries: Iterable[Any], parameters: Sequence[Tensor], tensor: Callable[[int, str], Tensor]
) -> dict[Tensor, Any]:
    """The state of each parameter; of what is told of its pieces, the first one's counts.

    entries: as `PiecesState.described` gives them. tensor(number of the parameter, path): a whole one of its state.
    """
    found: dict[Tensor, Any] = {}
    for number, _, tree, kinds in sorted(entries, key=order):
        if parameters[number] not in found:
            found[parameters[number]] = nested(tree, {path: tensor(number, path) for path in kinds})
    return found


def order(entry: Any) -> tuple[int, int]:
    """Of a described piece: its parameter's number, and where it starts."""
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
