"""The power fails while a run writes to its folder: a checkpoint that is there has every line that it implies.

As ALICE did (Pillai et al., OSDI 2014): what a whole run does to the disk is recorded, and every prefix of it replayed
on a model of a disk. What was written to a file is sure to be there once the file was flushed, an entry of a folder (a
new name, a rename, a removal) once the folder was; of the rest anything may have become.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from mbgd.checkpoints import format as checkpoint
from mbgd.tracking.json_lines import Line, read_lines

from small_runs import NUM_STEPS, PLAIN, lines, train

LOSSES = ("kept", "dropped", "torn", "zeroed")
"""What may have become of content that was not flushed."""

Operation = tuple[str, Any, Any]


@dataclass
class File:
    content: bytes = b""
    num_flushed: int = 0

    def after(self, loss: str) -> bytes:
        sure, rest = self.content[: self.num_flushed], self.content[self.num_flushed :]
        left = {"kept": rest, "dropped": b"", "torn": rest[: len(rest) // 2], "zeroed": bytes(len(rest))}
        return sure + left[loss]


@dataclass
class Folder:
    entries: "dict[str, File | Folder]" = field(default_factory=dict)
    flushed: "dict[str, File | Folder]" = field(default_factory=dict)

    def after(self, loss: str, *, entries_kept: bool, target: Path) -> None:
        """Make the folder as a crash now may leave it."""
        target.mkdir(exist_ok=True)
        for name, one in (self.entries if entries_kept else self.flushed).items():
            if isinstance(one, File):
                (target / name).write_bytes(one.after(loss))
            else:
                one.after(loss, entries_kept=entries_kept, target=target / name)


class Disk:
    """The model. Files are numbered by the recorder, so that renames do not matter to who has one open."""

    def __init__(self) -> None:
        self.root, self._files = Folder(), dict[int, File]()

    def folder(self, path: Path) -> Folder:
        found = self.root
        for part in path.parts:
            inner = found.entries[part]
            assert isinstance(inner, Folder)
            found = inner
        return found

    def apply(self, operation: Operation) -> None:
        kind, what, argument = operation
        if kind == "mkdir":
            self.folder(what.parent).entries[what.name] = Folder()
        elif kind == "create":
            self.folder(what.parent).entries[what.name] = self._files[argument] = File()
        elif kind == "append":
            self._files[what].content += argument
        elif kind == "flush":
            self._files[what].num_flushed = max(self._files[what].num_flushed, argument)
        elif kind == "flush folder":
            self.folder(what).flushed = dict(self.folder(what).entries)
        elif kind == "rename":
            self.folder(argument.parent).entries[argument.name] = self.folder(what.parent).entries.pop(what.name)
        else:
            self.folder(what.parent).entries.pop(what.name, None)


class Writer:
    """A file that notes what is written to it."""

    def __init__(self, file: Any, recorder: "Recorder", number: int) -> None:
        self._file, self._recorder, self._number = file, recorder, number

    def write(self, content: Any) -> Any:
        self._recorder.append(self._number, content.encode() if isinstance(content, str) else content)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Recorder:
    """Stands between the program and the disk, and notes what is done in `root`, in order."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.operations = root, list[Operation]()
        self._numbers: dict[Path, int] = {}
        self._lengths: list[int] = []
        self._open: dict[int, Path | int] = {}
        real_open, real_fdopen = os.open, os.fdopen
        real_path_open, real_save, real_rmtree = Path.open, checkpoint.save_file, shutil.rmtree

        def open_(path: Any, flags: int, *more: Any, **keywords: Any) -> int:
            existed = os.path.lexists(path)
            descriptor = real_open(path, flags, *more, **keywords)
            self._note_opened(descriptor, Path(path), is_new=not existed)
            return descriptor

        def path_open(path: Path, mode: str = "r", *more: Any, **keywords: Any) -> Any:
            existed = os.path.lexists(path)
            file = real_path_open(path, mode, *more, **keywords)
            if mode[0] not in "xwa" or root not in path.parents:
                return file
            return Writer(file, self, self._note_opened(file.fileno(), path, is_new=not existed))

        def fdopen(descriptor: int, mode: str, *more: Any) -> Any:
            file, number = real_fdopen(descriptor, mode, *more), self._open.get(descriptor)
            return Writer(file, self, number) if mode == "ab" and isinstance(number, int) else file

        def save(tensors: Any, path: Path) -> None:
            real_save(tensors, path)
            self.append(self._create(path), path.read_bytes())

        def fsync(descriptor: int) -> None:
            opened = self._open.get(descriptor)
            if isinstance(opened, int):
                self.operations.append(("flush", opened, self._lengths[opened]))
            elif opened is not None:
                self.operations.append(("flush folder", opened, None))

        def rmtree(path: Path, **keywords: Any) -> None:
            self._remove(Path(path))
            real_rmtree(path, **keywords)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "fdopen", fdopen)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "open", path_open)
        monkeypatch.setattr(checkpoint, "save_file", save)
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        self._patch_names(monkeypatch)

    def _patch_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_rename, real_replace, real_unlink, real_mkdir = Path.rename, Path.replace, Path.unlink, Path.mkdir

        def rename(path: Path, target: Path) -> Path:
            self._rename(path, target)
            return real_rename(path, target)

        def replace(path: Path, target: Path) -> Path:
            self._rename(path, target)
            return real_replace(path, target)

        def unlink(path: Path, missing_ok: bool = False) -> None:
            self._remove(path)
            real_unlink(path, missing_ok)

        def mkdir(path: Path, *more: Any, **keywords: Any) -> None:
            existed = path.exists()
            real_mkdir(path, *more, **keywords)
            if not existed and self.root in path.parents:
                self.operations.append(("mkdir", path.relative_to(self.root), None))

        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(Path, "unlink", unlink)
        monkeypatch.setattr(Path, "mkdir", mkdir)

    def append(self, number: int, content: bytes) -> None:
        self._lengths[number] += len(content)
        self.operations.append(("append", number, bytes(content)))

    def _create(self, path: Path) -> int:
        number = self._numbers[path] = len(self._lengths)
        self._lengths.append(0)
        self.operations.append(("create", path.relative_to(self.root), number))
        return number

    def _note_opened(self, descriptor: int, path: Path, *, is_new: bool) -> int:
        self._open.pop(descriptor, None)
        if path == self.root or (self.root in path.parents and path.is_dir()):
            self._open[descriptor] = path.relative_to(self.root)
        elif self.root in path.parents:
            number = self._create(path) if is_new else self._numbers[path]
            self._open[descriptor] = number
            return number
        return -1

    def _rename(self, path: Path, target: Path) -> None:
        if self.root in path.parents:
            self.operations.append(("rename", path.relative_to(self.root), target.relative_to(self.root)))
            moved = {
                target / p.relative_to(path): n for p, n in self._numbers.items() if p == path or path in p.parents
            }
            self._numbers = {p: n for p, n in self._numbers.items() if p != path and path not in p.parents} | moved

    def _remove(self, path: Path) -> None:
        if self.root in path.parents and os.path.lexists(path):
            self.operations.append(("remove", path.relative_to(self.root), None))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Operation]:
    """What a run does to the disk that begins in a folder that is not there, stops, and goes on to its end."""
    root = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        operations = Recorder(root, patch).operations
        train(root / "runs/one", stop_at=5)
        train(root / "runs/one")
    return operations


