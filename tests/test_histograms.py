"""Histograms of gradients and parameters: those of torch.histogram, the same on any number of workers."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mbgd
from mbgd.errors import Preempted, UsageError
from mbgd.files import observed
from mbgd.files.observed import HISTOGRAMS, Histogram, HistogramLine
from mbgd.step.histograms import by_layer, histogram, spread
from mbgd.tracking import follow

import runs
from processes import run_workers

STEPS, SIZE = 12, 10
POWERS = [2.0**exponent for exponent in range(-48, 25)]


def plain_histogram(values: Tensor) -> Histogram:
    """From the definition, by torch.histogram."""
    values = values.detach().double().flatten()
    edges = torch.tensor([0.0, *POWERS], dtype=torch.float64)
    below_the_last = math.nextafter(POWERS[-1], 0)  # torch.histogram's last bin holds its upper edge as well
    sides = [one[one <= below_the_last] for one in (values[values >= 0], -values[values < 0])]
    positive, negative = ([int(count) for count in torch.histogram(one, edges).hist] for one in sides)
    used = [number for number in range(1, len(edges) - 1) if positive[number] or negative[number]]
    found = Histogram(len(values), positive[0] + negative[0])
    if used:
        kept = slice(used[0], used[-1] + 1)
        found.low, found.positive, found.negative = used[0] - 1 - 48, positive[kept], negative[kept]
    return found


ODD = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-48, -(2.0**-48), 2.0**-49, 2.0**24, -(2.0**24), 1e30, 5e-324, 3.0, -0.75]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_counts_are_those_of_torch_histogram(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(5000).exp() * torch.randn(5000), torch.tensor(ODD, dtype=torch.float64)]).to(dtype)
    found = histogram([values])
    assert found == plain_histogram(values)
    assert sum(found.positive) > 1000
    assert sum(found.negative) > 1000
    parts = [values[:100].view(10, 10), values[100:]]
    assert histogram(parts) == found
    assert histogram([values.double() * 7], divisor=torch.tensor(7)) == histogram([values.double() * 7 / 7])


@given(st.lists(st.floats(width=32), max_size=50))
def test_whatever_the_values_each_is_counted_once_or_left_out(values: list[float]) -> None:
    found = histogram([torch.tensor(values, dtype=torch.float32)])
    counted = [value for value in values if abs(value) < POWERS[-1]]  # false for nan
    assert found.size == len(values)
    assert found.zero + sum(found.negative) + sum(found.positive) == len(counted)
    counts, edges = found.counts_and_edges()
    assert len(edges) == len(counts) + 1
    assert edges == sorted(edges)
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        is_middle = low < 0 < high
        inside = (abs(value) < POWERS[0] for value in counted)
        if not is_middle:
            inside = (low <= value < high if low > 0 else low < value <= high for value in counted)
        assert count == sum(inside)


def test_more_values_than_a_piece_has() -> None:
    values = torch.linspace(-1, 1, 2**20 + 12345)
    assert histogram([values]) == plain_histogram(values)
    assert histogram([torch.complex(values, 2 * values)]) == plain_histogram(torch.cat([values, 2 * values]))


@given(st.integers(1, 50), st.integers(1, 10**6))
def test_steps_are_spread_from_the_first_to_the_last(number: int, num_steps: int) -> None:
    steps = sorted(spread(number, num_steps))
    assert len(steps) <= number
    assert steps[-1] == num_steps
    assert number == 1 or steps[0] == 1
    if number > 1 and num_steps > 10 * number:
        gaps = [after - before for before, after in pairwise(steps)]
        assert len(steps) == number
        assert max(gaps) - min(gaps) <= 2


GPT = [f"blocks.{n}.{part}.{one}" for n in range(48) for part in ("norm", "mlp.up") for one in ("weight", "bias")]
RESNET = [f"layer{n}.{m}.conv{k}.weight" for n in range(4) for m in range(2) for k in range(2)]


@pytest.mark.parametrize(
    ("names", "most", "layers"),
    [
        (["weight", "bias"], 16, ["weight", "bias"]),
        (["0.weight", "0.bias", "2.weight"], 16, ["0", "2"]),
        (["embed.weight", *GPT, "head.weight"], 200, ["embed", "blocks.0.norm", "blocks.0.mlp.up", "blocks.1.norm"]),
        (["embed.weight", *GPT, "head.weight"], 60, ["embed", "blocks.0", "blocks.1", "blocks.2"]),
        (["embed.weight", *GPT, "head.weight"], 16, ["embed to blocks.2", "blocks.3 to blocks.5"]),
        (["conv.weight", *RESNET], 16, ["conv", "layer0.0", "layer0.1", "layer1.0"]),
        ([f"{n}.weight" for n in range(7)], 3, ["0 to 2", "3 to 4", "5 to 6"]),
        ([f"{n}.weight" for n in range(7)], 1, ["0 to 6"]),
    ],
)
def test_layers_are_put_together_where_they_are_many(names: list[str], most: int, layers: list[str]) -> None:
    found = by_layer(names, most)
    assert list(found)[: len(layers)] == layers
    assert len(found) <= most
    assert [one for of_layer in found.values() for one in of_layer] == names  # each once, and in order


# In training


def model_and_data(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    inputs = torch.randn(STEPS * SIZE, 6, dtype=dtype)
    return model, inputs, torch.randn(STEPS * SIZE, 2, dtype=dtype)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "fused":  # divides the gradients itself
        return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)  # changes the gradients in place


class Keeps:
    """A tracker that keeps what observers write."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: object) -> None:
        pass

    def observed(self, name: str, step: int, values: Any) -> None:
        assert name == HISTOGRAMS
        assert values["step"] == step
        self.lines.append(values)

    def close(self, ending: mbgd.tracking.Ending) -> None:  # type: ignore[name-defined]
        pass


