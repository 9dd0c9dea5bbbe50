"""A small model with simulated faulty hardware: one bit flips, once, at a given place and time."""

import random
from typing import Any

import torch
from torch import Tensor, nn

import mbgd
from mbgd import Workers
from mbgd.checks.replicas import checksum
from mbgd.config import Averaging, AveragingName, Batch, Check, Settings
from mbgd.errors import ComputedWrongly
from mbgd.trainer import Trainer


class Fault:
    """What is to happen in the next forwards of this process."""

    kind = ""
    after_forwards = 0
    seed = 0
    has_happened = False

    @classmethod
    def arm(cls, kind: str, after_forwards: int, seed: int) -> None:
        cls.kind, cls.after_forwards, cls.seed, cls.has_happened = kind, after_forwards, seed, False

    @classmethod
    def flip(cls, tensor: Tensor) -> None:
        """One random bit of one random element, in place."""
        draw = random.Random(cls.seed)
        element, bit = draw.randrange(tensor.numel()), draw.randrange(32)
        words = tensor.data.view(-1).view(torch.int32)
        words[element] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        cls.has_happened = True


class _Weight(torch.autograd.Function):
    """A weight whose gradient is hit on its way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, is_hit: bool) -> Tensor:
        ctx.is_hit = is_hit
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        if ctx.is_hit:
            Fault.flip(gradient)
        return gradient, None


class Faulty(nn.Module):
    """8 → 16 → 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        is_hit = bool(Fault.kind) and Fault.after_forwards == 0
        kind = Fault.kind if is_hit else ""
        Fault.after_forwards -= 1
        if is_hit:
            Fault.kind = ""
        weight = _Weight.apply(self.last.weight, kind == "gradient")  # type: ignore[no-untyped-call]
        hidden = torch.tanh(self.first(inputs))
        if kind == "activation":
            Fault.flip(hidden)
        output: Tensor = hidden @ weight.T + self.last.bias
        return output


def make_trainer(workers: Workers, *, seed: int, every_steps: int | None, num_steps: int) -> Trainer:
    """Minibatches of 24 in 6 micro-batches."""
    torch.manual_seed(seed)
    model = Faulty()
    inputs, targets = torch.randn(96, 8), torch.randint(3, (96,))
    settings = Settings(
        seed=seed,
        steps=num_steps,
        batch=Batch(size=24, micro_batch_size=4),
        averaging=Averaging(name=AveragingName.reproducible),
        check=Check(recompute_every_steps=every_steps),
        log_every_steps=max(1, num_steps),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Trainer(
        model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=mbgd.InMemory(inputs, targets)), settings, workers
    )


def flip(workers: Workers, kind: str, seed: int) -> dict[str, Any]:
    """Train up to a random step, in which a bit flips; what came of it."""
    draw = random.Random(seed)
    at_step = draw.randrange(6)
    trainer = make_trainer(workers, seed=seed, every_steps=1, num_steps=6)
    checking = trainer.train_step.recomputing
    assert checking is not None
    leaf, owner = checking.leaf(at_step), checking.owner(at_step)
    victim = draw.randrange(workers.num_workers) if kind == "parameter" else owner
    error, before = "", 0
    for shard in trainer.setup.loader.shards(0, 6):
        before = int(checksum([p.detach() for p in trainer.setup.model.parameters()], workers.device))
        if shard.step == at_step and workers.rank == victim:
            if kind == "parameter":
                Fault.seed = seed
                Fault.flip(trainer.setup.model.first.weight)  # type: ignore[union-attr, arg-type]
                before = int(checksum([p.detach() for p in trainer.setup.model.parameters()], workers.device))
            else:
                mine = [one.micro_batch.number for one in shard.micro_batches]
                Fault.arm(kind, mine.index(leaf), seed)
        try:
            trainer.train_step(shard)
        except ComputedWrongly as convicted:
            error = str(convicted)
            break
    Fault.kind = ""
    after = int(checksum([p.detach() for p in trainer.setup.model.parameters()], workers.device))
    return {
        "error": error,
        "step": at_step,
        "leaf": leaf,
        "victim": victim,
        "was_updated": bool(error) and before != after,
    }


def flips(workers: Workers, kinds: list[str], seeds: list[int]) -> list[tuple[str, int, dict[str, Any]]]:
    return [(kind, seed, flip(workers, kind, seed)) for kind in kinds for seed in seeds]


def weights_after(workers: Workers, num_steps: int, every_steps: int | None) -> str:
    """Trains without a fault, which raises nothing; the hash of the weights."""
    trainer = make_trainer(workers, seed=0, every_steps=every_steps, num_steps=num_steps)
    trainer.fit()
    return trainer.weights_sha256()
