"""Opens and reads files that anyone may have written: regular files only, up to a size limit.

Opening never blocks (as a FIFO would) and never follows a link in the last part of the path.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import msgspec
import yaml

from mbgd.errors import UsageError
from mbgd.text.escaping import plain

T = TypeVar("T")

MOST_JSON_BYTES = 64 * 2**20
MOST_YAML_BYTES = 2**20
"""A configuration has a few thousand bytes; the parser takes a second for this many."""
UNREADABLE = ".unreadable"
"""Ending of the names of files that could not be read and were set aside."""
MOST_NESTED = 100
"""Deepest nesting of containers; at the parsers' own limits they raise a traceback or crash."""

_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Unreadable(UsageError):  # noqa: N818  (the file is)
    """A file that exists but cannot be used, with the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{plain(path)} cannot be read: {reason}. Fix it, or move it out of the folder.")
        self.path, self.reason = path, reason


_FLAGS = {"rb": os.O_RDONLY, "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT, "r+b": os.O_RDWR | os.O_CREAT}


def open_regular(path: Path, mode: Literal["rb", "ab", "r+b"] = "rb") -> BinaryIO:
    """Open the file without blocking; FileNotFoundError, or Unreadable if it is not a regular file.

    mode: read, append, or read and write; the last two create the file.
    """
    try:
        found = _kind(path)  # first by name: opening a device can have effects
        if found is None:
            descriptor = os.open(path, _FLAGS[mode] | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            if (found := _kind(descriptor)) is None:
                return os.fdopen(descriptor, mode)
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Unreadable(path, _reason(error)) from error
    raise Unreadable(path, f"it is {found}, where only a regular file is opened")


def sha256(path: Path) -> str:
    """Hash of the content; raises like `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def check_regular(path: Path) -> None:
    """Raises like `open_regular`; for a file that a library opens by name."""
    open_regular(path).close()


def _kind(path: Path | int) -> str | None:
    """The kind of file, such as "a folder"; None for a regular file or if there is none."""
    try:
        mode = (os.fstat(path) if isinstance(path, int) else path.lstat()).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def read(path: Path, most_bytes: int) -> bytes:
    """The content; FileNotFoundError, or Unreadable."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most_bytes + 1) if size <= most_bytes else b""
        except OSError as error:
            raise Unreadable(path, _reason(error)) from error
    if max(size, len(content)) > most_bytes:
        raise Unreadable(path, f"it has {max(size, len(content)):,} bytes; at most {most_bytes:,} are read")
    return content


def read_json(path: Path, kind: type[T]) -> dict[str, Any]:
    """A JSON object whose known fields have the types in `kind`; FileNotFoundError, or Unreadable."""
    return _checked(path, lambda: parse_json(read(path, MOST_JSON_BYTES)), kind)


def read_yaml(path: Path, kind: type[T]) -> dict[str, Any]:
    """A YAML mapping whose known fields have the types in `kind`; FileNotFoundError, or Unreadable."""
    return _checked(path, lambda: _parse_yaml(read(path, MOST_YAML_BYTES)), kind)


def _checked(path: Path, parse: Any, kind: type[T]) -> dict[str, Any]:
    try:
        value = parse()
        convert(value, kind)
    except (FileNotFoundError, Unreadable):
        raise
    except ValueError as error:
        raise Unreadable(path, plain(error)) from error
    result: dict[str, Any] = value
    return result


def convert(value: Any, kind: type[T]) -> T:
    """The plain value as type `kind`, without conversions; ValueError says where the type is wrong."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(plain(error)) from error


def parse_json(content: bytes) -> Any:
    """JSON as plain values; ValueError if it is invalid, has a key twice, or is nested too deep."""
    try:
        text = content.decode()
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates could not be written again
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ValueError("it has half a character") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    _check_depth(value)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_NESTED} deep")


def _inside(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


class _Loader(_YAML_LOADER):  # type: ignore[misc]
    """Loads YAML's plain values; refuses duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return super().construct_mapping(node, deep)


def _parse_yaml(content: bytes) -> Any:
    """YAML as plain values; ValueError if it is invalid, has aliases, or is nested too deep."""
    try:
        text, depth = content.decode(), 0
        # Check the events first: composing recurses for each level, and expands aliases.
        for event in yaml.parse(text, _YAML_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has an alias in line {event.start_mark.line + 1}; a configuration has none")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_NESTED:
                raise ValueError(f"it is nested more than {MOST_NESTED} deep")
        return yaml.load(text, _Loader)
    except ValueError:
        raise
    except Exception as error:  # from the parser, or from converting dates and numbers
        raise ValueError(f"it is not YAML: {error}") from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or plain(error)


def free_name(path: Path) -> Path:
    """The first of `path-0`, `path-1` … that does not exist."""
    number = 0
    while os.path.lexists(aside := path.with_name(f"{path.name}-{number}")):
        number += 1
    return aside


def set_aside(path: Path, ending: str) -> Path:
    """Rename the file or folder, so that nothing reads it by its old name; returns the new path."""
    aside = free_name(path.with_name(path.name + ending))
    path.rename(aside)
    flush(aside.parent)
    return aside


def flush(path: Path) -> None:
    """Wait until the file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