def trained(workers: mbgd.Workers, kind: str, averaging: str, observes: bool = True) -> tuple[list[Any], str]:
    """(what the observer has written, the hash of the weights)"""
    model, inputs, targets = model_and_data(torch.float32 if kind == "fused" else torch.float64)
    settings = mbgd.Settings(
        steps=STEPS,
        batch=mbgd.Batch(SIZE, micro_batch_size=3),
        precision="fp32" if kind == "fused" else "fp64",
        averaging=mbgd.Averaging(averaging),
        max_grad_norm=0.5 if kind == "clipped" else None,
    )
    data = mbgd.Data(train=mbgd.InMemory(inputs, targets), shuffle=False)
    observers = [mbgd.Histograms(5, 2)] if observes else []
    optimizer = optimizer_of(kind, model)
    trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, workers, observers)
    keeps = Keeps()
    trainer.fit(keeps)
    return keeps.lines, trainer.weights_sha256()


def trained_twice(workers: mbgd.Workers, kind: str, averaging: str) -> tuple[list[Any], str, str]:
    """(what the observer has written, the hash of the weights with it, and without)"""
    return *trained(workers, kind, averaging), trained(workers, kind, averaging, False)[1]


def plainly(kind: str) -> list[Any]:
    """The same in plain torch, in one process, with whole minibatches."""
    model, inputs, targets = model_and_data(torch.float32 if kind == "fused" else torch.float64)
    optimizer, lines = optimizer_of(kind, model), []
    for step in range(STEPS):
        rows = slice(SIZE * step, SIZE * (step + 1))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[rows]), targets[rows]).backward()
        if kind == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        of_layers = {name: list(model.get_submodule(name).parameters()) for name in ("0", "2")}
        gradients = {
            name: plain_histogram(torch.cat([p.grad.flatten() for p in of_layer]))  # type: ignore[union-attr]
            for name, of_layer in of_layers.items()
        }
        optimizer.step()
        layers = [
            observed.Layer(name, plain_histogram(torch.cat([p.flatten() for p in of_layer])), gradients[name])
            for name, of_layer in of_layers.items()
        ]
        if step + 1 in (1, 3, 6, 9, 12):
            lines.append(observed.plain_values(HistogramLine(step + 1, layers)))
    return lines


@pytest.mark.parametrize("kind", ["nesterov", "clipped", "fused"])
@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_they_are_plain_torchs_on_any_number_of_workers(kind: str, averaging: str) -> None:
    wanted = plainly(kind)
    alone, sha256 = trained(mbgd.Workers(), kind, "reproducible" if averaging == "reproducible" else "auto")
    assert alone == wanted
    assert trained(mbgd.Workers(), kind, "reproducible" if averaging == "reproducible" else "auto", False)[1] == sha256
    for num_workers in (2, 3):
        (lines, with_them, without), *others = run_workers(trained_twice, num_workers, kind, averaging)
        assert lines == wanted
        assert all(written == [] for written, _, _ in others)
        assert with_them == without


def test_a_frozen_layer_has_no_gradient(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "histograms.steps=2", "freeze=[layers.0.*]")
    lines, problem = observed.read(tmp_path / "run", HISTOGRAMS, HistogramLine)
    assert problem == ""
    assert [(layer.name, layer.gradients is None) for layer in lines[0].layers] == [
        ("layers.0", True),
        ("layers.2", False),
    ]


# In the run's folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "observed/histograms.jsonl").read_text().splitlines()]


