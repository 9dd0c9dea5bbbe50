"""The same training on GPUs over nccl as on the CPU; runs where there is a CUDA device."""

from typing import Any

import pytest
import torch

import mbgd
from mbgd.clock import MOST_EVENTS, PARTS, StreamStopwatch
from mbgd.data import digits
from mbgd.models import MLP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(workers: mbgd.Workers, averaging: mbgd.AveragingName, precision: mbgd.Precision) -> tuple[Any, mbgd.Result]:
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10)
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
        mbgd.Data(train=digits("train"), evaluation=digits("test")),
        mbgd.Settings(
            epochs=1, batch=mbgd.Batch(100, 16), precision=precision, averaging=mbgd.Averaging(averaging), clip_norm=1.0
        ),
        workers,
    )
    result = trainer.fit()
    return [p.detach().cpu() for p in model.parameters()], result


@pytest.mark.parametrize("averaging", list(mbgd.AveragingName))
def test_a_gpu_computes_what_a_cpu_does(averaging: mbgd.AveragingName) -> None:
    on_gpu = mbgd.Workers(device=torch.device("cuda", 0), backend="nccl")
    got, result = train(on_gpu, averaging, mbgd.Precision.fp64)
    wanted, reference = train(mbgd.Workers(), averaging, mbgd.Precision.fp64)
    assert result.metrics["eval/accuracy"] == reference.metrics["eval/accuracy"]
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", [mbgd.Precision.bf16, mbgd.Precision.fp16])
def test_mixed_precision_learns(precision: mbgd.Precision) -> None:
    on_gpu = mbgd.Workers(device=torch.device("cuda", 0), backend="nccl")
    _, result = train(on_gpu, mbgd.AveragingName.ddp, precision)
    assert result.metrics["eval/accuracy"] > 0.8


def test_where_the_time_of_a_step_goes() -> None:
    _, result = train(
        mbgd.Workers(device=torch.device("cuda", 0), backend="nccl"), mbgd.AveragingName.ddp, mbgd.Precision.fp32
    )
    metrics = result.metrics
    seconds = {part: metrics[f"time/{part}_seconds"] for part in PARTS}
    assert min(seconds.values()) >= 0
    assert seconds["forward_backward"] > 0
    assert sum(seconds.values()) <= 1.05 * 100 / metrics["time/examples_per_second"]
    assert metrics["time/peak_memory_bytes"] > 0


def test_more_laps_than_events_are_kept() -> None:
    stopwatch = StreamStopwatch()
    for _ in range(5 * MOST_EVENTS):
        torch.cuda._sleep(1000)
        stopwatch.lap("optimizer")
        stopwatch.lap("rest")
    seconds = stopwatch.seconds()
    assert seconds["optimizer"] > seconds["rest"] > 0
    assert stopwatch.seconds() == {}
