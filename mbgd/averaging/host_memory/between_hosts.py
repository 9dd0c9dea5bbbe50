"""Swaps small values between hosts: the first worker of each host sends them, the others read them in its memory."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mbgd.averaging.host_memory.layout import whole_lines
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.workers.messages import bytes_of

T = TypeVar("T")

Message = tuple[Tensor, int]
"""A vector, and the rank of the worker to whom it is sent or from whom it comes."""


class BetweenHosts:
    """Values of all hosts on every worker. All workers call the methods in the same order."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory, self.hosts = memory, memory.hosts
        self.number = self.hosts.index(memory.members)
        """This host's number."""
        self._boards: dict[tuple[int, ...], list[list[Tensor]]] = {}
        """Two for each choice of sizes, in turn: whoever starts a swap has read the one before the last."""
        self._turn = 0

    def swap(self, mine: Tensor, num_bytes: Sequence[int]) -> list[Tensor]:
        """Every host's bytes in the order of the hosts, valid until the second call after this one.

        mine: this host's, uint8, the same on each of its workers. num_bytes: of each host.
        """
        self._turn = 1 - self._turn
        board = self._board(tuple(num_bytes))
        if self.memory.rank == 0:
            board[self.number].copy_(mine)
            others = [number for number in range(len(self.hosts)) if number != self.number]
            wait(
                start(
                    received=[(board[number], self.hosts[number][0]) for number in others],
                    sent=[(board[self.number], self.hosts[number][0]) for number in others],
                )
            )
        self.memory.barrier()
        return board

    def _board(self, num_bytes: tuple[int, ...]) -> list[Tensor]:
        if num_bytes not in self._boards:
            lines = [whole_lines(one) for one in num_bytes]
            memory, _ = self.memory.allocate_once(2 * sum(lines))
            self._boards[num_bytes] = [
                [place[:one] for place, one in zip(torch.split(half, lines), num_bytes, strict=True)]
                for half in memory.chunk(2)
            ]
        return self._boards[num_bytes][self._turn]

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every worker's `values` by rank, valid until the second call after this one; for small tensors."""
        mine = torch.stack(list(self.memory.all_gather(values)))
        of_hosts = self.swap(bytes_of(mine), [len(host) * values.nbytes for host in self.hosts])
        return self.by_rank([of_host.view(values.dtype).view(-1, *values.shape) for of_host in of_hosts])

    def by_rank(self, of_hosts: Sequence[Iterable[T]]) -> list[T]:
        """of_hosts: for each host, what its workers have → what all workers have, by rank."""
        pairs = zip(self.hosts, of_hosts, strict=True)
        found = {rank: one for ranks, values in pairs for rank, one in zip(ranks, values, strict=True)}
        return [found[rank] for rank in sorted(found)]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all workers' `values`: of each host's workers in rank order, then of the hosts in order."""
        mine = reduce(torch.add, self.memory.all_gather(values))
        of_hosts = self.swap(bytes_of(mine), [values.nbytes] * len(self.hosts))
        return reduce(torch.add, [of_host.view(values.dtype).view(values.shape) for of_host in of_hosts])

    def describe(self) -> str:
        return f"shared memory on each of {len(self.hosts)} hosts, gloo between them"


def start(*, received: Iterable[Message], sent: Iterable[Message]) -> list[dist.Work]:
    """Start to receive into tensors and to send others; both ends leave out empty ones."""
    works = [dist.irecv(values, rank) for values, rank in received if len(values)]
    works += [dist.isend(values, rank) for values, rank in sent if len(values)]
    return [work for work in works if work is not None]


def wait(works: list[dist.Work]) -> None:
    """Wait until all have arrived, and the sent tensors may be overwritten."""
    for work in works:
        work.wait()
    works.clear()  # a Work that outlives its process group aborts the process
