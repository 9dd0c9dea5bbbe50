"""A class or a value per token, pixel or box: losses of any shape (N, …) equal torch's over the whole minibatch."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan
from mbgd.config import AveragingName
from mbgd.data import InMemory
from mbgd.task.losses import _class_dims
from mbgd.task.objective import Totals

import reference
from processes import run_workers

CLASSES, HEIGHT, WIDTH = 3, 4, 5
CLASS_WEIGHTS = [0.3, 1.0, 0.7]
IGNORED = 255


class Net(nn.Module):
    """A class of each pixel, its outputs laid out in one of these ways."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layout, self.conv = layout, nn.Conv2d(1, CLASSES, 3, padding=1)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.conv(inputs)
        if self.layout == "classes first":
            return logits
        if self.layout == "classes first, flattened":
            return logits.flatten(2)
        logits = logits.permute(0, 2, 3, 1)
        return logits if self.layout == "classes last" else logits.flatten(1, 2)


LAYOUTS = ["classes first", "classes first, flattened", "classes last", "classes last, flattened"]


def examples(num_examples: int) -> tuple[Tensor, Tensor]:
    """Images, and targets of which a share that differs from image to image is ignored."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(num_examples, 1, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
    targets = torch.randint(CLASSES, (num_examples, HEIGHT, WIDTH), generator=generator)
    shares = torch.rand(num_examples, 1, 1, generator=generator)
    is_ignored = torch.rand(targets.shape, generator=generator) < shares
    return inputs, targets.masked_fill(is_ignored, IGNORED)


def mean(terms: mbgd.PerExample) -> Tensor:
    weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
    return (terms.losses * weights).sum() / weights.sum()


def torchs(logits: Tensor, targets: Tensor, label_smoothing: float, class_weights: list[float] | None) -> Tensor:
    """Logits (N, C, …)."""
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=logits.dtype)
    return F.cross_entropy(logits, targets, weight=weight, ignore_index=IGNORED, label_smoothing=label_smoothing)


@pytest.mark.parametrize(
    ("layout", "label_smoothing", "class_weights"), list(product(LAYOUTS, [0.0, 0.1], [None, CLASS_WEIGHTS]))
)
def test_cross_entropy_of_pixels_is_torchs(
    layout: str, label_smoothing: float, class_weights: list[float] | None
) -> None:
    inputs, targets = examples(20)
    model = Net(layout)
    objective = mbgd.CrossEntropy(label_smoothing=label_smoothing, class_weights=class_weights, ignore_index=IGNORED)
    terms = objective(model, (inputs, targets))
    terms.check(20)
    assert terms.losses.shape == targets.shape
    got, wanted = mean(terms), torchs(model.conv(inputs), targets, label_smoothing, class_weights)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad(loss, list(model.parameters())) for loss in (got, wanted)), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)
    counts = targets != IGNORED
    expected = model.conv(inputs).softmax(1).movedim(1, -1)[counts]
    outputs, counted = terms.counted_predictions()
    assert torch.equal(counted, targets[counts])
    assert torch.allclose(outputs, expected, rtol=1e-12)
    totals = Totals(terms.sums(("accuracy",)), ("accuracy",))
    assert totals.count == counts.sum()
    assert totals.means()["accuracy"] == pytest.approx((expected.argmax(-1) == targets[counts]).double().mean().item())


# On workers


def losses_and_weights(class_weights: list[float], model: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """In plain torch, of logits (N, C, H, W)."""
    inputs, targets = batch
    counts = targets != IGNORED
    weights = torch.tensor(class_weights, dtype=torch.float64)[targets.masked_fill(~counts, 0)] * counts
    return F.cross_entropy(model.conv(inputs), targets, reduction="none", ignore_index=IGNORED), weights


def train(workers: mbgd.Workers, layout: str, averaging: str) -> tuple[list[Tensor], dict[str, float]]:
    model = Net(layout)
    data = InMemory(*examples(61))
    settings = mbgd.Settings(
        batch=mbgd.Batch(size=20, micro_batch_size=3),
        epochs=1,
        seed=7,
        precision=mbgd.Precision.fp64,
        averaging=mbgd.Averaging(name=AveragingName(averaging)),
    )
    trainer = mbgd.Trainer(
        model=model,
        objective=mbgd.CrossEntropy(ignore_index=IGNORED, class_weights=CLASS_WEIGHTS),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        data=mbgd.Data(train=data, evaluation=data),
        settings=settings,
        workers=workers,
    )
    metrics = trainer.fit().metrics
    return [parameter.detach() for parameter in model.parameters()], metrics


@pytest.mark.parametrize(("num_workers", "averaging"), [(1, "ddp"), (2, "ddp"), (3, "ddp"), (3, "reproducible")])
def test_pixels_on_workers_are_one_process(num_workers: int, averaging: str) -> None:
    order, plan = Order(61, 7), Plan(num_examples=61, minibatch_size=20, num_workers=1)
    minibatches = []
    for step in range(plan.steps_per_epoch):
        one = plan.minibatch(step)
        minibatches.append(order.indices(one.epoch, one.start, one.stop).tolist())
    wanted = Net("classes first")
    make_optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    reference.train(wanted, partial(losses_and_weights, CLASS_WEIGHTS), examples(61), minibatches, make_optimizer)
    assert not torch.equal(wanted.conv.weight, Net("classes first").conv.weight)
    inputs, targets = examples(61)
    loss = torchs(wanted.conv(inputs), targets, 0.0, CLASS_WEIGHTS)
    for layout in ("classes first", "classes last, flattened"):
        for parameters, metrics in run_workers(train, num_workers, layout, averaging):
            for mine, theirs in zip(parameters, wanted.parameters(), strict=True):
                assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)
            assert metrics["eval/loss"] == pytest.approx(loss.item(), rel=1e-12)


# Which dimension holds the classes


@pytest.mark.parametrize(
    ("logits", "targets", "dims"),
    [
        ((8, 3), (8,), (-1,)),
        ((8, 1, 3), (8,), (-1,)),
        ((40, 3), (8, 5), (-1,)),  # flattened altogether
        ((8, 5, 3), (8, 5), (-1,)),
        ((8, 3, 5), (8, 5), (1,)),
        ((8, 5, 5), (8, 5), (1, -1)),
        ((8, 3, 4, 5), (8, 4, 5), (1,)),
        ((8, 4, 5, 3), (8, 4, 5), (-1,)),
        ((8, 4, 4, 4), (8, 4, 4), (1, -1)),
        ((8, 5, 4, 5), (8, 4, 5), (1,)),  # C = W alone leaves no doubt
        ((8, 20, 3), (8, 4, 5), (-1,)),
        ((8, 3, 20), (8, 4, 5), (1,)),
        ((8, 20, 20), (8, 4, 5), (1, -1)),
        ((8, 3, 4, 5), (8, 20), (1,)),
        ((8, 3, 2, 4, 5), (8, 2, 4, 5), (1,)),
        ((8, 3, 5, 4), (8, 4, 5), ()),
        ((8, 3, 8, 5), (8, 4, 5), ()),
        ((7, 3, 4, 5), (8, 4, 5), ()),
        ((8, 3), (8, 4, 5), ()),
        ((8, 4, 5), (8, 4, 5), ()),
        ((8,), (8,), ()),
        ((8, 3), (), ()),
    ],
)
def test_the_classes_dimension_is_told_by_the_shapes(
    logits: tuple[int, ...], targets: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    assert _class_dims(logits, targets) == dims


class Gives(nn.Module):
    """Its inputs, times 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.one


