"""The tier in the host's memory: this user's own, of this run, the same on every host; or the disk is gone on from."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mbgd
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import memory_tier
from mbgd.checkpoints.memory_tier import memory_path, newest_in_memory, remove_memory
from mbgd.checkpoints.saving import CheckpointFolder, DiskAndMemory, MemoryFolder, create, save_last
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config import Checkpoint

from processes import run_workers
from runs import run

NOBODY = 65534
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="another user is needed: root and setpriv"
)


def snapshot(step: int, weight: float = 0.0, **values: Any) -> Snapshot:
    return Snapshot(step, {"model": {"weight": torch.full((3,), weight)}}, values)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Where the snapshots of the run in tmp_path/run lie in the real memory of this host; removed at the end."""
    path = memory_path(tmp_path / "run")
    assert path.parent == Path("/dev/shm")
    assert not os.path.lexists(path)
    yield path
    if path.is_symlink() or path.is_fifo() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def newest(tmp_path: Path, identity: dict[str, Any] | None = None) -> Path | None:
    return newest_in_memory(tmp_path / "run", mbgd.Workers(), identity or {})


# Two hosts


def two_hosts(workers: mbgd.Workers, folder: str, held: list[dict[int, float]]) -> tuple[str | None, list[str]]:
    """Each worker is a host of its own; (the newest that both have, what is there once all but that is removed)."""
    memory_tier.HOST_MEMORY = Path(folder, f"host-{workers.rank}")
    memory_tier.HOST_MEMORY.mkdir()
    first, run = replace(workers, local_rank=0), Path(folder, "run")
    path = memory_path(run)
    path.mkdir(mode=0o700)
    for step, weight in held[workers.rank].items():
        measured = {
            "metrics": {"time/step_seconds": 0.1 * (1 + workers.rank)},
            "tracking": {"wandb": str(workers.rank)},
        }
        checkpoint.write(path, snapshot(step, weight, run={"batch.size": 5}, **measured), {"seed": 1}, durable=False)
    found = newest_in_memory(run, first, {"seed": 1})
    workers.barrier()
    remove_memory(run, first, but=found)
    return None if found is None else found.name, sorted(one.name for one in path.glob("*"))


@pytest.mark.parametrize(
    ("held", "newest"),
    [
        ([{4: 0.5, 5: 0.25}, {4: 0.5, 5: 0.25}], 5),
        ([{4: 0.5, 5: 0.25}, {4: 0.5, 5: 0.125}], 4),  # one of them went on from an older state
        ([{4: 0.5, 5: 0.25}, {5: 0.125}], None),
        ([{4: 0.5}, {}], None),
    ],
)
def test_hosts_are_matched_by_content(tmp_path: Path, held: list[dict[int, float]], newest: int | None) -> None:
    results = run_workers(two_hosts, 2, str(tmp_path), held)
    wanted = None if newest is None else checkpoint.name_of(newest)
    assert [name for name, _ in results] == [wanted, wanted]
    assert [there for _, there in results] == [[wanted] if wanted else []] * 2


def end_of_two_hosts(workers: mbgd.Workers, folder: str, disk_fails: bool) -> bool:
    """Whether this host's memory is there after the last save."""
    memory_tier.HOST_MEMORY = Path(folder, f"host-{workers.rank}")
    memory_tier.HOST_MEMORY.mkdir()
    disk = Path(folder, "disk")
    if disk_fails and workers.is_main:
        disk.touch()
    settings = Checkpoint(memory_every_steps=1, every_seconds=None)
    kept = create(settings, Path(folder, "run"), disk, {}, replace(workers, local_rank=0))
    problem = save_last(kept, workers, 7, {}, lambda: snapshot(7))
    assert bool(problem) == disk_fails
    return (memory_path(Path(folder, "run")) / "step-000000007").exists()


@pytest.mark.parametrize("disk_fails", [False, True])
def test_every_host_keeps_its_memory_until_the_disk_has_the_last_state(tmp_path: Path, disk_fails: bool) -> None:
    assert run_workers(end_of_two_hosts, 2, str(tmp_path), disk_fails) == [disk_fails] * 2


