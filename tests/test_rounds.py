"""The rounds in which reproducible averaging sums a bucket, played without messages against the plain tree."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbgd.averaging import rounds as in_rounds
from mbgd.averaging.rounds import Round, group_sizes, rounds
from mbgd.averaging.tree import Counter, Node, fold, worker_nodes

LENGTH = 29
"""Elements of the bucket; uneven, and fewer than some numbers of workers."""


def expression(left: Any, right: Any) -> Any:
    """Which leaves were added, and in which order."""
    return np.array([f"({a}+{b})" for a, b in zip(left, right, strict=True)], dtype=object)


@np.errstate(all="ignore")
def float_add(left: Any, right: Any) -> Any:
    return np.add(left, right)


def nodes_of(rank: int, num_workers: int, leaves: Any, add: Any) -> list[tuple[Node, Any]]:
    counter = Counter[Any](add)
    for leaf in range(rank * len(leaves) // num_workers, (rank + 1) * len(leaves) // num_workers):
        counter.push(leaf, leaves[leaf])
    return counter.nodes


def play(num_workers: int, leaves: Any, add: Any) -> tuple[list[Any], list[int], list[int]]:
    """For each worker: the elements of the sum by their place; the messages and the elements that it sends."""
    num_leaves, length = len(leaves), len(leaves[0])
    schedules = [list(rounds(num_leaves, num_workers, rank, length)) for rank in range(num_workers)]
    held = [nodes_of(rank, num_workers, leaves, add) for rank in range(num_workers)]
    starts, num_messages, num_elements = [0] * num_workers, [0] * num_workers, [0] * num_workers
    for number in range(len(schedules[0])):
        received: list[list[tuple[Node, Any]]] = [[] for _ in range(num_workers)]
        for rank in range(num_workers):
            one: Round = schedules[rank][number]
            mine = one.members.index(rank)
            for member, of_member in zip(one.members, one.held, strict=True):
                # Both sides of every exchange know the same.
                assert [node for node, _ in held[member]] == list(of_member)
                assert schedules[member][number] == one
                assert starts[member] == one.parts[0].start
                part = slice(one.parts[mine].start - starts[rank], one.parts[mine].stop - starts[rank])
                received[rank] += [(node, value[part]) for node, value in held[member]]
                if member != rank:
                    num_messages[member] += 1
                    num_elements[member] += len(of_member) * (part.stop - part.start)
        for rank, values in enumerate(received):
            counter = Counter[Any](add)
            for node, value in values:
                counter.push_node(node, value)
            held[rank] = counter.nodes
            one = schedules[rank][number]
            starts[rank] = one.parts[one.members.index(rank)].start
    sums: list[dict[int, Any]] = []
    for rank in range(num_workers):
        root = fold(dict(held[rank]), num_leaves, add)
        sums.append({starts[rank] + at: value for at, value in enumerate(root)})
    for number in reversed(range(len(schedules[0]))):
        known = [dict(of_worker) for of_worker in sums]
        for rank in range(num_workers):
            one = schedules[rank][number]
            for member, part in zip(one.members, one.parts, strict=True):
                sums[rank] |= {at: known[member][at] for at in range(part.start, part.stop)}
                if member != rank:
                    own = one.parts[one.members.index(rank)]
                    num_messages[rank] += 1
                    num_elements[rank] += own.stop - own.start
    return sums, num_messages, num_elements


def whole(of_worker: Mapping[int, Any], length: int) -> list[Any]:
    return [of_worker[at] for at in range(length)]


def plain(leaves: Any, add: Any) -> Any:
    counter = Counter[Any](add)
    for number, leaf in enumerate(leaves):
        counter.push(number, leaf)
    return fold(dict(counter.nodes), len(leaves), add)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 24), st.sampled_from([1, 32]), st.data())
def test_every_worker_gets_the_sum_in_the_order_of_the_tree(
    num_leaves: int, num_workers: int, most_peers: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_rounds, "MOST_PEERS", most_peers)  # 1: in rounds also where leaves do not divide evenly
        names = [np.array([f"{leaf}.{at}" for at in range(LENGTH)], dtype=object) for leaf in range(num_leaves)]
        wanted = list(plain(names, expression))
        for of_worker in play(num_workers, names, expression)[0]:
            assert whole(of_worker, LENGTH) == wanted
        bits = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=num_leaves, max_size=num_leaves))
        leaves = [np.full(3, value, np.uint32).view(np.float32) for value in bits]  # also −0, infinities and nan
        wanted_bits = plain([leaf.copy() for leaf in leaves], float_add).tobytes()
        for of_worker in play(num_workers, leaves, float_add)[0]:
            assert np.array(whole(of_worker, 3), np.float32).tobytes() == wanted_bits


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 32))
def test_rounds_send_fewer_messages_and_no_more_bytes_than_one_exchange_between_all(
    leaves_per_worker: int, num_workers: int
) -> None:
    num_leaves, length = leaves_per_worker * num_workers, 2 * num_workers
    leaves = [np.zeros(length, np.float32) for _ in range(num_leaves)]
    _, messages, elements = play(num_workers, leaves, float_add)
    power = num_workers & -num_workers
    assert set(messages) == {2 * (power.bit_length() - 1 + num_workers // power - 1)}
    for rank, sent in enumerate(elements):
        num_nodes = len(worker_nodes(num_leaves, num_workers, rank))
        most = max(len(worker_nodes(num_leaves, num_workers, other)) for other in range(num_workers))
        assert sent <= (most + 1) * 2 * (num_workers - 1)
        if leaves_per_worker == 1:
            assert sent == (num_nodes + 1) * 2 * (num_workers - 1)


@pytest.mark.parametrize("num_leaves", [65, 96, 127, 191, 300])
def test_leaves_that_do_not_divide_evenly_cost_at_most_half_as_many_bytes_more(num_leaves: int) -> None:
    num_workers, length = 64, 64_000

    def sent(rank: int, *, between_all: bool) -> int:
        if between_all:
            return (len(worker_nodes(num_leaves, num_workers, rank)) + 1) * length * (num_workers - 1) // num_workers
        return sum(
            (len(one.held[one.members.index(rank)]) + 1) * (part.stop - part.start)
            for one in rounds(num_leaves, num_workers, rank, length)
            for member, part in zip(one.members, one.parts, strict=True)
            if member != rank
        )

    in_rounds_, directly = (max(sent(rank, between_all=way) for rank in range(num_workers)) for way in (False, True))
    assert in_rounds_ <= 1.5 * directly


@pytest.mark.parametrize(
    ("num_leaves", "num_workers", "sizes"),
    [
        (8, 1, []),
        (8, 2, [2]),
        (8, 8, [2, 2, 2]),
        (24, 24, [2, 2, 2, 3]),  # three hosts of eight
        (21, 7, [7]),
        (11, 8, [8]),  # leaves that do not divide evenly: fewest bytes
        (16_000, 1024, [2] * 10),  # … but not a thousand messages
    ],
)
def test_sizes_of_the_groups(num_leaves: int, num_workers: int, sizes: list[int]) -> None:
    assert group_sizes(num_leaves, num_workers) == sizes


def test_a_worker_of_thousands_looks_at_few_others() -> None:
    num_workers = 16_384
    for num_leaves in (num_workers, 8 * num_workers, num_workers + 5):
        schedule = list(rounds(num_leaves, num_workers, 5_000, 10**6))
        assert sum(len(one.members) for one in schedule) == 28
        assert sum(len(held) for one in schedule for held in one.held) <= 28 * 28
