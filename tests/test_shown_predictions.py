"""Predictions of a few evaluation examples: what the model gives, as people see it; never at training's cost."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mbgd
from mbgd.building.recorded import recorded
from mbgd.data import digits, text
from mbgd.errors import UsageError
from mbgd.evaluation.shown_predictions import CHARACTERS_BEFORE, TOKENS
from mbgd.files import observed
from mbgd.files.observed import PREDICTIONS, PredictionLine

import runs
from processes import run_workers


class Keeps:
    """A tracker that keeps what observers write."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: object) -> None:
        pass

    def observed(self, name: str, step: int, values: Any) -> None:
        assert name == PREDICTIONS
        self.lines.append(observed.parsed(json.dumps({"step": step, **values}).encode(), PredictionLine))

    def close(self, ending: object) -> None:
        pass


def trainer(
    workers: mbgd.Workers,
    observers: Any,
    *,
    model: nn.Module | None = None,
    evaluation: Any = None,
    objective: Any = None,
    steps: int = 12,
) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = mbgd.Settings(steps=steps, batch=mbgd.Batch(50), evaluation=mbgd.Evaluation(every_steps=1))
    data = mbgd.Data(train=digits("train"), evaluation=evaluation or digits("test"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mbgd.Trainer(model, objective or mbgd.CrossEntropy(), optimizer, data, settings, workers, observers)


def drawn(png: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png.removeprefix("data:image/png;base64,")))))


def fitted(workers: mbgd.Workers, examples: int | None) -> tuple[list[Any], str]:
    made = trainer(workers, [] if examples is None else [mbgd.ShownPredictions(examples)])
    keeps = Keeps()
    made.fit(keeps)
    return keeps.lines, made.weights_sha256()


def test_images_have_the_models_classes_and_probabilities() -> None:
    made = trainer(mbgd.Workers(), [mbgd.ShownPredictions(4)])
    keeps = Keeps()
    made.fit(keeps)
    assert [line.step for line in keeps.lines] == [1, 2, 4, 8, 12]  # and the last
    inputs, targets = digits("test").gather(torch.arange(4))
    probabilities = made.setup.model(inputs).softmax(-1).detach()
    examples = keeps.lines[-1].examples
    assert len(examples) == 4
    for example, image, target, row in zip(examples, inputs, targets, probabilities, strict=True):
        assert np.array_equal(drawn(example.png), (image[0] / image.max() * 255).round().byte().numpy())
        assert example.target == str(target.item())
        best = row.argsort(descending=True)[:3]
        assert [guess.label for guess in example.predicted] == [str(one) for one in best.tolist()]
        assert [guess.probability for guess in example.predicted] == pytest.approx(row[best].tolist(), abs=6e-5)
    assert keeps.lines[0].examples[0].predicted != examples[0].predicted
    assert [line.examples[0].png for line in keeps.lines] == [examples[0].png] * 5


def test_they_are_the_same_on_any_number_of_workers_and_change_nothing() -> None:
    lines, sha256 = fitted(mbgd.Workers(), 3)
    assert fitted(mbgd.Workers(), None)[1] == sha256
    (of_main, _), (of_other, _) = run_workers(fitted, 2, 3)
    assert of_other == []
    assert [line.step for line in of_main] == [line.step for line in lines]
    for line, wanted in zip(of_main, lines, strict=True):
        for one, other in zip(line.examples, wanted.examples, strict=True):
            assert (one.png, one.target) == (other.png, other.target)
            assert [guess.label for guess in one.predicted] == [guess.label for guess in other.predicted]


class Dropped(nn.Module):
    """With dropout and BatchNorm, whose states an extra forward could change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)  # type: ignore[no-any-return]


def test_the_extra_forward_leaves_no_trace() -> None:
    hashes = set()
    for observers in ([], [mbgd.ShownPredictions(8)]):
        torch.manual_seed(0)
        made = trainer(mbgd.Workers(), observers, model=Dropped())
        made.fit(Keeps())
        buffers = [buffer.sum().item() for buffer in made.setup.model.buffers()]
        hashes.add((made.weights_sha256(), *buffers))
    assert len(hashes) == 1


def test_texts_have_each_tokens_prediction(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in {"a": "abcde" * 40, "b": "x" * 30, "c": "été " * 30}.items():
        (corpus / name).write_text(content)
    windows = text("evaluation", 100, str(corpus), evaluation_share=0.9)
    train = text("train", 100, str(corpus), evaluation_share=0.9)
    assert windows is not None
    assert train is not None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(257, 16), nn.Linear(16, 257))
    settings = mbgd.Settings(steps=3, batch=mbgd.Batch(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = mbgd.Data(train=train, evaluation=windows)
    observers = [mbgd.ShownPredictions(32)]
    keeps = Keeps()
    mbgd.Trainer(model, mbgd.CrossEntropy(ignore_index=-100), optimizer, data, settings, None, observers).fit(keeps)
    assert len(keeps.lines[-1].examples) == len(windows) >= 4
    kinds = set()
    for example, (inputs, targets) in zip(keeps.lines[-1].examples, windows, strict=True):
        kept = (targets >= 0).nonzero().flatten()[-TOKENS:]
        probabilities = model(inputs).softmax(-1)[kept]
        assert [token.target for token in example.tokens] == [character(one) for one in targets[kept].tolist()]
        assert [token.predicted for token in example.tokens] == [
            character(one) for one in probabilities.argmax(-1).tolist()
        ]
        found = [token.probability for token in example.tokens]
        assert found == pytest.approx(probabilities.gather(1, targets[kept].unsqueeze(1)).flatten().tolist(), abs=6e-5)
        before = bytes(one for one in inputs[: int(kept[0]) + 1].tolist() if one < 256).decode(errors="replace")
        assert example.text == before[-CHARACTERS_BEFORE:]
        kinds |= {token.target for token in example.tokens}
    assert {"<end>", "x", "a", "\ufffd"} <= kinds


def character(token: int) -> str:
    return "<end>" if token == 256 else bytes([token]).decode(errors="replace")


class Outputs(nn.Module):
    """Gives the objective's outputs of another kind."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.flatten(1))  # type: ignore[no-any-return]


