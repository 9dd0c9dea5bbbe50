"""recovery=continue with sharding: the whole state comes from what all workers have kept, also in mid-update."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_sharding import ADAMW, CASES, SENDING, SHARING, Case, digest, make_trainer
from torch import nn

import mbgd
from mbgd.averaging.pieces import Owned, cut_in_blocks
from mbgd.errors import GroupChanged, UsageError
from mbgd.step.kept_pieces import KeptPieces
from mbgd.step.scattered_state import ScatteredState

from processes import run_workers

STEP = 3


class GroupChangesAt:
    """A stop that is none: the group changes after step `STEP`."""

    def agreed(self, step: int) -> bool:
        if step == STEP:
            raise GroupChanged
        return False


def changes_in_call(number: int, function: Callable[[], None]) -> Callable[[], None]:
    calls = 0

    def called() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise GroupChanged
        function()

    return called


def carry(workers: mbgd.Workers, case: Case, transport: str, when: str) -> str:
    """What this worker takes along when the group changes after a step, or after the next one's update."""
    sharding = "none" if when == "without sharding" else "optimizer"
    trainer = make_trainer(replace(workers, go_on=True), case, transport, sharding, 2 * STEP)
    if sharding == "optimizer":
        assert trainer.train_step.sharded is not None
    if when == "mid-update":
        parameters: Any = trainer.train_step.sharded.parameters  # type: ignore[union-attr]
        parameters.spread = changes_in_call(STEP + 1, parameters.spread)
    with pytest.raises(GroupChanged):
        trainer.fit(stop=None if when == "mid-update" else GroupChangesAt())
    carried = trainer.carried([])
    assert carried is not None
    assert carried.progress.step == STEP
    return digest(carried.snapshot)


def carry_all(workers: mbgd.Workers, transport: str, when: str) -> dict[str, str]:
    return {case.name: carry(workers, case, transport, when) for case in CASES}


@cache
def all_carried(num_workers: int, transport: str, when: str) -> list[dict[str, str]]:
    return run_workers(carry_all, num_workers, transport, when, timeout_seconds=600)


@pytest.mark.parametrize("when", ["after a step", "mid-update"])
@pytest.mark.parametrize(("num_workers", "transport"), [(3, one) for one in (*SHARING, *SENDING)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_worker_has_the_whole_state(case: Case, num_workers: int, transport: str, when: str) -> None:
    wanted = all_carried(num_workers, transport, "without sharding")[0][case.name]
    assert [of_worker[case.name] for of_worker in all_carried(num_workers, transport, when)] == [wanted] * num_workers


def fill(workers: mbgd.Workers) -> list[str]:
    """What is told where there is more state than expected, and where it is not known how much there will be."""
    model = nn.Linear(100, 10)
    parameters = list(model.parameters())
    pieces = cut_in_blocks(parameters, workers.num_workers)
    owned = Owned(parameters, pieces, parameters, workers.rank)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    kept = KeptPieces(optimizer, owned, workers)
    state = ScatteredState(optimizer, owned, workers)
    state.hold()
    kept.keep(0, state, "beside")
    workers.barrier()
    assert kept.recall(1, state) is None
    for one in owned.tensors:
        optimizer.state[one]["more"] = torch.zeros(100_000)
    with pytest.raises(UsageError) as error:
        kept.keep(1, state, "beside")
    told = str(error.value)
    workers.barrier()
    assert kept.recall(0, state) == "beside"  # the last one is still there
    assert optimizer.param_groups[0]["params"] == parameters
    with pytest.raises(UsageError) as error:
        KeptPieces(NeedsClosure(parameters), owned, workers)
    return [told, str(error.value)]


class NeedsClosure(torch.optim.SGD):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        super().step()


def test_state_that_has_no_room_is_refused() -> None:
    for too_much, unknown in run_workers(fill, 2):
        assert "the optimizer made more state than the" in too_much
        assert "how much state NeedsClosure makes is not known" in unknown


def test_auto_shards_nothing_and_says_why() -> None:
    for told in run_workers(describe, 2):
        assert told == "none: with recovery=continue each piece is kept twice; sharding=optimizer asks for it"


def describe(workers: mbgd.Workers) -> str:
    trainer = make_trainer(replace(workers, go_on=True), Case("AdamW", ADAMW), "shared_memory", "auto", 1)
    return trainer.train_step.describe_sharding
