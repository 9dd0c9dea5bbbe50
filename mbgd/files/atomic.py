"""Atomic writes: a file holds its old content or the new, never a part, even if the power fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbgd.files import folder_lock
from mbgd.files.reading import UNREADABLE, flush, set_aside


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file's content. OSError if that fails, or if another run has replaced the folder."""
    with replaced(path) as temporary, temporary.open("xb") as file:
        file.write(content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write, which becomes the file at the end; it is removed at an exception.

    OSError as `write_atomically`.
    """
    folder_lock.check(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a crash, or a link that would lead elsewhere
    try:
        yield temporary
        flush(temporary)
        if path.is_dir() and not path.is_symlink():
            set_aside(path, UNREADABLE)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)
