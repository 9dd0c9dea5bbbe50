"""An image classifier on Fashion-MNIST, with an augmentation of its own that is keyed by (seed, epoch, example).

    torchrun --standalone --nproc-per-node 2 examples/fashion_shifted.py

`python examples/fashion_shifted.py` is one worker; with --plain it is the loop of plain torch below.
The images: `apt-get install dataset-fashion-mnist`.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import mbgd
from mbgd.data import InMemory, fashion_mnist

FOLDER = "/usr/share/datasets/fashion-mnist"
FARTHEST = 2
"""Pixels that an image is shifted by, at most, in each direction."""


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images that are shifted and mirrored at random when they are read for training."""

    def __init__(self, images: InMemory, num_examples: int) -> None:
        self.images, self.num_examples = images, num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index]

    def augmented(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        """Example `index`, changed as the key says: all randomness comes from it."""
        pixels, target = self.images[index]
        draw = random.Random(key)
        down, right = (draw.randint(-FARTHEST, FARTHEST) for _ in range(2))
        pixels = torch.roll(pixels, (down, right), dims=(1, 2))
        return pixels.flip(2) if draw.random() < 0.5 else pixels, target


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def train(workers: mbgd.Workers, *, num_examples: int = 60_000, **settings: Any) -> dict[str, float]:
    """The metrics after an epoch with mbgd."""
    net = model()
    data = mbgd.Data(
        train=Shifted(fashion_mnist("train", FOLDER), num_examples),
        evaluation=fashion_mnist("test", FOLDER),
        shuffle=False,  # the files are in no order
    )
    trainer = mbgd.Trainer(
        net,
        mbgd.CrossEntropy(),
        torch.optim.AdamW(net.parameters(), lr=2e-3),
        data,
        mbgd.Settings(epochs=1, batch=mbgd.Batch(size=128), **settings),
        workers,
    )
    return trainer.fit().metrics


def at_random(index: int) -> int:
    return random.getrandbits(63)


def plain_torch(
    *, num_examples: int = 60_000, dtype: torch.dtype = torch.float32, key_of: Callable[[int], int] = at_random
) -> dict[str, float]:
    """The same on one process without mbgd. key_of: the key of an example's augmentation."""
    net = model().to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    shifted, test = Shifted(fashion_mnist("train", FOLDER), num_examples), fashion_mnist("test", FOLDER)
    for indices in DataLoader(range(num_examples), batch_size=128):
        examples = [shifted.augmented(index, key_of(index)) for index in indices.tolist()]
        inputs, targets = (torch.stack(values) for values in zip(*examples, strict=True))
        loss = F.cross_entropy(net(inputs.to(dtype)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    total, right = 0.0, 0
    with torch.no_grad():
        for inputs, targets in DataLoader(Subset(test, range(len(test))), batch_size=256):
            logits = net(inputs.to(dtype))
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            right += int((logits.argmax(1) == targets).sum())
    return {"eval/loss": total / len(test), "eval/accuracy": right / len(test)}


def main() -> None:
    if "--plain" in sys.argv:
        print(plain_torch())
        return
    with mbgd.start_workers() as workers:
        metrics = train(workers)
    if workers.is_main:
        print(f"loss {metrics['eval/loss']:.4f}, accuracy {metrics['eval/accuracy']:.1%}")


if __name__ == "__main__":
    main()
