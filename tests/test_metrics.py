"""Metrics that are no means of per-example values: exact over the whole evaluation set, on any number of workers."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.building import build
from mbgd.data import digits

import runs
from processes import run_workers

SIZES = (1797, 360, 41)
"""Evaluation examples; the last are fewer parts of BATCH_SIZE than there are workers."""
BATCH_SIZE = 32


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def few(size: int) -> mbgd.InMemory:
    everything = digits("all")
    return mbgd.InMemory(everything.inputs[:size], everything.targets[:size])


def trainer(
    workers: mbgd.Workers,
    metrics: dict[str, Any],
    evaluation: Any,
    *,
    of: nn.Module | None = None,
    objective: Any = None,
    **settings: Any,
) -> mbgd.Trainer:
    of = of or model()
    return mbgd.Trainer(
        of,
        objective or mbgd.CrossEntropy(),
        torch.optim.SGD(of.parameters(), lr=0.1),
        mbgd.Data(train=evaluation or digits("train"), evaluation=evaluation),
        mbgd.Settings(evaluation=mbgd.Evaluation(batch_size=BATCH_SIZE, metrics=metrics), **({"steps": 0} | settings)),
        workers,
    )


def auroc(num_classes: int = 10, **options: Any) -> Any:
    from torchmetrics.classification import MulticlassAUROC  # takes seconds, in each worker that imports this file

    return MulticlassAUROC(num_classes, **options)


def of_digits() -> dict[str, Any]:
    from torchmetrics.classification import MulticlassF1Score

    return {"auroc": auroc(), "f1": MulticlassF1Score(10)}


def evaluate(workers: mbgd.Workers) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The metrics of an untrained model on each of SIZES, and of one trained with reproducible averaging."""
    precision, averaging = mbgd.Precision.fp64, mbgd.Averaging(mbgd.AveragingName.reproducible)
    untrained = [trainer(workers, of_digits(), few(size), precision=precision).fit().metrics for size in SIZES]
    trained = trainer(workers, of_digits(), digits("test"), averaging=averaging, steps=5).fit().metrics
    return untrained, {name: value for name, value in trained.items() if name.startswith("eval/")}


def area(probabilities: Tensor, targets: Tensor) -> float:
    """AUROC as it is defined: how often an example of a class gets more of it than one of another class; ties half."""
    areas = []
    for of_class in range(10):
        own, other = (probabilities[kept, of_class] for kept in (targets == of_class, targets != of_class))
        areas.append((own[:, None] > other).double().mean() + (own[:, None] == other).double().mean() / 2)
    return float(torch.stack(areas).mean())


@pytest.fixture
def as_in_a_worker() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("as_in_a_worker")
def test_they_are_those_of_the_whole_set_in_one_process_on_any_number_of_workers() -> None:
    on_one = evaluate(mbgd.Workers())
    on_three = run_workers(evaluate, 3)
    for index, size in enumerate(SIZES):
        data = few(size)
        with torch.no_grad():
            probabilities = model().double()(data.inputs.double()).softmax(1)
        in_one_process = {name: float(metric(probabilities, data.targets)) for name, metric in of_digits().items()}
        assert in_one_process["auroc"] == pytest.approx(area(probabilities, data.targets), abs=1e-6)  # it is float32
        assert 0.3 < in_one_process["auroc"] < 0.7
        for untrained, _ in (on_one, *on_three):
            assert {name: untrained[index][f"eval/{name}"] for name in in_one_process} == in_one_process
    same_bits = on_one[1]
    assert 0.6 < same_bits["eval/auroc"] < 1
    assert [trained for _, trained in on_three] == [same_bits] * 3


class Numbers:
    """Keeps what it gets, and gives how much that is."""

    def __init__(self) -> None:
        self.outputs, self.targets = torch.empty(0), torch.empty(0)

    def reset(self) -> None:
        pass

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs, self.targets = outputs, targets

    def compute(self) -> int:
        return len(self.targets)


NUM_TOKENS = 3


