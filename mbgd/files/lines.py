"""Files of one JSON object a line, read as far as they can be: one line that is wrong does not hide the others."""

import json
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
    with open_regular(path) as file:
        number, begins = 1, True
        try:
            while content := file.readline(MOST_LINE_BYTES):
                ends = content.endswith(b"\n")
                if begins and (ends or len(content) < MOST_LINE_BYTES):
                    yield _read(number, content, parse)
                else:
                    yield BadLine(number, f"it is longer than {MOST_LINE_BYTES:,} bytes", content)
                number, begins = number + ends, ends
        except OSError as error:
            raise Unreadable(path, error.strerror or plain(error)) from error


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
