"""The state of the pieces in memory that all workers of a host map, where it is whole."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.averaging.host_memory.layout import LINE_BYTES, whole_lines
from mbgd.averaging.host_memory.parameters import show_shared
from mbgd.averaging.pieces import Owned
from mbgd.checkpoints.keeper import Keeper
from mbgd.errors import UsageError
from mbgd.step.pieces_state import PiecesState, StateKind, lacking, of_parameters, order
from mbgd.workers.group import Workers
from mbgd.workers.messages import message

LENGTH_BYTES = 8


class SharedState(PiecesState):
    """Keeps the tensors of all pieces' state in memory that all workers map, where it is whole.

    State that is not tensors is written there after each step, too. So every worker can read the whole state between
    steps, without asking the others.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        owned: Owned,
        allocate: Callable[[int], tuple[Tensor, Tensor]],
        workers: Workers,
        *,
        stays_in_place: bool,
    ) -> None:
        """allocate(bytes): memory of all workers, mapped twice as by `HostMemory.allocate_once`.

        stays_in_place: the optimizer keeps each tensor of its state, and has no other state, once it has made it.
        """
        super().__init__(optimizer, owned, workers)
        self._allocate, self._stays_in_place = allocate, stays_in_place
        self._places: dict[tuple[int, str], tuple[StateKind, Tensor, Tensor]] = {}
        """(number of the parameter, path) → where that tensor of its state lies, in both mappings."""
        self._own_pages: list[Tensor] = []
        """The second mappings, in which the optimizer has the whole state between two trainings."""
        self._has_moved = allocate(LINE_BYTES * workers.num_workers)[0][::LINE_BYTES].numpy()
        """For each worker, whether its state has something that is not in its place."""
        self._num_placed = 0
        """Number of this worker's pieces in the optimizer's state when all of it lay in its places."""
        self._boards: list[Tensor] = []
        """What each worker's state is beside tensors: the length in bytes, and JSON."""

    @property
    def is_everywhere(self) -> bool:
        return True

    def release(self) -> None:
        """What is written to the state from then on stays in this process: every worker may write the same."""
        for pages in self._own_pages:
            show_shared(pages)
        self._read_from(lambda kind, _, own: _view(kind, own))
        self._copy_options(self._optimizer, self.whole)
        self._give_back()

    def problems(self, find: Callable[[], list[str]]) -> list[str]:
        return find()

    def together(self, checkpoints: Keeper) -> Keeper:
        return checkpoints

    def after_update(self) -> None:
        """Tell the others of this worker's new state."""
        super().after_update()
        if self._stays_in_place:
            self._has_moved[self._workers.rank] = len(self._optimizer.state) != self._num_placed
        else:
            self._has_moved[self._workers.rank] = not self._write_board(*self.described())

    def settle(self) -> None:
        """Find places for new state."""
        if self._has_moved.any():
            self._place()

    def _read_pieces(self) -> None:
        """The tensors of `whole` are shared with the pieces."""
        self._read_from(lambda kind, shared, _: _view(kind, shared))

    def _read_from(self, view: Callable[[StateKind, Tensor, Tensor], Tensor]) -> None:
        self.whole.state.clear()
        entries = [entry for board in self._boards for entry in json.loads(_content(board))]
        views = of_parameters(entries, self._owned.parameters, lambda *key: view(*self._places[key]))
        self.whole.state.update(views)

    def _place(self) -> None:
        """Let all workers' state lie in shared memory."""
        mine, tensors = self.described()
        of_workers = self._workers.gather_values(mine)
        if why := lacking(of_workers, self._owned):
            raise UsageError(f"sharding=optimizer: {why}. Use sharding=none.")
        first: dict[int, Any] = {}
        for number, start, _, kinds in sorted((one for entries in of_workers for one in entries), key=order):
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
            self._boards = list(self._allocate(room * self._workers.num_workers)[0].chunk(self._workers.num_workers))
        self._write_board(mine, tensors)
        self._has_moved[self._workers.rank] = False
        self._workers.barrier()  # all have moved theirs

    def _place_of(self, number: int, start: int, path: str, tensor: Tensor) -> Tensor | None:
        """Where a tensor of a piece's state lies; None if that of another piece of the parameter counts."""
        kind, memory, _ = self._places[number, path]
        if kind.is_cut:
            return memory.view(tensor.dtype)[start : start + tensor.numel()]
        return _view(kind, memory) if start == 0 else None

    def _write_board(self, mine: list[Any], tensors: list[dict[str, Tensor]]) -> bool:
        """Write this worker's state beside tensors; False if a tensor is not in its place, or there is no room."""
        for (number, start, _, kinds), of_piece in zip(mine, tensors, strict=True):
            for path, tensor in of_piece.items():
                known = self._places.get((number, path))
                if known is None or known[0] != StateKind.of(kinds[path]):
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

    def _make_places(self, wanted: Mapping[int, Mapping[str, Any]]) -> None:
        """Allocate memory for the tensors that have none of their kind. wanted: for each parameter, path → kind."""
        kinds = {(number, path): StateKind.of(kind) for number, paths in wanted.items() for path, kind in paths.items()}
        new = {key: kind for key, kind in kinds.items() if key not in self._places or self._places[key][0] != kind}
        if not new:
            return
        shared, own = self._allocate(sum(whole_lines(kind.num_bytes) for kind in new.values()))
        self._own_pages.append(own)
        offset = 0
        for key, kind in new.items():
            place = slice(offset, offset + kind.num_bytes)
            self._places[key] = kind, shared[place], own[place]
            offset += whole_lines(kind.num_bytes)


def _view(kind: StateKind, memory: Tensor) -> Tensor:
    return memory.view(kind.dtype).as_strided(kind.shape, kind.strides)


def _content(board: Tensor) -> bytes:
    length = int(board[:LENGTH_BYTES].view(torch.int64)[0])
    return board[LENGTH_BYTES : LENGTH_BYTES + length].numpy().tobytes()
