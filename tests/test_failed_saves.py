"""A save that failed, whatever the reason, is a failure: on every worker, in the message and in the exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mbgd
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.saving import CheckpointFolder, CheckpointsElsewhere
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config import Checkpoint

from processes import eventually, run_workers

ROOT = Path(__file__).parent.parent


def snapshot(step: int, **values: Any) -> Snapshot:
    return Snapshot(step, {"model": {"weight": torch.full((3,), float(step))}}, values)


def fail(error: BaseException) -> Snapshot:
    raise error


FAILURES = {
    "no memory": partial(fail, MemoryError("no room for the snapshot")),
    "pinned memory": partial(fail, RuntimeError("CUDA error: out of memory")),
    "an own state_dict": partial(fail, KeyError("state")),
    "not for JSON": lambda: snapshot(2, odd=object()),
    "not for safetensors": lambda: Snapshot(2, {"model": {"weight": torch.zeros(3).to_sparse()}}, {}),
    "no tensor": lambda: Snapshot(2, {"model": {"weight": "a text"}}, {}),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("required", [False, True])
def test_whatever_the_exception_it_is_a_failure(
    tmp_path: Path, name: str, required: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = CheckpointFolder(tmp_path, Checkpoint(every_steps=1, every_seconds=None, required=required), {})
    folder.after_step(1, {}, partial(snapshot, 1))
    if required:
        with pytest.raises(mbgd.UsageError, match=r"could not be written.*checkpoint\.required"):
            folder.at_end(2, {}, FAILURES[name])
    else:
        assert not folder.at_end(2, {}, FAILURES[name])
        assert "could not be written" in capsys.readouterr().out
    assert folder.newest_step() == 1
    assert folder.at_end(3, {}, partial(snapshot, 3))
    assert folder.newest_step() == 3


def test_the_log_has_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CheckpointFolder(tmp_path, Checkpoint(), {}).at_end(2, {}, FAILURES["no memory"])
    out, error = capsys.readouterr()
    assert f"a checkpoint could not be written to {tmp_path}: MemoryError: no room for the snapshot" in out
    assert "Traceback" not in out
    assert "Traceback" in error
    assert "raise error" in error


def test_a_failure_is_told_as_soon_as_it_is_known(tmp_path: Path) -> None:
    def folder() -> CheckpointFolder:
        return CheckpointFolder(tmp_path, Checkpoint(every_steps=2, every_seconds=None, required=True), {})

    with pytest.raises(mbgd.UsageError, match="no room"):
        folder().after_step(2, {}, FAILURES["no memory"])
    writing = folder()
    writing.after_step(2, {}, FAILURES["not for JSON"])
    assert writing._writer is not None
    writing._writer.join()
    with pytest.raises(mbgd.UsageError, match="not JSON serializable"):
        writing.after_step(3, {}, partial(snapshot, 3))


def test_what_was_not_written_is_not_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, Checkpoint(every_seconds=None, best="eval/loss"), {})
    folder.after_step(1, {"eval/loss": 0.5}, partial(snapshot, 1))
    folder.after_step(2, {"eval/loss": 0.1}, FAILURES["no memory"])
    folder.after_step(3, {"eval/loss": 0.3}, partial(snapshot, 3))
    folder.at_end(4, {}, partial(snapshot, 4))
    found = checkpoint.best(tmp_path, "eval/loss", highest=False)
    assert found is not None
    assert (found[0].name, found[1]) == ("step-000000003", 0.3)


def test_an_old_one_that_cannot_be_removed_is_no_failed_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = CheckpointFolder(tmp_path, Checkpoint(keep=1), {})
    assert folder.at_end(1, {}, partial(snapshot, 1))
    (tmp_path / "step-000000001.tmp").mkdir()
    (tmp_path / "step-000000001.tmp/in the way").touch()
    assert folder.at_end(2, {}, partial(snapshot, 2))
    assert "an old checkpoint could not be removed" in capsys.readouterr().out
    assert folder.newest_step() == 2


# In training


class StopAt:
    def __init__(self, step: int | None) -> None:
        self._step = step

    def agreed(self, step: int) -> bool:
        return step == self._step


class HoldsASet(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step()
        self.state[self.param_groups[0]["params"][0]]["seen"] = {"a": print}


def train(
    workers: mbgd.Workers, folder: str, failing_from: int, stop: int | None, required: bool, optimizer: str = "SGD"
) -> str:
    """Three steps; what is raised in the end."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    make = {"SGD": torch.optim.SGD, "HoldsASet": HoldsASet}[optimizer]
    trainer = mbgd.Trainer(
        model,
        mbgd.MeanSquaredError(),
        make(model.parameters(), lr=0.01),
        mbgd.Data(train=mbgd.InMemory(torch.randn(12, 3), torch.randn(12, 1))),
        mbgd.Settings(steps=3, batch=mbgd.Batch(4)),
        workers,
    )
    path = Path(folder)
    for step in range(failing_from, 4):
        if workers.is_main:
            path.mkdir(exist_ok=True)
            (path / f"step-{step:09d}.{os.getpid()}.tmp").write_text("in the way")
    settings = Checkpoint(every_steps=2, every_seconds=None, required=required)
    checkpoints = CheckpointFolder(path, settings, {}) if workers.is_main else CheckpointsElsewhere()
    try:
        trainer.fit(checkpoints=checkpoints, stop=StopAt(stop))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


