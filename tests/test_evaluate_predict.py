"""mbgd evaluate and mbgd predict: a run's weights on any data and any number of workers give one worker's figures."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mbgd import Workers
from mbgd.building.recorded import recorded
from mbgd.cli.reopened import reopened
from mbgd.cli.tools import predict
from mbgd.errors import UsageError
from mbgd.evaluation.predictions import predict as predictions_of
from mbgd.files import arrays
from mbgd.runs.weights import find

from processes import run_workers
from runs import metrics, run

PARTS = """
import torch
import torch.nn.functional as F
from torch import nn

import mbgd


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.norm(torch.tanh(self.first(inputs))))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, model, batch):
        outputs = model(batch[0]) * self.scale
        losses = ((outputs - batch[1]) ** 2).mean(1)
        return mbgd.PerExample(losses, predictions=(outputs, batch[1]))


def silent(model, batch):
    return mbgd.PerExample(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))


class Words:
    def __init__(self, num_examples):
        self.num_examples = num_examples

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index):
        return torch.full((1 + index % 5, 3), float(index))


def padded(examples):
    lengths = torch.tensor([len(one) for one in examples])
    inputs = nn.utils.rnn.pad_sequence(examples, batch_first=True)
    return {"inputs": inputs, "counts": (torch.arange(inputs.shape[1]) < lengths[:, None]).float()}


def of_words(model, batch):
    outputs = model(batch["inputs"])
    targets = batch["inputs"].sum(-1)
    return mbgd.PerExample((outputs.sum(-1) - targets) ** 2, batch["counts"], predictions=(outputs, targets))
"""
OWN = ["model=own", "model._target_=parts.Net", "objective=own", "objective._target_=parts.Scaled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parts, data, a run of the digits, and one of own parts, whose checkpoints of each step are kept."""
    path = tmp_path_factory.mktemp("tools")
    (path / "parts.py").write_text(PARTS)
    for name, size in (("own", 40), ("other", 23)):
        inputs = torch.randn(2 * size, 3, generator=torch.Generator().manual_seed(size)).numpy()
        targets = inputs[:, ::-1] ** 2
        values = {"inputs": inputs[:size], "targets": targets[:size]}
        np.savez(path / f"{name}.npz", **values, eval_inputs=inputs[size:], eval_targets=targets[size:])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        run(path / "digits", "averaging=reproducible", "epochs=1", "evaluation.batch_size=50")
        every = [
            "checkpoint.every_steps=1",
            "checkpoint.keep=9",
            "evaluation.every_steps=1",
            "checkpoint.best=eval/loss",
        ]
        of_data = ["data=tensors", f"data.path={path}/own.npz", "batch.size=10", "evaluation.batch_size=7"]
        run(path / "own", *OWN, *of_data, *every, "epochs=1", "optimizer.lr=0.01")
    return path


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def asked(run: str, *overrides: str, **options: Any) -> argparse.Namespace:
    given = {"step": None, "best": False, "ema": False, "name": None, "overwrite": False, "json": None, **options}
    return argparse.Namespace(run=Path(run), overrides=list(overrides), **given)


def evaluated(workers: Workers | None, folder: Path, run: str, *overrides: str, **options: Any) -> dict[str, float]:
    os.chdir(folder)
    if workers is not None:
        return _of_group(workers, asked(run, *overrides, **options))
    with reopened(asked(run, *overrides, **options)) as one:
        return one.trainer.evaluate()


def _of_group(workers: Workers, parsed: argparse.Namespace) -> dict[str, float]:
    """`reopened` in a group that a test has made already."""
    from mbgd.building.build import build_trainer
    from mbgd.runs.weights import load_from_run

    trainer = build_trainer(recorded(parsed.run, parsed.overrides), workers)
    load_from_run(trainer, parsed.run, step=parsed.step, best=parsed.best)
    return trainer.evaluate()


def predicted(workers: Workers, folder: Path, run: str, *overrides: str) -> dict[str, torch.Tensor]:
    os.chdir(folder)
    from mbgd.building.build import build_trainer
    from mbgd.runs.weights import load_from_run

    trainer = build_trainer(recorded(Path(run), overrides), workers)
    load_from_run(trainer, Path(run))
    (evaluator,) = trainer.evaluations.by_name.values()
    return predictions_of(evaluator, workers)


def last_evaluation(folder: Path) -> dict[str, float]:
    (*_, last) = [line for line in metrics(folder) if "eval/loss" in line]
    return {name: value for name, value in last.items() if name.startswith("eval/") and "sha256" not in name}


