"""Regression on the columns of a CSV file, read by pyarrow and standardised with the training rows' statistics.

    torchrun --standalone --nproc-per-node 2 examples/house_prices.py

`python examples/house_prices.py` is one worker; with --plain it is the loop of plain torch below. The file,
houses.csv, is made by `write_houses` if it is not there.
"""

import csv
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pyarrow import csv as arrow_csv
from torch import Tensor, nn

import mbgd

FILE = Path("houses.csv")
NUMBERS, DISTRICTS, PRICE = ("area", "rooms", "year"), ("centre", "hill", "harbour"), "price"
NUM_TRAINED = 1600


def write_houses(path: Path, num_rows: int = 2000) -> None:
    """Houses whose price follows from their columns, up to noise; always the same."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*NUMBERS, "district", PRICE])
        for _ in range(num_rows):
            area, rooms, year = round(draw.uniform(30, 250), 1), draw.randint(1, 8), draw.randint(1900, 2025)
            district = draw.choice(DISTRICTS)
            factor = {"centre": 4200, "hill": 3100, "harbour": 2300}[district] * (1 + (year - 1960) / 400)
            writer.writerow([area, rooms, year, district, round(factor * area + 9000 * rooms + draw.gauss(0, 15_000))])


class Houses(NamedTuple):
    inputs: Tensor
    """(N, 3 + 3): standardised numbers, and a 1 in the column of the district."""
    targets: Tensor
    """(N, 1): standardised prices."""
    price_std: float
    """Standard deviation of the training rows' prices."""


def read_houses(path: Path) -> Houses:
    table = arrow_csv.read_csv(path)
    columns = [torch.tensor(table[name].to_pylist(), dtype=torch.float64) for name in (*NUMBERS, PRICE)]
    values = torch.stack(columns, dim=1)
    mean, std = values[:NUM_TRAINED].mean(0), values[:NUM_TRAINED].std(0)  # of the training rows alone
    values = (values - mean) / std
    districts = torch.tensor([DISTRICTS.index(one) for one in table["district"].to_pylist()])
    inputs = torch.cat([values[:, :-1], F.one_hot(districts, len(DISTRICTS))], dim=1)
    return Houses(inputs, values[:, -1:], std[-1].item())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(len(NUMBERS) + len(DISTRICTS), 64), nn.ReLU(), nn.Linear(64, 1))


def train(workers: mbgd.Workers, path: Path = FILE, *, epochs: int = 30, **settings: Any) -> dict[str, float]:
    """The metrics after training with mbgd."""
    houses, net = read_houses(path), model()
    data = mbgd.Data(
        train=mbgd.InMemory(houses.inputs[:NUM_TRAINED], houses.targets[:NUM_TRAINED]),
        evaluation=mbgd.InMemory(houses.inputs[NUM_TRAINED:], houses.targets[NUM_TRAINED:]),
        shuffle=False,  # the rows are in no order
    )
    trainer = mbgd.Trainer(
        net,
        mbgd.MeanSquaredError(),
        torch.optim.AdamW(net.parameters(), lr=0.01),
        data,
        mbgd.Settings(epochs=epochs, batch=mbgd.Batch(size=64), **settings),
        workers,
    )
    return trainer.fit().metrics


def plain_torch(path: Path = FILE, *, epochs: int = 30, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The same on one process without mbgd."""
    houses, net = read_houses(path), model().to(dtype)
    inputs, targets = houses.inputs.to(dtype), houses.targets.to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(epochs):
        batches = zip(inputs[:NUM_TRAINED].split(64), targets[:NUM_TRAINED].split(64), strict=True)
        for of_inputs, of_targets in batches:
            loss = F.mse_loss(net(of_inputs), of_targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return {"eval/loss": F.mse_loss(net(inputs[NUM_TRAINED:]), targets[NUM_TRAINED:]).item()}


def main() -> None:
    with mbgd.start_workers() as workers:
        if workers.is_main and not FILE.exists():
            write_houses(FILE)
        workers.barrier()
        metrics = plain_torch() if "--plain" in sys.argv else train(workers)
    if workers.is_main:
        error = metrics["eval/loss"] ** 0.5 * read_houses(FILE).price_std
        print(f"loss {metrics['eval/loss']:.5f}, root mean squared error of the price {error:,.0f}")


if __name__ == "__main__":
    main()
