"""What one worker does at the start does not grow with the number of workers, as far as it is computed."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch

import mbgd
from mbgd.averaging.bucket_exchange import BucketExchange
from mbgd.averaging.tree import worker_nodes
from mbgd.batches.plan import Plan, cut

from processes import run_workers

NUM_WORKERS = 16_384


def counted(function: Any) -> int:
    """Number of calls of Python functions."""

    calls: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls["call"]


@pytest.mark.parametrize("micro_batches_per_worker", [1, 3, 8])
def test_the_plan_and_the_rounds_of_one_worker_take_few_calls(micro_batches_per_worker: int) -> None:

    size = 4 * micro_batches_per_worker * NUM_WORKERS
    plan = Plan(num_examples=10 * size + 17, minibatch_size=size, num_workers=NUM_WORKERS, micro_batch_size=4)
    workers = mbgd.Workers(rank=NUM_WORKERS - 2, num_workers=NUM_WORKERS)

    def start() -> None:
        for step in (0, plan.steps_per_epoch - 1):
            minibatch = plan.minibatch(step)
            plan.shard(minibatch, workers.rank)
            BucketExchange(torch.zeros(100_000), plan.num_micro_batches(minibatch.size), workers)

    assert counted(start) < 5_000


def test_nodes_of_a_worker_are_found_without_looking_at_its_leaves() -> None:
    leaves = 2**40 + 12_345
    assert counted(lambda: worker_nodes(leaves, NUM_WORKERS, 77)) < 1_000
    nodes = worker_nodes(leaves, NUM_WORKERS, 77)
    assert nodes[0].number << nodes[0].level == cut(leaves, NUM_WORKERS, 77)
    assert (nodes[-1].number + 1) << nodes[-1].level == cut(leaves, NUM_WORKERS, 78)


def gathered(workers: mbgd.Workers) -> list[Any]:
    same, longer = {"of": list(range(1000))}, {"of": list(range(1000 + workers.rank))}
    return [workers.gather_if_unlike(same), workers.gather_if_unlike(longer)]


def test_values_are_gathered_only_where_they_differ() -> None:
    for same, differing in run_workers(gathered, 3):
        assert same == []
        assert differing == [{"of": list(range(1000 + rank))} for rank in range(3)]
    assert mbgd.Workers().gather_if_unlike({"of": 1}) == []