def command(folder: Path, *arguments: str, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}", "-m"] if torchrun else []
    full = [sys.executable, "-m", *launcher, "mbgd", *arguments]
    return subprocess.run(full, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_figures_of_the_runs_last_evaluation_come_out_in_all_digits(folder: Path, num_workers: int) -> None:
    wanted = last_evaluation(folder / "digits")
    assert set(wanted) == {"eval/loss", "eval/accuracy"}
    assert run_workers(evaluated, num_workers, folder, "digits") == [wanted] * num_workers
    for found in run_workers(evaluated, num_workers, folder, "own"):
        assert found == pytest.approx(last_evaluation(folder / "own"), rel=1e-12)


def test_the_command_on_workers_of_its_own_and_under_torchrun(folder: Path) -> None:
    wanted = last_evaluation(folder / "digits")
    alone = command(folder, "evaluate", "digits", "--json", "-")
    started = command(folder, "evaluate", "digits", "workers=3", "--json=-")
    by_torchrun = command(folder, "evaluate", "digits", "--json", "-", torchrun=2)
    for done, num_workers in ((alone, 1), (started, 3), (by_torchrun, 2)):
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout)
        assert values["metrics"] == wanted
        assert (values["num_workers"], values["num_examples"]) == (num_workers, {"eval": 360})
        assert values["weights_sha256"] == json.loads((folder / "digits/summary.json").read_text())["weights_sha256"]
    printed = command(folder, "evaluate", "digits", "--json", "all.json")
    assert f"eval/loss     {wanted['eval/loss']:.6g}" in printed.stdout
    assert json.loads((folder / "all.json").read_text())["metrics"] == wanted


def test_weights_of_a_step_the_best_and_the_last(folder: Path) -> None:
    of_steps = {line["step"]: line["eval/loss"] for line in metrics(folder / "own") if "eval/loss" in line}
    assert len(set(of_steps.values())) == 4
    for step, loss in of_steps.items():
        assert evaluated(None, folder, "own", step=step)["eval/loss"] == pytest.approx(loss, rel=1e-12)
    best = evaluated(None, folder, "own", best=True)["eval/loss"]
    assert best == pytest.approx(min(of_steps.values()), rel=1e-12)
    with pytest.raises(UsageError, match=r"no whole checkpoint of step 9; there are the steps 1, 2, 3, 4\."):
        find(folder / "own", step=9)
    with pytest.raises(UsageError, match="keeps no best checkpoint"):
        find(folder / "digits", best=True)


def test_a_running_run_and_one_whose_checkpoints_are_gone(folder: Path, tmp_path: Path) -> None:
    wanted = pytest.approx(last_evaluation(folder / "own"), rel=1e-12)
    running, exported = tmp_path / "running", tmp_path / "exported"
    for copy in (running, exported):
        shutil.copytree(folder / "own", copy)
    for name in ("summary.json", "model.safetensors", "objective.safetensors"):
        (running / name).unlink()
    (running / "checkpoints/step-000000005.1.tmp").mkdir()
    assert evaluated(None, folder, str(running)) == wanted
    assert (running / "checkpoints/step-000000005.1.tmp").exists()  # the run writes it
    shutil.rmtree(exported / "checkpoints")
    assert find(exported).step == 4
    assert evaluated(None, folder, str(exported)) == wanted
    (exported / "objective.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be read on every worker"):
        evaluated(None, folder, str(exported))
    shutil.rmtree(running / "checkpoints")
    with pytest.raises(UsageError, match=r"holds no weights: no whole checkpoint, and no model\.safetensors"):
        evaluated(None, folder, str(running))


def test_a_broken_checkpoint_is_passed_over_and_a_changed_model_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "own", copy)
    (copy / "checkpoints/step-000000004/model.safetensors").write_bytes(b"broken")
    assert find(copy).path == copy / "model.safetensors"  # of the same step
    (copy / "model.safetensors").write_bytes(b"changed")
    assert find(copy).path == copy / "checkpoints/step-000000003"
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UsageError, match=r"model.safetensors: it has other content than was written"):
        find(copy)


