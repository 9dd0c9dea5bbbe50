"""Traces of some steps, read back."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mbgd
from mbgd import profiling
from mbgd.config import Config, problems
from mbgd.data import digits

from processes import run_workers


def trace(workers: mbgd.Workers, folder: Path, asked: str, step: int, averaging: str = "ddp") -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=digits("train")),
        mbgd.Settings(
            steps=8,
            batch=mbgd.Batch(size=64, micro_batch_size=16),
            averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
        ),
        workers,
    )
    trainer.state.step = step
    profiler = profiling.create(asked, folder, trainer.num_steps, workers, quiet=True)
    trainer.fit(profiler=profiler)


def counts(path: Path) -> Counter[str]:
    events: list[Any] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("ph") == "X")


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory"])
def test_each_worker_writes_its_steps_and_averaging_is_visible(tmp_path: Path, averaging: str) -> None:
    run_workers(trace, 2, tmp_path, "steps:3-5", 0, averaging)
    assert sorted(path.name for path in tmp_path.glob("profile/*")) == ["worker-0.json.gz", "worker-1.json.gz"]
    for path in tmp_path.glob("profile/*"):
        seen = counts(path)
        assert {f"step {step}" for step in range(1, 9) if seen[f"step {step}"]} == {"step 3", "step 4", "step 5"}
        assert [seen[name] for name in ("averaging", "optimizer", "data_wait")] == [3, 3, 3]
        assert [seen[name] for name in ("forward", "backward")] == [6, 6]  # two micro-batches a step
        if averaging == "ddp":
            assert seen["gloo:all_reduce"] >= 3  # beside the backward; in shared memory all of it is in "averaging"


def test_a_run_that_goes_on_traces_what_is_left(tmp_path: Path) -> None:
    trace(mbgd.Workers(), tmp_path / "inside", "steps:3-5", 4)
    seen = counts(tmp_path / "inside/profile/worker-0.json.gz")
    assert [seen[f"step {step}"] for step in (3, 4, 5, 6)] == [0, 0, 1, 0]
    trace(mbgd.Workers(), tmp_path / "beyond", "steps:3-5", 5)
    assert not (tmp_path / "beyond").exists()


def test_a_trace_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile/worker-0.json.gz").mkdir(parents=True)
    trace(mbgd.Workers(), tmp_path, "steps:1-2", 0)
    assert "could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["10-20", "steps:20-10", "steps:0-3", "steps:3", "all", ""])
def test_mistakes_are_explained(asked: str) -> None:
    assert any("such as steps:10-20" in problem for problem in problems(Config(profile=asked)))


def test_steps_beyond_the_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(mbgd.UsageError, match="the run has 8 steps"):
        trace(mbgd.Workers(), tmp_path, "steps:7-9", 0)
