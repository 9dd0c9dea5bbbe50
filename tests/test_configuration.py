"""Every file under conf/ composes and builds; every mistake is named at once."""

import math
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

import mbgd
from mbgd.building import composing
from mbgd.building.build import build_trainer, typed
from mbgd.config import CudaGraphsName, Settings, validate

CONF = Path(__file__).parent.parent / "conf"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

NEEDED = {
    "model/own": ["model._target_=mbgd.models.Linear", "+model.input_shape=null", "+model.num_outputs=null"],
    "model/cnn": ["model=cnn"],
    "model/gpt": ["data=text", "data.path=own.txt", "data.context=8"],
    "data/text": ["data.path=own.txt", "data.context=8", "model=gpt", "model.num_layers=1"],
    "data/tokens": ["data.folder=.", "data.vocabulary=50", "data.context=8", "model=gpt", "model.num_layers=1"],
    "data/image_folder": ["data.folder=images"],
    "data/huggingface": ["data.path=own.csv", "data.inputs=[a,b]", "data.targets=c", "data.evaluation_path=own.csv"],
    "data/huggingface_images": ["data.path=images.parquet", "data.size=8", "data.evaluation_path=null"],
    "experiment/fashion_cnn": ["data.evaluation=null"],
    "experiment/large_batch": ["data.evaluation=null", "schedule.warmup_steps=0"],
    "experiment/stdlib_gpt": ["data.path=own.txt", "schedule.warmup_steps=0"],
    "data/own": ["data.train._target_=mbgd.data.digits", "+data.train.split=train"],
    "data/tensors": ["data.path=own.npz", "model=linear"],
    "data/regression": ["objective=mse"],
    "optimizer/own": ["optimizer._target_=torch.optim.RMSprop", "+optimizer.lr=0.01"],
    "schedule/inverse_square_root": ["schedule.warmup_steps=1"],
    "schedule/own": ["schedule._target_=mbgd.schedule.Step", "+schedule.every_steps=5"],
    "objective/mse": ["data=regression"],
    "objective/huber": ["data=regression"],
    "objective/bce": ["data=tensors", "data.path=own.npz", "model=linear", "model.num_outputs=1"],
    "objective/distillation": [
        *("objective.teacher._target_=mbgd.models.MLP", "objective.weights=null"),
        *("+objective.teacher.input_shape=null", "+objective.teacher.num_outputs=null"),
    ],
    "objective/own": ["objective._target_=mbgd.CrossEntropy"],
}
"""What a group's member needs beside itself: values that only the user knows, or parts that fit."""

MEMBERS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.glob("*/*.yaml"))  # not Hydra's own


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_of_every_group_trains_a_step(
    member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if member == "backend/nccl" and not torch.cuda.is_available():
        pytest.skip("nccl needs a GPU")
    if member.startswith("data/huggingface"):
        datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
        image = BytesIO()
        Image.new("RGB", (40, 30)).save(image, "PNG")
        rows = {"image": [{"bytes": image.getvalue(), "path": None}] * 2, "label": [0, 1]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "images.parquet"))
    if (
        member in ("data/fashion_mnist", "experiment/fashion_cnn", "experiment/large_batch")
        and not FASHION_MNIST.is_dir()
    ):
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.savez("own.npz", inputs=np.zeros((9, 3)), targets=np.arange(9) % 2)
    Path("own.csv").write_text("a,b,c\n1.5,2,0\n2.5,1,1\n0.5,3,1\n")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            Path("images", split, name).mkdir(parents=True)
            Image.new("RGB", (40, 30)).save(Path("images", split, name, "1.png"))
        np.arange(50, dtype=np.uint16).tofile(f"{split}.bin")
    Path("own.txt").write_text("to be or not to be " * 20)
    group, name = member.split("/")
    needed = [one for one in NEEDED.get(member, []) if one != f"{group}={name}"]
    config = typed(composed(f"{group}={name}", "steps=1", *needed))
    result = build_trainer(config, mbgd.Workers()).fit()
    assert result.steps == 1
    assert math.isfinite(result.metrics["train/loss"])


