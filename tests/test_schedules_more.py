"""The schedules beside constant, linear, cosine and step: against torch's own or the papers' formulas."""

import math
from typing import Any

import pytest
import torch
from test_configuration import composed
from torch.optim import lr_scheduler

import mbgd
from mbgd.building.build import build_trainer, typed
from mbgd.config.must_match import must_match
from mbgd.schedule import WSD, CosineRestarts, InverseSquareRoot, OneCycle, Polynomial, Schedule

from small_runs import PLAIN


def torchs(num_steps: int, kind: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference, found = kind(optimizer, **options), []
    for _ in range(num_steps):
        found.append(reference.get_last_lr()[0])
        optimizer.step()
        if len(found) < num_steps:
            reference.step()
    return found


def factors(schedule: Schedule, num_steps: int) -> list[float]:
    return [schedule(step) for step in range(num_steps)]


@pytest.mark.parametrize("power", [0.9, 1.0, 3.0])
def test_polynomial_is_torchs(power: float) -> None:
    wanted = torchs(60, lr_scheduler.PolynomialLR, total_iters=50, power=power)
    assert factors(Polynomial(num_steps=50, power=power), 60) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("growth", [1, 2, 3])
def test_cosine_with_restarts_is_torchs(growth: int) -> None:
    wanted = torchs(200, lr_scheduler.CosineAnnealingWarmRestarts, T_0=7, T_mult=growth, eta_min=0.1)
    found = CosineRestarts(num_steps=1, cycle_steps=7, growth=growth, final_factor=0.1)
    assert factors(found, 200) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("num_steps", "peak_steps"), [(50, None), (50, 15), (50, 2), (50, 50), (7, None), (2, None)])
def test_one_cycle_is_torchs(num_steps: int, peak_steps: int | None) -> None:
    part = 0.3 if peak_steps is None else peak_steps / num_steps
    one_cycle = lr_scheduler.OneCycleLR
    wanted = torchs(num_steps, one_cycle, max_lr=1.0, total_steps=num_steps, pct_start=part, cycle_momentum=False)
    if peak_steps == num_steps:
        wanted = wanted[:-1]  # torch divides 0 by 0
    found = OneCycle(num_steps=num_steps, peak_steps=peak_steps)
    assert factors(found, len(wanted)) == pytest.approx(wanted, rel=1e-9)
    if peak_steps is not None:
        assert found(peak_steps - 1) == 1.0
    assert OneCycle(num_steps=50, peak_steps=1)(0) == 1.0  # here, too


def test_inverse_square_root_is_that_of_the_paper() -> None:
    warmup_steps, width = 40, 512
    # Vaswani et al. 2017, (3): d^-0.5 min(n^-0.5, n w^-1.5) in step n, whose largest value is (d w)^-0.5.
    wanted = [width**-0.5 * min(n**-0.5, n * warmup_steps**-1.5) for n in range(1, 500)]
    wanted = [rate * (width * warmup_steps) ** 0.5 for rate in wanted]
    assert factors(InverseSquareRoot(num_steps=499, warmup_steps=warmup_steps), 499) == pytest.approx(wanted, rel=1e-12)


def test_warm_up_stable_decay_is_that_of_the_papers() -> None:
    schedule = WSD(num_steps=100, warmup_steps=10, decay_steps=20, final_factor=0.1)
    # Hägele et al. 2024, (1) and (2): 1 up to step N − N_decay, then 1 − √((n − (N − N_decay)) / N_decay).
    wanted = [0.1 + 0.9 * (1 - math.sqrt((n - 80) / 20)) for n in range(80, 101)]
    assert factors(schedule, 10) == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert [schedule(n) for n in range(10, 81)] == [1.0] * 71
    assert [schedule(n) for n in range(80, 101)] == pytest.approx(wanted, rel=1e-12)
    assert schedule(1000) == pytest.approx(0.1)
    linear = WSD(num_steps=100, decay_steps=20, decay_shape="linear")
    assert [linear(n) for n in (79, 80, 85, 90, 100)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.0])


def test_the_decay_takes_a_fifth_unless_it_is_given() -> None:
    assert [WSD(num_steps=100)(n) < 1 for n in (79, 80, 81)] == [False, False, True]
    assert factors(WSD(num_steps=4, warmup_steps=4), 4) == [0.25, 0.5, 0.75, 1.0]
    assert factors(WSD(num_steps=30, decay_steps=0), 30) == [1.0] * 30


def test_a_longer_run_changes_the_first_steps_only_where_the_class_says_so() -> None:
    for schedule in (CosineRestarts, InverseSquareRoot, Polynomial, WSD, OneCycle):
        more: dict[str, Any] = {"cycle_steps": 7} if schedule is CosineRestarts else {}
        short, long = schedule(num_steps=50, **more), schedule(num_steps=80, **more)
        assert (factors(short, 50) != factors(long, 50)) == schedule.depends_on_length


@pytest.mark.parametrize("name", ["wsd", "polynomial", "one_cycle", "cosine_restarts", "inverse_square_root"])
def test_a_run_of_another_length_is_not_resumed_where_the_rate_depends_on_it(name: str) -> None:
    target = composed(f"schedule={name}").schedule["_target_"]
    depends = name in ("wsd", "polynomial", "one_cycle")
    of_two = [must_match({**PLAIN, "schedule": {"_target_": target}, "steps": steps}) for steps in (8, 9)]
    assert (of_two[0] != of_two[1]) == depends


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "polynomial", "wsd", "one_cycle"])
def test_the_values_in_the_groups_are_those_of_the_classes(name: str) -> None:
    trainer = build_trainer(typed(composed(f"schedule={name}")), mbgd.Workers())
    found = trainer.setup.settings.schedule
    assert vars(found) == vars(type(found)(num_steps=460))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WSD(num_steps=10, warmup_steps=5, decay_steps=6), "decay_steps=6 in a run of 10 steps, 5 of them"),
        (lambda: WSD(num_steps=10, decay_steps=-1), "decay_steps=-1"),
        (lambda: WSD(num_steps=10, decay_shape="sqrtt"), r"decay_shape=sqrtt; it is one of .* Did you mean sqrt\?"),
        (lambda: Polynomial(num_steps=10, power=-1.0), "power=-1"),
        (lambda: Polynomial(num_steps=10, power=math.nan), "power=nan"),
        (lambda: CosineRestarts(num_steps=10, cycle_steps=0), "cycle_steps=0; it must be ≥ 1"),
        (lambda: CosineRestarts(num_steps=10, cycle_steps=2, growth=0), "growth=0; it must be ≥ 1"),
        (lambda: CosineRestarts(num_steps=10, cycle_steps=2, growth=1.5), "growth=1.5: it takes a whole number"),
        (lambda: OneCycle(num_steps=10, peak_steps=11), "peak_steps=11 in a run of 10 steps"),
        (lambda: OneCycle(num_steps=10, start_factor=math.inf), "start_factor=inf"),
        (lambda: InverseSquareRoot(num_steps=10, warmup_steps=11), "warmup_steps=11"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        make()


def test_a_run_of_no_steps_can_have_any_schedule() -> None:
    for kind in (WSD, Polynomial, OneCycle, InverseSquareRoot):
        assert math.isfinite(kind(num_steps=0)(0))
