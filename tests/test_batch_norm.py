"""batch_norm=minibatch: N workers with BatchNorm equal one process in plain torch; what cannot be is refused."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mbgd
from mbgd.averaging.batch_norm import Statistics
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan
from mbgd.checkpoints.format import differences
from mbgd.config import must_match
from mbgd.models import CNN, ResNet

import reference
from processes import run_workers

SEED, CLASSES = 11, 3
IMAGE = (2, 8, 8)


class Layers(nn.Module):
    """BatchNorm in any form, on vectors of 6 values."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        options: dict[str, Any] = {
            "no affine": {"affine": False},
            "no running statistics": {"track_running_stats": False},
            "cumulative": {"momentum": None},
        }.get(form, {})
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.norm = nn.BatchNorm1d(6, **options)
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, eps=0.1, momentum=0.3)), nn.Tanh())
        if form == "frozen":
            self.inner[0][1].eval()
        if form == "frozen without running statistics":
            self.inner[0][1] = nn.BatchNorm1d(6, track_running_stats=False).eval()
        if form == "frozen parameters":
            self.norm.requires_grad_(False)
            self.first.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs))
        if self.form == "shared":
            hidden = self.norm(hidden.tanh() * 3 + 1)
        if self.form.startswith("recomputed"):
            hidden = checkpoint(self.inner, hidden, use_reentrant=self.form.endswith("reentrant"))
        else:
            hidden = self.inner(hidden)
        outputs: Tensor = self.last(hidden)
        return outputs


