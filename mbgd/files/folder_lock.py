"""The lock of a run's folder: only one run writes there, and it notices if the folder is replaced."""

import os
import platform
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

from mbgd.files.file_lock import is_locked, lock
from mbgd.files.reading import Unreadable, open_regular
from mbgd.text.escaping import plain

LOCK = "lock"
MOST_SHOWN = 200

_held: "WeakValueDictionary[Path, FolderLock]" = WeakValueDictionary()
"""The locks that this process holds, by folder."""


class FolderReplacedError(OSError):
    """The folder was deleted, and perhaps made again, while this run was writing to it."""


class FolderLock:
    """Held while this object lives; released when the process ends, however it ends."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self._path, self._file = folder / LOCK, file
        _held[folder.resolve()] = self

    def is_there(self) -> bool:
        """Whether the locked file is still in the folder."""
        try:
            there = self._path.lstat()
        except OSError:
            return False
        ours = os.fstat(self._file.fileno())
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def take(folder: Path) -> "FolderLock | str":
    """The folder's lock, or a text that names its holder. OSError or Unreadable if the lock file cannot be opened."""
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


def holder(folder: Path) -> str | None:
    """The process that holds the folder's lock, as it named itself; None if nobody does. Changes nothing."""
    try:
        with open_regular(folder / LOCK, "rb") as file:
            if not is_locked(file):
                return None
            return plain(file.read(MOST_SHOWN).decode(errors="backslashreplace").strip()) or "unknown"
    except (OSError, Unreadable):
        return None


def check(folder: Path) -> None:
    """FolderReplacedError if this process has locked the folder and it has since been deleted or replaced."""
    lock = _held.get(folder.resolve())
    if lock is not None and not lock.is_there():
        raise FolderReplacedError(
            f"{folder} was deleted, or replaced by another run's, while this run was writing to it; nothing more is "
            "written there"
        )
