"""Binary cross-entropy, Huber loss and distillation: torch's means on any number of workers; mistakes are explained."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan
from mbgd.building.build import build_trainer, typed
from mbgd.building.composing import compose
from mbgd.task.objective import Totals

import reference
from processes import run_workers

NUM_FEATURES, CLASSES, NUM_EXAMPLES, SIZE, SEED = 6, 3, 47, 10, 11
IGNORED = 255
POS_WEIGHT = [0.3, 1.0, 4.0]


def mean(terms: mbgd.PerExample) -> Tensor:
    weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
    return (terms.losses * weights).sum() / weights.sum()


class Outputs(nn.Module):
    """The inputs' features to outputs of this shape."""

    def __init__(self, *shape: int, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape, self.layers = shape, nn.Sequential(nn.Linear(NUM_FEATURES, math.prod(shape)), nn.Dropout(0.0))
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs).view(-1, *self.shape)
        return outputs


def inputs_of(num_examples: int) -> Tensor:
    return torch.randn(num_examples, NUM_FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


# In one process


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((), ()), ((1,), ()), ((3,), (3,)), ((1, 4, 5), (4, 5)), ((3, 4, 5), (3, 4, 5)), ((4, 1), (4,))],
)
@pytest.mark.parametrize("pos_weight", [None, 2.5])
def test_binary_cross_entropy_is_torchs_mean(
    outputs: tuple[int, ...], targets: tuple[int, ...], pos_weight: float | None
) -> None:
    model, inputs, wanted_targets = Outputs(*outputs), inputs_of(30), drawn(30, *targets)
    terms = mbgd.BinaryCrossEntropy(pos_weight=pos_weight)(model, (inputs, wanted_targets))
    terms.check(30)
    weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
    logits = model(inputs).view(wanted_targets.shape)
    wanted = F.binary_cross_entropy_with_logits(logits, wanted_targets, pos_weight=weight)
    assert terms.losses.shape == wanted_targets.shape
    assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-12)
    parameter = next(model.parameters())
    (got_gradient,), (wanted_gradient,) = (torch.autograd.grad(loss, [parameter]) for loss in (mean(terms), wanted))
    assert torch.allclose(got_gradient, wanted_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("shape", "class_dim"), [((3,), 1), ((3,), -1), ((3, 4), 1), ((4, 3), -1)])
def test_pos_weight_of_each_class(shape: tuple[int, ...], class_dim: int) -> None:
    model, inputs, targets = Outputs(*shape), inputs_of(30), drawn(30, *shape).round()
    terms = mbgd.BinaryCrossEntropy(pos_weight=POS_WEIGHT, class_dim=class_dim)(model, (inputs, targets))
    weight = torch.tensor(POS_WEIGHT, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1 if class_dim == 1 else 0))
    wanted = F.binary_cross_entropy_with_logits(model(inputs), targets, pos_weight=weight)
    assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_binary_targets_of_any_dtype_and_ignored_ones(dtype: torch.dtype) -> None:
    model, inputs, targets = Outputs(4, 5), inputs_of(30), drawn(30, 4, 5).round().to(dtype)
    is_ignored = drawn(30, 4, 5).flip(0) < 0.3
    logits, binary = model(inputs), targets.double()
    if dtype is not torch.bool:
        targets = targets.masked_fill(is_ignored, IGNORED)
        logits, binary = logits[~is_ignored], binary[~is_ignored]
    terms = mbgd.BinaryCrossEntropy(ignore_index=IGNORED)(model, (inputs, targets))
    wanted = F.binary_cross_entropy_with_logits(logits, binary)
    assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-12)
    found = Totals(terms.sums(("accuracy",)), ("accuracy",)).means()
    assert found["accuracy"] == pytest.approx(((logits > 0) == (binary > 0.5)).double().mean().item(), rel=1e-12)
    outputs, counted = terms.counted_predictions()
    assert torch.allclose(outputs, logits.sigmoid().flatten())
    assert torch.equal(counted.double(), binary.flatten())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 4)])
