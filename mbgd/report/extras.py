"""What further panels show: for each its name in the page's data, and what reads it from a run's folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

READERS: dict[str, Callable[[Path], Any]] = {}
"""A reader returns plain values for JSON, a few kilobytes, or None where the folder has none; it never raises."""


def extras(folder: Path) -> dict[str, Any]:
    found = {name: read(folder) for name, read in READERS.items()}
    return {name: data for name, data in found.items() if data is not None}
