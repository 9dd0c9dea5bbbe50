"""Checkpoints: whole or not there; a run that goes on ends with the bits of one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mbgd
from mbgd import checkpoint
from mbgd.__main__ import main as mbgd_main
from mbgd.checkpoint import CheckpointFolder, Snapshot
from mbgd.config import Checkpoint
from mbgd.data import digits
from mbgd.errors import Preempted
from mbgd.fingerprint import weights_sha256
from mbgd.models import CNN

from processes import run_workers

ROOT = Path(__file__).parent.parent

# On disk


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"model": {"weight": torch.full((3,), float(step))}}, {"metrics": {"train/loss": 0.1}})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(7), {"seed": 1})
    assert checkpoint.newest(tmp_path) == path
    read, identity = checkpoint.read(path)
    assert (read.step, identity, read.values) == (7, {"seed": 1}, {"metrics": {"train/loss": 0.1}})
    assert torch.equal(read.tensors["model"]["weight"], torch.full((3,), 7.0))


def damages(path: Path) -> list[Any]:
    manifest, model = path / "manifest.json", path / "model.safetensors"
    content = model.read_bytes()
    return [
        lambda: model.write_bytes(content[:-1]),
        lambda: model.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        lambda: model.unlink(),
        lambda: model.write_bytes(b""),
        lambda: manifest.unlink(),
        lambda: manifest.write_text(manifest.read_text()[:-9]),
        lambda: manifest.write_text("[]"),
        lambda: manifest.write_text("{}"),
        lambda: manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2')),
    ]


@pytest.mark.parametrize("which", range(9))
def test_a_broken_checkpoint_is_put_aside_and_the_one_before_is_taken(
    tmp_path: Path, which: int, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = (checkpoint.write(tmp_path, snapshot(step), {}) for step in (7, 8))
    damages(newer)[which]()
    assert checkpoint.newest(tmp_path) == older
    assert "step-000000008 is broken" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*broken*")] == ["step-000000008.broken-0"]


def test_the_tool_lists_verifies_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = str(tmp_path), tmp_path / "model.safetensors"
    for step in (7, 8):
        checkpoint.write(tmp_path / "checkpoints", snapshot(step), {})
    assert tool("checkpoints", run) == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert tool("checkpoints", run, "--export", str(model), "--step", "7") == 0
    assert torch.equal(load_file(model)["weight"], torch.full((3,), 7.0))
    (tmp_path / "checkpoints/step-000000008/model.safetensors").write_bytes(b"")
    assert tool("checkpoints", run) == 1
    assert "has 0 bytes" in capsys.readouterr().out
    assert tool("checkpoints", run, "--export", str(model)) == 0
    assert "after step 7" in capsys.readouterr().out
    assert tool("checkpoints", run, "--export", str(model), "--step", "8") == 2
    assert "no whole checkpoint of step 8" in capsys.readouterr().err
    assert tool("checkpoints", str(tmp_path / "nowhere")) == 2


def tool(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mbgd", *arguments])
        return mbgd_main()


class Crash(BaseException):
    pass


def test_a_crash_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process died there: nothing after it happens, not even tidying up."""
    calls = 0
    crash_at = -1

    def crashing(function: Any) -> Any:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise Crash
            return function(*arguments, **keywords)

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", crashing(checkpoint.save_file))
    monkeypatch.setattr(checkpoint.os, "fsync", crashing(os.fsync))
    monkeypatch.setattr(Path, "rename", crashing(Path.rename))
    monkeypatch.setattr(Path, "write_text", crashing(Path.write_text))
    real_rmtree = checkpoint.shutil.rmtree
    for crash_at in range(1, 40):
        folder = tmp_path / str(crash_at)
        calls = -(10**6)
        checkpoint.write(folder, snapshot(1), {})
        calls = 0
        crashed = False
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: None)
            try:
                checkpoint.write(folder, snapshot(2), {})
            except Crash:
                crashed = True
        num_calls, calls = calls, -(10**6)
        assert checkpoint.shutil.rmtree is real_rmtree
        found = checkpoint.newest(folder)
        assert found is not None
        step = checkpoint.read(found)[0].step
        assert step in (1, 2)
        assert crashed or step == 2
        assert not list(folder.glob("*.tmp")), "leftovers are removed"
        assert not list(folder.glob("*broken*")), "a crash while writing breaks nothing"
        if not crashed:
            assert num_calls >= 6
            break
    else:
        pytest.fail("never got through")


