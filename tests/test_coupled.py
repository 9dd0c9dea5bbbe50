"""Losses that look at several examples: plain torch's, on the whole minibatch, however it is cut."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd

from processes import run_workers

NUM_EXAMPLES, EPOCHS, LR = 22, 2, 0.2
AVERAGINGS = ("ddp", "shared_memory", "reproducible")


def data() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    second = first + 0.5 * torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    weights = torch.arange(NUM_EXAMPLES) % 4 * 0.5  # some are 0
    return first, second, weights.double(), torch.arange(NUM_EXAMPLES) % 3


class Pairs:
    def __init__(self) -> None:
        self.columns = data()

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.columns)

    def gather(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(column[indices] for column in self.columns)


class Net(nn.Module):
    def __init__(self, *, spare: bool = False, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
        self.norm = nn.BatchNorm1d(3) if batch_norm else nn.Identity()
        self.spare = nn.Linear(2, 2) if spare else None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.layers(inputs))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(first), self.second(second)


class Plain:
    """A pair without parameters, and without weights."""

    def encode(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def losses(self, encodings: Tensor) -> mbgd.PerExample:
        return mbgd.PerExample(torch.cdist(encodings, encodings.roll(1, 0)).square().mean(1))


class Weighted(nn.Module):
    """Softmax over all examples of a minibatch, with a temperature and a head of its own, weights and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(3, 3)

    def encode(self, model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
        first, second, weights, labels = batch
        return self.head(model(first)), model(second), weights, labels

    def losses(self, *encodings: Tensor) -> mbgd.PerExample:
        first, second, weights, labels = encodings
        logits = self.head(first) @ second.T * self.log_t.exp() + (labels[:, None] == labels).to(first.dtype)
        losses = F.cross_entropy(logits, torch.arange(len(first)), reduction="none")
        return mbgd.PerExample(losses, weights, {"largest": lambda: logits.detach().max(1).values})


class Normalised(nn.Module):
    """Buffers of its own: `losses` normalises the whole minibatch, and counts its examples and its calls."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.of_encode = nn.BatchNorm1d(3) if shared else None
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))
        self.shared = shared

    def encode(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if self.shared:
            self.num_seen += 1
        return model(batch[0]), model(batch[1])

    def losses(self, *encodings: Tensor) -> mbgd.PerExample:
        first, second = encodings
        correlation = self.norm(first).T @ self.norm(second) / len(first)
        if self.training:
            self.num_seen += len(first)
            self.centre = 0.9 * self.centre + 0.1 * first.detach().mean(0)
        loss = (correlation - torch.eye(3)).square().sum() + (first - self.centre).square().mean()
        return mbgd.PerExample(loss.expand(len(first)))


@dataclass
class Case:
    model: Callable[[], nn.Module]
    objective: Callable[[], Any]
    size: int = 8  # minibatches of 8, 8 and 6: shards are uneven on 3 workers
    max_grad_norm: float | None = None


CASES = {
    "plain": Case(Net, Plain),
    "fewer examples than workers": Case(Net, Weighted, size=2),
    "weighted": Case(Net, Weighted, max_grad_norm=0.1),
    "unused parameters": Case(partial(Net, spare=True), Weighted),
    "buffers": Case(Net, Normalised),
    "views": Case(Net, partial(mbgd.InfoNCE, temperature=0.5)),
    "towers": Case(
        Towers, partial(mbgd.InfoNCE, temperature=0.5, learn_temperature=True, negatives="other", two_towers=True)
    ),
}


def made(case: Case) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model, objective = case.model().double(), case.objective()
    own = objective.double().parameters() if isinstance(objective, nn.Module) else ()
    return model, objective, torch.optim.SGD([*model.parameters(), *own], lr=LR, momentum=0.5)


def state(model: nn.Module, objective: Any) -> dict[str, Tensor]:
    of_objective = objective.state_dict() if isinstance(objective, nn.Module) else {}
    of_objective = {f"objective.{name}": value for name, value in of_objective.items()}
    return {name: value.detach().clone() for name, value in {**model.state_dict(), **of_objective}.items()}


def minibatches(size: int) -> list[tuple[Tensor, ...]]:
    return [
        tuple(column[start : start + size] for column in data())
        for _ in range(EPOCHS)
        for start in range(0, NUM_EXAMPLES, size)
    ]


def whole(case: Case) -> dict[str, Tensor]:
    """One process, plain torch, one backward for each minibatch."""
    model, objective, optimizer = made(case)
    for batch in minibatches(case.size):
        encodings = objective.encode(model, batch)
        terms = objective.losses(*([encodings] if isinstance(encodings, Tensor) else encodings))
        weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
        optimizer.zero_grad()
        ((terms.losses * weights).sum() / weights.sum()).backward()
        if case.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
        optimizer.step()
    return state(model, objective)


def trainer_of(workers: mbgd.Workers, case: Case, averaging: str, size: int | None, **settings: Any) -> mbgd.Trainer:
    model, objective, optimizer = made(case)
    return mbgd.Trainer(
        model,
        objective,
        optimizer,
        mbgd.Data(train=Pairs(), evaluation=Pairs(), shuffle=False),
        mbgd.Settings(
            **{
                "epochs": EPOCHS,
                "batch": mbgd.Batch(size=case.size, micro_batch_size=size),
                "precision": "fp64",
                "averaging": mbgd.Averaging(name=averaging),  # type: ignore[arg-type]
                "max_grad_norm": case.max_grad_norm,
                "check": mbgd.Check(replicas_every_steps=1),
                "evaluation": mbgd.Evaluation(batch_size=9),  # three groups, of 7, 7 and 8 examples
                "log_every_steps": 3,
                **settings,
            }
        ),
        workers,
    )


def train(workers: mbgd.Workers) -> dict[tuple[str, str, int | None], tuple[dict[str, Tensor], dict[str, float]]]:
    """Every case in every averaging, with one micro-batch a worker and with several."""
    found = {}
    for name, case in CASES.items():
        for averaging in AVERAGINGS:
            for size in (None, min(3, case.size - 1)):
                if averaging == "reproducible" and case.size < workers.num_workers:
                    continue  # refused: a worker takes whole micro-batches
                trainer = trainer_of(workers, case, averaging, size)
                metrics = trainer.fit().metrics
                found[name, averaging, size] = state(trainer.setup.model, trainer.setup.task.given_objective), metrics
                torch.use_deterministic_algorithms(False)
    return found


@pytest.fixture(scope="module")
def trained() -> dict[int, Any]:
    return {number: run_workers(train, number) for number in (1, 2, 3)}


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_the_whole_minibatch_in_plain_torch(trained: dict[int, Any], name: str) -> None:
    wanted = whole(CASES[name])
    torch.manual_seed(1)
    num_compared = 0
    for num_workers, of_workers in trained.items():
        for found in of_workers:
            for how, (parameters, _) in found.items():
                if how[0] == name:
                    assert parameters.keys() == wanted.keys()
                    num_compared += 1
                    for key, value in wanted.items():
                        error = (parameters[key] - value).double().norm() / value.double().norm().clamp(min=1e-3)
                        assert error <= 1e-12, (num_workers, how, key)
    assert num_compared == sum(len(AVERAGINGS) * 2 * n for n in trained) - (6 if CASES[name].size < 3 else 0)
    start = state(*made(CASES[name])[:2])
    assert all((wanted[key] - start[key]).norm() > 1e-3 for key in ("layers.0.weight", "first.weight") if key in wanted)
