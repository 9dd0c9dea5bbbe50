"""`train.py` as a user runs it: the run's folder, what is printed, and mistakes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def train(folder: Path, *overrides: str, num_workers: int = 0) -> subprocess.CompletedProcess[str]:
    """Run train.py in `folder`, under torchrun unless `num_workers` is 0."""
    launcher = [*TORCHRUN, str(num_workers)] if num_workers else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [*launcher, str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_leaves_its_folder_and_says_where(tmp_path: Path, num_workers: int) -> None:
    done = train(tmp_path, "epochs=6", "run.dir=out", num_workers=num_workers)
    assert done.returncode == 0, done.stderr
    assert "minibatch   64 = " in done.stdout
    assert "folder      out" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lock",
        "logs",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "run.json",
        "summary.json",
    ]
    logs = [(out / f"logs/worker-{rank}.log").read_text() for rank in range(max(1, num_workers))]
    assert "minibatch   64 = " in logs[0]
    assert all(f"worker {rank} of {max(1, num_workers)}" in log for rank, log in enumerate(logs))

    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6 * 23
    assert summary["examples_seen"] == 6 * 1437
    assert summary["num_workers"] == summary["num_micro_batches"] == max(1, num_workers)
    assert summary["averaging"] == ("shared_memory" if num_workers > 1 else "none: one worker")
    assert summary["metrics"]["eval/accuracy"] > 0.9
    exported = load_file(out / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(exported):
        digest.update(exported[name].numpy().tobytes())
    assert summary["weights_sha256"] == digest.hexdigest()

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [23 * epoch for epoch in range(1, 7)]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 50, 100, 138]
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["hidden"] == [128]


def test_steps_0_evaluates_and_exports_without_training(tmp_path: Path) -> None:
    done = train(tmp_path, "steps=0", "run.dir=out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["steps"] == summary["examples_seen"] == 0
    assert set(summary["metrics"]) == {"eval/loss", "eval/accuracy"}


def test_double_precision_inputs_keep_their_bits(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(10, 4)), generator.normal(size=(10, 2))
    np.savez(tmp_path / "own.npz", inputs=inputs, targets=targets)
    overrides = [
        "data=tensors",
        "data.path=own.npz",
        "model=linear",
        "objective=mse",
        "optimizer=sgd",
        "precision=fp64",
    ]
    overrides += ["schedule=constant", "optimizer.lr=0.1", "batch.size=10", "data.shuffle=false", "run.dir=out"]
    for steps in (0, 1):
        done = train(tmp_path, *overrides[:-1], f"run.dir=out{steps}", f"steps={steps}")
        assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / f"out{steps}/model.safetensors") for steps in (0, 1))
    weight, bias = before["output.weight"].requires_grad_(), before["output.bias"].requires_grad_()
    outputs = torch.from_numpy(inputs) @ weight.T + bias
    (outputs - torch.from_numpy(targets)).square().mean().backward()
    assert torch.allclose(after["output.weight"], weight - 0.1 * weight.grad, rtol=1e-13, atol=1e-15)
    assert torch.allclose(after["output.bias"], bias - 0.1 * bias.grad, rtol=1e-13, atol=1e-15)


def test_a_second_run_does_not_write_over_the_first(tmp_path: Path) -> None:
    assert train(tmp_path, "steps=1", "run.dir=out").returncode == 0
    before = (tmp_path / "out/summary.json").read_bytes()
    for overrides, message in (
        (["steps=2"], "belongs to a run with other settings"),  # the learning rate follows a cosine over all steps
        (["steps=1", "seed=1"], "seed: 0 before, 1 now"),
        (["steps=1", "resume=never"], "already holds a run"),
    ):
        done = train(tmp_path, *overrides, "run.dir=out")
        assert done.returncode == 2
        assert message in done.stderr
    assert "complete" in train(tmp_path, "steps=1", "run.dir=out").stdout
    assert (tmp_path / "out/summary.json").read_bytes() == before


def test_training_on_from_another_run(tmp_path: Path) -> None:
    constant = "schedule=constant"
    assert train(tmp_path, "steps=30", constant, "run.dir=whole").returncode == 0
    assert train(tmp_path, "steps=20", constant, "run.dir=first").returncode == 0
    done = train(tmp_path, "steps=30", constant, "resume=first", "run.dir=second")
    assert "resume      step 20, from first/checkpoints/step-000000020" in done.stdout
    whole, second = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "second"))
    assert whole["weights_sha256"] == second["weights_sha256"]
    # Longer, in its own folder.
    assert train(tmp_path, "steps=30", constant, "run.dir=first").returncode == 0
    first = json.loads((tmp_path / "first/summary.json").read_text())
    assert first["weights_sha256"] == whole["weights_sha256"]

    done = train(tmp_path, "steps=30", constant, "resume=nowhere", "run.dir=third")
    assert done.returncode == 2
    assert "there is no checkpoint" in done.stderr
    done = train(tmp_path, "steps=30", constant, "optimizer.lr=0.1", "resume=first", "run.dir=fourth")
    assert "optimizer.lr: 0.01 before, 0.1 now" in done.stderr
    overrides = ["steps=31", constant, "optimizer.lr=0.1", "resume=first", "resume.force=true", "run.dir=fifth"]
    assert train(tmp_path, *overrides).returncode == 0


def test_a_loss_that_is_not_finite_keeps_the_runs_files(tmp_path: Path) -> None:
    done = train(tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "epochs=1", "run.dir=out")
    assert done.returncode == 1
    assert "the loss is not finite at step 2" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoints",  # empty
        "config.yaml",
        "lock",
        "logs",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]
    assert "the loss is not finite at step 2" in (tmp_path / "out/logs/worker-0.log").read_text()
    assert "failed: UsageError: the loss is" in (tmp_path / "out/report.html").read_text()


OWN = """
import torch, torch.nn.functional as F, mbgd

