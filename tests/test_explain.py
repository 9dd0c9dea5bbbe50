"""explain: its numbers are those that one computes by hand, in float64."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mbgd.building.build import typed
from mbgd.building.composing import compose
from mbgd.data import digits
from mbgd.data.pictures import Picture, pictures
from mbgd.errors import UsageError
from mbgd.explain import example, page, wording
from mbgd.explain.computing import Explained
from mbgd.explain.explanation import Explanation

ROOT = Path(__file__).parent.parent
MEAN = [1.35, 0.15, 0.0, -0.2, -0.8]
SOFTMAX = ("model=linear", "optimizer=sgd", "optimizer.lr=0.5", "optimizer.momentum=0", "schedule=constant")


def explained(*overrides: str, num_workers: int = 2, seconds: float = 0.5) -> tuple[Explanation, list[Picture]]:
    it = Explained(typed(compose(overrides)), num_workers, seconds)
    explanation = it()
    return explanation, pictures(it.examples.batch, it.dataset, it.size)


class Branches(nn.Module):
    """What vmap cannot take: the way depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs.flatten(1))
        return outputs * 2 if inputs.sum().item() > 0 else outputs


def test_five_weights_by_hand() -> None:
    it, _ = explained(*example.OVERRIDES, seconds=120)
    assert [one.loss for one in it.examples] == [2, -2]
    assert it.mean_loss == 0
    assert [tuple(one.gradient) for one in it.examples] == list(example.GRADIENTS)
    assert [one.mean for one in it.weights] == pytest.approx(MEAN, rel=1e-15, abs=1e-15)
    assert [one.backward for one in it.weights] == pytest.approx(MEAN, rel=1e-15, abs=1e-15)
    assert [one.after for one in it.weights] == pytest.approx([-0.1 * one for one in MEAN], rel=1e-14, abs=1e-15)
    assert [tuple(one.sums) for one in it.shares] == list(example.GRADIENTS)
    assert it.total == pytest.approx([2 * one for one in MEAN], rel=1e-15, abs=1e-15)
    assert it.opposite is not None
    assert it.opposite.mean_loss == 0
    assert it.opposite.gradient == pytest.approx(MEAN, rel=1e-15, abs=1e-15)
    # Two gradients that lie d apart scatter by |d|² / 4 around their mean.
    apart = sum((a - b) ** 2 for a, b in zip(*example.GRADIENTS, strict=True)) / 4
    assert it.variance.of_one == pytest.approx(apart, rel=0.1)
    assert it.variance.noise_scale == pytest.approx(apart / sum(one**2 for one in MEAN), rel=0.15)
    assert it.next.loss_after == pytest.approx(
        2 - 0.1 * sum(a * b for a, b in zip(example.GRADIENTS[0], MEAN, strict=True)), rel=1e-14
    )


def test_softmax_regression_equals_its_formula() -> None:
    it, seen = explained(*SOFTMAX, "batch.size=6", "precision=fp64", num_workers=3)
    torch.manual_seed(0)
    data = digits("train")
    numbers = torch.tensor([one.number for one in it.examples])
    inputs, targets = (part[numbers] for part in (data.inputs.flatten(1).double(), data.targets))
    from mbgd.models import Linear

    layer = Linear((1, 8, 8), 10).output.double()
    errors = torch.softmax(layer(inputs), 1) - torch.nn.functional.one_hot(targets, 10)
    by_weight = errors[:, :, None] * inputs[:, None, :]
    for n, one in enumerate(it.examples):
        for value, weight in zip(one.gradient, it.weights, strict=True):
            name, *position = re.findall(r"[\w.]+", weight.name)
            of_example = by_weight[n] if name == "output.weight" else errors[n]
            assert value == pytest.approx(of_example[tuple(map(int, position))].item(), rel=1e-11, abs=1e-13)
        norm = (by_weight[n].square().sum() + errors[n].square().sum()).sqrt().item()
        assert one.norm == pytest.approx(norm, rel=1e-11)
    assert it.difference < 1e-14
    assert [one.after - one.before for one in it.weights] == pytest.approx([-0.5 * one.mean for one in it.weights])
    assert [(one.first, one.last) for one in it.shares] == [(1, 2), (3, 4), (5, 6)]
    assert [one.backward * 6 for one in it.weights] == pytest.approx(it.total, rel=1e-12)
    assert [int(one.label) for one in seen] == targets.tolist()
    assert all(one.png.startswith("data:image/png;base64,") for one in seen)


def test_variance_falls_with_the_size() -> None:
    it, _ = explained("batch.size=4", *SOFTMAX, seconds=120)
    ratios = [point.variance * point.size / it.variance.of_one for point in it.variance.points]
    assert len(ratios) == 10
    assert all(0.5 < ratio < 2 for ratio in ratios)


def test_tables_fit_and_the_page_stands_alone() -> None:
    it, seen = explained("batch.size=30", "model=mlp", "model.dropout=0.1")
    lines = wording.describe(it, seen).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("note: The model has Dropout") for line in lines)
    html = page.render(it, seen)
    assert "http" not in html.replace("http-equiv", "")
    assert "<script" not in html
    assert html.count("<img") == 48


def test_text_is_shown_as_text() -> None:
    small = ("model.width=8", "model.num_layers=1", "model.num_heads=2", "data.context=16", "batch.size=3")
    it, seen = explained("model=gpt", "data=text", f"data.path={ROOT / 'README.md'}", *small)
    assert it.difference < 1e-12
    assert all(0 < len(one.text) <= 16 for one in seen)


def test_what_vmap_cannot_take_goes_in_a_loop() -> None:
    it, _ = explained("model=own", "model._target_=test_explain.Branches", "batch.size=3")
    assert it.method.startswith("a loop")
    assert any("vmap cannot take" in note for note in it.notes)
    assert it.difference < 1e-12


@pytest.mark.parametrize(
    ("overrides", "num_workers", "told"),
    [
        (["batch.size=600"], 2, "explain shows each example, 512 at most"),
        (["objective=info_nce"], 2, "objective=InfoNCE: its losses look at several examples at once"),
        ([*example.OVERRIDES, "batch.size=3"], 2, "batch.size=3, but there are 2 training examples"),
        (["batch.size=2"], 3, "--workers 3 with 2 examples"),
        (["data=own"], 2, "data.train._target_ has no value"),
        (["modle=mlp"], 2, "modle"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(overrides: list[str], num_workers: int, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        explained(*overrides, num_workers=num_workers)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mbgd", "explain", "--example", "--seconds", "0.5", "--json", "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [one["name"] for one in json.loads(done.stdout)["weights"]] == [f"w[{n}]" for n in range(5)]
    assert (tmp_path / "explain.html").read_text().startswith("<!doctype html>")
