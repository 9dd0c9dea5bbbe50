"""Workers that are not the same program are told so, by name and before anything can hang; equal ones pass."""

import dataclasses
import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mbgd
from mbgd.checks.same_program import check_same_config, check_same_program
from mbgd.config import AveragingName
from mbgd.schedule import Cosine

from processes import environment, free_port, run_workers

ROOT = Path(__file__).parent.parent


class Numbers(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Example i is made of i and what else is given."""

    def __init__(self, length: int = 24, first: float = 0.0, last: float = 0.0) -> None:
        self.length, self._ends = length, {0: first, length - 1: last}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(index), 1.0]), torch.tensor(self._ends.get(index, 0.0))


class Noisy(Numbers):
    """Draws from the global generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([np.random.rand(), random.random()]), torch.rand(())


class OwnGenerator(Numbers):
    """Draws, of the operating system's randomness, whether an example is mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = np.random.default_rng()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return (inputs.flip(0) if self._generator.random() < 0.5 else inputs), targets


class OwnLengths(OwnGenerator):
    """Examples of random length, which no trial reads."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(int(self._generator.integers(1, 5))), torch.tensor(0.0)


class Perceptron(nn.Sequential):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1), nn.Flatten(0))


class OtherPerceptron(Perceptron):
    pass