@contextmanager
def crashed(operations: list[Operation], target: Path, loss: str, *, entries_kept: bool) -> Iterator[Path]:
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    disk.root.after(loss, entries_kept=entries_kept, target=target)
    yield target / "runs/one"
    shutil.rmtree(target)


def implied(operations: list[Operation], step: int) -> list[dict[str, Any]]:
    """The lines up to this step that were logged by then; a run that goes on writes those before anew."""
    numbers = {n for kind, path, n in operations if kind == "create" and path.name.startswith("metrics.jsonl")}
    contents = b"".join(content for kind, n, content in operations if kind == "append" and n in numbers)
    logged = [json.loads(line) for line in contents.splitlines()]
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in logged:
        found[line["step"], "train/loss" in line] = line
    return [line for (at, _), line in found.items() if at <= step]


def violations(operations: list[Operation], folder: Path) -> list[str]:
    """What a crash has left that may not be."""
    found = []
    path = checkpoint.newest(folder / "checkpoints", whole_run=True)
    if list(folder.glob("checkpoints/*broken*")):
        found.append("a crash has broken a checkpoint")
    if path is not None:
        there: list[Line] = []
        with suppress(FileNotFoundError):
            there = [line for line in read_lines(folder / "metrics.jsonl") if isinstance(line, Line)]
        step = checkpoint.step_of(path)
        wanted = [line["step"] for line in implied(operations, step)]
        if [line.step for line in there if line.step <= step] != wanted:
            found.append(f"lines up to step {step} are missing")
        if not (folder / "config.yaml").exists():
            found.append("the configuration is missing")
    if (folder / "config.yaml").exists() and yaml.safe_load((folder / "config.yaml").read_text()) != PLAIN:
        found.append("the configuration is not whole")
    if (folder / "summary.json").exists():
        json.loads((folder / "summary.json").read_text())
        with safe_open(folder / "model.safetensors", "pt"):
            pass
    return found


