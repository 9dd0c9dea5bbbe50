"""Hardware that computes wrongly is named before the update; hardware that does not never is."""

import re

import pytest

from mbgd.config import Check, Settings, validate

from faulty_hardware import flips, weights_after
from processes import run_workers

KINDS = ["gradient", "activation", "parameter"]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_flipped_bit_is_named_before_the_update(num_workers: int) -> None:
    of_workers = run_workers(flips, num_workers, KINDS, list(range(8)))
    for of_rank in zip(*of_workers, strict=True):
        kind, seed, told = of_rank[0]
        errors = {one["error"] for _, _, one in of_rank}
        assert len(errors) == 1, errors
        if kind == "activation" and not told["error"]:
            continue  # rounded away: no bit of the gradient was another one
        assert not any(one["was_updated"] for _, _, one in of_rank)
        assert told["error"].startswith(f"step {told['step'] + 1}: "), (kind, seed, told)
        if kind != "parameter":
            assert f"micro-batch {told['leaf']} " in told["error"]
        if kind != "parameter" or num_workers > 2:  # of two copies none is in the majority
            named = re.findall(r"worker (\d) \(host \S+, device cpu\)", told["error"])
            assert named == [str(told["victim"])], told["error"]
    found = [told["error"] != "" for kind, _, told in of_workers[0] if kind == "activation"]
    assert sum(found) >= 4


def test_right_hardware_is_never_accused_and_the_bits_stay() -> None:
    checked = run_workers(weights_after, 3, 200, 1)
    assert set(checked) == set(run_workers(weights_after, 2, 200, None))


def test_it_needs_reproducible_averaging() -> None:
    (problem,) = validate(Settings(check=Check(recompute_every_steps=10)))
    assert problem.startswith("check.recompute_every_steps=10 with averaging=auto;")
    assert "only with averaging=reproducible" in problem
