"""A ranker with two towers: users and items become vectors, whose product says whether a user clicks an item.

    torchrun --standalone --nproc-per-node 2 examples/two_towers.py

`python examples/two_towers.py` is one worker; with --plain it is the loop of plain torch below. Batches are dicts, and
AUC is a metric of the whole evaluation set: the mean of two workers' AUCs is not the AUC.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd

NUM_USERS, NUM_ITEMS, NUM_CLICKS, NUM_EVALUATED = 300, 200, 24_000, 4_000


class Clicks:
    """Pairs of a user and an item, and whether the user clicked: 1.0 or 0.0."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Read without a Python loop over examples."""
        return {name: column[indices] for name, column in self.columns.items()}


def clicks() -> tuple[Clicks, Clicks]:
    """For training and for evaluation: users click items whose hidden tastes are like theirs."""
    draw = torch.Generator().manual_seed(0)
    tastes, kinds = (torch.randn(size, 4, generator=draw) for size in (NUM_USERS, NUM_ITEMS))
    user = torch.randint(NUM_USERS, (NUM_CLICKS,), generator=draw)
    item = torch.randint(NUM_ITEMS, (NUM_CLICKS,), generator=draw)
    likes = torch.sigmoid(2 * (tastes[user] * kinds[item]).sum(1) - 1)
    columns = {"user": user, "item": item, "label": torch.bernoulli(likes, generator=draw)}
    parts = slice(NUM_EVALUATED, None), slice(NUM_EVALUATED)
    train, evaluation = (Clicks({name: one[part] for name, one in columns.items()}) for part in parts)
    return train, evaluation


class TwoTowers(nn.Module):
    """Logits (N,) of clicks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Embedding(NUM_USERS, width), nn.Linear(width, width))
        self.item = nn.Sequential(nn.Embedding(NUM_ITEMS, width), nn.Linear(width, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(-1) + self.bias


def model() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers()


def objective(model: nn.Module, batch: dict[str, Tensor]) -> mbgd.PerExample:
    logits = model(batch["user"], batch["item"])
    losses = F.binary_cross_entropy_with_logits(logits, batch["label"], reduction="none")
    return mbgd.PerExample(losses, predictions=(logits, batch["label"]))


def area_under_curve(outputs: Tensor, targets: Tensor) -> float:
    """The share of pairs, one clicked and one not, in which the clicked one has the larger output; ties count half."""
    _, ranks, counts = outputs.unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - (counts - 1) / 2  # counted from 1
    clicked = targets > 0.5
    num_clicked, num_others = int(clicked.sum()), int((~clicked).sum())
    above = mean_rank[ranks[clicked]].double().sum().item() - num_clicked * (num_clicked + 1) / 2
    return above / max(num_clicked * num_others, 1)


class Auc:
    """A metric of the whole evaluation set, of the objective's predictions."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs.append(outputs)
        self.targets.append(targets)

    def compute(self) -> float:
        return area_under_curve(torch.cat(self.outputs), torch.cat(self.targets))


def train(workers: mbgd.Workers, *, epochs: int = 10, **settings: Any) -> dict[str, float]:
    """The metrics after training with mbgd."""
    towers = model()
    of_training, of_evaluation = clicks()
    trainer = mbgd.Trainer(
        towers,
        objective,
        torch.optim.AdamW(towers.parameters(), lr=0.01),
        mbgd.Data(train=of_training, evaluation=of_evaluation, shuffle=False),  # the clicks are in no order
        mbgd.Settings(
            epochs=epochs, batch=mbgd.Batch(size=256), evaluation=mbgd.Evaluation(metrics={"auc": Auc()}), **settings
        ),
        workers,
    )
    return trainer.fit().metrics


def plain_torch(*, epochs: int = 10, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The same on one process without mbgd."""
    towers = model().to(dtype)
    of_training, of_evaluation = clicks()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=0.01)
    for _ in range(epochs):
        for indices in torch.arange(len(of_training)).split(256):
            batch = of_training.gather(indices)
            logits = towers(batch["user"], batch["item"])
            loss = F.binary_cross_entropy_with_logits(logits, batch["label"].to(dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        batch = of_evaluation.columns
        logits, labels = towers(batch["user"], batch["item"]), batch["label"].to(dtype)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return {"eval/loss": loss.item(), "eval/auc": area_under_curve(logits, labels)}


def main() -> None:
    if "--plain" in sys.argv:
        print(plain_torch())
        return
    with mbgd.start_workers() as workers:
        metrics = train(workers)
    if workers.is_main:
        print(f"loss {metrics['eval/loss']:.4f}, AUC {metrics['eval/auc']:.4f}")


if __name__ == "__main__":
    main()