def test_after_a_power_failure_at_any_point_a_checkpoint_has_its_lines(
    tmp_path: Path, recorded: list[Operation]
) -> None:
    steps, states = set(), 0
    for length in range(len(recorded) + 1):
        for loss, entries_kept in (*((loss, True) for loss in LOSSES), (LOSSES[length % 4], False)):
            with crashed(recorded[:length], tmp_path / "after", loss, entries_kept=entries_kept) as folder:
                assert violations(recorded[:length], folder) == [], f"{length}, {loss}, {entries_kept}"
                newest = checkpoint.complete(folder / "checkpoints")
                steps.add(checkpoint.step_of(newest[0]) if newest else None)
                states += 1
    assert steps == {None, 2, 4, 5, 6, 8}
    assert states >= 700


def test_and_the_run_goes_on_from_there(tmp_path: Path, recorded: list[Operation]) -> None:
    wanted = train(tmp_path / "whole")
    for number, length in enumerate(range(0, len(recorded) + 1, 9)):
        loss, entries_kept = LOSSES[number % 4], number % 3 == 0
        with crashed(recorded[:length], tmp_path / str(number), loss, entries_kept=entries_kept) as folder:
            assert train(folder) in (wanted, None)
            assert lines(folder) == lines(tmp_path / "whole")
            assert lines(folder)[-1]["step"] == NUM_STEPS


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml.tmp"])
def test_without_its_flushes_lines_would_be_lost(tmp_path: Path, recorded: list[Operation], name: str) -> None:
    """The control: the replay finds fault with a run that does not flush its files or, below, its folder."""
    numbers = {n for kind, path, n in recorded if kind == "create" and path.name.startswith(name)}
    unflushed = [one for one in recorded if not (one[0] == "flush" and one[1] in numbers)]
    assert any(found(unflushed, tmp_path))


@pytest.mark.parametrize("folder", ["runs", "runs/one"])
def test_without_flushing_the_folder_its_entries_would_be_lost(
    tmp_path: Path, recorded: list[Operation], folder: str
) -> None:
    unflushed = [one for one in recorded if one[:2] != ("flush folder", Path(folder))]
    with crashed(unflushed, tmp_path / "after", "kept", entries_kept=False) as after:
        assert not (after / "metrics.jsonl").exists()


def found(operations: list[Operation], tmp_path: Path) -> Iterator[list[str]]:
    for length in range(0, len(operations) + 1, 3):
        with crashed(operations[:length], tmp_path / "after", "dropped", entries_kept=True) as folder:
            yield violations(operations[:length], folder)