@pytest.mark.parametrize("delta", [0.3, 2.0])
def test_huber_is_torchs_mean(shape: tuple[int, ...], delta: float) -> None:
    model, inputs, targets = Outputs(*shape), inputs_of(30), drawn(30, *shape) * 5
    terms = mbgd.Huber(delta=delta)(model, (inputs, targets))
    assert terms.losses.shape == (30,)
    wanted = F.huber_loss(model(inputs), targets, delta=delta)
    assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-12)


def distilled(
    logits: Tensor, of_teacher: Tensor, targets: Tensor, temperature: float, hard_weight: float, **of_hard: Any
) -> Tensor:
    """In plain torch, as a mean; logits (N, C)."""
    hard = F.cross_entropy(logits, targets, **of_hard)
    student, teacher = logits / temperature, of_teacher / temperature
    soft = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean") * temperature**2
    return hard_weight * hard + (1 - hard_weight) * soft


@pytest.mark.parametrize(("temperature", "hard_weight"), [(1.0, 0.5), (4.0, 0.3), (2.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("tokens", [None, 5])
def test_distillation_is_torchs_mean(temperature: float, hard_weight: float, tokens: int | None) -> None:
    shape = (CLASSES,) if tokens is None else (tokens, CLASSES)
    model, teacher, inputs = Outputs(*shape), Outputs(*shape, seed=2), inputs_of(30)
    targets = (drawn(30, *shape[:-1]) * CLASSES).long()
    objective = mbgd.Distillation(
        teacher, temperature=temperature, hard_weight=hard_weight, label_smoothing=0.1, class_dim=-1
    )
    terms = objective(model, (inputs, targets))
    logits, of_teacher = (one(inputs).view(-1, CLASSES) for one in (model, teacher))
    wanted = distilled(logits, of_teacher, targets.flatten(), temperature, hard_weight, label_smoothing=0.1)
    assert terms.losses.shape == targets.shape
    assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-12)
    found = Totals(terms.sums(("agreement",)), ("agreement",)).means()["agreement"]
    assert found == pytest.approx((logits.argmax(-1) == of_teacher.argmax(-1)).double().mean().item())


def test_an_ignored_target_counts_for_neither_part_of_distillation() -> None:
    model, teacher, inputs = Outputs(CLASSES), Outputs(CLASSES, seed=2), inputs_of(30)
    targets = (drawn(30) * CLASSES).long()
    kept = drawn(30).flip(0) > 0.3
    terms = mbgd.Distillation(teacher, ignore_index=-1)(model, (inputs, targets.masked_fill(~kept, -1)))
    wanted = distilled(model(inputs[kept]), teacher(inputs[kept]), targets[kept], 2.0, 0.5)
    assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-12)


# On workers


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    objective: Callable[[], Any]
    targets: tuple[int, ...]
    kind: str
    reference: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, Tensor | None]]

    def data(self) -> tuple[Tensor, Tensor]:
        targets = drawn(NUM_EXAMPLES, *self.targets)
        if self.kind == "classes":
            return inputs_of(NUM_EXAMPLES), (targets * CLASSES).long()
        if self.kind == "ignored":
            shares = torch.linspace(0, 0.9, NUM_EXAMPLES).view(-1, *[1] * len(self.targets))
            targets = targets.round().masked_fill(targets.flip(0) < shares, IGNORED)
        return inputs_of(NUM_EXAMPLES), targets


