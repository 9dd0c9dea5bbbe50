"""Long lists of names in messages."""

from collections.abc import Iterable


def shown(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """a, b, c, …"""
    names = list(names)
    return separator.join(names[:most]) + (f"{separator}…" if len(names) > most else "")
