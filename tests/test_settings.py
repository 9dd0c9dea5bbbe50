"""Settings as Python objects: each value is what it says, or is refused by name."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mbgd
from mbgd.config import (
    AveragingName,
    Backend,
    BackendName,
    Checkpoint,
    Config,
    Direction,
    Resume,
    Run,
    Sweep,
    Tracking,
    Wandb,
    WandbMode,
    must_match,
    validate,
)
from mbgd.schedule import Constant, Cosine, Schedule, Step


def test_names_do_where_enums_do() -> None:
    assert mbgd.Settings(precision="bf16").precision is mbgd.Precision.bf16  # type: ignore[arg-type]
    assert mbgd.Averaging(name="reproducible").name is AveragingName.reproducible  # type: ignore[arg-type]
    assert Backend(name="gloo").name is BackendName.gloo  # type: ignore[arg-type]
    assert Sweep(direction="maximize").direction is Direction.maximize  # type: ignore[arg-type]
    assert Checkpoint(direction="maximize").direction is Direction.maximize  # type: ignore[arg-type]
    assert Wandb(mode="online").mode is WandbMode.online  # type: ignore[arg-type]


def test_precision_by_name_is_the_precision_of_training() -> None:
    seen = set()

    def objective(model: torch.nn.Module, batch: Any) -> mbgd.PerExample:
        outputs = model(batch[0])
        seen.add(outputs.dtype)
        return mbgd.PerExample(outputs.float().square().mean(1))

    model = torch.nn.Linear(3, 2)
    data = mbgd.Data(train=mbgd.InMemory(torch.ones(4, 3), torch.ones(4)))
    settings = mbgd.Settings(steps=1, precision="bf16", batch=mbgd.Batch(4))  # type: ignore[arg-type]
    mbgd.Trainer(model, objective, torch.optim.SGD(model.parameters(), lr=0.1), data, settings).fit()
    assert seen == {torch.bfloat16}


def test_numbers_of_other_libraries_become_pythons() -> None:
    settings = mbgd.Settings(seed=np.int64(3), epochs=np.int32(2), max_grad_norm=np.float32(0.5))  # type: ignore[arg-type]
    assert (type(settings.seed), type(settings.epochs), type(settings.max_grad_norm)) == (int, int, float)
    assert type(mbgd.Settings(max_grad_norm=1).max_grad_norm) is float
    assert mbgd.Settings(max_grad_norm=Fraction(1, 2)).max_grad_norm == 0.5  # type: ignore[arg-type]
    assert mbgd.Averaging(find_unused_parameters=np.bool_(True)).find_unused_parameters is True  # type: ignore[arg-type]
    assert Run(dir=Path("a") / "b").dir == "a/b"  # type: ignore[arg-type]
    assert Wandb(tags=("a", "b")).tags == ["a", "b"]  # type: ignore[arg-type]


WRONG = [
    (mbgd.Batch, {"size": "16"}, "Batch(size='16'): it takes a whole number."),
    (mbgd.Batch, {"size": 16.0}, "Batch(size=16.0): it takes a whole number."),
    (mbgd.Batch, {"size": True}, "Batch(size=True)"),
    (mbgd.Batch, {"size": None}, "Batch(size=None)"),
    (mbgd.Batch, {"size": torch.tensor(3)}, "Batch(size=tensor(3))"),
    (mbgd.Batch, {"micro_batch_size": 1.5}, "it takes a whole number or None"),
    (mbgd.Batch, {"drop_last": "drop"}, "Batch(drop_last='drop'): it takes True or False."),
    (mbgd.Batch, {"drop_last": 1}, "it takes True or False."),
    (mbgd.Settings, {"epochs": 1.5}, "Settings(epochs=1.5)"),
    (mbgd.Settings, {"seed": "3"}, "Settings(seed='3')"),
    (mbgd.Settings, {"max_grad_norm": "1"}, "it takes a number or None"),
    (mbgd.Settings, {"max_grad_norm": False}, "it takes a number or None"),
    (mbgd.Settings, {"precision": "bf61"}, "fp64, fp32, bf16, bf16-true, fp16. Did you mean bf16"),
    (mbgd.Settings, {"precision": "BF16"}, "Did you mean bf16?"),
    (mbgd.Settings, {"precision": torch.bfloat16}, "Settings(precision=torch.bfloat16)"),
    (mbgd.Settings, {"precision": AveragingName.auto}, "it is one of fp64"),
    (mbgd.Settings, {"averaging": "reproducible"}, "it takes mbgd.Averaging(name=…)"),
    (mbgd.Settings, {"batch": 16}, "Settings(batch=16): it takes mbgd.Batch(size=…)"),
    (mbgd.Settings, {"batch": {"size": 16}}, "it takes mbgd.Batch(size=…)"),
    (mbgd.Settings, {"evaluation": None}, "it takes mbgd.Evaluation"),
    (mbgd.Evaluation, {"metrics": [1]}, "it takes a dict with names as keys"),
    (mbgd.Averaging, {"find_unused_parameters": "no"}, "it takes True or False or None"),
    (Tracking, {"quiet": 1}, "it takes True or False"),
    (Run, {"name": 3}, "it takes a text or None"),
    (Wandb, {"tags": "abc"}, "it takes a list of texts"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_values_of_another_type_are_refused_by_name(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(mbgd.UsageError) as caught:
        kind(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan"),
        ({"max_grad_norm": math.inf}, "max_grad_norm=inf"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"schedule": 3}, "schedule=3"),
        ({"schedule": {"_target_": "mbgd.schedule.Constant"}}, "must be a function of the step"),
    ],
)
def test_numbers_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    [problem] = validate(mbgd.Settings(**values))
    assert message in problem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": Backend(timeout_seconds=math.nan)}, "backend.timeout_seconds=nan"),
        ({"checkpoint": Checkpoint(every_seconds=math.inf)}, "checkpoint.every_seconds=inf"),
        ({"checkpoint": Checkpoint(best="")}, "checkpoint.best is empty"),
        ({"tracking": Tracking(wandb=Wandb(finish_seconds=math.nan))}, "finish_seconds=nan"),
        ({"sweep": Sweep(target=math.nan)}, "sweep.target=nan"),
        ({"run": Run(dir="")}, "run.dir is empty"),
        ({"resume": Resume("")}, "resume.from is empty"),
    ],
)
def test_numbers_of_a_run_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    [problem] = validate(Config(**values))
    assert message in problem


class OneCycleStep(Step):
    """Inherits from one that is independent of the run's length, and is not."""

    def after_warmup(self, step: int) -> float:
        return 1 - self.progress(step)


