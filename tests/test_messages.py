"""What workers tell each other: data of a fixed form, of which nothing is unpickled."""

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

import mbgd
from mbgd.config import AveragingName
from mbgd.data import digits

from processes import run_workers

VALUES: list[Any] = [
    None,
    True,
    -(2**70),
    0.1,
    math.inf,
    "",
    "é\0\ud800\n",  # a lone surrogate, as in a file's name that is not UTF-8
    [],
    [[], {}, {"a": [1, "b", None]}],
    ["x" * 3_000_000],
]
REFUSED: list[Any] = [{1}, Path("a"), torch.zeros(1), {1: 2}, [{None: 1}], {"a": [{(1, 2): 3}]}, b"a", 1j]


def exchange(workers: mbgd.Workers) -> list[Any]:
    received: list[Any] = []
    for value in VALUES:
        received.append([workers.broadcast(value if workers.is_main else "other"), workers.gather_values(value)])
    assert math.isnan(workers.broadcast(math.nan))
    received.append(workers.gather_values(["of", workers.rank, "x" * 1000 * workers.rank]))
    received.append(workers.gather_values((1, (2, 3))))
    return received


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_what_json_holds_arrives_on_any_number_of_workers(num_workers: int) -> None:
    wanted: list[Any] = [[value, [value] * num_workers] for value in VALUES]
    wanted.append([["of", rank, "x" * 1000 * rank] for rank in range(num_workers)])
    wanted.append([[1, [2, 3]]] * num_workers)
    assert run_workers(exchange, num_workers) == [wanted] * num_workers


def refuse(workers: mbgd.Workers) -> list[str]:
    refused = []
    for value in REFUSED:
        for send in (workers.broadcast, workers.gather_values):
            with pytest.raises(TypeError) as caught:
                send(value)
            refused.append(str(caught.value))
    return refused


@pytest.mark.parametrize("num_workers", [1, 2])
def test_anything_else_is_refused_before_it_is_sent(num_workers: int) -> None:
    for refused in run_workers(refuse, num_workers):
        assert len(refused) == 2 * len(REFUSED)
        assert "the key 1 is a int; workers send dicts with str keys only" in refused


def tensors(rank: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rank)
    kinds = [torch.float64, torch.bfloat16, torch.complex64, torch.int16, torch.uint8, torch.bool, torch.int64]
    drawn = [(torch.rand(rank + 2, 3, generator=random) * 100).to(kind) for kind in kinds]
    return [*drawn, torch.tensor(float(rank)), torch.zeros(0, 4), torch.zeros(0), drawn[0].t(), drawn[2].conj()]


def collect(workers: mbgd.Workers) -> list[Any]:
    return [(str(tensor.dtype), tensor.tolist()) for tensor in workers.collect(tensors(workers.rank))]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_tensors_of_every_dtype_and_shape_are_collected(num_workers: int) -> None:
    wanted = [(str(tensor.dtype), tensor.tolist()) for rank in range(num_workers) for tensor in tensors(rank)]
    assert run_workers(collect, num_workers) == [wanted, *[[]] * (num_workers - 1)]


@contextmanager
def no_unpickling() -> Iterator[None]:
    """Unpickling raises."""

    def refuse_to(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("something was unpickled")

    kept = [(module, name, getattr(module, name)) for module, name in (
        (pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (distributed_c10d, "_unpickler"),
    )]  # fmt: skip
    for module, name, _ in kept:
        setattr(module, name, refuse_to)
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


class Highest:
    """A metric of the whole evaluation set."""

    value = 0.0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.value = outputs.max().item()

    def compute(self) -> float:
        return self.value

    def reset(self) -> None:
        self.value = 0.0


def train_without_pickle(workers: mbgd.Workers) -> list[float]:
    losses = []
    with no_unpickling():
        with pytest.raises(AssertionError, match="unpickled"):
            torch.distributed.all_gather_object([None] * workers.num_workers, 1)
        for name in AveragingName:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            settings = mbgd.Settings(
                steps=3,
                averaging=mbgd.Averaging(name=name),
                evaluation=mbgd.Evaluation(metrics={"highest": Highest()}),
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = mbgd.Data(train=digits("train"), evaluation=digits("test"))
            trainer = mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers)
            losses.append(trainer.fit().metrics["eval/highest"])
    return losses


def test_training_unpickles_nothing() -> None:
    first, second = run_workers(train_without_pickle, 2)
    assert first == second
    assert min(first) > 0