def per_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    """Token t of example n is number 3n + t, and counts where n + t is even."""
    inputs, numbers = batch
    weights = (torch.arange(NUM_TOKENS) + numbers[:, :1] // NUM_TOKENS) % 2 == 0
    return mbgd.PerExample(model(inputs).expand(-1, NUM_TOKENS), weights.float(), predictions=(numbers / 2, numbers))


def count_tokens(workers: mbgd.Workers) -> tuple[float, list[int], list[float]]:
    numbers, seen = torch.arange(100 * NUM_TOKENS).view(100, NUM_TOKENS), Numbers()
    data = mbgd.InMemory(torch.ones(100, 2), numbers)
    result = trainer(workers, {"tokens": seen}, data, of=nn.Linear(2, 1), objective=per_token).fit()
    return result.metrics["eval/tokens"], seen.targets.tolist(), seen.outputs.tolist()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_token_that_counts_is_seen_once_in_order(num_workers: int) -> None:
    wanted = [3 * n + t for n in range(100) for t in range(NUM_TOKENS) if (n + t) % 2 == 0]
    results = run_workers(count_tokens, num_workers)
    assert results[0] == (150, wanted, [number / 2 for number in wanted])
    assert all(count == 150 for count, _, _ in results)


class OnlyFew(Numbers):
    """Fails on more examples than the check before training shows it."""

    def compute(self) -> int:
        if len(self.targets) > 4:
            raise ValueError("too many")
        return 0


def of_growing_size(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    return mbgd.PerExample(losses, predictions=(inputs.flatten(1)[:, : len(inputs)], targets))


def fail_late(workers: mbgd.Workers) -> list[str]:
    messages = []
    for metric, objective in ((OnlyFew(), None), (Numbers(), of_growing_size)):
        with pytest.raises(mbgd.UsageError) as caught:
            trainer(workers, {"mine": metric}, few(67), objective=objective).fit()
        messages.append(str(caught.value))
    return messages


def test_what_the_check_before_training_cannot_find_stops_every_worker() -> None:
    for too_many, growing in run_workers(fail_late, 2):
        assert "evaluation.metrics.mine (OnlyFew) cannot be computed from outputs of shape (67, 10)" in too_many
        assert "outputs of one example have shapes (22,), (23,) in different parts" in growing


# Mistakes


def without_predictions(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    return mbgd.PerExample(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def with_a_mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return mbgd.PerExample(losses, predictions=lambda: (losses.mean(), batch[1]))


def with_a_list(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return mbgd.PerExample(losses, predictions=[losses, batch[1]])  # type: ignore[arg-type]


MISTAKES: list[tuple[dict[str, Callable[[], Any]], dict[str, Any], str]] = [
    ({"auroc": auroc}, {"evaluation": None}, "evaluation.metrics=auroc, but there is no evaluation"),
    ({"auroc": auroc}, {"objective": without_predictions}, r"predictions=\(outputs, targets\)"),
    ({"auroc": auroc}, {"objective": with_a_mean}, r"outputs have shape \(\) beside losses"),
    ({"auroc": auroc}, {"objective": with_a_list}, "predictions of type list; they must be a pair"),
    ({"accuracy": auroc}, {}, "the name eval/accuracy is taken. Choose another name"),
    ({"loss": auroc}, {}, "the name eval/loss is taken"),
    ({"auroc": partial(nn.Linear, 1, 1)}, {}, "auroc is a Linear; a metric has update"),
    ({"auroc": partial(auroc, 7)}, {}, r"\(MulticlassAUROC\) cannot take outputs of shape \(4, 10\)"),
    ({"auroc": partial(auroc, average=None)}, {}, r"gives a tensor of shape \(10,\); a metric is one number"),
]


def make_mistakes(workers: mbgd.Workers) -> list[str]:
    messages = []
    for metrics, parts, _ in MISTAKES:
        with pytest.raises(mbgd.UsageError) as caught:
            trainer(workers, {name: make() for name, make in metrics.items()}, **({"evaluation": few(360)} | parts))
        messages.append(str(caught.value))
    return messages


def test_mistakes_are_refused_on_every_worker_before_training() -> None:
    first, second = run_workers(make_mistakes, 2)
    assert first == second
    for message, (_, _, wanted) in zip(first, MISTAKES, strict=True):
        assert re.search(wanted, message)


def test_a_metric_that_needs_more_examples_than_the_check_has_is_taken() -> None:
    class Many(Numbers):
        def compute(self) -> int:
            if len(self.targets) < 5:
                raise ValueError("too few")
            return super().compute()

    assert trainer(mbgd.Workers(), {"many": Many()}, few(100)).fit().metrics["eval/many"] == 100


# From the configuration

AUROC = "torchmetrics.classification.MulticlassAUROC"


def test_a_metric_of_the_configuration_is_like_any_other(tmp_path: Path) -> None:
    overrides = (f"+evaluation.metrics.auroc._target_={AUROC}", "+evaluation.metrics.auroc.num_classes=10")
    runs.run(tmp_path, *overrides, "checkpoint.best=eval/auroc", "checkpoint.every_steps=5")
    logged = [line["eval/auroc"] for line in runs.metrics(tmp_path) if "eval/auroc" in line]
    assert len(logged) == 2
    assert 0.9 < logged[-1] < 1
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["eval/auroc"] == logged[-1]


def test_a_target_that_cannot_be_found_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    make_metric = partial(build.make, "evaluation.metrics.auroc")
    with pytest.raises(mbgd.UsageError, match=r"MulticlassAUROCC'\. Did you mean MulticlassAUROC"):
        make_metric({"_target_": f"{AUROC}C", "num_classes": 10})
    with pytest.raises(mbgd.UsageError, match="MulticlassAUROC needs num_classes"):
        make_metric({"_target_": AUROC})
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
    for module in [name for name in sys.modules if name.startswith("torchmetrics.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(mbgd.UsageError, match=r"pip install 'mbgd\[metrics\]'"):
        make_metric({"_target_": AUROC, "num_classes": 10})