def images_and_values(number: int) -> mbgd.InMemory:
    inputs, targets = digits("test").gather(torch.arange(number))
    return mbgd.InMemory(inputs, targets.float().unsqueeze(1) / 10)


def test_values_of_images_are_shown_as_they_are() -> None:
    values = images_and_values(20)
    made = trainer(
        mbgd.Workers(), [mbgd.ShownPredictions(2)], model=Outputs(1), evaluation=values, objective=Valued(), steps=1
    )
    keeps = Keeps()
    made.fit(keeps)
    first = keeps.lines[-1].examples[0]
    assert first.target == f"{values[0][1].item():.4g}"
    [guess] = first.predicted
    assert float(guess.label) == pytest.approx(made.setup.model(values[0][0].unsqueeze(0)).item(), rel=1e-3)
    assert guess.probability is None


class Valued:
    """Squared error, whatever the targets' type and shape."""

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        outputs, targets = model(batch[0]), batch[1].float().view(-1, 1)
        return mbgd.PerExample((outputs - targets).square().flatten(), predictions=(outputs, targets))


class Silent:
    """Without predictions."""

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        return mbgd.PerExample(nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Silent()}, "the objective gives no predictions"),
        (
            {"evaluation": mbgd.InMemory(torch.randn(9, 64), torch.zeros(9, dtype=torch.int64))},
            "the evaluation examples cannot be shown. They must be images",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(
        UsageError, match=r"observers.predictions: predictions.examples=3.*predictions.examples=null"
    ) as told:
        trainer(mbgd.Workers(), [mbgd.ShownPredictions(3)], **changes)
    assert message in str(told.value)


def test_without_evaluation_examples_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"predictions.examples=3, but there is no evaluation dataset"):
        runs.run(tmp_path / "run", "predictions.examples=3", "data.evaluation=null")
    with pytest.raises(UsageError, match=r"predictions.examples=33; it must be from 1 to 32"):
        runs.run(tmp_path / "run", "predictions.examples=33")


class BreaksLater(nn.Module):
    """Its forward of exactly 5 examples in evaluation fails from the second on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(64, 10), 0

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 5 and not self.training:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no memory")
        return self.linear(inputs.flatten(1))  # type: ignore[no-any-return]


def test_a_failure_does_not_stop_training(capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(mbgd.Workers(), [mbgd.ShownPredictions(5)], model=BreaksLater())
    keeps = Keeps()
    result = made.fit(keeps)
    assert result.steps == 12
    assert keeps.lines == []
    assert capsys.readouterr().out.count("warning: the predictions of the first evaluation examples failed") == 1


class StopsAfter3:
    def after_evaluation(self, step: int, metrics: object) -> bool:
        return step == 3


def test_a_run_that_is_stopped_early_has_its_last_predictions() -> None:
    made = trainer(mbgd.Workers(), [mbgd.ShownPredictions(2), StopsAfter3()])
    keeps = Keeps()
    made.fit(keeps)
    assert [line.step for line in keeps.lines] == [1, 2, 3]


def test_a_resumed_run_repeats_and_loses_no_line(tmp_path: Path) -> None:
    overrides = ["predictions.examples=2", "evaluation.every_steps=8"]
    runs.run(tmp_path / "whole", *overrides)
    with pytest.raises(mbgd.Preempted):
        runs.run(tmp_path / "cut", *overrides, stop_at=20)
    runs.run(tmp_path / "cut", *overrides)
    whole, cut = ((tmp_path / name / "observed/predictions.jsonl").read_text() for name in ("whole", "cut"))
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [8, 16, 32, 46]
    assert cut == whole


class Named:
    """Digits whose classes have names."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self) -> None:
        self._digits = digits("test")

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._digits[index]


def test_classes_have_their_names_and_sets_theirs() -> None:
    made = trainer(mbgd.Workers(), [mbgd.ShownPredictions(3)], evaluation={"b": Named(), "a": digits("test")}, steps=1)
    keeps = Keeps()
    made.fit(keeps)
    assert keeps.lines[-1].set == "b"
    assert {example.target for example in keeps.lines[-1].examples} <= set(Named.classes)
    assert all(guess.label in Named.classes for example in keeps.lines[-1].examples for guess in example.predicted)


def test_a_finished_run_is_evaluated_on_other_data(tmp_path: Path) -> None:
    """On which predictions could not be shown."""
    runs.run(tmp_path / "run", "predictions.examples=2", "histograms.steps=2")
    config = recorded(tmp_path / "run", [])
    assert (config.predictions.examples, config.histograms.steps) == (None, None)
