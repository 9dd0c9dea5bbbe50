"""Features of Fashion-MNIST without labels (SimCLR): two random crops of an image find each other in the minibatch.

    torchrun --standalone --nproc-per-node 2 examples/simclr_fashion.py

`python examples/simclr_fashion.py` is one worker; with --plain it is the loop of plain torch below. The minibatch is
cut into micro-batches, and each image still has all others of the minibatch as negatives. What the features are worth
is shown by a linear classifier on them that sees 1,000 labels.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.data import InMemory, fashion_mnist

FOLDER = "/usr/share/datasets/fashion-mnist"
NUM_EXAMPLES, NUM_EVALUATED, NUM_LABELS = 20_000, 500, 1_000
SIZE, TEMPERATURE, LR = 256, 0.2, 2e-3


class Views:
    """Two random crops of each of the first `num_examples` images; mbgd keys the draws by (seed, epoch, example)."""

    def __init__(self, images: Tensor, num_examples: int) -> None:
        self.images, self.num_examples, self.crops = images, num_examples, mbgd.RandomCrops()

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first, second = self.crops(self.images[[index, index]])
        return first, second


def evaluated() -> InMemory:
    """Pairs of views that stay the same."""
    torch.manual_seed(1)
    images, crops = fashion_mnist("test", FOLDER).inputs[:NUM_EVALUATED], mbgd.RandomCrops()
    return InMemory(crops(images), crops(images))


def model() -> nn.Sequential:
    """Features, and the head whose outputs are compared."""
    torch.manual_seed(0)
    features = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    )
    return nn.Sequential(features, nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)))


def train(
    workers: mbgd.Workers,
    *,
    net: nn.Module | None = None,
    num_examples: int = NUM_EXAMPLES,
    epochs: int = 2,
    **settings: Any,
) -> dict[str, float]:
    """The metrics after training with mbgd."""
    net = net or model()
    trainer = mbgd.Trainer(
        net,
        mbgd.InfoNCE(temperature=TEMPERATURE),
        torch.optim.AdamW(net.parameters(), lr=LR),
        mbgd.Data(
            train=Views(fashion_mnist("train", FOLDER).inputs, num_examples), evaluation=evaluated(), shuffle=False
        ),
        mbgd.Settings(
            epochs=epochs,
            batch=mbgd.Batch(size=SIZE, micro_batch_size=64),
            evaluation=mbgd.Evaluation(batch_size=NUM_EVALUATED),
            **settings,
        ),
        workers,
    )
    return trainer.fit().metrics


def info_nce(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy over a minibatch's pairs."""
    codes = F.normalize(torch.cat([first, second]), dim=1)
    logits = (codes @ codes.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    numbers = torch.arange(len(first))
    targets = torch.cat([numbers + len(first), numbers])
    return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).double().mean()


def plain_torch(
    *,
    net: nn.Module | None = None,
    num_examples: int = NUM_EXAMPLES,
    epochs: int = 2,
    dtype: torch.dtype = torch.float32,
    key_of: Callable[[int, int], int] = lambda epoch, index: int(torch.randint(2**62, ())),
) -> dict[str, float]:
    """The same on one process without mbgd. key_of: seeds the views of an example in an epoch."""
    net = (net or model()).to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    views = Views(fashion_mnist("train", FOLDER).inputs, num_examples)
    for epoch in range(epochs):
        for indices in torch.arange(num_examples).split(SIZE):
            pairs = []
            for index in indices.tolist():
                torch.manual_seed(key_of(epoch, index))
                pairs.append(views[index])
            first, second = (torch.stack(side).to(dtype) for side in zip(*pairs, strict=True))
            loss, _ = info_nce(net(first), net(second))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pair = evaluated()
    with torch.no_grad():
        loss, accuracy = info_nce(net(pair.inputs.to(dtype)), net(pair.targets.to(dtype)))
    return {"eval/loss": loss.item(), "eval/accuracy": accuracy.item()}


def probe(net: nn.Module) -> float:
    """Test accuracy of ridge regression from the features of `NUM_LABELS` images to their classes."""
    labelled, test = fashion_mnist("train", FOLDER), fashion_mnist("test", FOLDER)
    with torch.no_grad():
        of_labelled, of_test = (net[0](one).double() for one in (labelled.inputs[:NUM_LABELS], test.inputs))
    mean, std = of_labelled.mean(0), of_labelled.std(0).clamp(min=1e-6)
    rows, of_test = (F.pad((one - mean) / std, (0, 1), value=1.0) for one in (of_labelled, of_test))
    ridge = rows.T @ rows + 30 * torch.eye(rows.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(ridge, rows.T @ F.one_hot(labelled.targets[:NUM_LABELS]).double())
    return float(((of_test @ weights).argmax(1) == test.targets).double().mean())


def main() -> None:
    net = model()
    before = probe(net)
    if "--plain" in sys.argv:
        metrics, is_main = plain_torch(net=net), True
    else:
        with mbgd.start_workers() as workers:
            metrics, is_main = train(workers, net=net), workers.is_main
    if is_main:
        print(f"loss {metrics['eval/loss']:.4f}, pairs found {metrics['eval/accuracy']:.1%}")
        print(f"linear classifier from {NUM_LABELS} labels: {before:.1%} before, {probe(net):.1%} after training")


if __name__ == "__main__":
    main()