def test_a_resumed_run_repeats_and_loses_no_line(tmp_path: Path) -> None:
    runs.run(tmp_path / "whole", "histograms.steps=6")
    whole = lines_of(tmp_path / "whole")
    assert [line["step"] for line in whole] == [1, 9, 18, 28, 37, 46]
    folder = tmp_path / "cut"
    with pytest.raises(Preempted):
        runs.run(folder, "histograms.steps=6", stop_at=20)
    assert lines_of(folder) == whole[:3]
    with (folder / "observed/histograms.jsonl").open("a") as file:  # a crash after the checkpoint of step 20
        file.write(json.dumps(whole[3]) + "\nno line\n" + json.dumps(whole[4])[:50])
    runs.run(folder, "histograms.steps=6")
    assert lines_of(folder) == whole
    [aside] = (folder / "observed").glob("*.unreadable-0")
    assert [json.loads(line)["line"] for line in aside.read_text().splitlines()] == [5, 6]


def test_the_file_is_small(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "histograms.steps=8", "histograms.layers=2")
    size = (tmp_path / "run/observed/histograms.jsonl").stat().st_size
    assert size < 8 * 2 * 2 * 500  # steps × layers × (parameters, gradients) × bytes


def test_wrong_values_are_refused_by_name(tmp_path: Path) -> None:
    for key in ("steps", "layers"):
        with pytest.raises(UsageError, match=rf"histograms\.{key}=0; it must be ≥ 1"):
            runs.run(tmp_path / key, "histograms.steps=2", f"histograms.{key}=0")


@pytest.mark.parametrize(
    "content",
    [b'{"step": 1}', b'{"step": -1, "layers": []}', b"[]", b'{"step": 1, "layers": [{"name": "a"}]}', b"\xff"],
)
def test_lines_that_are_wrong_are_told_and_left_out(tmp_path: Path, content: bytes) -> None:
    good = observed.plain_values(HistogramLine(3, [observed.Layer("a", Histogram(2, 0, -1, [1], [1]))]))
    uneven = {"step": 4, "layers": [{"name": "a", "parameters": {"size": 1, "zero": 0, "negative": [1]}}]}
    (tmp_path / "observed").mkdir()
    (tmp_path / "observed/histograms.jsonl").write_bytes(
        content + b"\n" + json.dumps(good).encode() + b"\n" + json.dumps(uneven).encode() + b"\n"
    )
    lines, problem = observed.read(tmp_path, HISTOGRAMS, HistogramLine)
    assert [line.step for line in lines] == [3]
    assert problem.startswith("observed/histograms.jsonl: line 1 cannot be read")
    assert observed.read(tmp_path, observed.PREDICTIONS, observed.PredictionLine) == ([], "")


def test_a_follower_gives_them_out_in_their_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = follow._Histograms(tmp_path)
    assert list(lines.up_to(5)) == []  # there is no file yet
    (tmp_path / "observed").mkdir()
    content = [
        json.dumps(observed.plain_values(HistogramLine(step, [observed.Layer("a", Histogram(0, 0))]))).encode() + b"\n"
        for step in (1, 3, 8)
    ]
    with (tmp_path / "observed/histograms.jsonl").open("wb", buffering=0) as file:
        file.write(content[0] + b"no line\n" + content[1] + content[2][:20])
        assert [line.step for line in lines.up_to(2)] == [1]
        assert [line.step for line in lines.up_to(8)] == [3]  # the last one is still being written
        file.write(content[2][20:])
        assert [line.step for line in lines.up_to(7)] == []
        assert [line.step for line in lines.up_to(math.inf)] == [8]
    assert capsys.readouterr().out.count("a line of histograms.jsonl cannot be read") == 1


def test_tensorboard_has_them_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'mbgd[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS as KIND
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        runs.run(folder, "tracking=tensorboard", "histograms.steps=6", stop_at=20)
    runs.run(folder, "tracking=tensorboard", "histograms.steps=6")
    events = EventAccumulator(str(folder / "tensorboard"), {KIND: 0}).Reload()
    lines, _ = observed.read(folder, HISTOGRAMS, HistogramLine)
    tags = ["parameters/layers.0", "gradients/layers.0", "parameters/layers.2", "gradients/layers.2"]
    assert Counter(events.Tags()["histograms"]) == Counter(tags)
    for tag in tags:
        wanted = [(line.step, dict(observed.by_name(line))[tag]) for line in lines]
        found = [(event.step, event.histogram_value) for event in events.Histograms(tag)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        for (_, shown), (_, one) in zip(found, wanted, strict=True):
            counts, edges = one.counts_and_edges()
            assert (list(shown.bucket), list(shown.bucket_limit)) == (counts, edges[1:])
            assert (shown.min, shown.max, shown.num) == (edges[0], edges[-1], one.size)
