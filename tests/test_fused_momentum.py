"""torch's fused SGD with momentum, where a parameter's first step is skipped in fp16 or comes later than others'."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd

from processes import run_workers


@pytest.fixture(autouse=True)
def _memory_that_nobody_has_written_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(inputs)))
        return logits


def large(model: nn.Module, batch: Any) -> mbgd.PerExample:
    """Overflows in fp16 until the loss scale has fallen."""
    return mbgd.PerExample(F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none") * 1e3)


def trained(
    workers: mbgd.Workers,
    fused: bool,
    precision: str = "fp32",
    frozen_until: int | None = None,
    sharding: str = "none",
    **more: Any,
) -> tuple[mbgd.Result, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, examples = Two(), mbgd.InMemory(torch.randn(32, 4), torch.randint(3, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, fused=fused, **more)
    observers = [] if frozen_until is None else [mbgd.Freeze(["first.*"], frozen_until)]
    made = mbgd.Trainer(
        model,
        large,
        optimizer,
        mbgd.Data(train=examples),
        mbgd.Settings(steps=20, batch=mbgd.Batch(8), precision=precision, sharding=sharding),  # type: ignore[arg-type]
        workers,
        observers=observers,
    )
    return made.fit(), {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("num_workers", "sharding"), [(1, "none"), (2, "none"), (2, "optimizer")])
def test_a_first_step_that_fp16_skips_leaves_no_momentum_behind(num_workers: int, sharding: str) -> None:
    # Which steps overflow depends on how the minibatch is cut.
    plain, expected = run_workers(trained, num_workers, False, "fp16")[0]
    assert 0 < plain.num_skipped_steps < 15
    for result, found in run_workers(trained, num_workers, True, "fp16", None, sharding):
        assert result.num_skipped_steps == plain.num_skipped_steps
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_parameters_that_come_later_begin_their_momentum_as_without_the_fused_kernel() -> None:
    _, expected = trained(mbgd.Workers(), fused=False, frozen_until=5)
    on_two = [one for how in ("none", "optimizer") for one in run_workers(trained, 2, True, "fp32", 5, how)]
    for _, found in [trained(mbgd.Workers(), True, frozen_until=5), *on_two]:
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_dampening_is_refused_where_the_momentum_could_not_begin() -> None:
    for case in ({"precision": "fp16"}, {"frozen_until": 5}):
        with pytest.raises(mbgd.UsageError, match=r"dampening=0\.5; .* Use optimizer\.fused=false"):
            trained(mbgd.Workers(), True, dampening=0.5, **case)  # type: ignore[arg-type]
    assert trained(mbgd.Workers(), True, dampening=0.5)[0].steps == 20
    assert trained(mbgd.Workers(), False, "fp16", dampening=0.5)[0].steps == 20
