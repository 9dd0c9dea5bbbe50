"""The models that ship: shapes, options, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import nn

import mbgd
from mbgd.models import CNN, MLP, Linear, ResNet


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
        lambda: ResNet((64,), 10),
        lambda: ResNet((1, 28, 28), 10, depth=18),
        lambda: ResNet((1, 28, 28), 10, depth=2),
    ],
)
def test_shapes_that_cannot_work_are_refused(make: Any) -> None:
    with pytest.raises(mbgd.UsageError, match=r"the cnn takes|the resnet takes|model.depth=\d+; it must be 6n"):
        make()


def test_a_resnet_has_its_published_size_and_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    model = ResNet((3, 32, 32), 10, depth=20)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20  # He et al. count the shortcuts' matrices apart
    parameters = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for name, p in model.named_parameters() if "shortcut" in name
    )
    assert parameters == 269_722  # 0.27 million in the paper's table 6
    for shape in ((1, 28, 28), (3, 32, 32), (1, 8, 8)):
        small = ResNet(shape, 7, depth=8, width=4)
        assert small(torch.randn(4, *shape)).shape == (4, 7)
    block = small.features[3]
    inputs = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(inputs), inputs)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small(torch.randn(8, 1, 8, 8)), torch.arange(8) % 7).backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in small.named_parameters())
