"""Files that are never half-written; apart from what needs torch, for processes that do without it."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """The file holds the old content or the new, never a part, also after a crash of the machine."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
