"""How minibatches are cut: every example once, on any number of workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbgd.batches.plan import MicroBatch, Plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    minibatch_size = draw(st.integers(1, 120))
    num_workers = draw(st.integers(1, 9))
    return Plan(
        num_examples=draw(st.integers(minibatch_size, 300)),
        minibatch_size=minibatch_size,
        num_workers=num_workers,
        micro_batch_size=draw(st.none() | st.integers(1, minibatch_size)),
        default_num_micro_batches=draw(st.sampled_from([num_workers, 8])),
        drop_last=draw(st.booleans()),
    )


def shards(plan: Plan, step: int) -> list[list[MicroBatch]]:
    minibatch = plan.minibatch(step)
    return [plan.shard(minibatch, rank) for rank in range(plan.num_workers)]


@given(plans(), st.integers(0, 3))
def test_an_epoch_holds_every_position_once_and_in_order(plan: Plan, epoch: int) -> None:
    positions = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        assert plan.epoch_of(step) == plan.minibatch(step).epoch == epoch
        for shard in shards(plan, step):
            for micro_batch in shard:
                assert micro_batch.size > 0
                assert plan.micro_batch_size is None or micro_batch.size <= plan.micro_batch_size
                if not micro_batch.is_stand_in:
                    positions += range(micro_batch.start, micro_batch.stop)
    assert positions == list(range(plan.examples_per_epoch))
    rest = plan.num_examples % plan.minibatch_size
    assert plan.examples_per_epoch == plan.num_examples - (rest if plan.drop_last else 0)


@given(plans())
def test_micro_batches_are_numbered_and_stand_ins_only_fill_empty_shards(plan: Plan) -> None:
    for step in range(plan.steps_per_epoch):
        minibatch = plan.minibatch(step)
        counting = [mb for shard in shards(plan, step) for mb in shard if not mb.is_stand_in]
        assert [mb.number for mb in counting] == list(range(plan.num_micro_batches(minibatch.size)))
        assert {mb.num_micro_batches for mb in counting} == {len(counting)}
        for shard in shards(plan, step):
            if not all(not mb.is_stand_in for mb in shard):
                assert len(shard) == 1
                assert shard[0][2:4] == counting[0][2:4]


@given(plans(), st.integers(1, 9))
def test_the_cut_does_not_depend_on_the_number_of_workers_where_the_size_is_set(plan: Plan, num_workers: int) -> None:
    if plan.micro_batch_size is None:
        return
    other = Plan(
        num_examples=plan.num_examples,
        minibatch_size=plan.minibatch_size,
        num_workers=num_workers,
        micro_batch_size=plan.micro_batch_size,
        drop_last=plan.drop_last,
    )
    for step in range(plan.steps_per_epoch):
        cuts = [[mb for shard in shards(p, step) for mb in shard if not mb.is_stand_in] for p in (plan, other)]
        assert cuts[0] == cuts[1]


@given(plans(), st.integers(0, 30))
def test_examples_seen_adds_up(plan: Plan, steps: int) -> None:
    assert plan.examples_seen(steps) == sum(plan.minibatch(step).size for step in range(steps))


@pytest.mark.parametrize(("num_examples", "last"), [(1797, 97), (1701, 1), (1700, 100)])
def test_the_last_minibatch_of_an_epoch_is_short(num_examples: int, last: int) -> None:
    plan = Plan(num_examples=num_examples, minibatch_size=100, num_workers=3)
    assert plan.minibatch(plan.steps_per_epoch - 1).size == last
    assert plan.minibatch(plan.steps_per_epoch) == (1, 0, 100)


def test_a_plan_spelled_out() -> None:
    plan = Plan(num_examples=10, minibatch_size=4, num_workers=3, micro_batch_size=2)
    assert shards(plan, 0) == [
        [MicroBatch(0, 2, 0, 2, is_stand_in=True)],
        [MicroBatch(0, 2, 0, 2)],
        [MicroBatch(1, 2, 2, 4)],
    ]
    assert shards(plan, 2)[2] == [MicroBatch(0, 1, 8, 10)]