class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 1

class Empty(torch.utils.data.Dataset):
    def __len__(self):
        return 0
    def __getitem__(self, index):
        raise IndexError(index)

def scalar(model, batch):
    return mbgd.PerExample(F.cross_entropy(model(batch[0]), batch[1]))
"""

MISTAKES = [
    (["batch.sise=3"], "Key 'sise' is not in struct"),
    (["clip_norm=1"], "It is called max_grad_norm now"),
    (["+batch.last=drop"], "It is called batch.drop_last (keep is false, drop is true) now"),
    (["resume_force=true"], "It is called resume.force now"),
    (["batch.micro_size=3"], "Did you mean batch.micro_batch_size or batch.size?"),
    (["lr=0.1"], "Did you mean optimizer.lr?"),
    (["modle=cnn"], "Did you mean model?"),
    (["model=cnn", "model.chanels=[8]"], "Did you mean model.channels?"),
    (["model=cnnn"], "Did you mean cnn?"),
    (["hydra.launcher.nproc=2"], "Did you mean hydra.launcher.nproc_per_node"),
    (["precision=fp31", "+batch.sise=3"], "Did you mean batch.size?"),
    (["precision=fp31", "+batch.sise=3"], "Did you mean fp32 or fp16?"),
    (["+batch.sise=3", "batch.size=0", "seed=abc"], "Key 'sise' not in 'Batch'"),
    (["+batch.sise=3", "batch.size=0", "seed=abc"], "a minibatch has at least 1 example"),
    (["+batch.sise=3", "batch.size=0", "seed=abc"], "Value 'abc' of type 'str' could not be converted"),
    (["data=tensors"], "data.path has no value"),
    (["batch.micro_batch_size=65"], "micro-batch has from 1 example to the whole minibatch"),
    (["model=nope"], "Could not find 'model/nope'"),
    (["model=cnn", "data=regression", "objective=mse"], "the cnn takes images"),
    (["data=tensors", "data.path=nope.npz"], "there is no such file"),
    (["data=tensors", "data.path=own.py"], "must be .npz or .safetensors"),
    (["data=tensors", "data.path=junk.npz"], "not a readable .npz file"),
    (["data=tensors", "data.path=objects.npz"], "pickles are refused"),
    (["data=tensors", "data.path=targets.npz", "model.num_outputs=3"], "1 targets lie outside the classes"),
    (["data=fashion_mnist", "data.folder=nope"], "apt-get install dataset-fashion-mnist"),
    (["data=own", "data.train._target_=own.Endless"], "has no length"),
    (["data=own", "data.train._target_=own.Empty", "model.input_shape=[1]", "model.num_outputs=1"], "is empty"),
    (["objective=own", "objective._target_=own.scalar"], "use reduction='none'"),
    (["objective=own", "objective._target_=own.nope"], "own.nope"),
    (["objective=mse"], "mean squared error needs equal shapes"),
    (["schedule.warmup_steps=1000"], "schedule.warmup_steps=1000 in a run of"),
]


def write_files(folder: Path) -> None:
    (folder / "own.py").write_text(OWN)
    (folder / "junk.npz").write_text("junk")
    np.savez(folder / "objects.npz", inputs=np.array([{}, {}]), targets=np.zeros(2))
    np.savez(folder / "targets.npz", inputs=np.zeros((4, 3)), targets=np.array([0, 1, 2, 7]))


@pytest.mark.parametrize(
    ("overrides", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_are_explained_before_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    write_files(tmp_path)
    done = train(tmp_path, *overrides)
    assert done.returncode == 2
    assert message.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=own", "objective._target_=own.scalar"], "reduction='none'"),
        (["data=tensors", "data.path=targets.npz", "model.num_outputs=3"], "lie outside the classes"),
        (["backend=nccl"], "Use backend=gloo"),
        (["batch.micro_size=3"], "Did you mean batch.micro_batch_size"),
        (["--multirun", "batch.size=32,64"], "python train.py --multirun"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_every_worker(tmp_path: Path, overrides: list[str], message: str) -> None:
    if "backend=nccl" in overrides and torch.cuda.is_available():
        pytest.skip("this host has a GPU, so nccl works")
    write_files(tmp_path)
    done = train(tmp_path, *overrides, num_workers=2)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_tab_completion_knows_groups_choices_and_keys(tmp_path: Path) -> None:
    for line, expected in (
        ("model=", "model=mlp"),
        ("model=cnn model.ch", "model.channels."),
        ("batch.s", "batch.size="),
    ):
        environment = os.environ | {"COMP_LINE": f"python train.py {line}"}
        command = [sys.executable, str(ROOT / "train.py"), "-sc", "query=bash"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert expected in done.stdout.split()


def test_help_completion_and_sweeps_do_not_wait_for_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "model: cnn, gpt, linear, mlp, own, resnet" in done.stdout
    assert not re.search(r"\| +(torch|matplotlib|rich|optuna)$", done.stderr, re.MULTILINE)