# This run's


def test_a_snapshot_of_another_course_does_not_count(tmp_path: Path, memory: Path) -> None:
    memory.mkdir(mode=0o700)
    checkpoint.write(memory, snapshot(5), {"seed": 1, "data": [1, 2]}, durable=False)
    checkpoint.write(memory, snapshot(6), {"seed": 2, "data": [1, 2]}, durable=False)
    found = newest(tmp_path, {"seed": 1, "data": (1, 2)})
    assert found == memory / "step-000000005"


SHORT = ["tracking.quiet=true", "tracking.report=false", "checkpoint.every_seconds=null", "log_every_steps=1"]


def stopped_run(tmp_path: Path, *more: str) -> None:
    with pytest.raises(mbgd.errors.Preempted):
        run(tmp_path / "run", *SHORT, *more, stop_at=3)


def weights(folder: Path) -> str:
    summary: str = json.loads((folder / "summary.json").read_text())["weights_sha256"]
    return summary


def put(memory: Path, taken: Path, step: int, change: Any) -> Path:
    """A snapshot in the host's memory, made of a checkpoint on disk."""
    memory.mkdir(mode=0o700, parents=True, exist_ok=True)
    read, identity = checkpoint.read(taken)
    tensors = {file: dict(of_file) for file, of_file in read.tensors.items()}
    change(tensors)
    return checkpoint.write(memory, Snapshot(step, tensors, read.values), identity, durable=False)


def planted(tensors: Any) -> None:
    for name, tensor in tensors["model"].items():
        tensors["model"][name] = torch.full_like(tensor, 1234.5)


def renamed(tensors: Any) -> None:
    tensors["model"] = {f"other.{name}": tensor for name, tensor in tensors["model"].items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, *SHORT)
    return weights(folder)


