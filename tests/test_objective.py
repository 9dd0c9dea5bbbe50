"""The loss contract, and that the objectives that ship are torch's, averaged over the whole minibatch."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.task.objective import Totals

CLASSES = 4


def mean(terms: mbgd.PerExample) -> Tensor:
    weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
    return (terms.losses * weights).sum() / weights.sum()


@pytest.mark.parametrize(
    ("label_smoothing", "ignore_index", "class_weights", "num_tokens"),
    list(product([0.0, 0.1], [None, 2], [None, [0.5, 1.0, 2.0, 3.0]], [None, 5])),
)
def test_cross_entropy_is_torchs_mean(
    label_smoothing: float, ignore_index: int | None, class_weights: list[float] | None, num_tokens: int | None
) -> None:
    torch.manual_seed(0)
    shape = (30,) if num_tokens is None else (30, num_tokens)
    inputs, targets = torch.randn(*shape, 6, dtype=torch.float64), torch.randint(CLASSES, shape)
    model = nn.Linear(6, CLASSES).double()
    objective = mbgd.CrossEntropy(
        label_smoothing=label_smoothing, ignore_index=ignore_index, class_weights=class_weights
    )
    got = mean(objective(model, (inputs, targets)))
    wanted = F.cross_entropy(
        model(inputs).flatten(0, -2),
        targets.flatten(),
        weight=None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64),
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    (got_gradient,), (wanted_gradient,) = (torch.autograd.grad(loss, [model.weight]) for loss in (got, wanted))
    assert torch.allclose(got_gradient, wanted_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(30,), (30, 5)])
def test_cross_entropy_predicts_the_probability_of_each_class(shape: tuple[int, ...]) -> None:
    inputs, targets = torch.randn(*shape, 6), torch.randint(CLASSES, shape)
    model = nn.Linear(6, CLASSES)
    terms = mbgd.CrossEntropy(ignore_index=2)(model, (inputs, targets))
    outputs, counted = terms.counted_predictions()
    assert torch.equal(counted, targets[targets != 2])
    assert torch.allclose(outputs, model(inputs).softmax(-1)[targets != 2])


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 3)])
def test_mean_squared_error_is_torchs_mean(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(30, 6), torch.randn(shape)
    model = nn.Linear(6, shape[-1] if len(shape) > 1 else 1)
    got = mean(mbgd.MeanSquaredError()(model, (inputs, targets)))
    assert torch.allclose(got, F.mse_loss(model(inputs).view(shape), targets))


def test_mean_squared_error_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(mbgd.UsageError, match="equal shapes"):
        mbgd.MeanSquaredError()(nn.Linear(6, 2), (torch.randn(5, 6), torch.randn(5)))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (mbgd.PerExample(torch.tensor(1.0)), "scalar"),
        (mbgd.PerExample(torch.zeros(3)), r"shape \(3,\) for 4 examples"),
        (mbgd.PerExample(torch.zeros(2, 4, 2)), r"expected one loss per example, shape \(4,\) or \(4, …\)"),
        (mbgd.PerExample(torch.zeros(4), torch.zeros(4, 1)), "weights of shape"),
    ],
)
def test_broken_shapes_are_explained(terms: mbgd.PerExample, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        terms.check(4)


def test_a_metric_of_another_shape_is_explained() -> None:
    with pytest.raises(mbgd.UsageError, match="metric 'accuracy' of shape"):
        mbgd.PerExample(torch.zeros(4), metrics={"accuracy": torch.zeros(3)}).sums(("accuracy",))


def test_what_has_weight_0_is_left_out_even_if_its_loss_is_infinite() -> None:
    terms = mbgd.PerExample(
        torch.tensor([1.0, float("inf"), 3.0, float("nan")]),
        torch.tensor([1.0, 0.0, 3.0, 0.0]),
        {"accuracy": lambda: torch.tensor([1.0, 1.0, 0.0, 1.0])},
    )
    assert Totals(terms.sums(("accuracy",)), ("accuracy",)).means() == {"loss": 2.5, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0, -1.0], "1 negative weights"), ([0.0, 0.0], "only zero weights")]
)
def test_weights_that_make_no_mean_are_explained(weights: list[float], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        Totals(mbgd.PerExample(torch.ones(2), torch.tensor(weights)).sums(()), ()).check_weights("here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.5}, "between 0 and 1"),
        ({"class_weights": [1.0, -1.0]}, "must be ≥ 0"),
        ({"class_weights": [1.0, 0.0], "label_smoothing": 0.1}, "left out of the mean"),
    ],
)
def test_impossible_arguments_are_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        mbgd.CrossEntropy(**arguments)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 4, -1]), "2 targets lie outside the classes, for example 4"),
        (torch.tensor([0.0, 1.0]), "dtype torch.float32"),
    ],
)
def test_targets_that_are_no_classes_are_explained(targets: Tensor, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        mbgd.CrossEntropy().check_targets(targets, num_classes=CLASSES)
    mbgd.CrossEntropy(ignore_index=-1).check_targets(torch.tensor([0, 3, -1]), num_classes=CLASSES)
