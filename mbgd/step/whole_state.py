"""The optimizer's state of whole parameters, put together from that of all workers' pieces."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mbgd.averaging.pieces import Owned, in_memory_order, with_strides
from mbgd.step.pieces_state import StateKind, of_parameters, order


class WholeState:
    """Memory for the whole state, where each worker's part of it goes, and the state that it holds then."""

    def __init__(self, of_workers: Sequence[list[Any]], owned: Owned) -> None:
        """of_workers: each worker's pieces with state, as `PiecesState.described` gives them."""
        self._of_workers, self._owned = of_workers, owned
        self._entries = sorted((entry for entries in of_workers for entry in entries), key=order)
        self._kinds = {
            (number, path): StateKind.of(kind)
            for number, _, _, kinds in reversed(self._entries)  # so that a parameter's first piece counts
            for path, kind in kinds.items()
        }
        self._tensors: dict[tuple[int, str], Tensor] = {}

    def num_bytes(self, counts: Callable[[StateKind], bool]) -> int:
        """Of the tensors that count."""
        return sum(kind.num_bytes for kind in self._kinds.values() if counts(kind))

    def allocate(self, device: Callable[[StateKind], torch.device]) -> None:
        """Make memory for every tensor. Raises MemoryError or RuntimeError."""
        for key, kind in self._kinds.items():
            self._tensors[key] = torch.empty_strided(kind.shape, kind.strides, dtype=kind.dtype, device=device(kind))

    def places(self, rank: int) -> list[Tensor]:
        """Where the worker's `own_parts` go, in their order."""
        sizes = {(one.parameter, one.start): one.stop - one.start for one in self._owned.of_workers[rank]}
        places = []
        for number, start, _, kinds in self._of_workers[rank]:
            for path, values in kinds.items():
                is_cut = StateKind.of(values).is_cut
                if is_cut or start == 0:
                    whole = in_memory_order(self._tensors[number, path])
                    part = whole[start : start + sizes[number, start]] if is_cut else whole
                    places.append(part.view(torch.uint8))
        return places

    def state(self) -> dict[Tensor, Any]:
        """The state of each parameter, in this memory."""
        return of_parameters(self._entries, self._owned.parameters, lambda *key: self._tensors[key])


def own_parts(entries: Sequence[Any], tensors: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
    """A worker's part of the whole state, as bytes in the order of memory; the arguments are those of
    `PiecesState.described`. State that is not cut is that of a parameter's first piece."""
    for (_, start, _, kinds), of_piece in zip(entries, tensors, strict=True):
        for path, tensor in of_piece.items():
            kind = StateKind.of(kinds[path])
            if kind.is_cut or start == 0:
                strides = tensor.stride() if kind.is_cut else kind.strides
                yield in_memory_order(with_strides(tensor, strides)).view(torch.uint8)
