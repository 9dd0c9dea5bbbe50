"""`data=tensors` with a target per pixel, box or token: the same update as plain torch, from the configuration on."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan

import reference
from processes import run_workers

ROOT = Path(__file__).parent.parent
PARTS = """
import torch
from torch import nn

import mbgd


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view(parameter.shape))


class Pixels(Net):
    '''Images (N, 1, H, W) to logits (N, 3, H, W).'''

    def __init__(self):
        super().__init__(conv=nn.Conv2d(1, 3, 3, padding=1))

    def forward(self, images):
        return self.layers["conv"](images)


class Boxes(Net):
    '''Images to boxes (N, 4, 4).'''

    def __init__(self):
        super().__init__(linear=nn.Linear(20, 16))

    def forward(self, images):
        return self.layers["linear"](images.flatten(1)).unflatten(1, (4, 4))


class Translation(Net):
    '''Tokens (N, S), of which 0 pads, to logits (N, 6, 5): each place of the output attends to all tokens.'''

    def __init__(self):
        super().__init__(tokens=nn.Embedding(9, 8), places=nn.Embedding(6, 8), output=nn.Linear(8, 5))

    def forward(self, tokens):
        read = self.layers["tokens"](tokens)
        scores = self.layers["places"].weight @ read.transpose(1, 2)
        attended = scores.masked_fill((tokens == 0)[:, None], -torch.inf).softmax(-1) @ read
        return self.layers["output"](attended)


def of_boxes(model, batch):
    images, targets = batch
    boxes, weights = targets[..., :4], targets[..., 4:]
    losses = (model(images) - boxes) ** 2
    return mbgd.PerExample(losses, weights.expand_as(losses))
"""
SIZE, SEED = 61, 7
RANDOM = np.random.default_rng(0)


def lengths(most: int) -> Any:
    """From 1 on, so that examples differ in what counts."""
    return RANDOM.integers(1, most + 1, (SIZE, 1))


IMAGES = RANDOM.normal(size=(SIZE, 1, 4, 5))
CLASSES = np.where(RANDOM.random((SIZE, 4, 5)) < RANDOM.random((SIZE, 1, 1)), 255, RANDOM.integers(0, 3, (SIZE, 4, 5)))
BOXES = np.concatenate([RANDOM.normal(size=(SIZE, 4, 4)), (np.arange(4) < lengths(4) - 1)[..., None]], axis=2)
TOKENS = np.where(np.arange(7) < lengths(7), RANDOM.integers(1, 9, (SIZE, 7)), 0)
WORDS = np.where(np.arange(6) < lengths(6), RANDOM.integers(0, 5, (SIZE, 6)), -100)
ARRAYS = {
    "Pixels": (IMAGES, CLASSES.astype(np.uint8)),
    "Boxes": (IMAGES, BOXES),
    "Translation": (TOKENS, WORDS.astype(np.int16)),
}
OBJECTIVES = {
    "Pixels": ["objective=cross_entropy", "objective.ignore_index=255"],
    "Boxes": ["objective=own", "objective._target_=dense_parts.of_boxes"],
    "Translation": ["objective=cross_entropy", "objective.ignore_index=-100"],
}
SETTINGS = [
    *("optimizer=sgd", "optimizer.lr=0.5", "schedule=constant", "precision=fp64", "epochs=1", f"seed={SEED}"),
    *("batch.size=20", "batch.micro_batch_size=3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    (path / "dense_parts.py").write_text(PARTS)
    for name, (inputs, targets) in ARRAYS.items():
        np.savez(path / f"{name}.npz", inputs=inputs, targets=targets, eval_inputs=inputs, eval_targets=targets)
    return path


def overrides(name: str) -> list[str]:
    of_model = ["model=own", f"model._target_=dense_parts.{name}"]
    return ["data=tensors", f"data.path={name}.npz", *of_model, *OBJECTIVES[name], *SETTINGS]


def losses_and_weights(name: str, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """In plain torch."""
    inputs, targets = batch
    outputs = model(inputs)
    if name == "Boxes":
        losses = (outputs - targets[..., :4]).square()
        return losses, targets[..., 4:].expand_as(losses)
    if name == "Translation":
        outputs = outputs.transpose(1, 2)
    counts = (targets != 255) & (targets != -100)
    return F.cross_entropy(outputs, targets.where(counts, 0), reduction="none"), counts.double()


def wanted(name: str, folder: Path) -> tuple[dict[str, Tensor], float]:
    """Weights after training, and the mean loss of all examples, in one process."""
    parts: dict[str, Any] = {}
    exec((folder / "dense_parts.py").read_text(), parts)
    model = parts[name]().double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs, targets = (torch.from_numpy(array) for array in ARRAYS[name])
    data = inputs, targets if targets.is_floating_point() else targets.long()
    order, plan = Order(SIZE, SEED), Plan(num_examples=SIZE, minibatch_size=20, num_workers=1)
    steps = [plan.minibatch(step) for step in range(plan.steps_per_epoch)]
    minibatches = [order.indices(one.epoch, one.start, one.stop).tolist() for one in steps]
    of_case = partial(losses_and_weights, name)
    reference.train(model, of_case, data, minibatches, partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        losses, weights = of_case(model, data)
    return model.state_dict(), float((losses * weights).sum() / weights.sum())


def train(workers: mbgd.Workers, folder: Path) -> dict[str, tuple[dict[str, Tensor], float]]:
    from mbgd.building.build import build_trainer, typed

    from runs import CONF, compose, initialize_config_dir

    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    found = {}
    for name in ARRAYS:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = typed(compose("train", overrides(name)))
        trainer = build_trainer(config, workers)
        loss = trainer.fit().metrics["eval/loss"]
        found[name] = {key: value.clone() for key, value in trainer.setup.model.state_dict().items()}, loss
    return found


def check(name: str, folder: Path, weights: dict[str, Tensor], loss: float) -> None:
    of_reference, its_loss = wanted(name, folder)
    assert loss == pytest.approx(its_loss, rel=1e-12)
    assert weights.keys() == of_reference.keys()
    for key, values in of_reference.items():
        assert torch.allclose(weights[key], values, rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("num_workers", [1, 2])
def test_targets_of_any_shape_are_one_process(folder: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    of_workers = [train(mbgd.Workers(), folder)] if num_workers == 1 else run_workers(train, num_workers, folder)
    for of_worker in of_workers:
        for name, (weights, loss) in of_worker.items():
            check(name, folder, weights, loss)


def test_the_command_on_two_workers(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [*launcher, str(ROOT / "train.py"), *overrides("Pixels"), "run.dir=out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loss = json.loads((folder / "out/summary.json").read_text())["metrics"]["eval/loss"]
    check("Pixels", folder, load_file(folder / "out/model.safetensors"), loss)