SQUARE = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(0))
CLASSES_OF_SQUARE = torch.randint(4, (8, 4), generator=torch.Generator().manual_seed(1))


def test_shapes_that_do_not_tell_need_the_option() -> None:
    batch = SQUARE, CLASSES_OF_SQUARE
    with pytest.raises(mbgd.UsageError, match=r"logits of shape \(8, 4, 4\).*fit with.*objective.class_dim=1"):
        mbgd.CrossEntropy()(Gives(), batch)
    for dim, wanted in ((1, SQUARE), (-1, SQUARE.movedim(-1, 1))):
        got = mean(mbgd.CrossEntropy(class_dim=dim)(Gives(), batch))
        assert got.item() == pytest.approx(F.cross_entropy(wanted, CLASSES_OF_SQUARE).item())


def test_an_earlier_batch_tells_for_those_that_do_not() -> None:
    """Sequences of any length, of which some are as long as there are classes."""
    objective = mbgd.CrossEntropy()
    objective(Gives(), (torch.randn(8, 6, 4), torch.zeros(8, 6, dtype=torch.int64)))
    got = mean(objective(Gives(), (SQUARE, CLASSES_OF_SQUARE)))
    assert got.item() == pytest.approx(F.cross_entropy(SQUARE.movedim(-1, 1), CLASSES_OF_SQUARE).item())
    with pytest.raises(
        mbgd.UsageError, match=r"class_dim=-1, .*by an earlier batch, .* have the classes in dimension 1"
    ):
        objective(Gives(), (torch.randn(8, 4, 6), torch.zeros(8, 6, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        ((8, 3, 4, 5), torch.zeros(8, 5, 4).long(), {}, r"\(8, 3, 4, 5\) and targets of shape \(8, 5, 4\)"),
        ((8, 3, 4, 5), torch.zeros(8, 3, 4, 5), {}, r"\(8, 3, 4, 5\) and targets of shape \(8, 3, 4, 5\)"),
        ((8, 3, 4, 5), torch.zeros(8, 4, 5), {}, "dtype torch.float32"),
        ((8, 3, 4, 5), torch.full((8, 4, 5), 3), {}, "targets lie outside the classes, for example 3"),
        ((8, 3, 4, 5), torch.zeros(8, 4, 5).long(), {"class_dim": -1}, "have the classes in dimension 1"),
        ((8, 3, 4, 5), torch.zeros(8, 4, 5).long(), {"class_weights": [1.0, 2.0]}, "2 class_weights for 3 classes"),
    ],
)
def test_what_does_not_fit_is_refused(
    logits: tuple[int, ...], targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        mbgd.CrossEntropy(**options)(Gives(), (torch.randn(logits), targets))


@pytest.mark.parametrize("options", [{"class_dim": 2}, {"class_weights": [1.0, float("nan")]}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(mbgd.UsageError, match="must be"):
        mbgd.CrossEntropy(**options)


def test_masks_of_bytes() -> None:
    inputs, targets = examples(4)
    objective = mbgd.CrossEntropy(ignore_index=IGNORED)
    bytes_, longs = (objective(Net("classes first"), (inputs, of)) for of in (targets.to(torch.uint8), targets))
    assert torch.equal(bytes_.losses, longs.losses)
    assert bytes_.weights is not None
    assert longs.weights is not None
    assert torch.equal(bytes_.weights, longs.weights)


def test_targets_of_the_whole_dataset_are_checked_against_the_classes_wherever_they_lie() -> None:
    def trainer(targets: Tensor) -> mbgd.Trainer:
        model, data = Net("classes first"), InMemory(examples(40)[0], targets)
        return mbgd.Trainer(
            model=model,
            objective=mbgd.CrossEntropy(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data=mbgd.Data(train=data),
            settings=mbgd.Settings(batch=mbgd.Batch(size=8), epochs=1, precision=mbgd.Precision.fp64),
        )

    targets = examples(40)[1].clamp(max=CLASSES - 1)
    trainer(targets)
    targets[-1, -1, -1] = CLASSES
    with pytest.raises(mbgd.UsageError, match=r"1 targets lie outside the classes, .* the model has 3 outputs"):
        trainer(targets)


# Precision


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_are_not_rounded_under_autocast(label_smoothing: float) -> None:
    objective = mbgd.CrossEntropy(class_weights=CLASS_WEIGHTS, label_smoothing=label_smoothing)
    targets = torch.tensor([0, 1, 2, 0])
    model = nn.Linear(4, CLASSES)
    inputs = torch.randn(4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            terms = objective(model, (inputs, targets))
            logits = model(inputs)
        assert logits.dtype is dtype
        assert terms.losses.dtype is torch.float32
        assert terms.weights is not None
        assert torch.equal(terms.weights, torch.tensor(CLASS_WEIGHTS)[targets])
        wanted = torchs(logits.float(), targets, label_smoothing, CLASS_WEIGHTS)
        assert mean(terms).item() == pytest.approx(wanted.item(), rel=1e-6)
    terms = objective(model.double(), (inputs.double(), targets))  # not what 32 bits have left of them
    assert terms.weights is not None
    assert torch.equal(terms.weights, torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)[targets])


def test_class_weights_that_an_evaluation_has_made_serve_training() -> None:
    objective = mbgd.CrossEntropy(class_weights=CLASS_WEIGHTS, label_smoothing=0.1)
    model, batch = nn.Linear(4, CLASSES), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    with torch.inference_mode():
        objective(model, batch)
    mean(objective(model, batch)).backward()


def test_targets_of_squared_error_are_not_rounded_under_autocast() -> None:
    model, inputs, targets = nn.Linear(4, 1), torch.randn(6, 4), torch.full((6,), 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mbgd.MeanSquaredError()(model, (inputs, targets)).losses
        predictions = model(inputs).float().squeeze(-1)
    assert torch.equal(got, (predictions - 0.3).square())


# Objectives of a user's own, and squared error


def weighted_boxes(model: nn.Module, batch: tuple[Tensor, ...]) -> mbgd.PerExample:
    """Errors of boxes (N, boxes, 4), of which those that pad weigh 0."""
    inputs, boxes, weights = batch
    losses = (model(inputs).view(boxes.shape) - boxes).square()
    weights = weights.unsqueeze(-1).expand_as(losses)
    return mbgd.PerExample(losses, weights, {"error": losses.detach().sqrt()}, (boxes, boxes))


def test_losses_of_three_dimensions() -> None:
    torch.manual_seed(0)
    inputs, boxes = torch.randn(10, 5, dtype=torch.float64), torch.randn(10, 3, 4, dtype=torch.float64)
    weights = (torch.rand(10, 3) > 0.5).double()
    model = nn.Linear(5, 12).double()
    terms = weighted_boxes(model, (inputs, boxes, weights))
    terms.check(10)
    kept = weights != 0
    errors = (model(inputs).view(10, 3, 4) - boxes)[kept]
    means = Totals(terms.sums(("error",)), ("error",)).means()
    assert means["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-12)
    assert means["error"] == pytest.approx(errors.abs().mean().item(), rel=1e-12)
    assert torch.equal(terms.counted_predictions()[0], boxes[kept].flatten())


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [((8, 2, 4, 5), (8, 2, 4, 5)), ((8, 1, 4, 5), (8, 4, 5)), ((8, 4, 5, 1), (8, 4, 5)), ((8, 1, 1), (8, 1))],
)
def test_squared_error_of_any_shape(predictions: tuple[int, ...], targets: tuple[int, ...]) -> None:
    given, wanted = torch.randn(predictions).double(), torch.randn(targets).double()
    terms = mbgd.MeanSquaredError()(Gives(), (given, wanted))
    terms.check(8)
    assert mean(terms).item() == pytest.approx(F.mse_loss(given.view(targets), wanted).item(), rel=1e-12)


def test_squared_error_refuses_other_shapes() -> None:
    with pytest.raises(mbgd.UsageError, match="equal shapes"):
        mbgd.MeanSquaredError()(Gives(), (torch.randn(8, 1, 5, 4), torch.randn(8, 4, 5)))
