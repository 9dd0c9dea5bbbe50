"""Checkpoints on disk. Each is complete and verifiable, or absent.

`checkpoints/step-000001200/` holds `model.safetensors`, `optimizer.safetensors`, `objective.safetensors` if the
objective has state, and `manifest.json` (sizes and hashes of the files, the step, and the run's identity). It is
written under a temporary name, flushed to the disk file by file, the manifest last, and then renamed. It contains no
pickle, so loading one runs no code.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mbgd.checkpoints import manifest
from mbgd.checkpoints.manifest import FORMAT
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config.must_match import AS_BEFORE
from mbgd.errors import UsageError
from mbgd.files import folder_lock, strict_json
from mbgd.files import reading as files
from mbgd.files.reading import Unreadable, check_regular
from mbgd.files.run_files import METRICS, OBSERVED
from mbgd.files.run_files import seal as _seal
from mbgd.text.escaping import plain

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
BROKEN = ".broken"


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write(folder: Path, snapshot: Snapshot, identity: Mapping[str, Any], *, durable: bool = True) -> Path:
    """Write a complete checkpoint under `folder`; durable: it survives a power failure from then on.

    The run's metrics and what observers have written are flushed first, so that a checkpoint implies the lines before
    it. If there is a checkpoint of the same step that verifies, it is kept: the run went on from it. OSError where the
    run's folder is gone.
    """
    flush = files.flush if durable else _do_not_flush
    folder_lock.check(folder.parent)
    if not folder.exists():
        folder.mkdir()  # not its parents: a run's folder that was deleted is not made again
        flush(folder.parent)
    for lines in (folder.parent / METRICS, *(folder.parent / OBSERVED).glob("*.jsonl")):
        if durable and lines.is_file():
            flush(lines)
    final = folder / name_of(snapshot.step)
    if final.exists():
        if verify(final) is None:
            return final
        set_aside(final)
    temporary = folder / f"{final.name}.{os.getpid()}{TEMPORARY}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        written = {}
        for name, tensors in snapshot.tensors.items():
            path = temporary / f"{name}{SUFFIX}"
            save_file(dict(tensors), path)
            flush(path)
            written[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        content = {
            "format": FORMAT,
            "step": snapshot.step,
            "identity": dict(identity),
            "values": json.loads(strict_json.dumps(snapshot.values)),
            "files": written,
        }
        (temporary / MANIFEST).write_text(json.dumps({**content, "sha256": _seal(content)}, indent=1))
        flush(temporary / MANIFEST)
        flush(temporary)
        folder_lock.check(folder.parent)
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def remove(path: Path) -> None:
    doomed = path.with_name(f"{path.name}{TEMPORARY}")  # so that a half-deleted one does not count as broken
    path.rename(doomed)
    shutil.rmtree(doomed)


def complete(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, by name, newest first; their content is not checked."""
    return sorted((path for path in folder.glob("step-*") if is_named_as_one(path)), key=step_of, reverse=True)


def is_named_as_one(path: Path) -> bool:
    return re.fullmatch("step-[0-9]{9,16}", path.name) is not None and name_of(step_of(path)) == path.name


def newest(folder: Path, *, whole_run: bool = False) -> Path | None:
    """The newest checkpoint that verifies. Broken ones are renamed, with a message; temporary folders are removed.

    Only the run that holds the folder's lock may call this. whole_run: as for `verify`.
    """
    for leftover in folder.glob(f"step-*{TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in complete(folder):
        problem = verify(path, whole_run=whole_run)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is broken ({problem}); it is now {set_aside(path).name}", flush=True)
    return None


def newest_of_another(folder: Path) -> Path | None:
    """The newest checkpoint of another run that verifies. This changes nothing there: that run may be saving now."""
    for path in complete(folder):
        problem = verify(path, whole_run=True)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is broken ({problem}) and is passed over", flush=True)
    return None


def named(path: Path, key: str) -> Path | None:
    """The checkpoint that a user names by `key`=PATH: that folder, or the newest of the run there, if any.

    Both are only read. UsageError for a folder that is a broken checkpoint.
    """
    if not os.path.lexists(path / MANIFEST):
        return newest_of_another(path / "checkpoints")
    if problem := verify(path, whole_run=True):
        raise UsageError(f"{key}={plain(path)}: the checkpoint is broken ({problem}). Name another one.")
    return path


def best(folder: Path, metric: str, *, highest: bool) -> tuple[Path, float] | None:
    """(checkpoint, value) with the best `metric` from an evaluation at its step; among equal values the earliest."""
    found = None
    for path in reversed(complete(folder)):
        try:
            value = _manifest(path)["values"]["evaluation"][metric]
        except (OSError, ValueError, KeyError):
            continue  # broken, or without an evaluation at its step
        if value is not None and is_better(value, None if found is None else found[1], highest=highest):
            found = path, value
    return found


def is_better(value: float, than: float | None, *, highest: bool) -> bool:
    """nan is never better."""
    if than is None:
        return not math.isnan(value)
    return value > than if highest else value < than


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one; returns the new path."""
    return files.set_aside(path, BROKEN)


def verify(path: Path, *, whole_run: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None. whole_run: it must hold everything that a trainer resumes from."""
    try:
        for name, wanted in _manifest(path, whole_run=whole_run)["files"].items():
            check_regular(path / name)
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if files.sha256(path / name) != wanted["sha256"]:
                return f"{name} has other content than was written"
            with safe_open(path / name, "pt"):
                pass  # opening it checks the sizes and offsets in its header
    except Unreadable as error:
        return f"{plain(error.path.name)}: {error.reason}"
    except (OSError, ValueError, SafetensorError) as error:
        return plain(f"{type(error).__name__}: {error}" if type(error) is not ValueError else str(error))
    return None


def read_manifest(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, identity) of a checkpoint that verifies."""
    content = _manifest(path)
    return content["step"], content["identity"]


def read(path: Path) -> tuple[Snapshot, dict[str, Any]]:
    """(snapshot, identity) of a checkpoint that verifies."""
    content, tensors = _manifest(path), {}
    for name in content["files"]:
        check_regular(path / name)
        tensors[name.removesuffix(SUFFIX)] = load_file(path / name)
    return Snapshot(content["step"], tensors, content["values"]), content["identity"]


def _manifest(path: Path, *, whole_run: bool = False) -> dict[str, Any]:
    """The manifest, checked; the files that it names are not. OSError or ValueError where something is wrong."""
    if path.is_symlink() or not path.is_dir():
        raise ValueError("it is not a folder")
    content = files.parse_json(files.read(path / MANIFEST, files.MOST_JSON_BYTES))
    return manifest.check(content, step_of(path) if is_named_as_one(path) else None, whole_run=whole_run)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ, with both values."""
    before = {key: AS_BEFORE[key] for key in AS_BEFORE.keys() & now.keys()} | dict(before)
    return [
        plain(f"{key}: {before.get(key)} before, {now.get(key)} now")
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _do_not_flush(path: Path) -> None:
    pass
