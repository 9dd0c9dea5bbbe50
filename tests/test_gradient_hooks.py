"""Hooks on parameters in fp16: they get the mean gradient without the loss scale, and hide no overflow."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbgd

from processes import run_workers

NUM_STEPS, SIZE = 4, 8


def examples() -> tuple[Tensor, Tensor]:
    inputs = 0.1 * torch.randn(SIZE * NUM_STEPS, 6, generator=torch.Generator().manual_seed(1))
    return inputs, inputs.sum(1, keepdim=True)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def to_unit_length(gradient: Tensor) -> Tensor:
    """Not linear, and not of single elements."""
    return gradient / gradient.norm()


def made(workers: mbgd.Workers, hook: Any, observers: Any = (), **settings: Any) -> mbgd.Trainer:
    model = make_model()
    for parameter in model.parameters():
        parameter.register_hook(hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = mbgd.Data(train=mbgd.InMemory(*examples()))
    batch, never = mbgd.Batch(SIZE), mbgd.NoiseScale(None)
    every: Any = {"steps": NUM_STEPS, "batch": batch, "precision": "fp16", "noise_scale": never, **settings}
    return mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, mbgd.Settings(**every), workers, observers)


def train(workers: mbgd.Workers, averaging: str, sharding: str) -> tuple[list[Tensor], list[Tensor]]:
    """What the hooks have got, and the weights."""
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return to_unit_length(gradient)

    trainer = made(workers, hook, averaging=mbgd.Averaging(averaging), sharding=sharding)  # type: ignore[arg-type]
    assert trainer.fit().num_skipped_steps == 0
    return seen, [p.detach().clone() for p in trainer.setup.model.parameters()]


def plain(order: list[Any]) -> list[Tensor]:
    """The gradients in one process in plain torch, without a loss scale."""
    model, (inputs, targets), seen = make_model(), examples(), []
    for chosen in order:
        with torch.autocast("cpu", torch.float16):
            outputs = model(inputs[chosen])
        gradients = torch.autograd.grad((outputs.float() - targets[chosen]).square().mean(), list(model.parameters()))
        seen += gradients
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * to_unit_length(gradient)
    return seen


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_they_get_mean_gradients_without_the_loss_scale_also_where_workers_update_pieces(averaging: str) -> None:
    loader = made(mbgd.Workers(), to_unit_length).setup.loader
    wanted = plain([torch.as_tensor(loader.minibatch_indices(step)) for step in range(NUM_STEPS)])
    whole = run_workers(train, 2, averaging, "none")
    pieces = run_workers(train, 2, averaging, "optimizer")
    for (seen, weights), (seen_of_pieces, weights_of_pieces) in zip(whole, pieces, strict=True):
        assert len(seen) == len(wanted)
        by_shape = {size: [one for one in wanted if one.shape == size] for size in {one.shape for one in wanted}}
        for size, of_shape in by_shape.items():
            found = [one for one in seen if one.shape == size]
            for got, want in zip(found, of_shape, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
        assert all(map(torch.equal, seen, seen_of_pieces))
        assert all(map(torch.equal, weights, weights_of_pieces))


def hide_overflow(gradient: Tensor) -> Tensor:
    return torch.nan_to_num(gradient).clamp(-1, 1)


def overflow(workers: mbgd.Workers, sharding: str) -> tuple[int, list[Tensor], list[Tensor]]:
    """The number of skipped steps where the third overflows, and the weights and their average after each."""
    ema, weights, averages = mbgd.EMA(0.5), [], []
    trainer = made(workers, hide_overflow, [ema], sharding=sharding)
    [first, *_] = trainer.setup.trained.parameters

    def overflow_in_third(shard: Any, weight: Any) -> None:
        if shard.step == 2:
            assert first.grad is not None
            first.grad.fill_(torch.inf)

    def look(done: mbgd.Done) -> None:
        weights.append(first.detach().clone())
        averages.append(ema.state_dict()["average"]["0.weight"].clone())

    trainer.train_step.before_update.append(overflow_in_third)
    trainer.observers._after_update.append(("look", look))
    return trainer.fit().num_skipped_steps, weights, averages


@pytest.mark.parametrize(("num_workers", "sharding"), [(1, "none"), (2, "none"), (2, "optimizer")])
def test_a_step_whose_overflow_they_hide_is_skipped_and_counted_all_the_same(num_workers: int, sharding: str) -> None:
    for num_skipped, weights, averages in run_workers(overflow, num_workers, sharding):
        assert num_skipped == 1
        for step, (before, after) in enumerate(pairwise(weights), 1):
            assert after.equal(before) == (step == 2)
        for step, (before, after) in enumerate(pairwise(averages), 1):
            assert after.equal(before if step == 2 else before.lerp(weights[step], 0.5))
