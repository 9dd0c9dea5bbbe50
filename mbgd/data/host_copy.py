"""Bytes that one process of a host computes and all others map, such as unpacked arrays.

They lie in an anonymous file in memory (memfd_create), which has no name on any disk and does not use /dev/shm. It is
sealed once it is filled: no process can change or shorten it. It is freed with the last process that maps it, however
that ends. The other processes find it by its label, a hash of what it holds, among the open files in /proc, which the
kernel opens to the same user alone. A lock under $XDG_CACHE_HOME/mbgd or ~/.cache/mbgd lets the first process fill it
while the others wait.
"""

import fcntl
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from mbgd.data.mapped_file import Bytes, map_privately
from mbgd.errors import UsageError
from mbgd.files.file_lock import lock
from mbgd.files.memory import available_bytes
from mbgd.files.reading import Unreadable, open_regular

SEALS = 0b1111
"""Of linux/fcntl.h: F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE."""

Content = Callable[[], Iterable[bytes]]
"""Gives the bytes, in pieces."""


def host_copy(key: str, num_bytes: int, content: Content) -> Bytes:
    """The bytes that `content` gives in the first process of this host that asks for this key; at least 1.

    They are found as long as any process uses them. Where nothing can be shared, because the system is not
    Linux or the cache folder cannot be written to, each process has its own. UsageError if there is too little memory.
    """
    label = _label(key)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mbgd").expanduser()
    try:
        if sys.platform != "linux":
            return _own(num_bytes, content)
        folder.mkdir(parents=True, exist_ok=True)
        file = open_regular(folder / f"host_copy-{platform.node()}.lock", "r+b")  # hosts may share the folder
    except (OSError, Unreadable):
        return _own(num_bytes, content)
    with file:
        lock(file, wait=True)
        found = _find(label, num_bytes)
        return _make(label, num_bytes, content) if found is None else found


def _label(key: str) -> str:
    return f"mbgd-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _own(num_bytes: int, content: Content) -> Bytes:
    _check_memory(num_bytes)
    own, end = np.empty(num_bytes, np.uint8), 0
    for piece in content():
        start, end = end, end + len(piece)
        own[start:end] = np.frombuffer(piece, np.uint8)
    assert end == num_bytes
    return own


def _find(label: str, num_bytes: int) -> Bytes | None:
    """What a process of this user holds under this label."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended, or is another user's
            for file in (process / "fd").iterdir() if process.name.isdecimal() else ():
                with suppress(OSError):
                    if _label_of(file) == label and (found := _mapped(file, label, num_bytes)) is not None:
                        return found
    return None


def _label_of(file: Path) -> str:
    return str(file.readlink()).removeprefix("/memfd:").removesuffix(" (deleted)")


def _mapped(path: Path, label: str, num_bytes: int) -> Bytes | None:
    """The file, unless it is no longer the one of this label, or another user's that root may open."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        is_it = _label_of(Path(f"/proc/self/fd/{descriptor}")) == label and found.st_uid == os.geteuid()
        if is_it and found.st_size == num_bytes and fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS:
            return map_privately(descriptor, num_bytes)
        return None
    finally:
        os.close(descriptor)


def _make(label: str, num_bytes: int, content: Content) -> Bytes:
    _check_memory(num_bytes)
    descriptor = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(descriptor, 0o600)
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            for piece in content():
                file.write(piece)
            assert file.tell() == num_bytes
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        return map_privately(descriptor, num_bytes)
    finally:
        os.close(descriptor)  # the mapping keeps one of its own, by which others find the file


def _check_memory(num_bytes: int) -> None:
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise UsageError(
            f"{num_bytes:,} bytes of memory cannot be allocated: {available:,} are available. A .safetensors file, or "
            "a folder of .npy files, need not fit into memory."
        )
