"""The models that ship: shapes, options, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import nn

import mbgd
from mbgd.models import CNN, MLP, Linear


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: Linear((8, 8), 10), (8, 8)),
        (lambda: Linear((5,), 1), (5,)),
        (lambda: MLP((1, 8, 8), 10), (1, 8, 8)),
        (lambda: MLP((6,), 3, hidden=(), dropout=0.5), (6,)),
        (lambda: MLP((6,), 3, hidden=(4, 5, 6)), (6,)),
        (lambda: CNN((1, 28, 28), 10), (1, 28, 28)),
        (lambda: CNN((3, 32, 32), 7, channels=(4, 8, 16), batch_norm=True, dropout=0.5), (3, 32, 32)),
        (lambda: CNN((1, 9, 7), 2, channels=(4,)), (1, 9, 7)),
    ],
)
def test_outputs_have_one_row_per_example_and_gradients_reach_everything(model: Any, shape: tuple[int, ...]) -> None:
    made = model()
    num_outputs = list(made.parameters())[-1].shape[0]
    outputs = made(torch.randn(4, *shape))
    assert outputs.shape == (4, num_outputs)
    (outputs * torch.randn_like(outputs)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_options_change_the_model() -> None:
    assert [m.out_features for m in MLP((6,), 3, hidden=(4, 5)).modules() if isinstance(m, nn.Linear)] == [4, 5, 3]
    assert any(isinstance(m, nn.Dropout) and m.p == 0.25 for m in MLP((6,), 3, dropout=0.25).modules())
    norms = [m for m in CNN((1, 8, 8), 3, channels=(4, 8), batch_norm=True).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.num_features for m in norms} == {4, 8}


@pytest.mark.parametrize(
    "make",
    [
        lambda: CNN((64,), 10),
        lambda: CNN((1, 2, 2), 10, channels=(4, 4, 4)),
    ],
)
def test_shapes_that_cannot_work_are_refused(make: Any) -> None:
    with pytest.raises(mbgd.UsageError, match="cnn"):
        make()