def by_hand(folder: Path, data: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of the run "own" in plain torch, and the targets."""
    import parts  # type: ignore[import-not-found]

    model = parts.Net()
    model.load_state_dict(load_file(folder / "own/model.safetensors"))
    scale = load_file(folder / "own/objective.safetensors")["scale"]
    with np.load(folder / data) as values:
        inputs, targets = (torch.from_numpy(values[f"eval_{name}"]).to(dtype) for name in ("inputs", "targets"))
    with torch.no_grad():
        return model.to(dtype).eval()(inputs) * scale, targets


@pytest.mark.parametrize("num_workers", [1, 2])
def test_other_data_is_evaluated_as_plain_torch_does(folder: Path, num_workers: int) -> None:
    outputs, targets = by_hand(folder, "other.npz")
    wanted = float(((outputs - targets) ** 2).mean())
    for found in run_workers(evaluated, num_workers, folder, "own", "data=tensors", "data.path=other.npz"):
        assert found["eval/loss"] == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(last_evaluation(folder / "own")["eval/loss"], rel=1e-2)
    outputs, targets = by_hand(folder, "other.npz", torch.float64)
    wanted = float(((outputs - targets) ** 2).mean())
    in_fp64 = ["data=tensors", "data.path=other.npz", "precision=fp64"]
    for found in run_workers(evaluated, num_workers, folder, "own", *in_fp64):
        assert found["eval/loss"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("run", "overrides", "message"),
    [
        ("nothing", [], "nothing is not the folder of a run: config.yaml cannot be read"),
        ("digits", ["steps=3"], "steps=3: an evaluation does not read steps; it reads averaging, backend, data"),
        ("digits", ["batch.size=3"], "an evaluation does not read batch"),
        ("own", ["data.path=other.npz"], "a run records what data.path led to"),
        ("own", ["evaluation.batch_sise=3"], "Did you mean evaluation.batch_size"),
        ("own", ["data=tensor"], "Could not find 'data/tensor'"),
        ("own", ["data=tensors"], "data.path has no value"),
        ("own", ["precision=fp65"], "precision: .* Did you mean fp"),
        ("own", ["data.evaluation=[1"], "Hydra cannot read the value of data.evaluation"),
        (
            "digits",
            ["data=text", "data.path=parts.py"],
            r"objective.ignore_index is null in the run, and would be -100",
        ),
    ],
)
def test_mistakes_in_what_to_evaluate(folder: Path, run: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recorded(Path(run), overrides)


def test_what_cannot_be_evaluated_is_told_once(folder: Path) -> None:
    for arguments, message in (
        (["evaluate", "nothing", "workers=2"], "error: nothing is not the folder of a run"),
        (["evaluate", "digits", "data.evaluation=null", "workers=2"], "error: digits with this data has no evaluation"),
        (
            ["predict", "digits", "out=p.npz", "objective=own", "objective._target_=parts.silent", "workers=2"],
            "gives no predictions, so",
        ),
        (["evaluate", "digits", "model.hidden=[7]"], "do not fit:\n"),
        (["evaluate", "digits", "--bset"], "unrecognized arguments: --bset. `mbgd evaluate --help`"),
    ):
        done = command(folder, *arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert done.stderr.count(message) == 1, (message, done.stderr)
        assert done.stderr.count("error: ") == 1, done.stderr
        assert not done.stdout
    assert not list(folder.glob("p.npz*"))


def test_a_run_of_another_model_does_not_fit(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "digits", copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UsageError, match=r"do not fit:\n  - .*before, .*now"):
        evaluated(None, folder, str(copy), "model.hidden=[7]")


@pytest.mark.parametrize("run_name", ["digits", "own"])
def test_predictions_are_the_same_on_any_number_of_workers(folder: Path, run_name: str) -> None:
    (alone,) = run_workers(predicted, 1, folder, run_name)
    for num_workers in (2, 3):
        main, *others = run_workers(predicted, num_workers, folder, run_name)
        assert others == [{}] * (num_workers - 1)  # only the main worker holds them
        assert main.keys() == alone.keys() == {"outputs", "targets"}
        assert all(torch.equal(main[name], alone[name]) for name in alone)
    if run_name == "own":
        outputs, targets = by_hand(folder, "own.npz")
        assert torch.equal(alone["targets"], targets)
        torch.testing.assert_close(alone["outputs"], outputs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_examples_of_several_lengths_are_padded_with_weight_0(folder: Path, num_workers: int) -> None:
    words = ["objective._target_=parts.of_words", "data=own", "data.train._target_=parts.Words"]
    words += ["+data.train.num_examples=4", "data.evaluation={_target_: parts.Words, num_examples: 11}"]
    words += ["data.collate={_target_: parts.padded}", "evaluation.batch_size=4", "model._target_=torch.nn.Linear"]
    words += ["+model.in_features=3", "+model.out_features=2"]
    run_folder = folder / f"words-{num_workers}"
    if not run_folder.exists():
        run(run_folder, "model=own", "objective=own", *words, "batch.size=4", "steps=1", "epochs=null")
    found = run_workers(predicted, num_workers, folder, run_folder.name)[0]
    assert {name: tuple(array.shape) for name, array in found.items()} == {
        "outputs": (11, 5, 2),
        "targets": (11, 5),
        "weights": (11, 5),
    }
    lengths = [1 + index % 5 for index in range(11)]
    assert found["weights"].sum(1).tolist() == lengths
    for index, length in enumerate(lengths):
        assert found["targets"][index].tolist() == [3.0 * index] * length + [0.0] * (5 - length)


def test_the_file_of_each_kind(folder: Path, tmp_path: Path) -> None:
    outputs, targets = by_hand(folder, "other.npz")
    data = ["data=tensors", "data.path=other.npz"]
    for suffix in ("csv", "npz", "safetensors"):
        out = tmp_path / f"predictions.{suffix}"
        done = command(folder, "predict", "own", *data, f"out={out}", "workers=2")
        assert done.returncode == 0, done.stderr
        assert "predictions outputs (23, 3) float32, targets (23, 3) float32" in done.stdout
        assert sorted(one.name for one in tmp_path.iterdir() if one.suffix == out.suffix) == [out.name]
    by_name = load_file(tmp_path / "predictions.safetensors")
    with np.load(tmp_path / "predictions.npz") as values:
        assert all(np.array_equal(values[name], by_name[name].numpy()) for name in ("outputs", "targets"))
    torch.testing.assert_close(by_name["outputs"], outputs, rtol=1e-6, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert list(rows[0]) == ["example", *[f"{name}_{n}" for name in ("output", "target") for n in range(3)]]
    assert [int(row["example"]) for row in rows] == list(range(23))
    read_back = np.array([[np.float32(row[f"output_{n}"]) for n in range(3)] for row in rows])
    assert np.array_equal(read_back, by_name["outputs"].numpy())
    assert np.array_equal(targets.numpy(), by_name["targets"].numpy())


def test_a_file_that_is_there_is_kept_unless_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"is there already. Name another file, or add --overwrite"):
        predict.check(asked("own", f"out={out}"))
    parsed = asked("own", f"out={out}", overwrite=True)
    predict.check(parsed)
    assert predict.main(parsed) == 0
    with np.load(out) as values:
        assert sorted(values) == ["outputs", "targets"]
    assert [one.name for one in tmp_path.iterdir()] == ["p.npz"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "predict writes one file, out=FILE, and none is given"),
        (["out=a.npz", "out=b.npz"], "and 2 are given"),
        (["out=a.parquet"], r"ends in .parquet; it must be .safetensors, .npz, .csv"),
        (["out=a"], "ends in nothing"),
        (["out=nowhere/a.npz"], "there is no folder nowhere"),
    ],
)
def test_mistakes_in_the_file(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict.check(asked("own", *given))


def test_csv_refuses_predictions_of_more_dimensions() -> None:
    with pytest.raises(UsageError, match=r"outputs \(2, 3, 4\) have more dimensions. Use .npz or .safetensors"):
        arrays.check_shapes(Path("p.csv"), {"outputs": torch.zeros(2, 3, 4), "targets": torch.zeros(2, 3)})


def test_one_of_several_sets_is_named(folder: Path, tmp_path: Path) -> None:
    node = "{{_target_: mbgd.data.tensors, path: {}.npz, split: evaluation}}"
    overrides = [f"data.evaluation={{own: {node.format('own')}, other: {node.format('other')}}}"]
    assert set(evaluated(None, folder, "own", *overrides)) == {"eval/own/loss", "eval/other/loss"}
    parsed = asked("own", f"out={tmp_path}/p.npz", *overrides)
    predict.check(parsed)
    with pytest.raises(
        UsageError, match=r"there are 2 evaluation sets, own, other; one file holds one\. Use --set NAME"
    ):
        predict.main(parsed)
    parsed.name = "othr"
    with pytest.raises(UsageError, match=r"--set othr: there is no such evaluation set; .* Did you mean other\?"):
        predict.main(parsed)
    parsed.name = "other"
    assert predict.main(parsed) == 0
    with np.load(tmp_path / "p.npz") as values:
        assert len(values["outputs"]) == 23
