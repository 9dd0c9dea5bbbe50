"""Numbers of steps, given in steps, epochs or examples."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_configuration import composed

import mbgd
from mbgd.batches.plan import Plan
from mbgd.building.build import build_trainer, typed
from mbgd.config import Checkpoint, Config, HistogramSettings, must_match, resolved, validate
from mbgd.config.duration import PREFIXES, in_steps

from small_runs import PLAIN

PLAN = Plan(num_examples=1437, minibatch_size=64, num_workers=1)  # 22 whole minibatches and one of 29 an epoch

WRITTEN = [
    (0, 0),
    (500, 500),
    ("500", 500),
    ("500 steps", 500),
    ("1 step", 1),
    ("12k", 12_000),
    ("1.5k steps", 1500),
    ("2 epochs", 46),
    ("1 epoch", 23),
    ("0.1 epochs", 2),  # 2.3
    (".5 epochs", 12),  # 11.5
    ("1e2 epochs", 2300),
    ("0 epochs", 0),
    ("0.0001 epochs", 1),
    ("1 example", 1),
    ("96 examples", 2),  # as near to 1 step as to 2
    ("95 examples", 1),
    ("1437 examples", 23),
    ("1423 examples", 23),  # 1,408 after 22 steps, 1,437 after 23
    ("1422 examples", 22),
    ("12k examples", 192),  # 8 epochs of 1,437 and 504 examples more, 7.9 steps
    ("3M examples", 48016),
]


@pytest.mark.parametrize(("duration", "steps"), WRITTEN)
def test_a_duration_in_steps(duration: Any, steps: int) -> None:
    assert in_steps(duration, PLAN) == steps


ANY_TIME = settings(deadline=None)  # the machine may be busy

plans = st.builds(
    lambda examples, size, drop: Plan(
        num_examples=max(examples, size), minibatch_size=size, num_workers=1, drop_last=drop
    ),
    st.integers(1, 400),
    st.integers(1, 50),
    st.booleans(),
)


@ANY_TIME
@given(st.integers(0, 2000), plans)
@example(0, PLAN)
def test_examples_become_the_number_of_steps_that_sees_the_nearest_number(wanted: int, plan: Plan) -> None:
    found = in_steps(f"{wanted} examples", plan)
    off = [abs(plan.examples_seen(steps) - wanted) for steps in range(wanted + 2)]
    least = min(off[1:]) if wanted else 0
    assert off[found] == least
    assert found == max(steps for steps, one in enumerate(off) if one == least)


@ANY_TIME
@given(st.fractions(0, 50, max_denominator=1000), plans)
def test_epochs_are_rounded_to_the_nearest_step(epochs: Fraction, plan: Plan) -> None:
    text = f"{float(epochs):.6f}"
    found = in_steps(f"{text} epochs", plan)
    wanted = Fraction(text) * plan.steps_per_epoch
    assert abs(found - wanted) <= Fraction(1, 2) or (found == 1 and 0 < wanted < 1)


@ANY_TIME
@given(st.integers(0, 10**6), st.sampled_from(sorted(PREFIXES)), st.sampled_from(["", " step", " steps", "steps"]))
def test_steps_are_exact(number: int, prefix: str, unit: str) -> None:
    assert in_steps(f"{number}{prefix}{unit}", PLAN) == number * PREFIXES[prefix]


@ANY_TIME
@given(st.text("0123456789.ekKMB -stepochxaml_", max_size=14))
@example("1 examplee")
@example("1e999 epochs")
@example("\u0663 steps")  # a digit of another script
def test_any_text_is_a_number_of_steps_or_refused_with_the_forms(text: str) -> None:
    problems = validate(mbgd.Settings(log_every_steps=text))
    if problems:
        assert problems[0].startswith(f"log_every_steps={text}; ")
        assert "0.1 epochs" in problems[0] or "must be ≥ 1" in problems[0]
    else:
        assert in_steps(text, PLAN) >= 1


@ANY_TIME
@given(st.lists(st.integers(0, 5000), min_size=2).map(sorted), plans)
def test_more_examples_are_never_fewer_steps(numbers: list[int], plan: Plan) -> None:
    steps = [in_steps(f"{number} examples", plan) for number in numbers]
    assert all(fewer <= more for fewer, more in pairwise(steps))


def test_every_setting_that_is_a_number_of_steps_is_a_duration() -> None:
    config = Config(
        steps="1 epochs",
        log_every_steps="64 examples",
        evaluation=mbgd.Evaluation(every_steps="0.5 epochs"),
        noise_scale=mbgd.NoiseScale(every_steps="2 epochs"),
        check=mbgd.Check(replicas_every_steps="3 epochs", recompute_every_steps="4 epochs"),
        checkpoint=Checkpoint(every_steps="5 epochs", memory_every_steps="128 examples"),
        histograms=HistogramSettings(steps=4),  # this counts steps, wherever they are
    )
    found = resolved(config, PLAN)
    assert (found.steps, found.log_every_steps, found.evaluation.every_steps) == (23, 1, 12)
    assert (found.noise_scale.every_steps, found.check.replicas_every_steps) == (46, 69)
    assert (found.check.recompute_every_steps, found.checkpoint.every_steps) == (92, 115)
    assert found.checkpoint.memory_every_steps == 2
    assert not [name for name, value in flat(found) if name.endswith("steps") and not isinstance(value, int)]
    assert resolved(found, PLAN) == found


def flat(section: Any) -> list[tuple[str, Any]]:
    own = [(name, value) for name, value in vars(section).items() if not hasattr(value, "__dataclass_fields__")]
    inner = [one for value in vars(section).values() if hasattr(value, "__dataclass_fields__") for one in flat(value)]
    return own + inner


@pytest.mark.parametrize("value", [1.5, True, [1], torch.tensor(3)])
def test_another_type_is_refused_with_the_forms(value: Any) -> None:
    with pytest.raises(mbgd.UsageError, match=r'log_every_steps=.*it takes a whole number of steps.*"0\.1 epochs"'):
        mbgd.Settings(log_every_steps=value)


def test_mistakes_in_a_configuration_are_told_together() -> None:
    with pytest.raises(mbgd.UsageError) as caught:
        typed(
            composed(
                "steps=3 epoch s",
                "log_every_steps=0 epochs",
                "evaluation.every_steps=1.5",
                "checkpoint.every_steps=0.5 steps",
                "noise_scale.every_steps=1.5M",
                "check.replicas_every_steps=-1",
            )
        )
    told = str(caught.value)
    assert 'steps=3 epoch s; it takes a whole number of steps, or a text such as "500 steps"' in told
    assert "log_every_steps=0 epochs; it must be ≥ 1." in told
    assert "evaluation.every_steps: Value '1.5'" in told
    assert "checkpoint.every_steps=0.5 steps; a number of steps is whole" in told
    assert "check.replicas_every_steps=-1; it must be ≥ 1" in told
    assert "1.5M" not in told  # 1,500,000 steps
    assert told.count("\n") == 5


TOLD = [
    ("schedule.warmup_steps=1 epoc", "schedule.warmup_steps=1 epoc; it takes a whole number of steps"),
    ("schedule.warmup_steps=100 epochs", "schedule.warmup_steps=2300 in a run of 460 steps"),
    ("+schedule.every_step=1 epochs", "does not take every_step"),
]


@pytest.mark.parametrize(("override", "message"), TOLD)
def test_mistakes_in_a_schedule(override: str, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        build_trainer(typed(composed(override)), mbgd.Workers())


class Logged:
    """A tracker that keeps the steps at which something is logged."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.evaluated: list[int] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            self.trained.append(step)
        if "eval/loss" in metrics:
            self.evaluated.append(step)

    def progress(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_run_by_the_command_goes_by_its_durations() -> None:
    overrides = ["steps=0.5 epochs", "log_every_steps=256 examples", "evaluation.every_steps=0.25 epochs"]
    schedule = ["schedule=step", "schedule.every_steps=0.2 epochs", "schedule.warmup_steps=0.1 epochs"]
    trainer = build_trainer(typed(composed(*overrides, *schedule)), mbgd.Workers())
    setup, logged = trainer.setup, Logged()
    assert (setup.num_steps, setup.settings.schedule.every_steps, setup.settings.schedule.warmup_steps) == (12, 5, 2)
    trainer.fit(logged)
    assert logged.trained == [1, 4, 8, 12]
    assert logged.evaluated == [6, 12]


def ramp(num_steps: int, ramp_steps: int) -> Any:
    """A schedule of a user's own, a function that knows nothing of durations."""
    return lambda step: min(1.0, (step + 1) / ramp_steps)


def test_a_schedule_of_ones_own_gets_whole_steps() -> None:
    own = ["schedule=own", "schedule._target_=test_durations.ramp", "+schedule.ramp_steps=1 epochs"]
    trainer = build_trainer(typed(composed(*own)), mbgd.Workers())
    assert trainer.setup.settings.schedule(11) == pytest.approx(12 / 23)


def library(of_run: mbgd.Settings) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    inputs = torch.arange(30.0).view(10, 3) / 30
    targets = inputs.sum(1, keepdim=True)
    data = mbgd.Data(train=mbgd.InMemory(inputs, targets), evaluation=mbgd.InMemory(inputs[:2], targets[:2]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, of_run)


def test_a_run_by_the_library_goes_by_its_durations(tmp_path: Path) -> None:
    schedule = mbgd.schedule.Linear(num_steps="4 epochs", warmup_steps="0.5 epochs")
    with pytest.raises(mbgd.UsageError, match="how many steps that is depends on the run"):
        schedule(0)
    of_run = mbgd.Settings(
        steps="4 epochs",
        log_every_steps="10 examples",
        schedule=schedule,
        batch=mbgd.Batch(3),
        evaluation=mbgd.Evaluation("2 epochs"),
    )
    trainer, logged = library(of_run), Logged()
    assert trainer.setup.settings.schedule.num_steps == trainer.setup.num_steps == 16
    assert [trainer.setup.settings.schedule(step) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 0.5]
    checkpoints = mbgd.Checkpoints(tmp_path, trainer, Checkpoint(every_steps="1 epochs", every_seconds=None, keep=9))
    trainer.fit(logged, checkpoints)
    assert logged.trained == [1, 4, 8, 12, 16]
    assert logged.evaluated == [8, 16]
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == [f"step-{n:09}" for n in (4, 8, 12, 16)]


def test_the_library_refuses_a_text_without_the_form() -> None:
    with pytest.raises(mbgd.UsageError, match=r"steps=4 epohcs; it takes a whole number of steps"):
        library(mbgd.Settings(steps="4 epohcs"))
    with pytest.raises(mbgd.UsageError, match=r"schedule\.warmup_steps=soon; it takes"):
        mbgd.schedule.Constant(num_steps=3, warmup_steps="soon")
    with pytest.raises(mbgd.UsageError, match=r"warmup_steps=2 in a run of 1 steps"):
        library(mbgd.Settings(schedule=mbgd.schedule.Constant(num_steps=1, warmup_steps="20 examples")))


def test_a_resumed_run_must_have_the_same_durations_where_the_rate_depends_on_them() -> None:
    def values(**more: Any) -> dict[str, Any]:
        return must_match({**PLAIN, "schedule": {"_target_": "mbgd.schedule.Cosine"}, **more})

    assert values(steps="1 epochs") != values(steps="2 epochs")
    assert values(log_every_steps="1 epochs") == values(log_every_steps="2 epochs")


def test_parts_of_ones_own_can_ask_for_the_steps_of_a_duration() -> None:
    assert mbgd.in_steps("0.5 epochs", library(mbgd.Settings()).setup.plan) == 1