class Scaled:
    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        inputs, targets = batch
        return mbgd.PerExample(self._scale * (model(inputs) - targets) ** 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    scale: float

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        return squared(model, batch, self.scale)


def squared(model: nn.Module, batch: Any, scale: float = 1.0) -> mbgd.PerExample:
    return Scaled(scale)(model, batch)


def with_scale(scale: float) -> Callable[[nn.Module, Any], mbgd.PerExample]:
    return lambda model, batch: squared(model, batch, scale)


@dataclasses.dataclass
class Program:
    """What one worker trains, to be changed by a case."""

    model: nn.Module = dataclasses.field(default_factory=Perceptron)
    objective: Any = squared
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    train: Any = dataclasses.field(default_factory=Numbers)
    evaluation: Any = dataclasses.field(default_factory=lambda: Numbers(10))
    shuffle: bool = True
    num_loaders: int = 0
    settings: mbgd.Settings = dataclasses.field(
        default_factory=lambda: mbgd.Settings(steps=2, batch=mbgd.Batch(size=6), schedule=Cosine(num_steps=9))
    )

    def set(self, **settings: Any) -> None:
        self.settings = dataclasses.replace(self.settings, **settings)

    def parts(self) -> tuple[Any, ...]:
        data = mbgd.Data(
            train=self.train, evaluation=self.evaluation, shuffle=self.shuffle, num_workers=self.num_loaders
        )
        return self.model, self.objective, self.optimizer(self.model.parameters()), data, self.settings


def sgd(**options: Any) -> Any:
    return functools.partial(torch.optim.SGD, **options)


def in_groups(first: int) -> Any:
    def make(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.SGD([{"params": parameters[:first]}, {"params": parameters[first:], "lr": 0.5}])

    return make


CASES: dict[str, tuple[Callable[[Program], None], Callable[[Program], None], list[str]]] = {
    # name: what worker 0 does, what the others do, what is said
    "seed": (
        lambda p: p.set(seed=3),
        lambda p: p.set(seed=4),
        ["seed: 3 on worker 0, 4 on worker 1"],
    ),
    "lr": (
        lambda p: setattr(p, "optimizer", sgd(lr=0.1)),
        lambda p: setattr(p, "optimizer", sgd(lr=0.2)),
        ["optimizer.lr: 0.1 on worker 0, 0.2 on worker 1"],
    ),
    "optimizer": (
        lambda p: setattr(p, "optimizer", sgd(lr=0.1)),
        lambda p: setattr(p, "optimizer", torch.optim.Adam),
        ["optimizer: torch.optim.sgd.SGD on worker 0, torch.optim.adam.Adam on worker 1"],
    ),
    "groups": (
        lambda p: setattr(p, "optimizer", in_groups(1)),
        lambda p: setattr(p, "optimizer", in_groups(2)),
        ["optimizer.param_groups[0].params: 1 on worker 0, 2 on worker 1", "optimizer.param_groups[1].params: 3 on"],
    ),
    "a parameter without optimizer": (
        lambda p: None,
        lambda p: setattr(p, "optimizer", lambda parameters: torch.optim.SGD(list(parameters)[1:])),
        ["parameters of the model that the optimizer lacks: 0 on worker 0, 1 on worker 1"],
    ),
    "precision": (
        lambda p: p.set(precision=mbgd.Precision.fp32),
        lambda p: p.set(precision=mbgd.Precision.bf16),
        ["precision: 'fp32' on worker 0, 'bf16' on worker 1"],
    ),
    "batch.size": (
        lambda p: None,
        lambda p: p.set(batch=mbgd.Batch(size=8)),
        ["batch.size: 6 on worker 0, 8 on worker 1"],
    ),
    "micro_batch_size": (
        lambda p: p.set(batch=mbgd.Batch(size=6, micro_batch_size=1)),
        lambda p: None,
        ["batch.micro_batch_size: 1 on worker 0, None on worker 1"],
    ),
    "averaging": (
        lambda p: None,
        lambda p: p.set(averaging=mbgd.Averaging(name=AveragingName.ddp)),
        ["averaging.name: 'auto' on worker 0, 'ddp' on worker 1"],
    ),
    "steps, clipping, evaluation": (
        lambda p: p.set(steps=5, max_grad_norm=1.0, evaluation=mbgd.Evaluation(batch_size=4)),
        lambda p: None,
        ["steps: 5 on worker 0, 2 on worker 1", "max_grad_norm: 1.0 on worker 0, None", "evaluation.batch_size: 4"],
    ),
    "schedule": (
        lambda p: p.set(schedule=Cosine(num_steps=9, final_factor=0.5)),
        lambda p: None,
        ["schedule.final_factor: 0.5 on worker 0, 0.0 on worker 1"],
    ),
    "schedule's class": (
        lambda p: p.set(schedule=None),
        lambda p: None,
        ["schedule: None on worker 0, mbgd.schedule.Cosine on worker 1"],
    ),
    "ignore_index": (
        lambda p: setattr(p, "objective", mbgd.CrossEntropy(ignore_index=-1)),
        lambda p: setattr(p, "objective", mbgd.CrossEntropy(class_weights=[1.0, 2.0])),
        ["objective.ignore_index: -1 on worker 0, ", "objective.class_weights: None on worker 0, [1.0, 2.0] on"],
    ),
    "objective's hidden attribute": (
        lambda p: setattr(p, "objective", Scaled(1.0)),
        lambda p: setattr(p, "objective", Scaled(2.0)),
        ["objective._scale: 1.0 on worker 0, 2.0 on worker 1"],
    ),
    "objective with slots": (
        lambda p: setattr(p, "objective", Slotted(1.0)),
        lambda p: setattr(p, "objective", Slotted(2.0)),
        ["objective.scale: 1.0 on worker 0, 2.0 on worker 1"],
    ),
    "objective's closure": (
        lambda p: setattr(p, "objective", with_scale(1.0)),
        lambda p: setattr(p, "objective", with_scale(2.0)),
        ["objective.scale: 1.0 on worker 0, 2.0 on worker 1"],
    ),
    "objective's partial": (
        lambda p: setattr(p, "objective", functools.partial(squared, scale=1.0)),
        lambda p: setattr(p, "objective", functools.partial(squared, scale=2.0)),
        ["objective.scale: 1.0 on worker 0, 2.0 on worker 1"],
    ),
    "model's class": (
        lambda p: None,
        lambda p: setattr(p, "model", OtherPerceptron()),
        [f"model: {__name__}.Perceptron(training=True) on worker 0, {__name__}.OtherPerceptron(training=True) on"],
    ),
    "dropout": (
        lambda p: None,
        lambda p: setattr(p, "model", Perceptron(0.5)),
        ["model.2: torch.nn.modules.dropout.Dropout(training=True, p=0.0, inplace=False) on worker 0, ", "p=0.5"],
    ),
    "frozen": (
        lambda p: None,
        lambda p: p.model[0].weight.requires_grad_(False),  # type: ignore[index, union-attr, operator]
        ["model.0: ", "weight frozen) on worker 1"],
    ),
    "length": (
        lambda p: setattr(p, "train", Numbers(25)),
        lambda p: setattr(p, "train", Numbers(40)),
        ["program: number of training examples: 25 on worker 0, 40 on worker 1. Start"],
    ),
    "length of the evaluation": (
        lambda p: setattr(p, "evaluation", Numbers(25)),
        lambda p: setattr(p, "evaluation", Numbers(40)),
        ["program: number of evaluation examples: 25 on worker 0, 40 on worker 1. Start"],
    ),
    "no evaluation": (
        lambda p: setattr(p, "evaluation", None),
        lambda p: None,
        [f"the evaluation dataset: none on worker 0, {__name__}.Numbers on worker 1"],
    ),
    "first example": (
        lambda p: setattr(p, "train", Numbers(first=1.0)),
        lambda p: setattr(p, "train", Numbers(first=2.0)),
        ["the first training example: (float32 (2,), float32 ()) of content ", " on worker 1"],
    ),
    "last example": (
        lambda p: setattr(p, "evaluation", Numbers(10, last=1.0)),
        lambda p: setattr(p, "evaluation", Numbers(10, last=2.0)),
        ["the last evaluation example: (float32 (2,), float32 ()) of content "],
    ),
    "an example in memory": (
        lambda p: setattr(p, "train", mbgd.InMemory(torch.zeros(9, 2), torch.zeros(9))),
        lambda p: setattr(p, "train", mbgd.InMemory(torch.zeros(9, 2), torch.ones(9))),
        ["the first training example: (float32 (1, 2), float32 (1,)) of content "],
    ),
    "unlike examples of random content": (
        lambda p: setattr(p, "train", Noisy()),
        lambda p: setattr(p, "train", Numbers()),
        [f"the training dataset: {__name__}.Noisy on worker 0, {__name__}.Numbers on worker 1"],
    ),
    "shuffle": (
        lambda p: setattr(p, "shuffle", False),
        lambda p: None,
        ["data.shuffle: False on worker 0, True on worker 1"],
    ),
}


def told(workers: mbgd.Workers, changes: list[Callable[[Program], None]]) -> str:
    """What a trainer of this worker's program raises, or nothing."""
    program = Program()
    changes[min(workers.rank, len(changes) - 1)](program)
    try:
        mbgd.Trainer(*program.parts(), workers)
    except mbgd.UsageError as error:
        return str(error)
    return ""


def told_of_all(workers: mbgd.Workers) -> dict[str, str]:
    return {name: told(workers, [first, others]) for name, (first, others, _) in CASES.items()}


def test_every_difference_is_named_with_both_values_on_both_workers() -> None:
    of_workers = run_workers(told_of_all, 2)
    assert of_workers[0] == of_workers[1]
    for name, (_, _, wanted) in CASES.items():
        error = of_workers[0][name]
        assert error.startswith("the workers do not run the same program: "), name
        assert all(part in error for part in wanted), f"{name}: {error}"


def told_minority(workers: mbgd.Workers) -> str:
    return told(workers, [lambda p: None, lambda p: p.set(seed=8), lambda p: None])


def test_of_three_workers_the_one_that_differs_is_named() -> None:
    for error in run_workers(told_minority, 3):
        assert ": seed: 8 on worker 1, 0 on the others. Start" in error


def train_alike(workers: mbgd.Workers) -> list[float]:
    """Programs that are one, though the workers' generators, processes and places are not."""
    torch.manual_seed(workers.rank)
    np.random.seed(workers.rank)
    random.seed(workers.rank)
    norms = []
    for train in (Noisy(), OwnGenerator(), torch.utils.data.Subset(Noisy(), range(20)), Numbers()):
        for averaging in (AveragingName.auto, AveragingName.ddp):
            program = Program(train=train, evaluation=train, num_loaders=workers.rank)
            program.set(averaging=mbgd.Averaging(name=averaging))
            trainer = mbgd.Trainer(*program.parts(), workers)
            trainer.fit()
            norms.append(float(nn.utils.parameters_to_vector(trainer.setup.model.parameters()).norm()))
    check_same_program(workers, *Program(train=OwnLengths()).parts())
    return norms


def test_equal_programs_pass_also_with_datasets_that_draw() -> None:
    first, second = run_workers(train_alike, 2)
    assert first == second


TRAIN_A_STEP = """
import sys
import torch
import mbgd
from mbgd.data import digits

with mbgd.start_workers("gloo", 60) as workers:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = mbgd.Settings(steps=1, averaging=mbgd.Averaging(mbgd.AveragingName(sys.argv[1])))
    try:
        mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=digits("test")), settings, workers).fit()
    except mbgd.UsageError as error:
        print(error)
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there are no other instructions")
@pytest.mark.parametrize("averaging", ["auto", "reproducible"])
def test_reproducible_averaging_is_refused_where_the_processors_differ(averaging: str) -> None:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_A_STEP, averaging],
            env=os.environ | environment(rank, 2, port) | {"PYTHONPATH": str(ROOT), **instructions},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, instructions in enumerate([{}, {"ATEN_CPU_CAPABILITY": "default"}])
    ]
    for process in started:
        told = process.communicate(timeout=120)[0]
        if averaging == "auto":
            assert not told
        else:
            assert told.startswith("averaging=reproducible on different processors: ")
            assert "with DEFAULT on worker 1. There" in told


def seconds_to_compare(workers: mbgd.Workers) -> float:
    parts = Program().parts()
    check_same_program(workers, *parts)
    start = time.monotonic()
    check_same_program(workers, *parts)
    return time.monotonic() - start


def test_comparing_is_cheap() -> None:
    assert max(run_workers(seconds_to_compare, 2)) < 1.0  # 3 ms on two free cores


def compare_configs(workers: mbgd.Workers, key: str) -> str:
    config: dict[str, Any] = {
        "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]},
        "run": {"dir": "a"},
        "data": {"num_workers": 1, "folder": "/a"},
    }
    if workers.rank == 1:
        section, _, name = key.partition(".")
        config[section] = {**config[section], name: [1] if name == "betas" else 2}
    try:
        check_same_config(workers, config)
    except mbgd.UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("optimizer.betas", ": optimizer.betas: [0.9, 0.99] on worker 0, [1] on worker 1. "),
        ("optimizer.momentum", ": optimizer.momentum: nothing on worker 0, 2 on worker 1. "),
        ("run.dir", ""),
        ("data.num_workers", ""),
        ("data.folder", ""),
        ("data.cache_dir", ""),
    ],
)
def test_the_configuration_is_compared_places_aside(key: str, wanted: str) -> None:
    for error in run_workers(compare_configs, 2, key):
        assert bool(error) == bool(wanted)
        assert wanted in error


def test_train_py_compares_the_whole_configuration(tmp_path: Path) -> None:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), f"run.dir={tmp_path / 'run'}", f"checkpoint.keep={2 + rank}"],
            env={**os.environ, **environment(rank, 2, port)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert "do not run the same program: checkpoint.keep: 2 on worker 0, 3 on worker 1. Start every" in told
        assert process.returncode == 2
    assert not (tmp_path / "run").exists()
