"""Sums gradients over the CPU workers of several hosts: in the memory of each host, and then between the hosts.

The rows of all hosts are alike. Each host cuts them among its workers, and a worker owns on its host what it sums
there. Where an owner has added up the rows of its host, it exchanges the sum with the owners of the same bytes on the
other hosts: of each chunk, every host adds up one part over all hosts and sends it to the others. So a host sends as
many bytes as one worker in a ring all-reduce over the hosts. Chunks travel while the next ones are added up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mbgd.averaging.host_memory.between_hosts import BetweenHosts, start, wait
from mbgd.averaging.host_memory.exchange import Fold
from mbgd.averaging.host_memory.layout import LINE_BYTES
from mbgd.averaging.host_memory.rows import MOVED_ON, NO_NOTE, Row, Rows
from mbgd.batches.plan import cut
from mbgd.workers.messages import bytes_of

CHUNK_BYTES = 2**19
"""Bytes of every row that are sent together."""


@dataclass(frozen=True)
class TwoFolds:
    """How to add up rows: first those of a host's workers, then what the hosts have."""

    within: Callable[[Sequence[Tensor]], list[Tensor]]
    """The rows of this host, by rank and in each worker's order → this host's terms; may overwrite the rows."""
    between: Fold
    """All hosts' terms, in the order of the hosts → their sum; may overwrite the terms."""
    terms_of_hosts: tuple[int, ...]
    """The number of terms that each host has."""


@dataclass(frozen=True)
class _Chunk:
    """Bytes of one dtype that this worker owns on its host."""

    rows: list[list[Tensor]]
    """By worker of the host and by row."""
    owners: list[int]
    """The rank of the worker that owns these bytes, by host."""
    parts: list[slice]
    """The elements that each host adds up over all hosts."""


