"""Starting from the weights of a file, a run or a checkpoint, with a fresh optimizer."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_command_line import train
from torch import nn

import mbgd
from mbgd.runs.initial_weights import load_weights

SMALL = ("data=regression", "objective=mse", "model=linear", "epochs=null", "batch.size=32", "schedule=constant")


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


def net(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_starts_from_another_ones_weights(tmp_path: Path, workers: int) -> None:
    train(tmp_path, "steps=6", "run.dir=first", "checkpoint.every_steps=3", *SMALL)
    first = summary(tmp_path / "first")
    for number, source in enumerate(("first", "first/model.safetensors", "first/checkpoints/step-000000006")):
        done = train(
            tmp_path, "steps=0", f"run.dir=again{number}", f"init.from={source}", "seed=5", *SMALL, num_workers=workers
        )
        assert done.returncode == 0, done.stderr
        again = summary(tmp_path / f"again{number}")
        assert again["weights_sha256"] == first["weights_sha256"]
        assert "init        2 of 2 tensors from" in done.stdout


def test_a_run_that_goes_on_needs_the_file_no_more_and_another_file_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "steps=4", "run.dir=first", *SMALL)
    begun = ("run.dir=second", "init.from=first", "seed=5", "optimizer=sgd", "optimizer.lr=0.01", *SMALL)
    assert train(tmp_path, "steps=3", *begun).returncode == 0
    shutil.rmtree(tmp_path / "first")
    done = train(tmp_path, "steps=6", *begun)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "second")["steps"] == 6
    done = train(tmp_path, "steps=7", *(one for one in begun if not one.startswith("init")))
    assert done.returncode == 2
    assert "init.from: first before, None now" in done.stderr


def test_a_quiet_run_does_not_tell_what_it_started_from(tmp_path: Path) -> None:
    save_file({"output.weight": torch.ones(1, 32), "output.bias": torch.zeros(1)}, tmp_path / "w.safetensors")
    done = train(tmp_path, "steps=0", "run.dir=out", "init.from=w.safetensors", "tracking.quiet=true", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_what_does_not_fit_is_refused_on_every_worker(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    done = train(tmp_path, "steps=1", "init.from=other.safetensors", "run.dir=out", *SMALL, num_workers=2)
    assert done.returncode == 1  # torchrun's
    assert "the weights do not fit the model" in done.stderr
    assert "not in the file: output.bias, output.weight; not in the model: other" in done.stderr


def test_names_are_changed_by_patterns(tmp_path: Path) -> None:
    source, model = net(), net()
    save_file({f"encoder.{name}.x": one for name, one in tensors(source).items()}, tmp_path / "w.safetensors")
    note = load_weights(model, tmp_path / "w.safetensors", strict=True, rename={"encoder.*.x": "*"})
    assert all(torch.equal(one, tensors(model)[name]) for name, one in tensors(source).items())
    assert note.startswith("init        9 of 9 tensors")


def test_tensors_of_other_shapes_are_left_out_by_other_names(tmp_path: Path) -> None:
    save_file(tensors(net(5)), tmp_path / "w.safetensors")
    model, rename = net(), {"0.weight": "left out"}
    note = load_weights(model, tmp_path / "w.safetensors", strict=False, rename=rename)
    assert note.startswith("init        8 of 9 tensors")
    assert "not in the file: 0.weight; not in the model: left out" in note


def test_strict_false_loads_what_fits_by_name_and_lists_the_rest(tmp_path: Path) -> None:
    source, model = net(), net()
    kept = {name: one for name, one in tensors(source).items() if not name.startswith("2.")}
    save_file({**kept, "head": torch.zeros(1)}, tmp_path / "w.safetensors")
    before = tensors(model)
    note = load_weights(model, tmp_path / "w.safetensors", strict=False, rename={})
    assert "not in the file: 2.bias, 2.weight; not in the model: head" in note
    for name, one in tensors(model).items():
        assert torch.equal(one, (before if name.startswith("2.") else kept)[name])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, {}, "not in the file"),
        ({"a": torch.ones(1)}, {}, r"Use another file, or init.rename for names that differ.$"),
        ({"2.bias": torch.ones(2)}, {}, r"or init.strict=false to load what fits.$"),
        (tensors(net(5)), {"strict": False}, r"To load the others alone, init.rename takes these to names that"),
        (tensors(net(5)), {"strict": False}, r"other shapes: 0.weight \(4, 5\) in the file, \(4, 3\) in the model"),
        (
            tensors(net()),
            {"rename": {"0.weigth": "x"}},
            r"no name in the file matches '0.weigth'. Names there are 0.weight",
        ),
        (tensors(net()), {"rename": {"*.bias": "b"}}, "makes two tensors of the file b"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(
    tmp_path: Path, content: dict[str, torch.Tensor], options: dict[str, Any], message: str
) -> None:
    model = net()
    before = tensors(model)
    save_file(content, tmp_path / "w.safetensors")
    with pytest.raises(mbgd.UsageError, match=message):
        load_weights(model, tmp_path / "w.safetensors", **{"strict": True, "rename": {}, **options})
    assert all(torch.equal(one, before[name]) for name, one in tensors(model).items())


@pytest.mark.parametrize("kind", ["nothing", "no safetensors", "an empty folder", "a pipe"])
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "no safetensors":
        source.write_bytes(b"x" * 100)
    elif kind == "an empty folder":
        source.mkdir()
    elif kind == "a pipe":
        os.mkfifo(source)
    with pytest.raises(mbgd.UsageError, match=r"init\.from=.*source"):
        load_weights(net(), source, strict=True, rename={})
