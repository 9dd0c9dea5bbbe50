"""The sums beside the gradients: the weights' sum runs beside the last backward, with the same bits and no barrier."""

import hashlib
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging.host_memory.barrier import Barrier
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.task.objective import NUM_SUMS

from processes import run_workers

STEPS = 5
WEIGHTS = [0.0, 0.25, 1.0, 3.7, 1e-30, -1.0, math.inf, math.nan]
LOSSES = [0.0, -0.5, 2.0, 1e38, math.inf, math.nan]


@given(st.lists(st.tuples(st.sampled_from(LOSSES), st.sampled_from(WEIGHTS)), max_size=6), st.booleans())
def test_sums_of_weights_are_those_of_all_sums(pairs: list[tuple[float, float]], has_weights: bool) -> None:
    losses, weights = (torch.tensor(values) for values in (list(zip(*pairs, strict=True)) or [(), ()]))
    terms = mbgd.PerExample(losses, weights if has_weights else None)
    wanted, got = terms.sums(()), terms.sums_of_weights()
    assert got.shape == (NUM_SUMS,)
    assert got.dtype == torch.float64
    assert torch.equal(got[1:].nan_to_num(-9.0), wanted[1:].nan_to_num(-9.0))
    assert got[0].isfinite() or not wanted[0].isfinite()
    assert wanted[0].isfinite() or not got[0].isfinite() or (weights < 0).any()


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    inputs, targets = batch
    losses = F.mse_loss(model(inputs), targets, reduction="none").squeeze(1)
    return mbgd.PerExample(losses, inputs[:, 0].abs().round(decimals=1) + 0.1, {"size": lambda: losses.abs()})


def unweighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    return mbgd.PerExample(weighted(model, batch).losses)


class TwoTowers:
    """A coupled objective with weights."""

    def encode(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch[0]), batch[1]

    def losses(self, outputs: Tensor, targets: Tensor) -> mbgd.PerExample:
        centred = outputs - outputs.mean(0)
        return mbgd.PerExample(
            F.mse_loss(centred, targets, reduction="none").squeeze(1), targets.abs().squeeze(1) + 0.1
        )


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def train(
    workers: mbgd.Workers,
    averaging: str,
    objective: Any,
    size: int,
    micro_batch: int | None,
    make_optimizer: Any = SGD,
    **how: Any,
) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    inputs = torch.randn(6 * size, 5, generator=torch.Generator().manual_seed(0))
    trainer = mbgd.Trainer(
        model,
        objective,
        make_optimizer(model.parameters(), fused=True),
        mbgd.Data(train=mbgd.InMemory(inputs, inputs[:, :1].sin())),
        mbgd.Settings(
            steps=STEPS,
            batch=mbgd.Batch(size, micro_batch),
            averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
            **how,
        ),
        workers,
    )
    trainer.fit()
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()


EARLY = {"log_every_steps": 100, "noise_scale": mbgd.NoiseScale(every_steps=None)}
LOGGED = {"log_every_steps": 1, "noise_scale": mbgd.NoiseScale(every_steps=None)}
LATE = {"log_every_steps": 2, "noise_scale": mbgd.NoiseScale(every_steps=1)}
"""The noise is known only after the backward, and the other sums wait with it."""


def train_in_every_way(workers: mbgd.Workers, averaging: str, sends: bool) -> list[list[str]]:
    """For each kind of minibatch, the hashes of ways that must give the same bits."""
    if sends:

        def refuse(workers: mbgd.Workers) -> None:
            raise CannotShareError("this test sends messages")

        averagings.HostMemory = refuse  # type: ignore[assignment,misc]
    cuts: list[Any] = [(weighted, 24, 2), (weighted, 24, 2, ADAMW), (weighted, 25, 4), (TwoTowers(), 24, 4)]
    if averaging != "reproducible":
        cuts += [(weighted, 2, None), (weighted, 3, 2)]  # stand-ins
    return [[train(workers, averaging, *cut, **way) for way in (EARLY, LOGGED, LATE)] for cut in cuts]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("averaging", "sends"), [("ddp", True), ("shared_memory", False), ("reproducible", False), ("reproducible", True)]
)
def test_the_same_bits_beside_the_backward_and_after_it(averaging: str, sends: bool, num_workers: int) -> None:
    if averaging == "shared_memory" and num_workers == 1:
        averaging = "auto"
    results = run_workers(train_in_every_way, num_workers, averaging, sends)
    for of_worker in results:
        assert of_worker == results[0]
        assert all(len(set(of_cut)) == 1 for of_cut in of_worker)
    assert len({of_cut[0] for of_cut in results[0]}) == len(results[0])


def count_barriers(workers: mbgd.Workers, averaging: str) -> list[int]:
    """Barriers in the training of `STEPS` more steps, without weights and with them."""
    calls, meet = [0], Barrier.__call__

    def counted(barrier: Barrier) -> None:
        calls[0] += 1
        meet(barrier)

    Barrier.__call__ = counted  # type: ignore[method-assign]
    counts = []
    for objective in (unweighted, weighted):
        before = calls[0]
        train(workers, averaging, objective, 24, 4, **EARLY)
        counts.append(calls[0] - before)
    return counts


@pytest.mark.parametrize("averaging", ["shared_memory", "reproducible"])
def test_weights_take_no_barrier_of_their_own(averaging: str) -> None:
    for without, given_ in run_workers(count_barriers, 2, averaging):
        assert without == given_ >= 2 * STEPS
