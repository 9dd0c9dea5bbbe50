"""Metrics of the whole evaluation set: the same on any number of workers, each example once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbgd
from mbgd.data import digits

from processes import run_workers

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'mbgd[metrics]'")


class NumExamples:
    """How many examples it was given, in parts or at once."""

    def __init__(self) -> None:
        self.num_examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        assert len(outputs) == len(targets)
        self.num_examples += len(outputs)

    def compute(self) -> int:
        return self.num_examples

    def reset(self) -> None:
        self.num_examples = 0


def metrics() -> dict[str, Any]:
    return {
        "auroc": torchmetrics.AUROC(task="multiclass", num_classes=10),
        "f1": torchmetrics.F1Score(task="multiclass", num_classes=10, average="macro"),
        "examples": NumExamples(),
    }


def trainer_of(workers: mbgd.Workers, num_examples: int, asked: dict[str, Any], objective: Any = None) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    examples = digits("test")
    evaluation = mbgd.InMemory(examples.inputs[:num_examples], examples.targets[:num_examples])
    return mbgd.Trainer(
        model,
        objective or mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=digits("train"), evaluation=evaluation),
        mbgd.Settings(
            steps=4,
            averaging=mbgd.Averaging(mbgd.AveragingName.reproducible),
            evaluation=mbgd.Evaluation(batch_size=50, metrics=asked),
        ),
        workers,
    )


def evaluate(workers: mbgd.Workers, num_examples: int) -> tuple[dict[str, float], dict[str, float] | None]:
    """After training; and what torchmetrics gives for the whole set at once."""
    trainer = trainer_of(workers, num_examples, metrics())
    assert set(trainer.evaluation_names) == {"eval/loss", "eval/accuracy", "eval/auroc", "eval/f1", "eval/examples"}
    got = trainer.fit().metrics
    examples = digits("test")
    with torch.no_grad():
        outputs = trainer.model(examples.inputs[:num_examples]).softmax(1)
    wanted = {}
    for name, metric in metrics().items():
        if isinstance(metric, nn.Module):
            metric.distributed_available_fn = lambda: False
        metric.update(outputs, examples.targets[:num_examples])
        wanted[f"eval/{name}"] = float(metric.compute())
    return {name: value for name, value in got.items() if name.startswith("eval/")}, wanted


@pytest.mark.parametrize("num_examples", [360, 101, 40])  # 40: one part, so that workers 1 and 2 of 3 have none
def test_they_are_exact_and_the_same_bits_on_1_and_3_workers(num_examples: int) -> None:
    [(alone, wanted)] = run_workers(evaluate, 1, num_examples)
    together = run_workers(evaluate, 3, num_examples)
    assert wanted is not None
    for name, value in wanted.items():
        assert alone[name] == pytest.approx(value, rel=1e-6)  # the whole set in one forward rounds differently
    assert alone["eval/examples"] == num_examples
    assert 0.5 < alone["eval/auroc"] < 1.0
    assert all(got == alone for got, _ in together)


class Ragged:
    """Two tokens for each example, of which the second counts only where the digit is even."""

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        inputs, targets = batch
        outputs = model(inputs)
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        weights = torch.stack([torch.ones_like(losses), (targets % 2 == 0).to(losses.dtype)], 1)
        both = torch.stack([outputs, outputs], 1)
        return mbgd.PerExample(
            torch.stack([losses, losses], 1), weights, predictions=(both, torch.stack([targets, targets], 1))
        )


def test_what_has_no_weight_is_left_out() -> None:
    trainer = trainer_of(mbgd.Workers(), 101, {"tokens": NumExamples()}, Ragged())
    num_even = int((digits("test").targets[:101] % 2 == 0).sum())
    assert trainer.evaluate()["eval/tokens"] == 101 + num_even


class TwoNumbers(NumExamples):
    def compute(self) -> Any:
        return torch.zeros(2)


def without_predictions(model: nn.Module, batch: Any) -> mbgd.PerExample:
    return mbgd.PerExample(nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"))


@pytest.mark.parametrize(
    ("asked", "objective", "message"),
    [
        ({"loss": NumExamples()}, None, "eval/loss is there without it"),
        ({"accuracy": NumExamples()}, None, "eval/accuracy is there without it"),
        ({"mine": nn.Linear(2, 2)}, None, "is a Linear; a metric has update"),
        ({"mine": NumExamples()}, without_predictions, "gives no predictions"),
        ({"mine": TwoNumbers()}, None, "a metric is one number"),
        ({"mine": torchmetrics.AUROC(task="multiclass", num_classes=3)}, None, "cannot take outputs of shape"),
    ],
)
def test_mistakes_are_found_before_training(asked: dict[str, Any], objective: Any, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        trainer_of(mbgd.Workers(), 40, asked, objective)
