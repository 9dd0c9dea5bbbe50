"""What datasets draw: a function of (seed, epoch, example), on any workers and loader processes, from any step on."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mbgd
from mbgd.batches.loader import Loader, read
from mbgd.batches.plan import Plan
from mbgd.batches.randomness import key_reading

from processes import run_workers

NUM_EXAMPLES, SIZE, NUM_EPOCHS = 23, 8, 2
PLACE = {"device": torch.device("cpu"), "dtype": torch.float64}


def draws(index: int) -> Tensor:
    """The example's number, and one draw from each generator; numpy's normal draws come in pairs."""
    return torch.tensor(
        [index, np.random.rand(), np.random.normal(), random.random(), torch.rand((), dtype=torch.float64).item()],
        dtype=torch.float64,
    )


class Drawing(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return draws(index)


class DrawingSometimes(Drawing):
    """Most examples draw nothing, among them the first that is read in most places."""

    def __getitem__(self, index: int) -> Tensor:
        return draws(index) if index % 5 == 2 else torch.tensor([index, 1, 2, 3, 4], dtype=torch.float64)


class DrawingInBatches(Drawing):
    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [draws(index) for index in indices]


class Augmenting(Drawing):
    """Has a key, but also draws."""

    def augmented(self, index: int, key: int) -> Tensor:
        return draws(index) + key % 2


DATASETS: list[Any] = [
    Drawing(),
    DrawingSometimes(),
    DrawingInBatches(),
    Augmenting(),
    torch.utils.data.Subset(Drawing(), range(NUM_EXAMPLES)),
]


def training_draws(
    workers: mbgd.Workers, dataset: Any, num_loaders: int, first: int = 0, seed: int = 5
) -> list[list[float]]:
    """What this worker reads in all steps from the first on: step and row."""
    plan = Plan(
        num_examples=len(dataset),
        minibatch_size=SIZE,
        num_workers=workers.num_workers,
        default_num_micro_batches=2 * workers.num_workers,
    )
    data = mbgd.Data(train=dataset, num_workers=num_loaders)
    loader = Loader(data, plan, seed, workers, dtype=torch.float64, own_copies=False)
    rows = []
    for shard in loader.shards(first, NUM_EPOCHS * plan.steps_per_epoch):
        for examples in shard.micro_batches:
            if not examples.micro_batch.is_stand_in:
                rows += [[float(shard.step), *row] for row in examples.batch.tolist()]
    return rows


def all_draws(workers: mbgd.Workers) -> dict[tuple[int, int], list[list[float]]]:
    """By dataset and number of loader processes; what came before on this worker is another thing on each."""
    key_reading(workers.rank)
    return {
        (number, num_loaders): training_draws(workers, dataset, num_loaders)
        for number, dataset in enumerate(DATASETS)
        for num_loaders in ((0, 1, 2) if number == 0 else (workers.num_workers % 2,))
    }


def test_draws_follow_from_seed_epoch_and_example_alone() -> None:
    wanted: dict[int, list[list[float]]] = {}
    for num_workers in (1, 2, 3):
        of_workers = run_workers(all_draws, num_workers)
        for number, num_loaders in of_workers[0]:
            rows = sorted(row for of_worker in of_workers for row in of_worker[number, num_loaders])
            assert rows == wanted.setdefault(number, rows), (type(DATASETS[number]), num_workers, num_loaders)
    for number, rows in wanted.items():
        assert sorted(row[1] for row in rows) == sorted(2 * list(range(NUM_EXAMPLES))) or number == 3  # 3: plus 0 or 1
        if number != 1:
            for column in range(2, 6):
                assert len({row[column] for row in rows}) == len(rows)  # no two examples, and no two epochs
    assert wanted[0] == wanted[2] == wanted[4]


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: type(dataset).__name__)
def test_a_run_that_goes_on_draws_as_one_that_was_not_stopped(dataset: Any) -> None:
    whole = training_draws(mbgd.Workers(), dataset, 0)
    for first in (1, 4):
        rest = training_draws(mbgd.Workers(), dataset, 1, first=first)
        assert rest == [row for row in whole if row[0] >= first]
    other = training_draws(mbgd.Workers(), dataset, 0, seed=6)
    assert not {tuple(row[2:]) for row in whole if row[2] != 1} & {tuple(row[2:]) for row in other}


def test_evaluation_draws_the_same_each_time_and_other_things_than_training() -> None:
    indices = [np.arange(0, 9), np.arange(9, NUM_EXAMPLES)]
    passes = []
    for seed, num_loaders, parts in ((5, 0, indices), (5, 2, [np.arange(NUM_EXAMPLES)]), (6, 0, indices)):
        batches = read(Drawing(), parts, num_workers=num_loaders, seed=seed, **PLACE)
        passes.append(torch.cat(list(batches)).tolist())
    assert passes[0] == passes[1]
    of_training = {row[2] for row in training_draws(mbgd.Workers(), Drawing(), 0)}
    drawn = [{row[1] for row in one} for one in passes]
    assert not drawn[0] & drawn[2]
    assert not drawn[0] & of_training


@pytest.mark.parametrize("num_loaders", [0, 1])
@pytest.mark.parametrize("dataset", [*DATASETS, mbgd.InMemory(torch.zeros(NUM_EXAMPLES, 2), torch.zeros(NUM_EXAMPLES))])
def test_reading_leaves_the_random_state_of_others_alone(dataset: Any, num_loaders: int) -> None:
    key_reading(1)
    wanted = draws(0).tolist()
    key_reading(1)
    batches = read(dataset, [np.arange(4), np.arange(4, 9)], num_workers=num_loaders, **PLACE)
    next(batches)
    assert draws(0).tolist() == wanted
    list(batches)
    key_reading(1)
    assert draws(0).tolist() == wanted


class Gathering(mbgd.InMemory):
    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = super().gather(indices)
        return inputs + np.random.rand(), targets


class SeedingGathering(mbgd.InMemory):
    """Draws, but the same for the same indices."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = super().gather(indices)
        torch.manual_seed(3)
        return inputs + torch.rand(2), targets


def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
    inputs, targets = batch
    return mbgd.PerExample((model(inputs).squeeze(-1) - targets) ** 2)


def test_a_gather_that_draws_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(mbgd.UsageError, match=r"gather of Gathering draws random numbers; .*Draw in augmented"):
        mbgd.Trainer(
            model,
            objective,
            torch.optim.SGD(model.parameters()),
            mbgd.Data(train=Gathering(torch.zeros(9, 2), torch.zeros(9))),
            mbgd.Settings(steps=1),
        )


def test_a_gather_that_draws_the_same_each_time_is_taken() -> None:
    dataset = SeedingGathering(torch.zeros(9, 2), torch.zeros(9))
    (batch,) = read(dataset, [np.arange(9)], num_workers=0, **PLACE)
    assert torch.equal(batch[0][0], torch.rand(2, generator=torch.Generator().manual_seed(3)).double())


class Counting(Drawing):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return draws(index)


def test_examples_that_draw_are_read_once() -> None:
    dataset = Counting()
    list(read(dataset, [np.arange(4), np.arange(4, 9)], num_workers=0, **PLACE))
    assert dataset.asked == list(range(9))