class OfDimensions(nn.Module):
    """BatchNorm1d over sequences, BatchNorm2d and BatchNorm3d; inputs far from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2)])
        self.last = nn.Linear(128, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norms[0](inputs.flatten(2) * 3 + 50).tanh()
        hidden = self.norms[1](hidden.view(-1, 2, 8, 8)).to(memory_format=torch.channels_last)
        hidden = self.norms[2]((hidden * 2).view(-1, 2, 4, 2, 8))
        outputs: Tensor = self.last(hidden.flatten(1))
        return outputs


class Branching(nn.Module):
    """The second branch takes part in every other step alone, as a buffer that counts steps decides."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, CLASSES), nn.BatchNorm1d(CLASSES)
        self.branch = nn.Sequential(nn.Linear(6, CLASSES), nn.BatchNorm1d(CLASSES))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.norm(self.first(inputs))
        if self.training:
            self.step += 1
        return outputs + self.branch(inputs) if self.step % 2 else outputs


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = (6,)
    num_examples: int = 47
    minibatch: int = 10
    epochs: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    def minibatches(self) -> list[list[int]]:
        order, plan = Order(self.num_examples, SEED), self.plan
        found = [plan.minibatch(step) for step in range(self.epochs * plan.steps_per_epoch)]
        return [order.indices(one.epoch, one.start, one.stop).tolist() for one in found]

    @property
    def plan(self) -> Plan:
        return Plan(num_examples=self.num_examples, minibatch_size=self.minibatch, num_workers=1)

    def made(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        torch.manual_seed(1)
        model = self.model().double()
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(self.num_examples, *self.shape, dtype=torch.float64, generator=generator) * 2 + 1
        return model, (inputs, torch.randint(CLASSES, (self.num_examples,), generator=generator))


CNN_ = partial(CNN, IMAGE, CLASSES, channels=(4, 8), hidden=16, batch_norm=True)
RESNET = partial(ResNet, IMAGE, CLASSES, depth=8, width=4)
FORMS = (
    "nested",
    "shared",
    "no affine",
    "no running statistics",
    "cumulative",
    "frozen",
    "frozen without running statistics",
    "frozen parameters",
    "recomputed",
    "recomputed reentrant",
)
CASES = {
    "cnn": Case(CNN_, IMAGE, num_examples=257, minibatch=32),
    "resnet": Case(RESNET, IMAGE, num_examples=129, minibatch=32),
    **{form: Case(partial(Layers, form)) for form in FORMS},
    "of any dimensions": Case(OfDimensions, IMAGE, num_examples=41),  # the last minibatch has 1 example
    "micro-batches of one": Case(partial(Layers, "nested"), num_examples=9, minibatch=3, epochs=2),
    "fewer examples than workers": Case(partial(Layers, "nested"), num_examples=8, minibatch=2, epochs=2),
    "a branch": Case(Branching, settings={"averaging": mbgd.Averaging(find_unused_parameters=True)}),
}


def cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, None]:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none"), None


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def trainer_of(workers: mbgd.Workers, case: Case, name: str, **settings: Any) -> mbgd.Trainer:
    model, (inputs, targets) = case.made()
    how = case.settings.get("averaging", mbgd.Averaging())
    settings = {
        "seed": SEED,
        "epochs": case.epochs,
        "batch": mbgd.Batch(case.minibatch),
        "precision": "fp64",
        "batch_norm": "minibatch",
        "averaging": replace(how, name=mbgd.AveragingName(name)),
        **settings,
    }
    data = mbgd.Data(train=mbgd.InMemory(inputs, targets), evaluation=mbgd.InMemory(inputs[:7], targets[:7]))
    return mbgd.Trainer(
        model, mbgd.CrossEntropy(), make_optimizer(model.parameters()), data, mbgd.Settings(**settings), workers
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@cache
def plain_torch(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    model, data = case.made()
    reference.train(model, cross_entropy, data, case.minibatches(), make_optimizer)
    return state(model)


def train_all(workers: mbgd.Workers, averaging: str) -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        trainer = trainer_of(workers, case, averaging)
        trainer.fit()
        found[name] = state(trainer.setup.model)
        assert not any("forward" in vars(module) for module in trainer.setup.model.modules())
    return found


@pytest.fixture(scope="module")
def trained() -> Callable[[int, str], list[dict[str, Any]]]:
    return cache(lambda num_workers, averaging: run_workers(train_all, num_workers, averaging))


WORKERS = [(1, "auto"), (2, "shared_memory"), (3, "shared_memory"), (2, "ddp"), (3, "ddp")]


@pytest.mark.parametrize(("num_workers", "averaging"), WORKERS)
@pytest.mark.parametrize("name", CASES)
def test_workers_with_batch_norm_equal_one_process(
    trained: Callable[[int, str], list[dict[str, Any]]], name: str, num_workers: int, averaging: str
) -> None:
    wanted = plain_torch(name)
    main, *others = trained(num_workers, averaging)
    for key, value in wanted.items():
        least = 0.01  # a bias before another BatchNorm has no effect: its gradient is rounding alone
        error = (main[name][key] - value).abs().max() / value.abs().max().clamp(min=least)
        assert error <= 1e-12, f"{key}: {error}"
        assert all(torch.equal(other[name][key], main[name][key]) for other in others), key


def test_statistics_of_the_micro_batches_are_another_function() -> None:
    """So that the ladder above has teeth."""
    for of_worker in run_workers(train_over_micro_batches, 2):
        wanted = plain_torch("cnn")
        assert any((of_worker[key] - value).abs().max() > 1e-6 for key, value in wanted.items())


def train_over_micro_batches(workers: mbgd.Workers) -> dict[str, Tensor]:
    trainer = trainer_of(workers, CASES["cnn"], "auto", batch_norm="micro_batch")
    trainer.fit()
    return state(trainer.setup.model)


# Precision, resuming, evaluating


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_round_as_one_process_does(precision: str) -> None:
    [wanted] = run_workers(train_in, 1, precision)
    for of_worker in run_workers(train_in, 2, precision):
        for key, value in wanted.items():
            tolerance = 1e-4 if precision == "fp32" else 0.05
            assert of_worker[key].dtype == value.dtype
            assert torch.allclose(of_worker[key].double(), value.double(), rtol=tolerance, atol=tolerance), key


def train_in(workers: mbgd.Workers, precision: str) -> dict[str, Tensor]:
    trainer = trainer_of(workers, CASES["cnn"], "auto", precision=precision, steps=4)
    trainer.fit()
    return state(trainer.setup.model)


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    for averaging in ("shared_memory", "ddp"):
        for whole, resumed in run_workers(interrupt, 2, averaging):
            assert whole.keys() == resumed.keys() == CASES["cnn"].made()[0].state_dict().keys()
            assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def interrupt(workers: mbgd.Workers, averaging: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    whole = trainer_of(workers, CASES["cnn"], averaging, steps=6)
    whole.fit()
    first = trainer_of(workers, CASES["cnn"], averaging, steps=3)
    first.fit()
    resumed = trainer_of(workers, CASES["cnn"], averaging, steps=6)
    resumed.restore(first.snapshot())
    resumed.fit()
    return state(whole.setup.model), state(resumed.setup.model)


def test_evaluations_and_other_forwards_exchange_nothing() -> None:
    """Otherwise the main worker, which computes them alone, would wait for the other."""
    (before, wanted, after), _ = run_workers(evaluate, 2)
    assert before["eval/loss"] == pytest.approx(wanted, rel=1e-12)
    assert after != before["eval/loss"]


def evaluate(workers: mbgd.Workers) -> tuple[dict[str, float], float, float]:
    """(metrics of two steps; on the main worker also the loss in plain torch, and after a forward in training)."""
    case = CASES["cnn"]
    trainer = trainer_of(workers, case, "auto", steps=2)
    metrics, losses = trainer.fit().metrics, [0.0, 0.0]
    model, (_, (inputs, targets)) = trainer.setup.model, case.made()
    if workers.is_main:
        for number in range(2):
            with torch.no_grad():
                losses[number] = F.cross_entropy(model.eval()(inputs[:7]), targets[:7]).item()
            model.train()(inputs)
    return metrics, losses[0], losses[1]


class Spoilt(mbgd.InMemory):
    """One example is not finite."""

    def gather(self, indices: Tensor) -> Any:
        inputs, targets = super().gather(indices)
        return torch.where(indices.view(-1, 1) == 3, math.nan, inputs), targets


def spoil(workers: mbgd.Workers) -> str:
    case = Case(partial(Layers, "nested"), num_examples=9, minibatch=3)
    model, rows = case.made()
    settings = mbgd.Settings(batch=mbgd.Batch(3), batch_norm="minibatch", precision="fp64")  # type: ignore[arg-type]
    data = mbgd.Data(train=Spoilt(*rows))
    try:
        mbgd.Trainer(model, mbgd.CrossEntropy(), make_optimizer(model.parameters()), data, settings, workers).fit()
    except mbgd.UsageError as error:
        return str(error)
    return "trained"


def test_a_loss_that_is_not_finite_names_the_example_that_spoils_the_others() -> None:
    """Each worker looks for it alone, with micro-batches of one example."""
    one, *others = run_workers(spoil, 3)
    assert all(other == one for other in others)
    assert re.search(r"the loss is not finite at step \d; it is not for the examples 3\. ", one)


# What cannot be


class Skipping(nn.Module):
    """Skips one of its layers, as random numbers decide, which are keyed by the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6)])

    def forward(self, inputs: Tensor) -> Tensor:
        norm = self.norms[int(torch.rand(()) < 0.5)]
        outputs: Tensor = self.last(norm(self.first(inputs)))
        return outputs


def skip(workers: mbgd.Workers, averaging: str) -> str:
    case = Case(Skipping, settings={"averaging": mbgd.Averaging(find_unused_parameters=True)}, epochs=9)
    try:
        trainer_of(workers, case, averaging).fit()
    except mbgd.UsageError as error:
        return str(error)
    return "trained"


class Scaled(nn.Module):
    """Inputs × a weight, normalised: the weight changes nothing, so the gradient at it is 0 whatever the minibatch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.tensor(2.0)), nn.BatchNorm1d(1, eps=1e-30, affine=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs * self.weight)  # type: ignore[no-any-return]


def measured_noise(workers: mbgd.Workers) -> tuple[str, dict[str, float]]:
    inputs = torch.randn(24, 1, generator=torch.Generator().manual_seed(3))
    model = Scaled()
    settings = mbgd.Settings(
        batch=mbgd.Batch(8), precision="fp64", batch_norm="minibatch", noise_scale=mbgd.NoiseScale(every_steps=1)
    )
    data, optimizer = mbgd.Data(train=mbgd.InMemory(inputs, inputs**3)), torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, workers)
    return trainer.train_step.noise_scale.describe(), trainer.fit().metrics


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_noise_scale_is_not_measured(num_workers: int) -> None:
    """A worker's part of the gradient is not that of its examples: here the parts are not 0, but their sum always is.

    Its noise is 0, and the parts said otherwise.
    """
    for described, metrics in run_workers(measured_noise, num_workers):
        assert described == "not measured: examples have no losses of their own"
        assert metrics["train/gradient_norm"] < 1e-12
        assert "train/noise_scale" not in metrics
        assert "train/gradient_variance" not in metrics


@pytest.mark.parametrize("averaging", ["shared_memory", "ddp"])
def test_workers_that_compute_different_layers_are_told_so(averaging: str) -> None:
    one, other = run_workers(skip, 2, averaging)
    assert one == other
    assert re.match(r"step \d+: worker 0 the forward of norms.[01], worker 1 the forward of norms.[01]. With", one)
    assert "Let every micro-batch pass through the same layers" in one


def test_a_worker_that_computes_no_layer_is_noticed() -> None:
    """In shared memory it leaves the values of an earlier exchange."""
    layers, rows = {"norm": nn.BatchNorm1d(2)}, []
    statistics = Statistics(layers, lambda values: [values, *rows])
    assert statistics.of_examples(0, torch.ones(3, 2))[0] == 3
    rows.append(torch.zeros(6, dtype=torch.float64))
    with pytest.raises(mbgd.UsageError, match=r"worker 0 the forward of norm, worker 1 none of them"):
        statistics.of_examples(0, torch.ones(3, 2))


class OwnForward(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.last = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(F.batch_norm(self.layers(inputs), None, None, training=True))
        return outputs


class TwiceDerived:
    """A penalty on the inputs' gradient."""

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
        inputs, targets = batch
        inputs = inputs.detach().requires_grad_()
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        return mbgd.PerExample(losses + gradient.square().sum(1))


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, CLASSES))


