"""Files of one JSON object a line, read as far as they can be: one line that is wrong does not hide the others."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from mbgd.files.atomic import write_atomically
from mbgd.files.reading import UNREADABLE, Unreadable, free_name, open_regular
from mbgd.text.escaping import plain

T = TypeVar("T")

MOST_LINE_BYTES = 2**20


@dataclass(frozen=True)
class GoodLine(Generic[T]):
    """A line and its value."""

    value: T
    number: int
    """Counted from 1."""
    content: bytes = field(repr=False)
    """The bytes in the file, with the newline."""


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be read, or a part of one longer than `MOST_LINE_BYTES`."""

    number: int
    reason: str
    content: bytes = field(repr=False)


def lines_of(path: Path, parse: Callable[[bytes], T]) -> Iterator[GoodLine[T] | BadLine]:
    """The lines in their order; parse(content): ValueError says what is wrong with a line.

    FileNotFoundError, or Unreadable if the file cannot be read.
    """
    return GrowingFile(path, parse).lines()


class GrowingFile(Generic[T]):
    """A file that another process may be writing, read a part after the other."""

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        self._path, self._parse = path, parse
        self._position, self._number, self._inode = 0, 1, -1

    def was_replaced(self) -> bool:
        """Whether what has been read is no longer in the file, as where a resumed run takes back its last steps.

        Raises as `lines`.
        """
        with open_regular(self._path) as file:
            found = os.fstat(file.fileno())
            return self._inode not in (-1, found.st_ino) or found.st_size < self._position

    def lines(self, *, whole: bool = False) -> Iterator[GoodLine[T] | BadLine]:
        """The lines after those already read; FileNotFoundError, or Unreadable if the file cannot be read.

        whole: a last line without its end is still being written, and is left for the next call.
        """
        with open_regular(self._path) as file:
            self._inode, begins = os.fstat(file.fileno()).st_ino, True
            try:
                file.seek(self._position)
                while content := file.readline(MOST_LINE_BYTES):
                    ends = content.endswith(b"\n")
                    if whole and not ends and len(content) < MOST_LINE_BYTES:
                        return
                    self._position += len(content)
                    if begins and (ends or len(content) < MOST_LINE_BYTES):
                        yield _read(self._number, content, self._parse)
                    else:
                        yield BadLine(self._number, f"it is longer than {MOST_LINE_BYTES:,} bytes", content)
                    self._number, begins = self._number + ends, ends
            except OSError as error:
                raise Unreadable(self._path, error.strerror or plain(error)) from error


def _read(number: int, content: bytes, parse: Callable[[bytes], T]) -> GoodLine[T] | BadLine:
    try:
        value = parse(content)
    except ValueError as error:
        return BadLine(number, plain(error), content)
    return GoodLine(value, number, content if content.endswith(b"\n") else content + b"\n")


def keep_bad(path: Path, lines: Sequence[BadLine]) -> Path:
    """Write lines of the file that cannot be read, with their numbers, into a file next to it; returns that file.

    It has one JSON object per line; bytes that are not UTF-8 by Python's surrogateescape, so that none is lost.
    """
    aside = free_name(path.with_name(path.name + UNREADABLE))
    told = [(line.number, line.reason, line.content.decode(errors="surrogateescape")) for line in lines]
    keys = ("line", "reason", "content")
    write_atomically(aside, b"".join(json.dumps(dict(zip(keys, one, strict=True))).encode() + b"\n" for one in told))
    return aside
