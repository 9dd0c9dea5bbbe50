"""What each worker has of the state, where the other workers of the host find it once that worker is lost.

Where each worker has the optimizer's state of its own pieces alone, a lost worker's would be gone, or half updated. So
each copies its pieces, after every update and before the others see them, into memory that all workers of the host
map and that outlives it. There is room for two steps, in turn: workers are at most one step apart, so whatever step the
one that is furthest has reached, everybody's pieces of that step are whole there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.averaging.host_memory.layout import whole_lines
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.pieces import Owned, Piece, cut_out, in_memory_order
from mbgd.errors import UsageError
from mbgd.step.pieces_state import PiecesState
from mbgd.step.sharding_trial import made_state
from mbgd.step.whole_state import WholeState, own_parts
from mbgd.workers.group import Workers
from mbgd.workers.messages import message, value_of

HEADER_BYTES = 64
"""Three int64: how many times the worker had kept its pieces (0: not whole), the step, and the length of the JSON."""
DESCRIPTION_BYTES = 1024
"""At least as many as a piece's nesting and the kind of one tensor of its state take as JSON."""


class KeptPieces:
    """This worker's pieces of parameters and optimizer state, kept for the others, and theirs."""

    def __init__(self, optimizer: Optimizer, owned: Owned, workers: Workers) -> None:
        """Every worker makes one, while the optimizer holds the parameters and has no state yet.

        Raises CannotShareError, and UsageError where it is not known how much state the optimizer makes.
        """
        self._owned, self._workers, self._num_kept = owned, workers, 0
        made = made_state(optimizer) or made_state(optimizer, from_values=True)
        if made is None:
            raise UsageError(
                f"recovery=continue with sharding=optimizer, but how much state {type(optimizer).__name__} makes is "
                "not known. Use sharding=none, or recovery=restart."
            )
        size = whole_lines(max(_bytes_of(pieces, owned, made) for pieces in owned.of_workers))
        self._rooms = [room.chunk(2) for room in HostMemory(workers).allocate(2 * size)]
        """Two for each worker."""
        self._beside: dict[int, Any] = {}
        """After the last two steps: what every worker has of the state."""

    def keep(self, step: int, state: PiecesState, beside: Any) -> None:
        """Keep the state after `step` steps. beside: what belongs to it, on every worker alike."""
        room = self._rooms[self._workers.rank][self._num_kept % 2]
        entries, tensors = state.described()
        content = message(entries)
        of_pieces = [_bytes(tensor) for tensor in self._owned.tensors]
        header = room[:HEADER_BYTES].view(torch.int64)
        header[0], begin = 0, HEADER_BYTES
        for part in (content, *of_pieces, *own_parts(entries, tensors)):
            if begin + len(part) > len(room):
                raise UsageError(
                    f"recovery=continue with sharding=optimizer: the optimizer made more state than the {len(room):,} "
                    "bytes that its first step was expected to make. Use sharding=none, or recovery=restart."
                )
            room[begin : begin + len(part)].copy_(part)
            begin += len(part)
        self._num_kept += 1
        header[1], header[2] = step, len(content)
        header[0] = self._num_kept
        self._beside = {at: one for at, one in self._beside.items() if at == step - 1} | {step: beside}

    def recall(self, step: int, state: PiecesState) -> Any:
        """Give the optimizer and the parameters what all workers kept after `step` steps, also those that are lost.

        Needs no other worker. Returns what belongs to it, and None, with nothing changed, where not all have kept it.
        """
        found = [self._content(rooms, step) for rooms in self._rooms]
        if step not in self._beside or any(one is None for one in found):
            return None
        contents = [one for one in found if one is not None]
        whole = WholeState([entries for entries, _ in contents], self._owned)
        whole.allocate(lambda kind: torch.device("cpu") if kind.is_on_host else self._workers.device)
        for rank, (_, content) in enumerate(contents):
            for place in [*map(self._place, self._owned.of_workers[rank]), *whole.places(rank)]:
                place.copy_(content[: len(place)])
                content = content[len(place) :]
        state.release_with(whole.state())
        return self._beside[step]

    def _content(self, rooms: Sequence[Tensor], step: int) -> tuple[list[Any], Tensor] | None:
        """A worker's pieces with state as it kept them after `step` steps, and the bytes; None if it has not."""
        for room in rooms:
            number, at, length = room[:HEADER_BYTES].view(torch.int64)[:3].tolist()
            if number and at == step:
                start = HEADER_BYTES + length
                return value_of(room[HEADER_BYTES:start]), room[start:]
        return None

    def _place(self, piece: Piece) -> Tensor:
        return _bytes(cut_out(self._owned.parameters[piece.parameter].detach(), piece))


def _bytes_of(pieces: Sequence[Piece], owned: Owned, made: Mapping[Tensor, Sequence[Tensor]]) -> int:
    """What pieces take in a room. made: the tensors of each parameter's state."""
    total = HEADER_BYTES
    for piece in pieces:
        parameter = owned.parameters[piece.parameter]
        share = (piece.stop - piece.start) / max(parameter.numel(), 1)
        for tensor in (parameter, *made.get(parameter, ())):
            total += DESCRIPTION_BYTES + math.ceil(tensor.nbytes * (share if tensor.shape == parameter.shape else 1))
    return total


def _bytes(tensor: Tensor) -> Tensor:
    """In the order of memory: a view."""
    return in_memory_order(tensor.detach()).view(torch.uint8)
