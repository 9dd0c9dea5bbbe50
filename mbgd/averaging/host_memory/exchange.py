"""Sums all workers' gradients in shared memory, in the order of addition that the averaging chooses.

Every worker puts its gradients into memory that all map. After a barrier, each worker sums one slice over all workers
and writes the sum into every worker's memory; the parameters' gradients are views of it. So each element is summed by
one worker, and all have the same bits. A worker that owns pieces of the parameters sums those, and keeps the sums.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mbgd.averaging.host_memory.layout import LINE_BYTES, Layout, joined, whole_lines
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.host_memory.rows import MOVED_ON, NO_NOTE, Row, Rows
from mbgd.averaging.pieces import Owned, cut_out
from mbgd.batches.plan import cut
from mbgd.errors import UsageError

Fold = Callable[[Sequence[Tensor]], Tensor]
"""All rows, by rank and in each worker's order → their sum; may overwrite the rows."""

CHUNK_BYTES = 2**18
"""Bytes of every row that are summed at once, so that they are still in the processor's cache when the sum is
written."""


class Exchange:
    """Sums rows of gradients over all workers of a host.

    A parameter for which no worker has a gradient has none afterwards; if some have one, the others count as zeros.
    Each worker gives a note, which all read before anything is summed.
    """

    def __init__(self, parameters: Sequence[Tensor], num_rows: int, memory: HostMemory, *, rank: int) -> None:
        """num_rows: the most rows that a worker has. All workers make it alike; raises CannotShareError."""
        self._parameters, self._memory = parameters, memory
        self._rows = Rows(parameters, num_rows, memory)
        self.places = self._rows.places
        """This worker's gradients in shared memory: for each row, one view for each parameter."""
        of_workers = self._rows.of_workers
        self._chunks = list(_chunks(of_workers, _equal_slice(self._rows.layout, rank, len(of_workers))))
        self._owned: Owned | None = None
        self._sums: list[tuple[Tensor, int, Tensor]] = []
        """For each piece that this worker owns: the piece, its parameter's number, and its sum, in the first row."""
        self._read: list[bytes] = []
        self._used: list[bool] = []
        self.everywhere = True
        """Whether every parameter with a gradient in any row of the last exchange had one in all rows."""

    def own(self, owned: Owned) -> None:
        """Let this worker sum the pieces that it owns, instead of an equal slice."""
        owned.follow_flags()
        self._owned, self._sums = owned, []
        numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        layout, of_workers = self._rows.layout, self._rows.of_workers
        views, ranges = layout.views(of_workers[0][0]), []
        for piece, tensor in zip(owned.pieces, owned.tensors, strict=True):
            tensor.grad, number = None, numbers.get(owned.parameters[piece.parameter])
            if number is not None:
                begin = layout.offsets[number] + piece.start * tensor.element_size()
                ranges.append((tensor.dtype, begin, begin + whole_lines(tensor.nbytes)))
                self._sums.append((tensor, number, cut_out(views[number], piece)))
        self._chunks = list(_chunks(of_workers, joined(ranges)))

    def __call__(
        self,
        rows: Sequence[Row],
        rows_of_workers: Sequence[int],
        fold: Fold,
        note: int = NO_NOTE,
        *,
        whole: bool = True,
    ) -> list[int]:
        """Make the parameters' gradients the sum of all workers' rows; returns every worker's note, by rank.

        rows: this worker's; gradients that are already in `places` are not copied. rows_of_workers: the number of rows
        of each worker. If any worker's note is `MOVED_ON`, nothing is summed. whole=False: where workers own pieces,
        only these get gradients, valid until the next barrier, and the parameters have none.
        """
        whole = whole or self._owned is None
        self._rows.put(rows, note)
        self._memory.barrier()
        notes = self._rows.notes()
        if MOVED_ON in notes:
            self._memory.barrier()  # until all have read the notes
            return notes
        self._read_flags(rows_of_workers)
        for of_workers in self._chunks:
            total = fold([row for rows, held in zip(of_workers, rows_of_workers, strict=True) for row in rows[:held]])
            for target, *_ in of_workers if whole else of_workers[:1]:
                if target is not total:
                    target.copy_(total)
        if whole:
            self._memory.barrier()
        for parameter, place, used in zip(self._parameters, self.places[0], self._used, strict=True):
            parameter.grad = place if used and whole else None
        if self._owned is not None and whole:
            self._owned.take_gradients()
        elif self._owned is not None:
            for tensor, number, gradient in self._sums:
                tensor.grad = gradient if self._used[number] else None
        return notes

    def _read_flags(self, rows_of_workers: Sequence[int]) -> None:
        read = [flags.tobytes() for flags in self._rows.flags(rows_of_workers)]
        if read != self._read:  # flags seldom change
            self._read = read
            together = b"".join(read)
            of_parameters = [together[number :: len(self._parameters)] for number in range(len(self._parameters))]
            self._used = [any(flags) for flags in of_parameters]
            self.everywhere = all(any(flags) == all(flags) for flags in of_parameters)


def check_moved_on(notes: Sequence[int]) -> None:
    """UsageError, on every worker alike, if `requires_grad` changed on some workers only."""
    if others := [rank for rank, note in enumerate(notes) if note != MOVED_ON]:
        changed = [rank for rank, note in enumerate(notes) if note == MOVED_ON]
        raise UsageError(
            f"requires_grad of some parameters changed on worker {', '.join(map(str, changed))}, but not on worker "
            f"{', '.join(map(str, others))}. All workers must change it in the same step: let it depend on the step "
            "alone, never on the rank or on a worker's own examples."
        )


def _equal_slice(layout: Layout, rank: int, num_workers: int) -> list[tuple[torch.dtype, int, int]]:
    """One byte range of each dtype, in whole cache lines, so that no two workers write to the same one."""
    ranges = []
    for dtype, start, stop in layout.dtypes:
        num_lines = (stop - start) // LINE_BYTES
        first, last = (start + LINE_BYTES * cut(num_lines, num_workers, edge) for edge in (rank, rank + 1))
        ranges.append((dtype, first, last))
    return ranges


def _chunks(rows: Sequence[Tensor], ranges: Sequence[tuple[torch.dtype, int, int]]) -> Iterator[list[list[Tensor]]]:
    """The worker's part in chunks of one dtype: the same bytes of all rows, by worker and by row."""
    for dtype, first, last in ranges:
        for begin in range(first, last, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, last)
            yield [[row[begin:end].view(dtype) for row in of_worker] for of_worker in rows]