def binary_reference(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    counts = targets != IGNORED
    weight = torch.tensor(POS_WEIGHT, dtype=torch.float64).view(-1, 1)
    losses = F.binary_cross_entropy_with_logits(model(inputs), targets * counts, reduction="none", pos_weight=weight)
    return losses, counts.double()


def huber_reference(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, None]:
    inputs, targets = batch
    return F.huber_loss(model(inputs), targets, reduction="none", delta=0.4), None


def distillation_reference(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, None]:
    inputs, targets = batch
    logits = model(inputs)
    with torch.no_grad():
        teacher = (Outputs(CLASSES, seed=2)(inputs) / 3.0).softmax(-1)
    soft = (teacher * (teacher.log() - (logits / 3.0).log_softmax(-1))).sum(-1) * 9.0
    return 0.3 * F.cross_entropy(logits, targets, reduction="none") + 0.7 * soft, None


CASES = {
    "bce": Case(
        partial(Outputs, CLASSES, 4),
        partial(mbgd.BinaryCrossEntropy, pos_weight=POS_WEIGHT, ignore_index=IGNORED),
        (CLASSES, 4),
        "ignored",
        binary_reference,
    ),
    "huber": Case(partial(Outputs, 2), partial(mbgd.Huber, delta=0.4), (2,), "values", huber_reference),
    "distillation": Case(
        partial(Outputs, CLASSES),
        lambda: mbgd.Distillation(Outputs(CLASSES, seed=2), temperature=3.0, hard_weight=0.3),
        (),
        "classes",
        distillation_reference,
    ),
}


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def trainer_of(workers: mbgd.Workers, name: str, **settings: Any) -> mbgd.Trainer:
    case = CASES[name]
    model = case.model()
    inputs, targets = case.data()
    data = mbgd.Data(train=mbgd.InMemory(inputs, targets), evaluation=mbgd.InMemory(inputs[:7], targets[:7]))
    how = mbgd.Settings(**{"seed": SEED, "precision": "fp64", "batch": mbgd.Batch(SIZE), **settings})
    return mbgd.Trainer(model, case.objective(), make_optimizer(model.parameters()), data, how, workers)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_all(workers: mbgd.Workers) -> dict[str, Any]:
    found = {}
    for name in CASES:
        for micro_batch_size in (None, 3):
            trainer = trainer_of(workers, name, batch=mbgd.Batch(SIZE, micro_batch_size))
            metrics = trainer.fit().metrics
            found[f"{name} {micro_batch_size}"] = (state(trainer.setup.model), metrics)
    return found


@cache
def plain_torch(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    model = case.model()
    order, plan = Order(NUM_EXAMPLES, SEED), Plan(num_examples=NUM_EXAMPLES, minibatch_size=SIZE, num_workers=1)
    steps = [plan.minibatch(step) for step in range(plan.steps_per_epoch)]
    minibatches = [order.indices(one.epoch, one.start, one.stop).tolist() for one in steps]
    reference.train(model, case.reference, case.data(), minibatches, make_optimizer)
    return state(model)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_equal_one_process(num_workers: int) -> None:
    for of_worker in run_workers(train_all, num_workers):
        for name, (got, metrics) in of_worker.items():
            wanted = plain_torch(name.split()[0])
            for key, value in wanted.items():
                assert torch.allclose(got[key], value, rtol=1e-12, atol=1e-14), f"{name}: {key}"
            assert not torch.equal(got["layers.0.weight"], CASES[name.split()[0]].model().layers[0].weight)
            assert math.isfinite(metrics["eval/loss"])
            assert ("eval/accuracy" in metrics) == ("huber" not in name)
            assert ("eval/agreement" in metrics) == ("distillation" in name)


# The teacher


def test_the_teacher_is_no_part_of_the_model_and_does_not_change() -> None:
    trainer = trainer_of(mbgd.Workers(), "distillation", precision="fp32")
    objective: Any = trainer.setup.task.given_objective
    before = state(objective.teacher)
    trainer.fit()
    parameters = set(objective.teacher.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert not any(module.training for module in objective.teacher.modules())
    assert parameters.isdisjoint(p for group in trainer.setup.optimizer.param_groups for p in group["params"])
    assert parameters.isdisjoint(trainer.setup.task.parameters())
    assert set(trainer.snapshot().tensors) == {"model", "optimizer"}
    assert set(trainer.snapshot().tensors["model"]) == set(trainer.setup.model.state_dict())
    after = objective.teacher.state_dict()
    assert {one.dtype for one in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], value.float()) for name, value in before.items())


def other_teachers(workers: mbgd.Workers) -> str:
    model = Outputs(CLASSES)
    inputs, targets = CASES["distillation"].data()
    objective = mbgd.Distillation(Outputs(CLASSES, seed=workers.rank))
    data = mbgd.Data(train=mbgd.InMemory(inputs, targets))
    try:
        mbgd.Trainer(model, objective, make_optimizer(model.parameters()), data, mbgd.Settings(), workers)
    except mbgd.UsageError as error:
        return str(error)
    return "made"


def test_workers_with_other_teachers_are_told_so() -> None:
    assert all("objective.teacher_sha256" in told for told in run_workers(other_teachers, 2))


def test_weights_of_a_teacher_come_from_a_run(tmp_path: Path) -> None:
    trained = Outputs(CLASSES, seed=4)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        objective = mbgd.Distillation(Outputs(CLASSES, seed=2), weights=path)
        assert all(torch.equal(a, b) for a, b in zip(objective.teacher.parameters(), trained.parameters(), strict=True))
    with pytest.raises(mbgd.UsageError, match="do not fit the teacher"):
        mbgd.Distillation(Outputs(2), weights=tmp_path)
    with pytest.raises(mbgd.UsageError, match="cannot be read"):
        mbgd.Distillation(Outputs(2), weights=tmp_path / "none.safetensors")


def test_the_command_line_gives_the_teacher_the_shapes_of_the_data() -> None:
    overrides = ["objective=distillation", "objective.weights=null", "objective.teacher._target_=mbgd.models.MLP"]
    overrides += ["+objective.teacher.input_shape=null", "+objective.teacher.num_outputs=null"]
    trainer = build_trainer(typed(compose([*overrides, "steps=1"])), mbgd.Workers())
    objective: Any = trainer.setup.task.given_objective
    assert objective.teacher(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# Mistakes


def shared_teacher() -> None:
    model = Outputs(CLASSES)
    mbgd.Distillation(model)(model, (inputs_of(5), torch.zeros(5, dtype=torch.int64)))


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "bce shapes": (
        lambda: mbgd.BinaryCrossEntropy()(Outputs(2), (inputs_of(5), drawn(5))),
        r"output has shape \(5, 2\) and the targets \(5,\); binary cross-entropy needs equal shapes, because",
    ),
    "huber shapes": (lambda: mbgd.Huber()(Outputs(5), (inputs_of(5), drawn(5))), r"the Huber loss needs equal shapes"),
    "bce of targets outside 0 to 1": (
        lambda: mbgd.BinaryCrossEntropy()(Outputs(5), (inputs_of(5), drawn(5, 5) * 3)),
        r"targets lie outside 0 to 1, for example",
    ),
    "pos_weight": (lambda: mbgd.BinaryCrossEntropy(pos_weight=[1.0, -1.0]), r"must be ≥ 0 and finite"),
    "number of pos_weights": (
        lambda: mbgd.BinaryCrossEntropy(pos_weight=[1.0, 2.0])(Outputs(3), (inputs_of(5), drawn(5, 3))),
        r"2 values of pos_weight for targets of shape \(5, 3\)",
    ),
    "class_dim": (lambda: mbgd.BinaryCrossEntropy(class_dim=0), r"it must be 1, for targets"),
    "targets": (
        lambda: mbgd.BinaryCrossEntropy().check_targets(torch.tensor([0, 1, 7]), num_classes=1),
        r"1 targets lie outside 0 to 1, for example 7",
    ),
    "delta": (lambda: mbgd.Huber(delta=0.0), r"delta=0.0; it is the difference"),
    "temperature": (lambda: mbgd.Distillation(Outputs(2), temperature=0.0), r"temperature=0.0"),
    "hard_weight": (lambda: mbgd.Distillation(Outputs(2), hard_weight=1.5), r"hard_weight=1.5"),
    "no teacher": (lambda: mbgd.Distillation("own"), r"teacher is a str; it must be a torch.nn.Module"),  # type: ignore[arg-type]
    "other classes": (
        lambda: mbgd.Distillation(Outputs(2))(Outputs(3), (inputs_of(5), torch.zeros(5, dtype=torch.int64))),
        r"the teacher gives 2 classes and the model 3",
    ),
    "shared": (shared_teacher, r"the teacher has parameters of the model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name: str) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(mbgd.UsageError, match=message):
        call()


def test_ignored_targets_are_no_mistake() -> None:
    mbgd.BinaryCrossEntropy(ignore_index=IGNORED).check_targets(torch.tensor([0, 1, IGNORED]), num_classes=1)
