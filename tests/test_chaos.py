"""Workers killed and stopped at every phase of a step and of a save: the run goes on and ends with the same bits.

A share of the schedules of `make chaos`.
"""

from pathlib import Path

import pytest

import chaos

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_run_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    chaos.check(tmp_path, seed)


def test_the_schedules_strike_in_every_phase_with_everything() -> None:
    rounds = [round_ for seed in range(100) for round_ in chaos.schedule(seed)]
    blows = [round_.blow for round_ in rounds if round_.blow is not None]
    assert {blow.phase for blow in blows} == set(chaos.PHASES)
    assert {blow.kind for blow in blows} == set(chaos.Kind)
    assert {round_.damage for round_ in rounds} == {None, *chaos.Damage}
    phases = {round_.blow.phase for seed in SEEDS for round_ in chaos.schedule(seed) if round_.blow is not None}
    assert phases == set(chaos.PHASES)
