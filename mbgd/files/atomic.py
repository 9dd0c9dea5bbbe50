"""Atomic writes: a file holds its old content or the new, never a part, even if the power fails."""

import os
from pathlib import Path

from mbgd.files import folder_lock
from mbgd.files.reading import UNREADABLE, flush, set_aside


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file's content. OSError if that fails, or if another run has replaced the folder."""
    folder_lock.check(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a crash, or a link that would lead elsewhere
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            set_aside(path, UNREADABLE)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)
