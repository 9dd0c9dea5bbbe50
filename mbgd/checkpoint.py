"""Checkpoints on disk: a folder is there whole and verified, or it is not there.

`checkpoints/step-000001200/` holds `model.safetensors`, `optimizer.safetensors` and `manifest.json` (sizes and hashes
of the others, the step, and what the run was). It is written under a temporary name, flushed to the disk file by file,
the manifest last, and then renamed. There is no pickle in it, so that loading one runs no code.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mbgd.config import Checkpoint as Settings
from mbgd.errors import UsageError

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
BROKEN = ".broken"


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after so many steps, in memory of its own."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file (model, optimizer), then by name."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What JSON can hold."""


class Checkpoints(Protocol):
    """Takes the snapshots of a run."""

    def due(self, step: int) -> bool:
        """Whether a snapshot is wanted after so many steps."""

    def save(self, snapshot: Snapshot) -> None:
        """Take it; writing goes on beside training."""

    def close(self) -> None:
        """Wait until everything is written."""


class NoCheckpoints:
    """Takes none."""

    def due(self, step: int) -> bool:
        return False

    def save(self, snapshot: Snapshot) -> None:
        pass

    def close(self) -> None:
        pass


class CheckpointFolder:
    """The checkpoints of one run, written by its main worker in a thread beside training."""

    def __init__(self, path: Path, settings: Settings, identity: Mapping[str, Any]) -> None:
        """identity: what the run's course depends on, kept in the manifest; a resumed run's must be the same."""
        self._path, self._settings, self._identity = path, settings, dict(identity)
        self._writer: threading.Thread | None = None
        self._failure: OSError | SafetensorError | None = None
        self._last_time = time.monotonic()
        self._last_step = -1

    def due(self, step: int) -> bool:
        every_steps, every_seconds = self._settings.every_steps, self._settings.every_seconds
        if every_steps is not None and step % every_steps == 0:
            return True
        return every_seconds is not None and time.monotonic() - self._last_time >= every_seconds

    def save(self, snapshot: Snapshot) -> None:
        """Raises UsageError where an earlier one could not be written and `checkpoint.required` is set."""
        if snapshot.step == self._last_step:
            return
        self.close()  # one at a time: where the disk is slower than the schedule, training waits for it
        self._last_step, self._last_time = snapshot.step, time.monotonic()
        self._writer = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint writer")
        self._writer.start()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            message = (
                f"a checkpoint could not be written to {self._path}: {failure}. Older checkpoints are as they were."
            )
            if self._settings.required:
                raise UsageError(f"{message} Training stops because of checkpoint.required=true.")
            print(f"warning: {message} Training goes on.", flush=True)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(self._path, snapshot, self._identity)
            self._remove_old_ones()
        except (OSError, SafetensorError) as error:
            self._failure = error

    def _remove_old_ones(self) -> None:
        for path in complete(self._path)[self._settings.keep :]:
            doomed = path.with_name(f"{path.name}{TEMPORARY}")  # so that a half-deleted one is not taken for broken
            path.rename(doomed)
            shutil.rmtree(doomed)


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def write(folder: Path, snapshot: Snapshot, identity: Mapping[str, Any]) -> Path:
    """Write a checkpoint under `folder`; afterwards it is there whole, even if the power fails now.

    One of the same step that verifies is left as it is: the run went on from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / name_of(snapshot.step)
    if final.exists():
        if verify(final) is None:
            return final
        set_aside(final)
    temporary = folder / f"{final.name}.{os.getpid()}{TEMPORARY}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = {}
        for name, tensors in snapshot.tensors.items():
            path = temporary / f"{name}.safetensors"
            save_file(dict(tensors), path)
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "identity": dict(identity),
            "values": dict(snapshot.values),
            "files": files,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(temporary / MANIFEST)
        _flush(temporary)
        temporary.rename(final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def complete(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, newest first; what is in them is not looked at."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies. Broken ones are put aside, with a message; leftovers are removed."""
    for leftover in folder.glob(f"step-*{TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in complete(folder):
        problem = verify(path)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is broken ({problem}); it is now {set_aside(path).name}", flush=True)
    return None


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is no longer taken for one; the new path."""
    number = 0
    while (aside := path.with_name(f"{path.name}{BROKEN}-{number}")).exists():
        number += 1
    return path.rename(aside)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, not {FORMAT}"
        for name, wanted in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if _sha256(path / name) != wanted["sha256"]:
                return f"{name} has other content than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_manifest(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, identity) of a checkpoint."""
    manifest = json.loads((path / MANIFEST).read_text())
    return manifest["step"], manifest["identity"]


def read(path: Path) -> tuple[Snapshot, dict[str, Any]]:
    """(snapshot, identity) of a checkpoint that verifies."""
    manifest = json.loads((path / MANIFEST).read_text())
    tensors = {Path(name).stem: load_file(path / name) for name in manifest["files"]}
    return Snapshot(manifest["step"], tensors, manifest["values"]), manifest["identity"]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two identities do not share, by key."""
    return [
        f"{key}: {before.get(key)} before, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Until the file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