LOST = "the state after step 3 is in no checkpoint on disk"


@pytest.mark.parametrize(
    ("failing_from", "stop", "required", "end"),
    [
        (9, 3, False, "Preempted: stopped by a signal after step 3"),
        (9, None, True, "finished"),
        (3, 3, False, f"NotSaved: stopped by a signal after step 3, but {LOST}; the newest one is of step 2"),
        (1, 3, False, f"NotSaved: stopped by a signal after step 3, but {LOST}; there is none of this run"),
        (3, 3, True, "UsageError: a checkpoint could not be written"),
        (3, None, True, "UsageError: a checkpoint could not be written"),
        (1, None, False, "finished"),
    ],
)
def test_every_worker_knows_the_outcome(
    tmp_path: Path, failing_from: int, stop: int | None, required: bool, end: str
) -> None:
    results = run_workers(train, 2, str(tmp_path / "checkpoints"), failing_from, stop, required)
    assert results[0] == results[1]
    assert results[0].startswith(end)


def test_a_run_whose_last_state_is_not_saved_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(mbgd.Workers(), str(tmp_path / "checkpoints"), 3, None, False) == "finished"
    out = capsys.readouterr().out
    assert f"warning: {LOST}; the newest one is of step 2. The run's results are written all the same." in out


def test_a_state_that_no_checkpoint_can_hold_is_refused_after_the_first_step(tmp_path: Path) -> None:
    results = run_workers(train, 2, str(tmp_path / "checkpoints"), 9, None, False, "HoldsASet")
    assert results[0] == results[1]
    assert results[0].startswith("UsageError: this run could not be saved:")
    assert "optimizer state 0.seen.a is of type builtins.builtin_function_or_method" in results[0]


# Through the command line


def command(run: Path, *more: str) -> list[str]:
    path = str(ROOT / "train.py")
    return [
        sys.executable,
        path,
        f"run.dir={run}",
        "schedule=constant",
        "epochs=100000",
        "tracking.report=false",
        *more,
    ]


def test_stopped_but_not_saved_is_no_success(tmp_path: Path) -> None:
    """Exit code 1, not 75: a launcher that requeues on 75 would begin anew each time."""
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(run), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        eventually(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), seconds=60)
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").touch()  # no checkpoint can be written there
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, out
    assert "is in no checkpoint on disk; there is none of this run" in out
    assert "goes on from there" not in out
    assert "Traceback" not in out
    assert "Traceback" in (run / "logs/worker-0.log").read_text()
    assert json.loads((run / "run.json").read_text())["ending"]["outcome"] == "failed"
