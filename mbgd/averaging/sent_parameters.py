"""The parameters where workers share no memory: each has a copy of its own, and owners send the pieces they update.

Broadcasts, because gloo takes them of GPU tensors, too: from the parameters' memory on one worker into that on the
others, without copies. For this the parameters lie in one piece of memory, those of one owner next to each other.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from mbgd.averaging.host_memory.layout import LINE_BYTES, LINE_BYTES_ON_GPU, Layout, joined, whole_lines
from mbgd.averaging.pieces import Owned, Piece
from mbgd.workers.group import Workers
from mbgd.workers.under_way import UnderWay


class SentParameters:
    """Parameters of which each worker has a copy, and updates its own pieces."""

    allocate = None

    def __init__(self, by_name: Mapping[str, nn.Parameter], of_workers: list[list[Piece]], workers: Workers) -> None:
        """Moves the parameters, which are alike on all workers, to memory of this worker's."""
        self._names, self._parameters = list(by_name), list(by_name.values())
        first_owner = {piece.parameter: rank for rank in reversed(range(len(of_workers))) for piece in of_workers[rank]}
        by_owner = sorted(range(len(self._parameters)), key=lambda number: (first_owner[number], number))
        device = self._parameters[0].device
        self._line_bytes = LINE_BYTES_ON_GPU if device.type == "cuda" else LINE_BYTES
        layout = Layout([self._parameters[number] for number in by_owner], self._line_bytes)
        memory = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        views = dict(zip(by_owner, layout.views(memory), strict=True))
        offsets = dict(zip(by_owner, layout.offsets, strict=True))
        self._views = [views[number] for number in range(len(by_owner))]
        self.owned = Owned(self._parameters, of_workers, self._views, workers.rank)
        ranges = [
            (rank, *self._range_of(piece, offsets[piece.parameter]))
            for rank, pieces in enumerate(of_workers)
            for piece in pieces
        ]
        self._sent = [(rank, memory[begin:end]) for rank, begin, end in joined(ranges)]
        """Each owner with memory that only its pieces lie in."""
        self._broadcasts = UnderWay()
        self.adopt()

    def _range_of(self, piece: Piece, offset: int) -> tuple[int, int]:
        size = self._parameters[piece.parameter].element_size()
        begin = offset + piece.start * size
        return begin, begin + whole_lines((piece.stop - piece.start) * size, self._line_bytes)

    def adopt(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.detach())
                parameter.data = view

    def spread(self) -> None:
        for rank, memory in self._sent:
            if len(memory):
                self._broadcasts.add(dist.broadcast(memory, src=rank, async_op=True))
        self._broadcasts.wait()

    def written_by_others(self) -> list[str]:
        """Those whose memory was replaced. What was written into it counts, as in the copies of unsharded workers."""
        together = zip(self._names, self._parameters, self._views, strict=True)
        return [name for name, parameter, view in together if parameter.data_ptr() != view.data_ptr()]
