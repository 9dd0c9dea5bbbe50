"""The lock of a run's folder: one run at a time writes there, and notices where the folder has become another's."""

import os
import platform
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

from mbgd.files.file_lock import lock
from mbgd.files.reading import open_regular
from mbgd.text.escaping import plain

LOCK = "lock"
MOST_SHOWN = 200

_held: "WeakValueDictionary[Path, FolderLock]" = WeakValueDictionary()
"""By folder: what this process has locked."""


class FolderReplacedError(OSError):
    """The folder was deleted, or deleted and made anew, while this run was writing to it."""


class FolderLock:
    """Held as long as this object lives; it ends with the process, however that ends."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self._path, self._file = folder / LOCK, file
        _held[folder.resolve()] = self

    def is_there(self) -> bool:
        """Whether the folder still has the file that was locked."""
        try:
            there = self._path.lstat()
        except OSError:
            return False
        ours = os.fstat(self._file.fileno())
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def take(folder: Path) -> "FolderLock | str":
    """The folder's lock, or who holds it. OSError or Unreadable where there can be no such file."""
    file = open_regular(folder / LOCK, "r+b")
    if not lock(file, wait=False):
        holder = os.pread(file.fileno(), MOST_SHOWN, 0).decode(errors="backslashreplace").strip()
        file.close()
        return plain(holder) or "unknown"
    file.truncate(0)
    file.seek(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    file.flush()
    taken = FolderLock(folder, file)
    return taken if taken.is_there() else "which has just deleted the folder"


def check(folder: Path) -> None:
    """FolderReplacedError where this process has locked the folder and what is there now is not that folder."""
    lock = _held.get(folder.resolve())
    if lock is not None and not lock.is_there():
        raise FolderReplacedError(
            f"{folder} was deleted, or replaced by another run's, while this run was writing to it; nothing more is "
            "written there"
        )
