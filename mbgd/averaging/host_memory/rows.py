"""The gradients of every worker of a host in memory that all of them map, and what they tell each other."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mbgd.averaging.host_memory.layout import Layout, whole_lines
from mbgd.averaging.host_memory.memory import HostMemory

Row = Sequence[Tensor | None]
"""A gradient for each parameter; None where the parameter took no part."""

NO_NOTE = 0
MOVED_ON = 255
"""The note of a worker whose trained parameters are no longer those of this exchange."""


class Rows:
    """Each worker's rows of gradients with a flag for each gradient that is there, and its note."""

    def __init__(self, parameters: Sequence[Tensor], num_rows: int, memory: HostMemory) -> None:
        """num_rows: the most rows that a worker has. All workers make it alike; raises CannotShareError."""
        self.layout = layout = Layout(parameters)
        flags_bytes = whole_lines(num_rows * len(parameters) + 1)
        pieces = memory.allocate(flags_bytes + num_rows * layout.num_bytes)
        self.of_workers = [piece[flags_bytes:].view(num_rows, layout.num_bytes) for piece in pieces]
        """Bytes by worker of the host, then by row."""
        self.places = [layout.views(row) for row in self.of_workers[memory.rank]]
        """This worker's gradients in shared memory: for each row, one view for each parameter."""
        self._flags = [piece[: num_rows * len(parameters)].view(num_rows, -1).numpy() for piece in pieces]
        self._my_flags = self._flags[memory.rank]
        self._notes = [piece[flags_bytes - 1 : flags_bytes].numpy() for piece in pieces]
        self._my_note = self._notes[memory.rank]
        self._written: list[list[bool]] = [[] for _ in range(num_rows)]

    def put(self, rows: Sequence[Row], note: int) -> None:
        """Write this worker's rows, where they are not in `places` already, their flags and the note."""
        for number, row in enumerate(rows):
            self._put(number, row)
        self._my_note[0] = note

    def _put(self, number: int, row: Row) -> None:
        places = self.places[number]
        moved = [(place, g) for place, g in zip(places, row, strict=True) if g is not None and g is not place]
        if moved:
            torch._foreach_copy_([place for place, _ in moved], [gradient for _, gradient in moved])
        flags = [gradient is not None for gradient in row]
        if flags != self._written[number]:
            self._my_flags[number] = self._written[number] = flags
        if not all(flags):
            torch._foreach_zero_([place for place, there in zip(places, flags, strict=True) if not there])

    def notes(self) -> list[int]:
        """The note of each worker of the host."""
        return [int(of_worker[0]) for of_worker in self._notes]

    def flags(self, rows_of_workers: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """By worker of the host: for each of its rows, 1 for each parameter that has a gradient there, otherwise 0."""
        return [flags[:held] for flags, held in zip(self._flags, rows_of_workers, strict=True)]
