"""Traces of steps, read back as their viewers read them."""

import gzip
import json
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbgd
from mbgd.config import Config, validate
from mbgd.data import digits
from mbgd.measuring import profiling
from mbgd.measuring.clock import PARTS

from processes import run_workers

NUM_MICRO_BATCHES = 2  # of each worker


def read(folder: Path, worker: str = "0") -> list[Any]:
    """What the trace of a worker shows as bars, by time."""
    with gzip.open(folder / "profile" / f"worker-{worker}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"])


def inside(outer: Any, events: list[Any]) -> list[Any]:
    begin, end = outer["ts"], outer["ts"] + outer["dur"]
    return [one for one in events if begin <= one["ts"] and one["ts"] + one["dur"] <= end and one is not outer]


def train(workers: mbgd.Workers, folder: str, profile: str | None, averaging: str = "ddp") -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=digits("train")),
        mbgd.Settings(steps=6, batch=mbgd.Batch(60, 15), averaging=mbgd.Averaging(mbgd.AveragingName(averaging))),
        workers,
    )
    trainer.fit(profiler=profiling.create(profile, Path(folder), workers, quiet=False))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory"])
def test_each_worker_traces_the_parts_of_each_step(tmp_path: Path, averaging: str) -> None:
    profiled = run_workers(train, 2, str(tmp_path), "steps:3-4", averaging)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["worker-0.json.gz", "worker-1.json.gz"]
    for rank in range(2):
        events = read(tmp_path, str(rank))
        steps = [event for event in events if event["name"].startswith("step ")]
        assert [step["name"] for step in steps] == ["step 3", "step 4"]
        for step in steps:
            within = inside(step, events)
            micro_batches = ["forward", "backward"] * NUM_MICRO_BATCHES
            wanted = ["data_wait", *micro_batches, "averaging", "optimizer"]
            assert [event["name"] for event in within if event["name"] in wanted] == wanted
            assert {"data_wait", "averaging", "optimizer"} < set(PARTS)
        if averaging == "ddp":  # in shared memory, all of it is in "averaging"
            assert sum(event["name"] == "gloo:all_reduce" for event in events) >= len(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for with_trace, without in zip(profiled, run_workers(train, 2, "", None, averaging), strict=True):
            assert torch.equal(with_trace, without)


def test_only_steps_that_are_still_to_come_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def steps_traced(profile: str, num_steps_done: int, stop_after: int, worker: str = "0") -> list[str]:
        profiler = profiling.create(profile, tmp_path, mbgd.Workers(), quiet=False)
        for _ in islice(profiler.steps(range(num_steps_done, 12), num_steps_done), stop_after):
            torch.ones(1).add(1)
        return [event["name"] for event in read(tmp_path, worker) if event["name"].startswith("step")]

    assert steps_traced("steps:11-12", 0, 100) == ["step 11", "step 12"]
    assert f"{tmp_path}/profile/worker-0.json.gz, and one for each" in capsys.readouterr().out
    assert steps_traced("steps:3-9", 0, 5) == ["step 3", "step 4", "step 5"]  # a run that breaks off
    assert steps_traced("steps:3-9", 5, 100, "0.from-6") == [f"step {step}" for step in range(6, 10)]  # and goes on
    assert steps_traced("steps:3-9", 0, 0) == ["step 3", "step 4", "step 5"]  # still there
    capsys.readouterr()
    steps_traced("steps:3-9", 10, 100)
    assert capsys.readouterr().out == ""
    shutil.rmtree(tmp_path / "profile")
    profiler = profiling.create("steps:2-4", tmp_path, mbgd.Workers(), quiet=False)
    assert list(profiler.steps(range(5, 12), 5)) == [*range(5, 12)]
    assert capsys.readouterr().out == "profile     none: steps 2 to 4 are done already\n"


def test_a_trace_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").touch()
    profiler = profiling.create("steps:1-2", tmp_path, mbgd.Workers(), quiet=True)
    assert list(profiler.steps(range(5), 0)) == [0, 1, 2, 3, 4]
    assert "could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("profile", ["steps:20-10", "steps:0-3", "foo", "10-20", "steps:10"])
def test_what_names_no_steps_is_refused(profile: str) -> None:
    [problem] = validate(Config(profile=profile, steps=100))
    assert problem.startswith(f"profile={profile}; it must name")
    assert "steps:10-20" in problem


def test_steps_beyond_the_end_are_refused() -> None:
    profiling.check("steps:10-20", 20)
    with pytest.raises(mbgd.UsageError, match="the run ends after step 19"):
        profiling.check("steps:10-20", 19)


def test_it_costs_nothing_when_off() -> None:
    shards = [1, 2]
    assert profiling.create(None, Path(), mbgd.Workers(), quiet=False).steps(shards, 0) is shards

    def microseconds() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            with profiling.part("forward"):
                pass
        return 1000 * (time.perf_counter() - began)

    assert min(microseconds() for _ in range(20)) < 1.0
