"""Checkpoints on disk: a folder is there whole and verified, or it is not there.

`checkpoints/step-000001200/` holds `model.safetensors`, `optimizer.safetensors` and `manifest.json` (sizes and hashes
of all, the step, and what the run was). It is written under a temporary name, flushed to the disk file by file,
the manifest last, and then renamed. There is no pickle in it, so that loading one runs no code.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mbgd.snapshot import Snapshot

FORMAT = 1
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
BROKEN = ".broken"


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write(folder: Path, snapshot: Snapshot, identity: Mapping[str, Any], *, durable: bool = True) -> Path:
    """Write a checkpoint under `folder`; afterwards it is there whole, if `durable` even if the power fails now.

    One of the same step that verifies is left as it is: the run went on from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flush = _flush if durable else _do_not_flush
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
            path = temporary / f"{name}{SUFFIX}"
            save_file(dict(tensors), path)
            flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "identity": dict(identity),
            "values": dict(snapshot.values),
            "files": files,
        }
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1))
        flush(temporary / MANIFEST)
        flush(temporary)
        temporary.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def remove(path: Path) -> None:
    doomed = path.with_name(f"{path.name}{TEMPORARY}")  # so that a half-deleted one is not taken for broken
    path.rename(doomed)
    shutil.rmtree(doomed)


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


def best(folder: Path, metric: str, *, highest: bool) -> tuple[Path, float] | None:
    """The checkpoint at whose step an evaluation gave the best `metric`, and that; of equal ones the earliest."""
    found = None
    for path in reversed(complete(folder)):
        try:
            value = json.loads((path / MANIFEST).read_text())["values"]["evaluation"][metric]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # broken, or without an evaluation at its step
        if is_better(value, None if found is None else found[1], highest=highest):
            found = path, value
    return found


def is_better(value: float, than: float | None, *, highest: bool) -> bool:
    """Not a number is never better."""
    if than is None:
        return not math.isnan(value)
    return value > than if highest else value < than


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
        if manifest.pop("sha256") != _seal(manifest):
            return "the manifest has other content than was written"
        for name, wanted in manifest["files"].items():
            if Path(name).name != name or not name.endswith(SUFFIX):
                return f"{name!r} is not the name of a file of a checkpoint"
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if _sha256(path / name) != wanted["sha256"]:
                return f"{name} has other content than was written"
            with safe_open(path / name, "pt"):
                pass  # that it is one: sizes and offsets within it make sense
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
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


def _seal(manifest: Mapping[str, Any]) -> str:
    """A hash of what the manifest says, which it carries itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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


def _do_not_flush(path: Path) -> None:
    pass
