"""Snapshots in a host's memory, for workers that restart there: where they are, and which of them are valid.

Every user of the host can write to /dev/shm. So nothing there is read or removed unless it is in a folder that belongs
to this user, that nobody else may enter, and that holds only folders and regular files of this user.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbgd.checkpoints import format as checkpoint
from mbgd.workers.group import Workers

HOST_MEMORY = Path("/dev/shm")
OF_ONE_WORKER = ("metrics", "tracking")
"""Values of a snapshot that may differ between workers: speeds, and the run ids of trackers."""


def memory_path(run: Path) -> Path:
    """The folder of a run's snapshots in this host's memory."""
    key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    return HOST_MEMORY / f"mbgd-{os.geteuid()}-{key}"


def make(path: Path) -> str:
    """Make the folder, or check that the one there is this user's own; returns the problem, or an empty text."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        return f"{path} cannot be made: {error.strerror}"
    return problem_of(path)


def problem_of(path: Path) -> str:
    """Why a folder in the host's memory cannot be trusted, or an empty text.

    A folder that passes cannot be replaced by another user: with the sticky bit, only owners may rename or remove.
    """
    try:
        place = path.parent.stat()
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{path} is not a folder of this user ({error.strerror})"
    if place.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not place.st_mode & stat.S_ISVTX:
        return f"anyone can put another folder in the place of {path}"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user (number {found.st_uid})"
    if found.st_mode & 0o077:
        return f"{path} may be entered by others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def newest_in_memory(run: Path, workers: Workers, identity: Mapping[str, Any]) -> Path | None:
    """The newest snapshot that every host has in its memory, the same on every worker.

    identity: the settings that the run's course depends on; snapshots with another identity do not count.
    """
    path, found = memory_path(run), None
    if workers.local_rank == 0:
        found = _contents(path, identity)
    of_hosts = [found for found in workers.gather_values(found) if found is not None]
    on_all = [name for name, content in of_hosts[0].items() if all(one.get(name) == content for one in of_hosts)]
    return path / max(on_all) if on_all else None


def remove_memory(run: Path, workers: Workers, but: Path | None = None) -> None:
    """Remove the run's snapshots from this host's memory, except `but`."""
    path = memory_path(run)
    if workers.local_rank != 0 or not os.path.lexists(path) or problem_of(path):
        return
    if but is None or but.parent != path:
        shutil.rmtree(path, ignore_errors=True)
        return
    for other in checkpoint.complete(path):
        if other != but:
            shutil.rmtree(other, ignore_errors=True)


def _contents(path: Path, identity: Mapping[str, Any]) -> dict[str, str]:
    """Name → hash of the state, for every snapshot in the folder that is whole and of this run."""
    if not os.path.lexists(path):
        return {}
    if problem := problem_of(path):
        print(f"warning: {problem}; nothing is read there, and the run goes on from the disk.", flush=True)
        return {}
    found = {}
    for one in checkpoint.complete(path):
        if _is_own(one) and checkpoint.verify(one) is None:
            manifest = json.loads((one / checkpoint.MANIFEST).read_text())
            if manifest["step"] == checkpoint.step_of(one) and manifest["identity"] == _as_json(identity):
                found[one.name] = _hash_of_state(manifest)
    return found


def _is_own(snapshot: Path) -> bool:
    """Whether it is a folder of regular files, all this user's: no link leads outside, and no pipe blocks a reader."""
    try:
        inside = [entry.lstat() for entry in snapshot.iterdir()] if stat.S_ISDIR(snapshot.lstat().st_mode) else []
        all_own = {snapshot.lstat().st_uid, *(one.st_uid for one in inside)} == {os.geteuid()}
    except OSError:
        return False
    return bool(inside) and all_own and all(stat.S_ISREG(one.st_mode) for one in inside)


def _hash_of_state(manifest: Mapping[str, Any]) -> str:
    """Hash of the state that must be the same on every worker: two hosts may hold different states of one step."""
    values = {name: value for name, value in manifest["values"].items() if name not in OF_ONE_WORKER}
    state = {"step": manifest["step"], "files": manifest["files"], "values": values}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _as_json(identity: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(identity)))
