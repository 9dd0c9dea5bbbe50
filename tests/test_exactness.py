"""The exactness ladder: any number of workers, any cut, any weights equal plain torch in one process."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan
from mbgd.config import AveragingName

import reference
from processes import run_workers

NUM_FEATURES, NUM_CLASSES, NUM_TOKENS = 6, 3, 5
SEED = 11


class Rows:
    """A dataset of several tensors in memory."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def gather(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES)).to(dtype)


def uniform(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, None]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none"), None


def weighted(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Losses of shape (N,), or (N, T) where inputs hold T tokens."""
    inputs, targets, weights = batch
    logits = model(inputs).movedim(-1, 1)
    return F.cross_entropy(logits, targets, reduction="none"), weights


def objective(losses_and_weights: reference.LossesAndWeights, model: nn.Module, batch: Any) -> mbgd.PerExample:
    return mbgd.PerExample(*losses_and_weights(model, batch))


@cache
def rows(kind: str, num_examples: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    tokens = (NUM_TOKENS,) if kind == "ragged tokens" else ()
    inputs = torch.randn(num_examples, *tokens, NUM_FEATURES, dtype=torch.float64, generator=generator)
    targets = torch.randint(NUM_CLASSES, (num_examples, *tokens), generator=generator)
    if kind == "uniform":
        return inputs, targets
    if kind == "ragged tokens":
        lengths = torch.randint(1, NUM_TOKENS + 1, (num_examples, 1), generator=generator)
        return inputs, targets, (torch.arange(NUM_TOKENS) < lengths).double()
    weights = torch.rand(num_examples, dtype=torch.float64, generator=generator)
    return inputs, targets, weights * (torch.rand(num_examples, generator=generator) > 0.6)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.2, momentum=0.9, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
}


@dataclass(frozen=True)
class Case:
    kind: str = "uniform"
    num_examples: int = 1797
    minibatch: int = 100
    micro_batch: int | None = None
    optimizer: str = "sgd"
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    steps: int | None = None
    averaging: str = "ddp"

    @property
    def losses_and_weights(self) -> reference.LossesAndWeights:
        return uniform if self.kind == "uniform" else weighted

    @property
    def plan(self) -> Plan:
        return Plan(num_examples=self.num_examples, minibatch_size=self.minibatch, num_workers=1)

    def minibatches(self) -> Iterator[list[int]]:
        order, plan = Order(self.num_examples, SEED), self.plan
        for step in range(self.steps or plan.steps_per_epoch):
            minibatch = plan.minibatch(step)
            yield order.indices(minibatch.epoch, minibatch.start, minibatch.stop).tolist()


CASES_OF_DDP = [
    # 1,797 = 17 × 100 + 97, 1,701 = 17 × 100 + 1; a micro-batch of 7 makes windows of 15 with an incomplete last one
    *(Case(kind, 1797, 100, micro) for kind in ("uniform", "ragged tokens", "some zero") for micro in (None, 1, 7)),
    *(Case(kind, 1701, 100, micro) for kind in ("uniform", "ragged tokens") for micro in (None, 7)),
    Case("uniform", 97, 3),  # fewer examples than workers
    Case("uniform", 97, 1, steps=20),
    Case("ragged tokens", 97, 3, 1),
    Case("uniform", 50, 100),  # one short minibatch an epoch
    Case("uniform", optimizer="adamw"),
    Case("ragged tokens", optimizer="adamw", micro_batch=7),
    Case("uniform", max_grad_norm=0.05),
    Case("uniform", max_grad_value=0.005),
    Case("ragged tokens", max_grad_value=0.005, max_grad_norm=0.02, optimizer="adamw"),
    Case("some zero", max_grad_norm=0.05, micro_batch=7, optimizer="adamw"),
    Case("uniform", 250, 100, 30, steps=9),  # three epochs, each in an order of its own
]
CASES = [
    *CASES_OF_DDP,
    *(replace(case, averaging="shared_memory") for case in CASES_OF_DDP),
    *(Case(kind, averaging="reproducible") for kind in ("uniform", "ragged tokens", "some zero")),
    Case("uniform", 1717, 100, 25, averaging="reproducible", optimizer="adamw", max_grad_norm=0.05),
]


@dataclass
class HashEveryStep:
    """A tracker that hashes the parameters after every step and keeps the logged losses."""

    model: nn.Module
    hashes: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def progress(self, step: int) -> None:
        vector = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.hashes.append(hashlib.sha256(vector.numpy().tobytes()).hexdigest())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])

    def close(self) -> None:
        pass


def train(workers: mbgd.Workers, case: Case) -> tuple[Tensor, list[str], list[float]]:
    model = make_model()
    trainer = mbgd.Trainer(
        model,
        partial(objective, case.losses_and_weights),
        OPTIMIZERS[case.optimizer](model.parameters()),
        mbgd.Data(train=Rows(*rows(case.kind, case.num_examples))),
        mbgd.Settings(
            seed=SEED,
            epochs=1,
            steps=case.steps,
            batch=mbgd.Batch(size=case.minibatch, micro_batch_size=case.micro_batch),
            precision=mbgd.Precision.fp64,
            max_grad_norm=case.max_grad_norm,
            max_grad_value=case.max_grad_value,
            averaging=mbgd.Averaging(AveragingName(case.averaging)),
            log_every_steps=1,
        ),
        workers,
    )
    tracker = HashEveryStep(model)
    trainer.fit(tracker)
    return nn.utils.parameters_to_vector(model.parameters()).detach(), tracker.hashes, tracker.losses


def train_cases(workers: mbgd.Workers, cases: list[Case]) -> list[tuple[Tensor, list[str], list[float]]]:
    return [train(workers, case) for case in cases]


def expected(case: Case) -> tuple[Tensor, list[float]]:
    return in_plain_torch(replace(case, averaging=""))


@cache
def in_plain_torch(case: Case) -> tuple[Tensor, list[float]]:
    model = make_model()
    losses = reference.train(
        model,
        case.losses_and_weights,
        rows(case.kind, case.num_examples),
        list(case.minibatches()),
        OPTIMIZERS[case.optimizer],
        case.max_grad_norm,
        case.max_grad_value,
    )
    return nn.utils.parameters_to_vector(model.parameters()).detach(), losses


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda n: f"{n} workers")
def trained(request: pytest.FixtureRequest) -> list[list[tuple[Tensor, list[str], list[float]]]]:
    """For each worker, for each case: parameters, their hashes after every step, logged losses."""
    return run_workers(train_cases, request.param, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_in_plain_torch(trained: Any, case: Case) -> None:
    parameters, _, losses = trained[0][CASES.index(case)]
    wanted, wanted_losses = expected(case)
    assert relative_error(parameters, wanted) <= 1e-12
    assert losses == pytest.approx(wanted_losses, rel=1e-11)
    assert relative_error(parameters, nn.utils.parameters_to_vector(make_model().parameters()).detach()) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_are_bitwise_equal_after_every_step(trained: Any, case: Case) -> None:
    of_main, *of_others = [worker[CASES.index(case)][1] for worker in trained]
    assert len(of_main) == len(list(case.minibatches()))
    assert len(set(of_main)) == len(of_main)
    for hashes in of_others:
        assert hashes == of_main


@pytest.mark.parametrize("case", [Case("uniform"), Case("ragged tokens"), Case("some zero")], ids=str)
def test_teeth_the_mean_of_means_fails(case: Case) -> None:
    """The check above can tell the field's recurring bug from the right result."""
    model = make_model()
    minibatches = list(case.minibatches())
    shards = [[minibatch[rank::3] for rank in range(3)] for minibatch in minibatches]  # 100 = 34 + 33 + 33
    data = rows(case.kind, case.num_examples)
    reference.train_mean_of_means(model, case.losses_and_weights, data, shards, OPTIMIZERS["sgd"])
    got = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert relative_error(got, expected(case)[0]) > 1e-5
