"""A run that goes on with other data than it began with says so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbgd
from mbgd.data import InMemory
from mbgd.models import MLP


class Drawing:
    """Its examples are changed by a generator of its own."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(4, generator=self._generator), torch.tensor(index % 3)


def trainer(dataset: Any) -> mbgd.Trainer:
    torch.manual_seed(0)
    model: nn.Module = MLP((4,), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = mbgd.Settings(batch=mbgd.Batch(6), steps=4)
    return mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=dataset), settings)


def images(first: float = 0.0, last: float = 0.0, middle: float = 0.0) -> InMemory:
    inputs = torch.linspace(0, 1, 48).reshape(12, 4)
    for position, change in ((0, first), (-1, last), (5, middle)):
        inputs[position, 1] += change
    return InMemory(inputs, torch.arange(12) % 3)


@pytest.mark.parametrize(
    ("then", "told"),
    [
        (images(), ""),
        (images(first=1e-6), "the first training example is not what it was when this state was saved after step 4"),
        (images(last=1.0), "the last training example is"),
        (images(first=1.0, last=1.0), "the first and the last training example is"),
        (Drawing(), ""),  # which examples it had cannot be told
    ],
)
def test_other_examples_are_told_of(then: Any, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    began = trainer(images())
    began.fit()
    saved = began.snapshot()
    assert set(saved.values["examples"]) == {"first", "last"}
    goes_on = trainer(then)
    capsys.readouterr()
    goes_on.restore(saved)
    said = capsys.readouterr().out
    assert goes_on.state.step == 4
    assert (told in said) if told else not said


def test_a_state_that_does_not_know_its_examples_is_restored(capsys: pytest.CaptureFixture[str]) -> None:
    began = trainer(Drawing())
    began.fit()
    saved = began.snapshot()
    assert saved.values["examples"] == {}
    goes_on = trainer(images())
    capsys.readouterr()
    goes_on.restore(saved)
    assert not capsys.readouterr().out
