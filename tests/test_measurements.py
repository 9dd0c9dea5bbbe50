"""What is logged of a step: norms, speeds, and where its time goes."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.data import digits
from mbgd.measuring.clock import PARTS, HostStopwatch
from mbgd.measuring.load import Load
from mbgd.tracking.slowest_worker import MUCH

from processes import run_workers

SECONDS = 0.1
NUM_TOKENS = 5
REPRODUCIBLE = mbgd.Averaging(mbgd.AveragingName.reproducible)


class Lines:
    """A tracker that keeps what is logged of training."""

    def __init__(self) -> None:
        self.lines: dict[int, Any] = {}

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Any) -> None:
        if "train/loss" in metrics:
            self.lines[step] = metrics

    def close(self, *ending: object) -> None:
        pass


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def train(
    workers: mbgd.Workers,
    model: nn.Module,
    *,
    train_data: Any = None,
    evaluation: Any = None,
    objective: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: Any,
) -> dict[int, Any]:
    """The logged steps of a short run."""
    lines = Lines()
    mbgd.Trainer(
        model,
        objective or mbgd.CrossEntropy(),
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=train_data or digits("test"), evaluation=evaluation),
        mbgd.Settings(**({"steps": 3, "batch": mbgd.Batch(60)} | settings)),
        workers,
    ).fit(lines)
    return lines.lines


CLIP_NORMS = (None, 0.01)


def train_for_norms(workers: mbgd.Workers) -> list[Any]:
    return [
        train(workers, linear(), precision=mbgd.Precision.fp64, max_grad_norm=clip, steps=1)[1] for clip in CLIP_NORMS
    ]


def test_norms_are_those_of_plain_torch() -> None:
    data = digits("test")
    inputs, targets = data.gather(torch.from_numpy(Order(len(data), seed=0).indices(0, 0, 60)))
    logged = [train_for_norms(mbgd.Workers()), *run_workers(train_for_norms, 3)]
    for index, max_grad_norm in enumerate(CLIP_NORMS):
        model = linear().double()
        before = flat(model)
        F.cross_entropy(model(inputs.double()), targets).backward()
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or 1e9)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        for of_worker in logged:
            line = of_worker[index]
            assert line["train/gradient_norm"] == pytest.approx(float(gradient_norm), rel=1e-12)
            assert line["train/parameter_norm"] == pytest.approx(float(before.norm()), rel=1e-12)
            wanted = float((flat(model) - before).norm() / before.norm())
            assert line["train/update_ratio"] == pytest.approx(wanted, rel=1e-10)


def test_there_is_no_update_ratio_of_parameters_that_are_zero() -> None:
    model = linear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    lines = train(mbgd.Workers(), model, log_every_steps=1)
    assert lines[1]["train/parameter_norm"] == 0
    assert "train/update_ratio" not in lines[1]
    assert lines[2]["train/update_ratio"] > 0


def test_metrics_that_are_functions_are_called_where_they_are_logged() -> None:
    """Not at the other steps, though weights are summed at each."""
    calls = []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
        losses = mbgd.CrossEntropy()(model, batch).losses

        def zero() -> Tensor:
            calls.append("zero")
            return torch.zeros_like(losses)

        return mbgd.PerExample(losses, torch.ones_like(losses), {"zero": zero})

    lines = train(mbgd.Workers(), linear(), objective=objective, steps=5, log_every_steps=4, batch=mbgd.Batch(60))
    assert [line["train/zero"] for line in lines.values()] == [0.0, 0.0, 0.0]  # steps 1, 4 and 5
    assert len(calls) == 3 + 1  # and once when the objective was tried


# Time


class Slow:
    """Digits that take a while to get."""

    def __init__(self, seconds: float) -> None:
        self._digits, self._seconds = digits("test"), seconds
        self.targets = self._digits.targets

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> Any:
        return self._digits[index]

    def gather(self, indices: Tensor) -> Any:
        time.sleep(self._seconds)
        return self._digits.gather(indices)


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(SECONDS)
        return super().step(closure)


def slow_objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
    time.sleep(SECONDS)
    return mbgd.CrossEntropy()(model, batch)


def objective_slow_on_worker_1(model: nn.Module, batch: Any) -> mbgd.PerExample:
    return (slow_objective if os.environ["RANK"] == "1" else mbgd.CrossEntropy())(model, batch)


def train_slowly(workers: mbgd.Workers) -> dict[str, Any]:
    """For each part of a step, what is logged where that part is slow; two workers."""

    def seconds(model: nn.Module, **slow: Any) -> Any:
        return train(workers, model, **slow, steps=5, log_every_steps=4)[4]  # the mean over steps 2 to 4

    model = linear()
    return {
        # Reproducible averaging reads each micro-batch by itself.
        "data_wait": seconds(model, train_data=Slow(SECONDS), averaging=REPRODUCIBLE, batch=mbgd.Batch(60, 30)),
        "forward_backward": seconds(model, objective=slow_objective),
        "averaging": seconds(model, objective=objective_slow_on_worker_1),
        "optimizer": seconds(model, optimizer=SlowSGD(model.parameters(), lr=0.1)),
    }


def test_each_part_of_a_step_has_its_time() -> None:
    of_main = run_workers(train_slowly, 2)[0]
    assert tuple(of_main) == PARTS
    for slow_part, line in of_main.items():
        seconds = {part: line[f"time/{part}_seconds"] for part in PARTS}
        assert seconds[slow_part] >= 0.8 * SECONDS  # a worker that comes late itself waits less for the others
        assert max(seconds, key=seconds.__getitem__) == slow_part
        assert sum(seconds.values()) <= 60 / line["time/examples_per_second"]
        assert line["time/num_workers"] == 2


def train_slowly_on_worker_1(workers: mbgd.Workers, averaging: str) -> tuple[dict[int, Any], str]:
    def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
        time.sleep(0.05 if workers.rank == 1 else 0.0)
        return mbgd.CrossEntropy()(model, batch)

    with redirect_stdout(StringIO()) as said:
        lines = train(
            workers,
            linear(),
            objective=objective,
            averaging=mbgd.Averaging(averaging),
            batch=mbgd.Batch(60, 20),
            steps=125,
            log_every_steps=10,
        )
    return lines, said.getvalue()


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_the_slowest_worker_is_found_and_named_once(averaging: str) -> None:
    of_workers = run_workers(train_slowly_on_worker_1, 3, averaging)
    lines, said = of_workers[0]
    assert "time/slowest_worker" not in lines[1]  # nothing has been measured before
    later = [line for step, line in lines.items() if step > 10 and "train/loss" in line]
    assert len(later) > 10
    for line in later:
        assert line["time/slowest_worker"] > MUCH
        assert line["time/slowest_worker_rank"] == 1
        assert line["time/slowest_worker_host"] == socket.gethostname()
    assert said.count(f"warning: worker 1 on host {socket.gethostname()} has been the slowest for 1") == 1
    assert not any(other for _, other in of_workers[1:])


def test_evaluation_is_not_training_time() -> None:
    slow = Slow(4 * SECONDS)  # after each of 5 steps, for two batches
    line = train(mbgd.Workers(), linear(), evaluation=slow, steps=5, log_every_steps=4, batch=mbgd.Batch(360))[4]
    assert 360 / line["time/examples_per_second"] < 7 * SECONDS


def per_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    inputs, weights = batch
    return mbgd.PerExample(model(inputs).square().mean(-1), weights)


def train_tokens(workers: mbgd.Workers) -> tuple[float, float]:
    """Tokens an example, as logged and as they are."""
    generator = torch.Generator().manual_seed(0)
    weights = (torch.arange(NUM_TOKENS) < torch.randint(1, NUM_TOKENS + 1, (64, 1), generator=generator)).float() / 2
    data = mbgd.InMemory(torch.randn(64, NUM_TOKENS, 3, generator=generator), weights)
    model, batch = nn.Linear(3, 2), mbgd.Batch(16)
    lines = train(workers, model, train_data=data, objective=per_token, batch=batch, steps=9, log_every_steps=4)
    # Steps 5 to 8 are an epoch.
    logged = lines[8]["time/tokens_per_second"] / lines[8]["time/examples_per_second"]
    return logged, int((weights > 0).sum()) / 64


def test_tokens_that_count_are_counted() -> None:
    for logged, wanted in run_workers(train_tokens, 3):
        assert logged == pytest.approx(wanted, rel=1e-12)
        assert wanted < NUM_TOKENS


def allocate(workers: mbgd.Workers) -> tuple[float, float]:
    before = train(workers, linear())[3]["time/peak_memory_bytes"]
    torch.ones(300_000_000, dtype=torch.uint8)
    return before, train(workers, linear())[3]["time/peak_memory_bytes"]


def test_peak_memory() -> None:
    [(before, after)] = run_workers(allocate, 1)
    assert before > 50e6
    assert 200e6 < after - before < 500e6


def test_a_lap_costs_less_than_a_thousandth_of_a_small_step() -> None:
    def microseconds(function: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(1000):
            function()
        return 1000 * (time.perf_counter() - began)

    stopwatch = HostStopwatch()
    assert min(microseconds(lambda: stopwatch.lap("optimizer")) for _ in range(20)) < 1.0
    assert set(stopwatch.seconds()) == {"optimizer"}
    assert stopwatch.seconds() == {}


def test_the_load_and_memory_of_the_host_are_read_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(torch.device("cpu"))
    until = time.process_time() + 0.5
    while time.process_time() < until:  # keeps a processor busy
        pass
    first = load.read()
    assert first.keys() == {"cpu_load", "host_memory_bytes"}
    assert 0.5 / os.cpu_count() / 2 < first["cpu_load"] <= 1  # type: ignore[operator]
    assert 2**26 < first["host_memory_bytes"] < 2**50
    assert load.read() == {}
    monkeypatch.setattr(load, "_last_read", -10.0)
    monkeypatch.setattr("mbgd.measuring.load.STAT", Path("/nowhere"))
    monkeypatch.setattr("mbgd.measuring.load.MEMINFO", Path("/nowhere"))
    assert load.read() == {}  # a system that does not tell