class HostsExchange:
    """Sums rows of gradients over all workers of several hosts.

    A parameter for which no worker has a gradient has none afterwards; if some have one, the others count as zeros.
    Each worker gives a note, which all read before anything is summed.
    """

    def __init__(self, parameters: Sequence[Tensor], num_rows: int, between: BetweenHosts) -> None:
        """num_rows: the most rows that a worker has. All workers make it alike; raises CannotShareError."""
        self._parameters, self._between, self._memory = parameters, between, between.memory
        self._rows = Rows(parameters, num_rows, between.memory)
        self.places = self._rows.places
        self._chunks = list(_chunks(self._rows, between))
        self._received: dict[tuple[int, ...], list[list[list[Tensor]]]] = {}
        """By the number of terms of each host: memory for the terms that the others send, by chunk and host."""
        self._read: list[bytes] = []
        self._used: list[bool] = []
        self.everywhere = True
        """Whether every parameter with a gradient in any row of the last exchange had one in all rows."""

    def __call__(
        self,
        rows: Sequence[Row],
        rows_of_workers: Sequence[int],
        folds: TwoFolds,
        note: int = NO_NOTE,
        *,
        rider: Callable[[], Tensor] | None = None,
    ) -> tuple[list[int], Tensor]:
        """Make the parameters' gradients the sum of all workers' rows; returns every worker's note, by rank.

        rows: this worker's; gradients that are already in `places` are not copied. rows_of_workers: the number of rows
        of each worker. If any worker's note is `MOVED_ON`, nothing is summed. rider: gives the sum of some float64
        values over this host's workers, after a barrier; also returns their sum over the hosts.
        """
        self._rows.put(rows, note)
        self._memory.barrier()
        mine = torch.empty(0, dtype=torch.float64) if rider is None else rider()
        held = [rows_of_workers[rank] for rank in self._memory.members]
        notes, total = self._tell(held, mine)
        if MOVED_ON not in notes:
            self._add_up(held, folds)
            self._memory.barrier()
            for parameter, place, used in zip(self._parameters, self.places[0], self._used, strict=True):
                parameter.grad = place if used else None
        return notes, total

    def _tell(self, rows_of_members: Sequence[int], values: Tensor) -> tuple[list[int], Tensor]:
        """Swap flags, notes and values with the other hosts; returns all notes by rank and the sum of the values."""
        num_parameters, hosts = len(self._parameters), self._between.hosts
        flags = np.concatenate(self._rows.flags(rows_of_members))
        there = torch.from_numpy(np.concatenate([flags.any(0), flags.all(0)]).view(np.uint8))
        notes = torch.tensor(self._rows.notes(), dtype=torch.uint8)
        sizes = [values.nbytes, 2 * num_parameters]
        told = self._between.swap(
            torch.cat([bytes_of(values), there, notes]), [sum(sizes) + len(ranks) for ranks in hosts]
        )
        of_hosts = [torch.split(one, [*sizes, len(ranks)]) for one, ranks in zip(told, hosts, strict=True)]
        self._read_flags([of_host.numpy().tobytes() for _, of_host, _ in of_hosts])
        total = reduce(torch.add, [of_host.view(torch.float64) for of_host, _, _ in of_hosts])
        return self._between.by_rank([of_host.tolist() for _, _, of_host in of_hosts]), total

    def _read_flags(self, read: list[bytes]) -> None:
        if read != self._read:  # flags seldom change
            self._read = read
            told = np.array([list(one) for one in read], dtype=bool).reshape(len(read), 2, len(self._parameters))
            some, every = np.any(told[:, 0], axis=0), np.all(told[:, 1], axis=0)
            self._used = some.tolist()
            self.everywhere = np.array_equal(some, every)

    def _add_up(self, rows_of_members: Sequence[int], folds: TwoFolds) -> None:
        """Leave the sum over all workers in the first row of each worker of this host, for the bytes that are owned."""
        me = self._between.number
        others = [host for host in range(len(self._between.hosts)) if host != me]
        received = self._memory_for(folds.terms_of_hosts)
        under_way = [
            start(received=[(term, chunk.owners[host]) for host in others for term in terms[host]], sent=[])
            for chunk, terms in zip(self._chunks, received, strict=True)
        ]
        for chunk, terms, works in zip(self._chunks, received, under_way, strict=True):
            held = [row for rows, number in zip(chunk.rows, rows_of_members, strict=True) for row in rows[:number]]
            mine = folds.within(held)
            terms[me] = [term[chunk.parts[me]] for term in mine]
            sent = [(term[chunk.parts[host]], chunk.owners[host]) for host in others for term in mine]
            works += start(received=[], sent=sent)
        for chunk, terms, works in zip(self._chunks, received, under_way, strict=True):
            wait(works)
            first = chunk.rows[0][0]
            place = first[chunk.parts[me]]
            total = folds.between([term for of_host in terms for term in of_host])
            if total.data_ptr() != place.data_ptr():
                place.copy_(total)
            works += start(
                received=[(first[chunk.parts[host]], chunk.owners[host]) for host in others],
                sent=[(place, chunk.owners[host]) for host in others],
            )
        for chunk, works in zip(self._chunks, under_way, strict=True):
            wait(works)
            for row, *_ in chunk.rows[1:]:
                row.copy_(chunk.rows[0][0])

    def _memory_for(self, terms_of_hosts: tuple[int, ...]) -> list[list[list[Tensor]]]:
        if terms_of_hosts not in self._received:
            me = self._between.number
            self._received[terms_of_hosts] = [
                [
                    [torch.empty_like(chunk.rows[0][0][chunk.parts[me]]) for _ in range(number if host != me else 0)]
                    for host, number in enumerate(terms_of_hosts)
                ]
                for chunk in self._chunks
            ]
        return self._received[terms_of_hosts]


def _chunks(rows: Rows, between: BetweenHosts) -> Iterator[_Chunk]:
    """What this worker owns. Owners of the same bytes on two hosts need not own the same otherwise."""
    for dtype, offset, stop in rows.layout.dtypes:
        num_lines = (stop - offset) // LINE_BYTES
        cuts = [[cut(num_lines, len(host), edge) for edge in range(len(host) + 1)] for host in between.hosts]
        for first, last in pairwise(sorted({edge for edges in cuts for edge in edges})):
            owners = [_owner(edges, first) for edges in cuts]
            if owners[between.number] != between.memory.rank:
                continue
            ranks = [host[owner] for host, owner in zip(between.hosts, owners, strict=True)]
            for begin in range(first, last, CHUNK_BYTES // LINE_BYTES):
                end = min(begin + CHUNK_BYTES // LINE_BYTES, last)
                yield _chunk(rows, dtype, offset + LINE_BYTES * begin, offset + LINE_BYTES * end, ranks)


def _owner(edges: Sequence[int], line: int) -> int:
    """The worker whose part has the line; edges: where each part begins, and where the last one ends."""
    return next(worker for worker, (begin, end) in enumerate(pairwise(edges)) if begin <= line < end)


def _chunk(rows: Rows, dtype: torch.dtype, begin: int, end: int, owners: list[int]) -> _Chunk:
    of_workers = [[row[begin:end].view(dtype) for row in of_worker] for of_worker in rows.of_workers]
    length = len(of_workers[0][0])
    edges = [cut(length, len(owners), part) for part in range(len(owners) + 1)]
    return _Chunk(of_workers, owners, [slice(*edge) for edge in pairwise(edges)])