def test_every_value_has_a_comment() -> None:
    for path in CONF.glob("**/*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), f"{path} does not begin with what it is"
        inside_of_dataset = False
        for number, line in enumerate(lines, 1):
            # A dataset's own arguments are named after its parameters, explained above or in its docstring.
            if re.match(r"\S", line):
                inside_of_dataset = line.startswith(("train:", "evaluation:")) and path.parent.name == "data"
            is_value = re.match(r"\s*\w+:\s*\S", line) and "_target_" not in line and not inside_of_dataset
            assert not is_value or "# " in line or "${" in line, f"{path}:{number} has no comment: {line}"


def composed_by_tools(*overrides: str) -> DictConfig:
    return composing.compose(overrides)


def test_what_an_experiment_sets_for_one_choice_does_not_apply_to_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    switched = composed_by_tools("experiment=stdlib_gpt", "optimizer=sgd", "batch.size=16")
    assert switched.optimizer == composed("optimizer=sgd").optimizer
    assert switched.data.context == 128  # of a choice that stays
    assert switched.batch.size == 16
    assert capsys.readouterr().err == (
        "note: experiment=stdlib_gpt sets optimizer.lr, optimizer.betas for optimizer=adamw; with optimizer=sgd that "
        "does not apply\n"
    )
    given = composed_by_tools("experiment=stdlib_gpt", "optimizer=sgd", "optimizer.lr=0.5", "schedule=constant")
    assert given.optimizer == {**composed("optimizer=sgd").optimizer, "lr": 0.5}
    assert given.schedule == composed("schedule=constant").schedule
    assert "sets schedule.warmup_steps for schedule=cosine; with schedule=constant" in capsys.readouterr().err
    same = composed_by_tools("experiment=digits_mlp", "optimizer=adamw", "model=mlp")
    assert same.optimizer.lr == 0.01
    by_another = composed_by_tools("experiment=large_batch", "model=linear")  # the experiment itself chooses sgd
    assert by_another.optimizer.lr == 0.16
    assert by_another.model == composed("model=linear").model
    assert "sets model.channels, model.hidden for model=cnn; with model=linear" in capsys.readouterr().err


def test_the_rule_holds_for_configurations_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/first.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: own\noptimizer:\n"
        "  _target_: torch.optim.RMSprop\n  alpha: 0.9\n"
    )
    monkeypatch.chdir(tmp_path)
    assert composed_by_tools("experiment=first").optimizer == {"_target_": "torch.optim.RMSprop", "alpha": 0.9}
    assert composed_by_tools("experiment=first", "optimizer=sgd").optimizer == composed("optimizer=sgd").optimizer


@pytest.mark.parametrize("plus", ["", "+"])
def test_sections_of_users_names_take_new_keys(plus: str) -> None:
    metric = "{_target_: torchmetrics.F1Score}"
    config = composing.compose(
        [
            f"{plus}init.rename={{l.*: x.*}}",
            f"{plus}evaluation.metrics.f1={metric}",
            f"{plus}observers.mine._target_=my.Own",
        ]
    )
    assert config.init.rename == {"l.*": "x.*"}
    assert config.evaluation.metrics.f1 == {"_target_": "torchmetrics.F1Score"}
    assert config.observers.mine == {"_target_": "my.Own"}


def test_all_mistakes_at_once() -> None:
    with pytest.raises(mbgd.UsageError) as caught:
        typed(
            composed(
                "+batch.sise=3",
                "+foo=1",
                "batch.size=0",
                "epochs=-1",
                "seed=abc",
                "precision=fp31",
                "max_grad_norm=0",
                "log_every_steps=0",
                "data=tensors",
            )
        )
    message = str(caught.value)
    for part in (
        "'sise'",
        "'foo'",
        "batch.size=0",
        "epochs=-1",
        "'abc'",
        "fp31",
        "max_grad_norm=0",
        "log_every_steps=0",
        "data.path",
    ):
        assert part in message, f"{part} is not in: {message}"


def test_rules_between_settings() -> None:
    assert validate(Settings()) == []
    assert validate(Settings(batch=mbgd.Batch(size=8, micro_batch_size=8))) == []
    for settings, word in (
        (Settings(batch=mbgd.Batch(size=8, micro_batch_size=9)), "micro_batch_size=9"),
        (Settings(batch=mbgd.Batch(size=8, micro_batch_size=0)), "micro_batch_size=0"),
        (Settings(epochs=None), "steps=null and epochs=null"),
        (Settings(steps=-1), "steps=-1"),
        (Settings(max_grad_norm=-1.0), "max_grad_norm=-1"),
        (Settings(max_grad_norm=math.nan), "max_grad_norm=nan"),
        (Settings(max_grad_value=0.0), "max_grad_value=0.0; it must be a finite number > 0"),
        (Settings(max_grad_value=math.inf), "max_grad_value=inf"),
        (Settings(evaluation=mbgd.Evaluation(every_steps=0)), "evaluation.every_steps=0"),
        (Settings(evaluation=mbgd.Evaluation(batch_size=0)), "evaluation.batch_size=0"),
        (Settings(averaging=mbgd.Averaging(num_threads=0)), "averaging.num_threads=0"),
        (Settings(noise_scale=mbgd.NoiseScale(every_steps=0)), "noise_scale.every_steps=0"),
        (Settings(noise_scale=mbgd.NoiseScale(smoothing=0)), "noise_scale.smoothing=0"),
    ):
        [problem] = validate(settings)
        assert word in problem


def test_a_configuration_keeps_its_numbers() -> None:
    config = typed(
        composed("optimizer=adamw", "optimizer.lr=3e-4", "max_grad_norm=1", "batch.size=7", "precision=fp64")
    )
    assert config.optimizer["lr"] == 3e-4
    assert config.max_grad_norm == 1.0
    assert config.batch.size == 7
    assert config.precision is mbgd.Precision.fp64


def test_a_configuration_has_cuda_graphs() -> None:
    assert typed(composed_by_tools()).cuda_graphs is CudaGraphsName.off
    assert typed(composed_by_tools("cuda_graphs=off")).cuda_graphs is CudaGraphsName.off
    assert typed(composed_by_tools("cuda_graphs=auto")).cuda_graphs is CudaGraphsName.auto
    with pytest.raises(mbgd.UsageError, match=r'YAML reads off as false: write "off", with quotes'):
        typed(composed_by_tools("cuda_graphs=false"))
