"""Sums gradients over all workers by point-to-point messages, in the order of the tree in `tree.py`."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from mbgd.averaging.rounds import Round, rounds
from mbgd.averaging.tree import Counter, Node, fold, worker_nodes
from mbgd.batches.plan import Plan
from mbgd.workers.group import Workers

Held = list[tuple[Node, Tensor]]
"""Nodes in the order of their leaves, with their values."""


class BucketExchange:
    """Sums one bucket over all workers' nodes, in the rounds of `rounds.py`.

    `start` sends the first round's messages; each `advance` waits for a round and starts the next, and in the end the
    bucket holds the sum. Workers send from and receive into the tensors themselves, so parts may differ in size and
    nothing is copied; receive buffers are kept from step to step.
    """

    def __init__(self, buffer: Tensor, num_leaves: int, workers: Workers) -> None:
        self._length, self._num_leaves, self._rank = len(buffer), num_leaves, workers.rank
        self._exchange_device = workers.exchange_device
        self._nodes = worker_nodes(num_leaves, workers.num_workers, workers.rank)
        self._rounds = [
            (one, self._buffers(one, buffer))
            for one in rounds(num_leaves, workers.num_workers, workers.rank, len(buffer))
        ]

    def _buffers(self, one: Round, buffer: Tensor) -> dict[int, Held]:
        """Memory for the nodes that each other member sends, by rank."""
        kept = one.parts[one.members.index(self._rank)]
        return {
            member: [(node, buffer.new_empty(kept.stop - kept.start)) for node in held]
            for member, held in zip(one.members, one.held, strict=True)
            if member != self._rank
        }

    def fits(self, buffer: Tensor, num_leaves: int) -> bool:
        return len(buffer) == self._length and num_leaves == self._num_leaves

    def start(self, buffer: Tensor, nodes: Sequence[Tensor]) -> None:
        """buffer: the bucket, which receives the sum; nodes: this worker's node values, each of the bucket's shape."""
        self._stages = self._exchange(buffer, list(zip(self._nodes, nodes, strict=True)))
        self.advance()

    def advance(self) -> bool:
        """Finish the messages under way and start the next; False once there are none."""
        return next(self._stages, False)

    def _exchange(self, buffer: Tensor, mine: Held) -> Iterator[bool]:
        start = 0
        for one, received in self._rounds:
            messages = self._send_nodes(one, mine, received, start)
            yield True
            messages.wait()
            mine, start = self._folded(one, mine, received, start)
        root = fold(dict(mine), self._num_leaves, Tensor.add_)
        part = buffer[start : start + len(root)]
        if root.data_ptr() != part.data_ptr():
            part.copy_(root)
        for one, _ in reversed(self._rounds):
            messages = self._send_sums(one, buffer)
            yield True
            messages.wait()

    def _send_nodes(self, one: Round, mine: Held, received: dict[int, Held], start: int) -> "_Messages":
        """start: where in the bucket the values of `mine` begin."""
        parts = {peer: slice(part.start - start, part.stop - start) for peer, part in _in_turn(one, self._rank)}
        return _Messages(
            [(value[part], peer) for peer, part in parts.items() for _, value in mine],
            [(value, peer) for peer in parts for _, value in received[peer]],
            device=self._exchange_device,
        )

    def _folded(self, one: Round, mine: Held, received: dict[int, Held], start: int) -> tuple[Held, int]:
        """The nodes of all members for this worker's part of the bucket, and where that begins."""
        kept = one.parts[one.members.index(self._rank)]
        counter = Counter[Tensor](Tensor.add_)
        for member in one.members:
            of_member = received.get(member)
            if of_member is None:
                of_member = [(node, value[kept.start - start : kept.stop - start]) for node, value in mine]
            for node, value in of_member:
                counter.push_node(node, value)
        return counter.nodes, kept.start

    def _send_sums(self, one: Round, buffer: Tensor) -> "_Messages":
        mine = buffer[one.parts[one.members.index(self._rank)]]
        others = _in_turn(one, self._rank)
        return _Messages(
            [(mine, peer) for peer, _ in others],
            [(buffer[part], peer) for peer, part in others],
            device=self._exchange_device,
        )


def _in_turn(one: Round, rank: int) -> list[tuple[int, slice]]:
    """The other members with their parts, the next first, so that not all members send to the same one first."""
    pairs = list(zip(one.members, one.parts, strict=True))
    number = one.members.index(rank)
    return pairs[number + 1 :] + pairs[:number]


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
    """The nodes that each worker of a host holds after folding its own leaves, by rank."""
    return [worker_nodes(num_leaves, num_workers, rank) for rank in range(num_workers)]


def most_nodes(plan: Plan) -> int:
    """The most nodes that any worker holds in any step; an epoch's short last minibatch may need more than the rest."""
    sizes = {plan.minibatch(step).size for step in (0, plan.steps_per_epoch - 1)}
    of_plan = (nodes_of_workers(plan.num_micro_batches(size), plan.num_workers) for size in sizes)
    return max(len(held) for nodes in of_plan for held in nodes)
