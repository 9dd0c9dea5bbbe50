"""Several evaluation sets by name, and an evaluation before the first step."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_configuration import composed
from torch import nn

import mbgd
from mbgd.building.build import build_data, build_trainer, typed
from mbgd.runs.wording import plan_lines
from mbgd.tracking import Ending

from processes import run_workers


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self.lines.append((step, dict(metrics)))

    def close(self, ending: Ending) -> None:
        pass


def examples(number: int, seed: int) -> mbgd.InMemory:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    return mbgd.InMemory(inputs, inputs.sum(1, keepdim=True) + seed)


SETS = {"val": (23, 1), "ood": (5, 2)}


def train(workers: mbgd.Workers, averaging: str, *, at_start: bool) -> tuple[list[tuple[int, dict[str, Any]]], float]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = mbgd.Data(train=examples(40, 0), evaluation={name: examples(*one) for name, one in SETS.items()})
    settings = mbgd.Settings(
        steps=4,
        batch=mbgd.Batch(10),
        precision="fp64",
        averaging=mbgd.Averaging(averaging),
        evaluation=mbgd.Evaluation(every_steps=2, batch_size=4, at_start=at_start),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, workers)
    lines = Lines()
    trainer.fit(lines)
    plain = {}
    for name, one in SETS.items():  # plain torch, all examples at once
        dataset = examples(*one)
        inputs, targets = dataset.gather(torch.arange(len(dataset)))
        with torch.no_grad():
            plain[name] = nn.functional.mse_loss(model(inputs), targets).item()
    last = trainer.evaluate()
    assert last.keys() == {"eval/val/loss", "eval/ood/loss"}
    return lines.lines, max(abs(last[f"eval/{name}/loss"] / plain[name] - 1) for name in SETS)


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_set_has_its_exact_mean(num_workers: int, averaging: str) -> None:
    if averaging == "shared_memory" and num_workers == 1:
        averaging = "auto"
    lines, error = run_workers(_train, num_workers, averaging, True)[0]
    assert error <= 1e-12
    evaluations = [(step, {name for name in values if name.startswith("eval/")}) for step, values in lines]
    evaluations = [(step, {name for name in names if "sha256" not in name}) for step, names in evaluations if names]
    both = {"eval/val/loss", "eval/ood/loss"}
    assert evaluations == [(0, both), (2, both), (4, both)]


def _train(workers: mbgd.Workers, averaging: str, at_start: bool) -> Any:
    return train(workers, averaging, at_start=at_start)


def test_without_at_start_the_first_evaluation_is_after_the_first_steps() -> None:
    lines, _ = train(mbgd.Workers(), "auto", at_start=False)
    assert [step for step, values in lines if any(name.startswith("eval/") for name in values)] == [2, 4]


def test_a_configuration_names_sets() -> None:
    digits = "{_target_:mbgd.data.digits,split:test}"
    config = typed(composed("data=own", f"data.evaluation={{val:{digits},again:{digits}}}", *_OWN_TRAIN))
    assert set(build_data(config).evaluation_sets) == {"val", "again"}
    trainer = build_trainer(config, mbgd.Workers())
    assert trainer.evaluations.names == [
        "eval/val/loss",
        "eval/val/accuracy",
        "eval/again/loss",
        "eval/again/accuracy",
    ]
    assert plan_lines(trainer)["examples"].endswith("360 val + 360 again for evaluation")


_OWN_TRAIN = ["data.train._target_=mbgd.data.digits", "+data.train.split=train"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({}, "names no evaluation set"),
        ({"a/b": examples(3, 0)}, "a set named 'a/b'"),
        ({"": examples(3, 0)}, "a set named ''"),
        ({1: examples(3, 0)}, "a set named 1"),
        ({"val": 3}, r"the evaluation \(val\) dataset \(int\) has no length"),
        ({"val": []}, r"the evaluation \(val\) dataset \(list\) is empty"),
    ],
)
def test_mistakes_are_refused_by_name(evaluation: Any, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        mbgd.Data(train=examples(3, 0), evaluation=evaluation)


def test_a_set_that_the_model_cannot_take_is_named_before_training() -> None:
    model = nn.Linear(3, 1)
    data = mbgd.Data(
        train=examples(8, 0),
        evaluation={"good": examples(4, 1), "bad": mbgd.InMemory(torch.ones(4, 5), torch.ones(4, 1))},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Exception, match="mat1 and mat2") as caught:
        mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, mbgd.Settings(steps=1, batch=mbgd.Batch(4)))
    assert "evaluation set bad" in json.dumps([str(caught.value), *getattr(caught.value, "__notes__", [])])