def test_what_does_not_fit_does_not_block(
    tmp_path: Path, memory: Path, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_run(tmp_path, "checkpoint.memory_every_steps=2")
    put(memory, tmp_path / "run/checkpoints/step-000000003", 5, renamed)
    run(tmp_path / "run", *SHORT, "checkpoint.memory_every_steps=2")
    assert "The run goes on from the disk instead" in capsys.readouterr().out
    assert weights(tmp_path / "run") == undisturbed
    assert not memory.exists()


def test_nothing_is_read_where_the_tier_is_off(tmp_path: Path, memory: Path, undisturbed: str) -> None:
    stopped_run(tmp_path)
    put(memory, tmp_path / "run/checkpoints/step-000000003", 5, planted)
    run(tmp_path / "run", *SHORT)
    assert weights(tmp_path / "run") == undisturbed
    assert not memory.exists(), "this user's own, which nobody else would remove"


def test_what_the_run_does_not_go_on_from_is_forgotten(tmp_path: Path, memory: Path) -> None:
    """Or the snapshots to come would be older than it, and go at once."""
    memory.mkdir(mode=0o700)
    for step in (4, 5, 9):
        checkpoint.write(memory, snapshot(step), {}, durable=False)
    remove_memory(tmp_path / "run", mbgd.Workers(), but=memory / "step-000000005")
    assert [one.name for one in memory.iterdir()] == ["step-000000005"]
    remove_memory(tmp_path / "run", mbgd.Workers(), but=tmp_path / "run/checkpoints/step-000000004")
    assert not memory.exists()


# This user's own


@needs_root
@pytest.mark.parametrize("every", ["null", "2"])
def test_what_another_user_has_planted_is_not_read(
    tmp_path: Path, memory: Path, undisturbed: str, every: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_run(tmp_path)
    source = put(tmp_path / "planted", tmp_path / "run/checkpoints/step-000000003", 5, planted)
    content = subprocess.run(["tar", "-C", str(source.parent), "-c", "."], capture_output=True, check=True).stdout
    other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    plant = 'mkdir "$0" && tar --no-same-permissions -x -C "$0"'
    subprocess.run([*other, "sh", "-c", plant, str(memory)], cwd="/", input=content, check=True, timeout=60)
    assert memory.stat().st_uid == NOBODY
    run(tmp_path / "run", *SHORT, f"checkpoint.memory_every_steps={every}")
    assert weights(tmp_path / "run") == undisturbed
    assert (memory / source.name).exists(), "it is left alone"
    said = capsys.readouterr().out
    assert ("belongs to another user" in said) == (every != "null")
    assert ("no snapshots are kept in this host's memory" in said) == (every != "null")


@pytest.mark.parametrize("every", ["null", "2"])
def test_a_link_is_not_followed(
    tmp_path: Path, memory: Path, undisturbed: str, every: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To another run's checkpoints: neither gone on from, nor removed."""
    stopped_run(tmp_path)
    other = tmp_path / "other/checkpoints"
    put(other, tmp_path / "run/checkpoints/step-000000003", 5, planted)
    memory.symlink_to(other)
    run(tmp_path / "run", *SHORT, f"checkpoint.memory_every_steps={every}")
    assert weights(tmp_path / "run") == undisturbed
    assert [one.name for one in other.iterdir()] == ["step-000000005"]
    assert memory.is_symlink()
    assert ("is not a folder of this user" in capsys.readouterr().out) == (every != "null")


def test_a_pipe_hangs_nobody(tmp_path: Path, memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(memory)
    assert newest(tmp_path) is None
    assert "is not a folder" in capsys.readouterr().out
    memory.unlink()
    memory.mkdir(mode=0o700)
    (memory / "step-000000009").mkdir()
    os.mkfifo(memory / "step-000000009/manifest.json")
    os.mkfifo(memory / "step-000000010")
    path = checkpoint.write(memory, snapshot(8), {}, durable=False)
    assert newest(tmp_path) == path


def test_a_folder_that_others_may_enter_is_not_trusted(
    tmp_path: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.mkdir()
    memory.chmod(0o755)
    checkpoint.write(memory, snapshot(8), {}, durable=False)
    assert newest(tmp_path) is None
    assert "may be entered by others (mode 755)" in capsys.readouterr().out
    assert memory_tier.make(memory)
    memory.chmod(0o700)
    assert newest(tmp_path) == memory / "step-000000008"


@needs_root
@pytest.mark.parametrize("what", ["manifest.json", "model.safetensors", "."])
def test_a_file_of_another_user_does_not_count(tmp_path: Path, memory: Path, what: str) -> None:
    memory.mkdir(mode=0o700)
    path = checkpoint.write(memory, snapshot(8), {}, durable=False)
    assert newest(tmp_path) == path
    os.chown(path / what, NOBODY, NOBODY)
    assert newest(tmp_path) is None


def test_links_within_do_not_count(tmp_path: Path, memory: Path) -> None:
    memory.mkdir(mode=0o700)
    elsewhere = checkpoint.write(tmp_path / "elsewhere", snapshot(9), {}, durable=False)
    (memory / "step-000000009").symlink_to(elsewhere)
    path = checkpoint.write(memory, snapshot(8), {}, durable=False)
    assert newest(tmp_path) == path
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    assert newest(tmp_path) is None


def test_a_place_where_anyone_can_rename_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(memory_tier, "HOST_MEMORY", tmp_path / "shm")
    path = memory_path(tmp_path / "run")
    (tmp_path / "shm").chmod(0o777)
    assert "anyone can put another folder" in memory_tier.make(path)
    (tmp_path / "shm").chmod(0o777 | stat.S_ISVTX)
    assert memory_tier.make(path) == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    kept = DiskAndMemory(CheckpointFolder(tmp_path / "disk", Checkpoint(), {}), MemoryFolder(path, 1, {}))
    kept.after_step(1, {}, lambda: snapshot(1))
    assert save_last(kept, mbgd.Workers(), 2, {}, lambda: snapshot(2)) == ""
    assert not path.exists()
    assert checkpoint.newest(tmp_path / "disk") == tmp_path / "disk/step-000000002"
