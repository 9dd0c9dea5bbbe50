"""Sums gradients over all workers by point-to-point messages, in the order of the tree in `tree.py`."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from mbgd.averaging.tree import Node, fold, worker_nodes
from mbgd.batches.plan import cut
from mbgd.workers.group import Workers


class BucketExchange:
    """Sums one bucket over all workers' nodes, in the order of the tree.

    `start` sends every worker its slice of my nodes, `fold` sums my slice and starts sending it to all, `finish` waits
    until the bucket holds the sum. Workers send from and receive into the tensors themselves, so slices may differ in
    size and nothing is copied; receive buffers are kept from step to step.
    """

    def __init__(self, buffer: Tensor, num_leaves: int, workers: Workers) -> None:
        self._length, self._num_leaves, self._rank = len(buffer), num_leaves, workers.rank
        self._exchange_device = workers.exchange_device
        self._held = nodes_of_workers(num_leaves, workers.num_workers)
        edges = [cut(len(buffer), workers.num_workers, rank) for rank in range(workers.num_workers + 1)]
        self._slices = [slice(start, stop) for start, stop in pairwise(edges)]
        # Starting with the next rank, so that the workers do not all send to rank 0 first.
        self._peers = [(workers.rank + k) % workers.num_workers for k in range(1, workers.num_workers)]
        mine = self._slices[workers.rank]
        self._received = {
            node: buffer.new_empty(mine.stop - mine.start) for peer in self._peers for node in self._held[peer]
        }

    def fits(self, buffer: Tensor, num_leaves: int) -> bool:
        return len(buffer) == self._length and num_leaves == self._num_leaves

    def start(self, buffer: Tensor, nodes: Sequence[Tensor]) -> None:
        """buffer: the bucket, which receives the sum; nodes: this worker's node values, each of the bucket's shape."""
        self._buffer, self._mine = buffer, nodes
        self._messages = _Messages(
            [(node[self._slices[peer]], peer) for peer in self._peers for node in nodes],
            [(self._received[node], peer) for peer in self._peers for node in self._held[peer]],
            device=self._exchange_device,
        )

    def fold(self) -> None:
        """Sum my slice and start sending it to all."""
        self._messages.wait()
        mine = self._slices[self._rank]
        own = {node: value[mine] for node, value in zip(self._held[self._rank], self._mine, strict=True)}
        root = self._buffer[mine]
        sum_ = fold(self._received | own, self._num_leaves, Tensor.add_)
        if sum_.data_ptr() != root.data_ptr():
            root.copy_(sum_)
        self._messages = _Messages(
            [(root, peer) for peer in self._peers],
            [(self._buffer[self._slices[peer]], peer) for peer in self._peers],
            device=self._exchange_device,
        )

    def finish(self) -> None:
        self._messages.wait()
        del self._buffer, self._mine, self._messages


class _Messages:
    """Sends and receives in flight."""

    def __init__(
        self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], *, device: torch.device
    ) -> None:
        """Start the sends and receives; each tensor comes with the peer's rank.

        device: the device the backend needs. Tensors on another device are staged through it.
        """
        self._arriving = [
            (tensor, tensor if tensor.device == device else torch.empty_like(tensor, device=device))
            for tensor, _ in received
        ]
        memory = [(memory, peer) for (_, memory), (_, peer) in zip(self._arriving, received, strict=True)]
        operations = [dist.P2POp(dist.irecv, tensor, peer) for tensor, peer in memory if len(tensor)]
        leaving = [(tensor.to(device), peer) for tensor, peer in sent]
        operations += [dist.P2POp(dist.isend, tensor, peer) for tensor, peer in leaving if len(tensor)]
        self._works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Wait until all have arrived and the sent tensors may be overwritten."""
        for work in self._works:
            work.wait()
        self._works.clear()  # a Work that outlives its process group aborts the process
        for tensor, memory in self._arriving:
            if memory is not tensor:
                tensor.copy_(memory)


@lru_cache
def nodes_of_workers(num_leaves: int, num_workers: int) -> list[list[Node]]:
    """The nodes that each worker holds after folding its own leaves, by rank."""
    return [worker_nodes(num_leaves, num_workers, rank) for rank in range(num_workers)]