def compiled() -> nn.Module:
    model = with_norm(nn.BatchNorm1d(6))
    model.compile()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "own forward": (lambda: with_norm(OwnForward(6)), {}, r"layer 1 \(OwnForward\) has a forward of its own"),
    "sync": (lambda: with_norm(nn.SyncBatchNorm(6)), {}, r"layer 1 \(SyncBatchNorm\) has a forward of its own"),
    "function": (ByFunction, {}, r"calls torch.nn.functional.batch_norm by itself"),
    "compiled": (compiled, {}, r"the model is compiled"),
    "scripted": (
        lambda: torch.jit.script(with_norm(nn.BatchNorm1d(6))),
        {},
        r"is compiled \(torch.compile or torch.jit",
    ),
    "micro-batches": (
        lambda: with_norm(nn.BatchNorm1d(6)),
        {"batch": mbgd.Batch(10, 3)},
        r"with 4 micro-batches of a minibatch for 2 workers; .* batch.micro_batch_size=null \(or 5 or more\)",
    ),
    "one value": (
        lambda: with_norm(nn.BatchNorm1d(6)),
        {"batch": mbgd.Batch(23)},
        r"smallest minibatch of this plan, of 1 examples: ValueError: .* What works: batch.drop_last=true",
    ),
    "reproducible": (
        lambda: with_norm(nn.BatchNorm1d(6)),
        {"averaging": mbgd.Averaging("reproducible")},  # type: ignore[arg-type]
        r"batch_norm=minibatch with averaging=reproducible; .* Use averaging=auto, or batch_norm=micro_batch",
    ),
    "nothing": (lambda: with_norm(nn.BatchNorm1d(6)), {"batch_norm": "batch"}, r"one of micro_batch, minibatch"),
}


