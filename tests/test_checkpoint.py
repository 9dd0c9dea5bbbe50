"""Checkpoints: whole or not there; a run that goes on ends with the bits of one that was never stopped."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mbgd
from mbgd.__main__ import main as mbgd_main
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import saving
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checkpoints.saving import CheckpointFolder
from mbgd.checkpoints.snapshot import Snapshot, SnapshotMemory
from mbgd.config import Checkpoint, Direction
from mbgd.data import digits
from mbgd.errors import Preempted
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


class Recorder:
    """Stands between `checkpoint.write` and the disk, and notes what reaches which file, in order.

    The model of a disk is the usual one: what was written to a file is sure to be there only once the file was flushed,
    and an entry of a folder (a new name, a rename) only once the folder was.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations: list[tuple[str, Path, Any]] = []
        real_save, real_text, real_rename, real_mkdir, real_fsync, real_open = (
            checkpoint.save_file,
            Path.write_text,
            Path.rename,
            Path.mkdir,
            os.fsync,
            os.open,
        )
        names: dict[int, Path] = {}

        def save(tensors: Any, path: Path) -> None:
            real_save(tensors, path)
            self.operations.append(("write", path, path.read_bytes()))

        def write_text(path: Path, text: str) -> None:
            real_text(path, text)
            self.operations.append(("write", path, text.encode()))

        def rename(path: Path, target: Path) -> Path:
            self.operations.append(("rename", path, target))
            return real_rename(path, target)

        def mkdir(path: Path, **keywords: Any) -> None:
            existed = path.exists()
            real_mkdir(path, **keywords)
            if not existed:
                self.operations.append(("mkdir", path, None))

        def open_(path: Any, *arguments: Any, **keywords: Any) -> int:
            descriptor = real_open(path, *arguments, **keywords)
            names[descriptor] = Path(path)
            return descriptor

        def fsync(descriptor: int) -> None:
            real_fsync(descriptor)
            self.operations.append(("flush", names[descriptor], None))

        monkeypatch.setattr(checkpoint, "save_file", save)
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(checkpoint.os, "open", open_)
        monkeypatch.setattr(checkpoint.os, "fsync", fsync)


LOSSES = ("kept", "dropped", "torn", "zeroed")
"""What may have become of content that was not flushed."""