class Plateau(Schedule):
    depends_on_length = False

    def after_warmup(self, step: int) -> float:
        return 0.5


def cosine_step(num_steps: int) -> Cosine:
    return Cosine(num_steps=num_steps)


def course(target: str | None) -> dict[str, Any]:
    parts = {key: {"_target_": "x"} for key in ("model", "objective", "optimizer", "data")}
    whole = {"seed": 0, "precision": "fp32", "max_grad_norm": None, "epochs": 2, "steps": None, **parts}
    schedule = None if target is None else {"_target_": target, "warmup_steps": 1}
    return must_match({**whole, "batch": {"size": 3, "drop_last": False}, "schedule": schedule})


def test_a_schedule_says_itself_whether_it_depends_on_the_runs_length() -> None:
    for name in ("mbgd.schedule.Constant", "mbgd.schedule.Step", f"{__name__}.Plateau", None):
        assert not {"epochs", "steps"} & course(name).keys(), name
    for name in (
        "mbgd.schedule.Cosine",
        "mbgd.schedule.Linear",
        f"{__name__}.OneCycleStep",
        f"{__name__}.cosine_step",
        "nowhere.Step",
        "mbgd.schedule.NoStep",
        "",
    ):
        assert {"epochs", "steps"} <= course(name).keys(), name


@pytest.mark.parametrize(
    "values", [{"warmup_steps": 1.5}, {"every_steps": 2.5}, {"decay": math.nan}, {"decay": "x"}, {"decay": -0.1}]
)
def test_numbers_of_a_schedule_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(mbgd.UsageError, match=rf"schedule\.{next(iter(values))}="):
        Step(num_steps=100, **({"every_steps": 10} | values))
    with pytest.raises(mbgd.UsageError, match=r"schedule\.final_factor=nan"):
        Cosine(num_steps=100, final_factor=math.nan)
    assert Constant(num_steps=100, warmup_steps=np.int64(2))(0) == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "new"),
    [
        (lambda: mbgd.Settings(clip_norm=1.0), "max_grad_norm"),  # type: ignore[call-arg]
        (lambda: mbgd.Batch(last="drop"), "batch.drop_last"),  # type: ignore[call-arg]
        (lambda: Checkpoint(memory_every=1), "checkpoint.memory_every_steps"),  # type: ignore[call-arg]
        (lambda: Config(resume_force=True), "resume.force"),  # type: ignore[call-arg]
    ],
)
def test_old_names_of_fields_are_refused_with_the_new_one(make: Callable[[], object], new: str) -> None:
    with pytest.raises(mbgd.UsageError, match=f"It is called {new}"):
        make()


def test_a_field_that_never_was_is_refused_with_the_nearest() -> None:
    with pytest.raises(mbgd.UsageError, match="Did you mean max_grad_norm"):
        mbgd.Settings(max_gradnorm=1.0)  # type: ignore[call-arg]