def refuse(workers: mbgd.Workers) -> dict[str, str]:
    told = {}
    for name, (model, settings, _) in REFUSED.items():
        try:
            trainer_of(workers, Case(model), "auto", **settings)
        except mbgd.UsageError as error:
            told[name] = str(error)
    case = CASES["nested"]
    trainer = trainer_of(workers, case, "auto")
    trainer.setup.task._parts = (TwiceDerived(), trainer.setup.model, None)
    try:
        trainer.fit()
    except mbgd.UsageError as error:
        told["twice"] = str(error)
    return told


@pytest.fixture(scope="module")
def refused() -> list[dict[str, str]]:
    return run_workers(refuse, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_use_the_statistics_of_the_minibatch_is_refused(refused: list[dict[str, str]], name: str) -> None:
    pattern = re.compile(REFUSED[name][2], re.DOTALL)
    assert all(pattern.search(told.get(name, "")) for told in refused), refused[0].get(name, "not refused")


def test_a_second_derivative_is_refused(refused: list[dict[str, str]]) -> None:
    assert all("differentiates a gradient through BatchNorm" in told["twice"] for told in refused)


def test_a_model_without_batch_norm_is_told_so() -> None:
    trainer = trainer_of(mbgd.Workers(), Case(lambda: nn.Linear(6, CLASSES)), "auto", batch=mbgd.Batch(10, 3))
    assert any("no BatchNorm layer" in told for told in trainer.setup.warnings)


def test_runs_from_before_the_setting_resume_with_what_they_had() -> None:
    config = {"data": {}, "batch": {}, "schedule": None}
    assert must_match(config)["batch_norm"] == "micro_batch"
    before = {key: value for key, value in must_match(config).items() if key != "batch_norm"}
    assert differences(before, must_match(config)) == []
    found = differences(before, must_match(config | {"batch_norm": "minibatch"}))
    assert found == ["batch_norm: micro_batch before, minibatch now"]
