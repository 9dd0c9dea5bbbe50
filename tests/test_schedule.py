"""Learning-rate schedules, functions of the step."""

import pytest
import torch

import mbgd
from mbgd.schedule import Constant, Cosine, Linear, Step


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    schedule = Cosine(num_steps=50, final_factor=0.1)
    for step in range(50):
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", [kind(num_steps=100, warmup_steps=10) for kind in (Constant, Cosine, Linear)])
def test_warm_up_rises_to_the_whole_learning_rate(schedule: Constant) -> None:
    assert [schedule(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_the_ends() -> None:
    assert Constant(num_steps=100)(99) == 1.0
    assert Linear(num_steps=100, final_factor=0.2)(50) == pytest.approx(0.6)
    assert Linear(num_steps=100, final_factor=0.2)(1000) == pytest.approx(0.2)
    assert [Step(num_steps=100, every_steps=30, decay=0.5)(step) for step in (29, 30, 60)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("warmup_steps", [-1, 101])
def test_a_warm_up_longer_than_the_run_is_refused(warmup_steps: int) -> None:
    with pytest.raises(mbgd.UsageError, match="warmup_steps"):
        Constant(num_steps=100, warmup_steps=warmup_steps)
