"""Who sends what to whom while a bucket is summed in the order of the tree: integers only.

With W = 2^a · q workers, q odd, there are a rounds between two workers each, and one between q. Before a round, blocks
of P consecutive workers have each added up their nodes, and each worker of a block has one of P parts of the bucket. In
the round, the workers that have the same part, one from each block of a group, cut it among themselves: each sends its
nodes' values to the worker that keeps them, and folds what it receives. In the end each worker has the sum of one of W
parts. The same rounds backwards send every part to all.

That is recursive halving and doubling with a last step between q: 2 (a + q - 1) messages per worker instead of
2 (W - 1). A block's leaves are consecutive, so its maximal complete nodes are subtrees, and the additions are those of
the tree in any rounds.

Source: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from mbgd.averaging.tree import Node, worker_nodes
from mbgd.batches.plan import cut

MOST_PEERS = 32
"""With more workers, messages cost more than the bytes that rounds add where the leaves do not divide evenly."""


class Round(NamedTuple):
    """One worker's exchange with the other members of a group."""

    members: tuple[int, ...]
    """Their ranks, in the order of their leaves; one is this worker."""
    held: tuple[tuple[Node, ...], ...]
    """The nodes that each member holds before the round, for the part that they cut."""
    parts: tuple[slice, ...]
    """The part of the bucket that each member keeps."""


def group_sizes(num_leaves: int, num_workers: int) -> list[int]:
    """The number of members in each round; their product is the number of workers.

    If the leaves divide evenly, a block of 2^i workers holds no more nodes than one worker, because its leaves are one
    worker's, 2^i times as many from 2^i times as far on. So rounds send no more bytes than one exchange between all.
    Otherwise they may send 1.5 times as many, and are only taken where they save many messages.
    """
    if num_workers == 1:
        return []
    if num_leaves % num_workers and num_workers <= MOST_PEERS:
        return [num_workers]
    power = (num_workers & -num_workers).bit_length() - 1
    odd = num_workers >> power
    return [2] * power + [odd] * (odd > 1)


def rounds(num_leaves: int, num_workers: int, rank: int, length: int) -> Iterator[Round]:
    """Worker `rank`'s rounds for a bucket of `length` elements."""
    start, stop, block = 0, length, 1
    for size in group_sizes(num_leaves, num_workers):
        first = rank // (block * size) * block * size
        blocks = range(first, first + block * size, block)
        edges = [start + cut(stop - start, size, number) for number in range(size + 1)]
        yield Round(
            members=tuple(begin + rank % block for begin in blocks),
            held=tuple(tuple(worker_nodes(num_leaves, num_workers, begin, block)) for begin in blocks),
            parts=tuple(slice(*edge) for edge in pairwise(edges)),
        )
        mine = (rank - first) // block
        start, stop, block = edges[mine], edges[mine + 1], block * size