def replay(operations: list[tuple[str, Path, Any]], loss: str, *, entries_kept: bool, root: Path, target: Path) -> None:
    """The folder `target` as a crash after these operations may leave what was `root`."""
    contents: dict[Path, tuple[bytes, bool]] = {}
    folders: set[Path] = set()
    sure: set[Path] = set()  # names that are on the disk
    for kind, path, argument in operations:
        if kind == "mkdir":
            folders.add(path)
        elif kind == "write":
            contents[path] = (argument, False)
        elif kind == "flush" and path in contents:
            contents[path] = (contents[path][0], True)
        elif kind == "flush":
            sure |= {name for name in (*contents, *folders) if name.parent == path}
        elif entries_kept or ("flush", argument.parent, None) in operations[operations.index((kind, path, argument)) :]:
            contents = {(argument / p.name if p.parent == path else p): value for p, value in contents.items()}
            sure = {(argument / p.name if p.parent == path else p) for p in sure}
            folders = {argument if p == path else p for p in folders}
    for folder in sorted(folders):
        if entries_kept or folder in sure or any(p.parent == folder and p in sure for p in contents):
            (target / folder.relative_to(root)).mkdir(parents=True, exist_ok=True)
    for path, (content, flushed) in contents.items():
        place = target / path.relative_to(root)
        if not place.parent.exists() or not (entries_kept or flushed or path in sure):
            continue
        if not flushed:
            if loss == "dropped":
                content = b""
            elif loss == "torn":
                content = content[: len(content) // 2]
            elif loss == "zeroed":
                content = bytes(len(content))
        place.write_bytes(content)


def test_after_a_crash_at_any_point_the_old_or_the_new_is_there(tmp_path: Path, monkeypatch: Any) -> None:
    """Every prefix of what a save does to the disk, with what was not flushed kept, dropped, torn or zeroed."""
    root = tmp_path / "real"
    old = checkpoint.write(root, snapshot(1), {})
    with monkeypatch.context() as patch:
        operations = (recorder := Recorder(patch)).operations
        new = checkpoint.write(root, snapshot(2), {})
    assert [kind for kind, _, _ in operations].count("flush") == 4, "model, manifest, its folder, the parent"
    states, found = 0, []
    for length in range(len(recorder.operations) + 1):
        for loss in LOSSES:
            for entries_kept in (True, False):
                target = tmp_path / f"{length}-{loss}-{entries_kept}"
                shutil.copytree(old, target / old.name)
                replay(operations[:length], loss, entries_kept=entries_kept, root=root, target=target)
                path = checkpoint.newest(target)
                assert path is not None
                read, _ = checkpoint.read(path)
                assert path.name in (old.name, new.name)
                assert torch.equal(read.tensors["model"]["weight"], torch.full((3,), float(read.step)))
                assert not list(target.glob("*.tmp")), "leftovers are removed"
                assert not list(target.glob("*broken*")), "a crash while writing breaks nothing"
                found.append(read.step)
                states += 1
        if length == len(operations):
            assert set(found[-2 * len(LOSSES) :]) == {2}, "once written, it stays"
    assert set(found) == {1, 2}
    assert states >= 70


def test_without_its_flushes_the_protocol_would_lose(tmp_path: Path, monkeypatch: Any) -> None:
    """The control: the replay finds fault with a save that does not flush."""
    root = tmp_path / "real"
    with monkeypatch.context() as patch:
        operations = Recorder(patch).operations
        checkpoint.write(root, snapshot(2), {}, durable=False)
    replay(operations, "torn", entries_kept=True, root=root, target=tmp_path / "after")
    assert checkpoint.newest(tmp_path / "after") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_any_bit_flip_is_noticed(tmp_path: Path, name: str) -> None:
    two_files = {"model": {"weight": torch.ones(3)}, "optimizer": {"0.momentum_buffer": torch.ones(3)}}
    path = checkpoint.write(tmp_path, Snapshot(8, two_files, {"metrics": {"eval/loss": 0.5}}), {"seed": 1})
    content = (path / name).read_bytes()
    wanted = checkpoint.read(path)
    for bit in range(0, 8 * len(content), 7):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(damaged)
        if checkpoint.verify(path) is None:  # a flip may change how the manifest is written, but not what it says
            read = checkpoint.read(path)
            assert name == "manifest.json"
            assert (read[0].step, read[0].values, read[1]) == (wanted[0].step, wanted[0].values, wanted[1])
    for length in range(0, len(content), 5):
        (path / name).write_bytes(content[:length])
        assert checkpoint.verify(path) is not None


def hostile(path: Path, name: str = "model.safetensors", content: bytes | None = None, **changes: Any) -> None:
    """Rewrite a checkpoint as someone who knows the format might: all hashes are right."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    if content is not None:
        (path / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"] = {name: {"bytes": len(content), "sha256": digest}}
    manifest |= changes
    manifest["sha256"] = checkpoint._seal(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


class Exploit:
    def __reduce__(self) -> Any:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (pickle.dumps(Exploit()), "model.safetensors", "Error"),
        ((2**60).to_bytes(8, "little") + b"{}", "model.safetensors", "Error"),
        (
            (71).to_bytes(8, "little") + b'{"weight":{"dtype":"F32","shape":[99999999],"data_offsets":[0,399999996]}}',
            "model.safetensors",
            "Error",
        ),
        (b"root:x", "../../passwd.safetensors", "not the name of a file"),
        (b"x", "model.pt", "not the name of a file"),
    ],
)
def test_hostile_files_are_refused_and_run_nothing(
    tmp_path: Path, content: bytes, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    older, newer = (checkpoint.write(tmp_path / "checkpoints", snapshot(step), {}) for step in (7, 8))
    hostile(newer, name, content)
    problem = checkpoint.verify(newer)
    assert problem is not None
    assert message in problem
    assert checkpoint.newest(tmp_path / "checkpoints") == older
    assert not (tmp_path / "executed").exists()


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
        folder.after_step(step, {}, partial(snapshot, step))
    folder.at_end(8, {}, partial(snapshot, 8))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000000008", "step-000000006"]


@pytest.mark.parametrize(("direction", "kept"), [("minimize", [9, 8, 3]), ("maximize", [9, 8, 5])])
def test_the_best_is_kept_too(tmp_path: Path, direction: str, kept: list[int]) -> None:
    settings = Checkpoint(every_steps=4, every_seconds=None, keep=2, best="eval/loss", direction=Direction(direction))
    losses = {1: 0.5, 3: 0.2, 5: 0.9, 6: float("nan"), 7: 0.9, 9: 0.3}
    for steps in (range(1, 6), range(6, 10)):  # the second as a run that goes on
        folder = CheckpointFolder(tmp_path, settings, {})
        for step in steps:
            evaluation = {"eval/loss": losses[step]} if step in losses else {}
            folder.after_step(step, evaluation, partial(snapshot, step))
        folder.at_end(step, evaluation, partial(snapshot, step))
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == kept


def test_the_best_must_be_a_metric_of_the_evaluation() -> None:
    with pytest.raises(mbgd.UsageError, match="one of eval/loss, eval/accuracy"):
        saving.check(Checkpoint(best="eval/acuracy"), ["eval/loss", "eval/accuracy"])
    with pytest.raises(mbgd.UsageError, match="no evaluation dataset"):
        saving.check(Checkpoint(best="eval/loss"), [])


def test_memory_of_snapshots_is_used_again_but_never_while_one_lives() -> None:
    memory = SnapshotMemory(torch.device("cpu"))
    first = memory.snapshot(1, {"model": {"weight": torch.ones(3)}}, {})
    second = memory.snapshot(2, {"model": {"weight": torch.zeros(3)}}, {})
    assert first.tensors["model"]["weight"].tolist() == [1, 1, 1]
    place = first.tensors["model"]["weight"].data_ptr()
    del first
    third = memory.snapshot(3, {"model": {"weight": torch.full((3,), 3.0)}}, {})
    assert third.tensors["model"]["weight"].data_ptr() == place
    assert second.tensors["model"]["weight"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("required", [False, True])
def test_a_failure_to_write_is_reported(tmp_path: Path, required: bool, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write(tmp_path, snapshot(1), {})
    folder = CheckpointFolder(tmp_path, Checkpoint(required=required), {})
    (tmp_path / f"step-000000002.{os.getpid()}.tmp").write_text("in the way")
    if required:
        with pytest.raises(mbgd.UsageError, match=r"could not be written.*checkpoint.required"):
            folder.at_end(2, {}, partial(snapshot, 2))
    else:
        assert not folder.at_end(2, {}, partial(snapshot, 2))
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
        assert not folder.at_end(2, {}, lambda: large)
        assert folder.at_end(3, {}, lambda: Snapshot(3, {"model": {"weight": torch.zeros(9)}}))
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
        self.lines.append((step, {k: v for k, v in metrics.items() if not k.startswith("time/")}))

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


NUM_EXAMPLES = 23


def go_on_with_ddp(workers: mbgd.Workers, folder: str, stop_after: int | None) -> tuple[list[float], torch.Tensor]:
    """From the newest checkpoint to `stop_after` or the end: (numbers of the examples that were used, weights)."""
    numbers = torch.arange(NUM_EXAMPLES, dtype=torch.float64)
    inputs = torch.stack([numbers, numbers.sin(), numbers.cos()], dim=1)
    used: list[float] = []

    def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
        inputs, targets = batch
        used.extend(inputs[:, 0].tolist())
        return mbgd.PerExample((model(inputs).squeeze(1) - targets) ** 2)

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    trainer = mbgd.Trainer(
        model,
        objective,
        torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
        mbgd.Data(train=mbgd.InMemory(inputs, numbers.sqrt())),
        mbgd.Settings(epochs=3, batch=mbgd.Batch(5), precision=mbgd.Precision.fp64),
        workers,
    )
    path = checkpoint.newest(Path(folder))
    if path is not None:
        trainer.restore(checkpoint.read(path)[0])
    workers.barrier()
    used.clear()  # of the trial run
    checkpoints = CheckpointFolder(Path(folder), Checkpoint(), {}) if workers.is_main else None
    with suppress(Preempted):
        trainer.fit(checkpoints=checkpoints, stop=None if stop_after is None else StopAt(stop_after))
    return used, model.weight.detach().clone()


def test_with_ddp_every_example_is_used_once_an_epoch_whatever_the_stops(tmp_path: Path) -> None:
    """15 steps of at most 5 of 23 examples; stops in the middle of an epoch, twice in one, and at its end."""
    used: list[float] = []
    for num_workers, stop_after in ((3, 2), (2, 4), (1, 5), (2, 12), (3, None)):
        results = run_workers(go_on_with_ddp, num_workers, str(tmp_path / "stopped"), stop_after)
        used += [number for of_worker, _ in results for number in of_worker]
    assert sorted(used) == sorted(3 * list(range(NUM_EXAMPLES)))
    (_, wanted), *_ = run_workers(go_on_with_ddp, 1, str(tmp_path / "whole"), None)
    torch.testing.assert_close(results[0][1], wanted, rtol=1e-12, atol=0)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    def trainer(width: int) -> mbgd.Trainer:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return mbgd.Trainer(
            model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=digits("test")), mbgd.Settings(steps=1)
        )

    taken = trainer(3).snapshot()
    with pytest.raises(mbgd.UsageError, match=r"1\.weight: float32 \(3, 64\) before, float32 \(4, 64\) now"):
        trainer(4).restore(taken)


@pytest.mark.parametrize(
    ("file", "name", "tensor", "message"),
    [
        ("model", "1.weight", torch.zeros(1), r"1\.weight: float32 \(1,\) before"),
        ("model", "1.bias", torch.zeros(3, dtype=torch.float64), r"1\.bias: float64 \(3,\) before"),
        ("model", "extra", torch.zeros(3), "extra: .* before, None now"),
        ("optimizer", "0.exp_avg", torch.zeros(1), r"0\.exp_avg: shape \(1,\), of a parameter \(3, 64\)"),
        ("optimizer", "9.exp_avg", torch.zeros(1), "there are 2 parameters"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(file: str, name: str, tensor: Any, message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(ignore_index=3),
        torch.optim.AdamW(model.parameters(), fused=True),
        mbgd.Data(train=mbgd.InMemory(torch.randn(8, 64), torch.zeros(8, dtype=torch.int64))),
        mbgd.Settings(steps=1),
    )
    trainer.fit()
    taken = trainer.snapshot()
    before = weights_sha256(model)
    changed = {key: dict(of_file) for key, of_file in taken.tensors.items()}
    changed[file][name] = tensor
    changed["model"]["1.bias"] = changed["model"]["1.bias"] + 1
    with pytest.raises(mbgd.UsageError, match=message):
        trainer.restore(Snapshot(5, changed, taken.values))
    assert weights_sha256(model) == before
    assert trainer.state.step == 1


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
    "epochs=14",  # 9 steps of 8 micro-batches each: 126 steps of 80 ms on one worker
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


def alone(folder: Path, *more: str) -> tuple[int, str]:
    """One worker without torchrun; (exit code, what it printed)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, str(ROOT / "train.py"), *OVERRIDES, *more]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


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
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_killed_and_preempted_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (tmp_path / "slow.py").write_text(SLOW)
    code, out = alone(tmp_path, f"run.dir={whole}")
    assert code == 0, out

    killed = start(tmp_path, 2, f"run.dir={broken}")  # torchrun dies; the workers notice, save and end
    wait_for_step(broken, 8)
    os.kill(killed.pid, signal.SIGKILL)
    out, _ = killed.communicate(timeout=60)  # until nobody has its output open any more
    assert "stopped by a signal after step" in out
    saved = checkpoint.step_of(checkpoint.complete(broken / "checkpoints")[0])
    assert saved >= 8
    assert not (broken / "summary.json").exists()
    assert not list(broken.glob("checkpoints/*broken*"))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # as a crash may leave it

    restarted = start(tmp_path, 3, f"run.dir={broken}", torchrun=("--max-restarts", "1"))  # a worker dies
    wait_for_step(broken, saved + 7)
    os.kill(workers_of(restarted)[1], signal.SIGKILL)
    wait_for_step(broken, saved + 12)
    os.kill(workers_of(restarted)[0], signal.SIGUSR1)  # one worker is told; all save and stop, and torchrun gives up
    out, _ = restarted.communicate(timeout=120)
    assert restarted.returncode != 0
    assert "stopped by a signal after step" in out
    saved_before, saved = saved, checkpoint.step_of(checkpoint.complete(broken / "checkpoints")[0])
    assert saved >= saved_before + 12

    code, out = alone(tmp_path, f"run.dir={broken}")
    assert code == 0, out
    assert f"resume      step {saved}" in out
    assert history(broken) == history(whole)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, broken)]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]

    (broken / "summary.json").unlink()  # as if it had died between its last checkpoint and its results
    assert alone(tmp_path, f"run.dir={broken}")[0] == 0
    assert json.loads((broken / "summary.json").read_text())["weights_sha256"] == summaries[0]["weights_sha256"]
    assert not list(broken.glob("checkpoints/*broken*"))

    assert "holds this run already, complete" in finish(start(tmp_path, 2, f"run.dir={broken}"))

    code, out = alone(tmp_path, f"run.dir={broken}", "optimizer.lr=0.5", "seed=3")
    assert code != 0
    assert "optimizer.lr: 0.01 before, 0.5 now" in out
    assert "seed: 0 before, 3 now" in out
    assert history(broken) == history(whole)