def test_one_of_the_same_step_is_left_as_it_is_unless_broken(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(7), {"seed": 1})
    assert checkpoint.write(tmp_path, snapshot(7), {"seed": 2}) == path
    assert checkpoint.read_manifest(path) == (7, {"seed": 1})
    (path / "model.safetensors").unlink()
    checkpoint.write(tmp_path, snapshot(7), {"seed": 2})
    assert checkpoint.read_manifest(path) == (7, {"seed": 2})
    assert (tmp_path / "step-000000007.broken-0").exists()


def test_so_many_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, Checkpoint(every_steps=2, every_seconds=None, keep=2), {})
    for step in range(1, 10):
        if folder.due(step):
            folder.save(snapshot(step))
    folder.close()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000000008", "step-000000006"]


@pytest.mark.parametrize("required", [False, True])
def test_a_failure_to_write_is_reported(tmp_path: Path, required: bool, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write(tmp_path, snapshot(1), {})
    folder = CheckpointFolder(tmp_path, Checkpoint(required=required), {})
    (tmp_path / f"step-000000002.{os.getpid()}.tmp").write_text("in the way")
    folder.save(snapshot(2))
    if required:
        with pytest.raises(mbgd.UsageError, match=r"could not be written.*checkpoint.required"):
            folder.close()
    else:
        folder.close()
        assert "Training goes on" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000000001"


def test_a_full_disk(tmp_path: Path) -> None:
    """On a real file system of 1 MiB; needs root for the mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    try:
        checkpoint.write(disk, snapshot(1), {})
        large = Snapshot(2, {"model": {"weight": torch.zeros(2**20)}})
        with pytest.raises(Exception, match="No space left"):
            checkpoint.write(disk, large, {})
        assert checkpoint.newest(disk) == disk / "step-000000001"
        folder = CheckpointFolder(disk, Checkpoint(), {})
        folder.save(large)
        folder.close()
        folder.save(Snapshot(3, {"model": {"weight": torch.zeros(9)}}))
        folder.close()
        assert checkpoint.newest(disk) == disk / "step-000000003"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# In training

NUM_STEPS = 12


class StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def agreed(self, step: int) -> bool:
        return step == self._step


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Any) -> None:
        self.lines.append((step, {k: v for k, v in metrics.items() if k != "train/examples_per_second"}))

    def close(self) -> None:
        pass


def go_on(
    workers: mbgd.Workers, folder: str, stop_after: int | None, optimizer_name: str, precision: str
) -> tuple[str, list[Any]]:
    """From the newest checkpoint, if there is one, up to `stop_after` or the end; (hash, what was logged)."""
    torch.manual_seed(0)
    model: nn.Module = CNN((1, 8, 8), 10, channels=(4, 8), batch_norm=True, dropout=0.2)
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[optimizer_name]
    keywords: dict[str, Any] = {"momentum": 0.9} if optimizer_name == "sgd" else {}
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        make(model.parameters(), lr=0.01, **keywords),
        mbgd.Data(train=digits("test"), evaluation=digits("test")),
        mbgd.Settings(
            steps=NUM_STEPS,
            batch=mbgd.Batch(97),
            averaging=mbgd.Averaging(mbgd.AveragingName.reproducible),
            precision=mbgd.Precision(precision),
            log_every_steps=1,
            schedule=lambda step: 1 - step / NUM_STEPS,
        ),
        workers,
    )
    path = checkpoint.newest(Path(folder))
    if path is not None:
        trainer.restore(checkpoint.read(path)[0])
    workers.barrier()
    tracker = Lines()
    checkpoints = CheckpointFolder(Path(folder), Checkpoint(), {}) if workers.is_main else None
    try:
        trainer.fit(tracker, checkpoints, None if stop_after is None else StopAt(stop_after))
    except Preempted:
        assert trainer.state.step == stop_after
    return weights_sha256(model), tracker.lines


@cache
def uninterrupted(optimizer_name: str, precision: str) -> tuple[str, list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        result: tuple[str, list[Any]] = run_workers(go_on, 1, folder, None, optimizer_name, precision)[0]
    return result


@pytest.mark.parametrize(
    ("optimizer_name", "precision", "schedule"),
    [
        ("adamw", "fp32", [(4, 3), (2, 4), (3, 5), (1, None)]),  # mid-epoch, its end (4 steps), just after it
        ("sgd", "fp64", [(1, 1), (2, 2), (3, 11), (2, None)]),
        ("adagrad", "bf16", [(2, 6), (1, 7), (2, None)]),
        ("sgd", "fp16", [(2, 5), (1, None)]),
    ],
)
def test_any_schedule_of_stops_and_workers_ends_alike(
    tmp_path: Path, optimizer_name: str, precision: str, schedule: list[tuple[int, int | None]]
) -> None:
    lines: list[Any] = []
    for num_workers, stop_after in schedule:
        results = run_workers(go_on, num_workers, str(tmp_path), stop_after, optimizer_name, precision)
        lines += results[0][1]
        assert len({weights for weights, _ in results}) == 1
    wanted = uninterrupted(optimizer_name, precision)
    assert results[0][0] == wanted[0]
    assert lines == wanted[1]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    def trainer(width: int) -> mbgd.Trainer:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return mbgd.Trainer(
            model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=digits("test")), mbgd.Settings(steps=1)
        )

    taken = trainer(3).snapshot()
    with pytest.raises(mbgd.UsageError, match=r"shape of 1\.weight"):
        trainer(4).restore(taken)


# Through the command line

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SLOW = """
import time, mbgd
from mbgd.data import digits

class Slow:
    def __init__(self):
        self.all = digits("test")
        self.targets, self.input_shape, self.num_outputs = self.all.targets, (1, 8, 8), 10
    def __len__(self):
        return len(self.all)
    def __getitem__(self, i):
        return self.all[i]
    def gather(self, indices):
        time.sleep(0.01)
        return self.all.gather(indices)
"""
OVERRIDES = [
    "data=own",
    "data.train._target_=slow.Slow",
    "data.evaluation={_target_: mbgd.data.digits, split: test}",
    "model.dropout=0.2",
    "averaging=reproducible",
    "batch.size=40",
    "epochs=10",  # 9 steps of 8 micro-batches each: 90 steps of 80 ms on one worker
    "log_every_steps=1",
    "checkpoint.every_steps=5",
]


def start(folder: Path, num_workers: int, *more: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    (folder / "slow.py").write_text(SLOW)
    command = [*TORCHRUN, *torchrun, "--nproc-per-node", str(num_workers), str(ROOT / "train.py"), *OVERRIDES, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} did not come")


def history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train/examples_per_second"} for line in lines]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_killed_and_preempted_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(tmp_path, 1, f"run.dir={whole}"))

    killed = start(tmp_path, 2, f"run.dir={broken}")  # everything dies at once
    wait_for_step(broken, 23)
    for pid in [*workers_of(killed), killed.pid]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (broken / "summary.json").exists()
    assert not list(broken.glob("checkpoints/*broken*"))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # as a crash may leave it

    restarted = start(tmp_path, 3, f"run.dir={broken}", torchrun=("--max-restarts", "1"))  # a worker dies
    wait_for_step(broken, 43)
    os.kill(workers_of(restarted)[1], signal.SIGKILL)
    wait_for_step(broken, 60)
    os.kill(workers_of(restarted)[0], signal.SIGUSR1)  # one worker is told; all save and stop, and torchrun gives up
    out, _ = restarted.communicate(timeout=120)
    assert restarted.returncode != 0
    assert "stopped by a signal after step" in out
    saved = max(int(path.name[5:]) for path in (broken / "checkpoints").glob("step-*"))
    assert saved >= 60

    out = finish(start(tmp_path, 1, f"run.dir={broken}"))
    assert f"resume      step {saved}" in out
    assert history(broken) == history(whole)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, broken)]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]

    (broken / "summary.json").unlink()  # as if it had died between its last checkpoint and its results
    finish(start(tmp_path, 1, f"run.dir={broken}"))
    assert json.loads((broken / "summary.json").read_text())["weights_sha256"] == summaries[0]["weights_sha256"]
    assert not list(broken.glob("checkpoints/*broken*"))

    assert "holds this run already, complete" in finish(start(tmp_path, 2, f"run.dir={broken}"))

    refused = start(tmp_path, 2, f"run.dir={broken}", "optimizer.lr=0.5", "seed=3")
    out, _ = refused.communicate(timeout=120)
    assert refused.returncode != 0
    assert "optimizer.lr: 0.01 before, 0.5 now" in out
    assert "seed: 0 before, 3 now" in out
    assert history(broken) == history(whole)
