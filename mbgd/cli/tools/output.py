"""Writes a tool's output files."""

from collections.abc import Callable
from pathlib import Path

from mbgd.errors import UsageError
from mbgd.text.escaping import plain


def write(path: Path, content: Callable[[Path], object]) -> None:
    """Call `content(path)`, which writes the file; UsageError if it cannot be written."""
    try:
        content(path)
    except OSError as error:
        raise UsageError(f"{plain(path)} cannot be written: {error.strerror}. Name another file.") from error
