"""The order of summation that makes averaging reproducible: a fixed binary tree over micro-batch numbers.

Node (level, j) is the sum of leaves [j·2^level, (j+1)·2^level), left plus right; absent leaves are skipped. The tree
depends on the number of leaves alone, so the sum has the same bits however the leaves are spread over workers.
"""

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from mbgd.batches.plan import cut

T = TypeVar("T")
Add = Callable[[T, T], T]
"""left, right → left + right; may overwrite either."""


class Node(NamedTuple):
    level: int
    number: int


class Counter(Generic[T]):
    """Folds consecutive leaves into maximal complete nodes, O(log K) of them, like the carries of a binary counter."""

    def __init__(self, add: Add[T]) -> None:
        self._add = add
        self.nodes: list[tuple[Node, T]] = []

    def push(self, leaf: int, value: T) -> None:
        """Add the next leaf."""
        self.push_node(Node(0, leaf), value)

    def push_node(self, node: Node, value: T) -> None:
        """Add the next node: its leaves follow those of the nodes before it."""
        while self.nodes and node.number % 2 and self.nodes[-1][0] == Node(node.level, node.number - 1):
            _, left = self.nodes.pop()
            value = self._add(left, value)
            node = Node(node.level + 1, node.number // 2)
        self.nodes.append((node, value))


def worker_nodes(num_leaves: int, num_workers: int, rank: int, num_ranks: int = 1) -> list[Node]:
    """The nodes that a `Counter` holds after the leaves of worker `rank`, or of `num_ranks` workers from `rank` on."""
    first, last = cut(num_leaves, num_workers, rank), cut(num_leaves, num_workers, rank + num_ranks)
    nodes = []
    while first < last:
        level = (last - first).bit_length() - 1
        if first:
            level = min(level, (first & -first).bit_length() - 1)  # 2^level must divide first
        nodes.append(Node(level, first >> level))
        first += 1 << level
    return nodes


def fold(nodes: Mapping[Node, T], num_leaves: int, add: Add[T]) -> T:
    """The root of the tree, from nodes that together cover every leaf once."""

    def value(node: Node) -> T | None:
        if node in nodes:
            return nodes[node]
        if node.number << node.level >= num_leaves:
            return None
        left, right = (value(Node(node.level - 1, 2 * node.number + side)) for side in (0, 1))
        assert left is not None
        return left if right is None else add(left, right)

    root = value(Node((num_leaves - 1).bit_length(), 0))
    assert root is not None
    return root
