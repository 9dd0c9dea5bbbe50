"""Which keys of a section a configuration refers to: ${data.path}, ${.path}, ${oc.select:data.path,null}."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

OPEN = "\0"
"""Marks the beginning of an interpolation."""


def referred(configuration: Any, section: str, keys: Iterable[str]) -> set[str]:
    """The section's `keys` that interpolations anywhere in the configuration name; all of them, if one takes the whole
    section or computes a name by another interpolation.

    configuration: plain containers, with interpolations as text.
    """
    named = {target for path, text in _texts(configuration, ()) for target in _targets(path, text)}
    in_section = {target[1:] for target in named if target[:1] == (section,)}
    if () in in_section or ("",) in in_section:
        return set(keys)
    return {target[0] for target in in_section} & set(keys)


def _texts(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, text inside interpolations) of each value that has interpolations."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, (*path, str(key)))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, (*path, str(number)))
    elif isinstance(node, str) and (inside := _inside(node)):
        yield path, inside


def _inside(text: str) -> str:
    """The text inside ${…}, with OPEN at the beginning of each; text outside is not a reference."""
    depth, found = 0, ""
    for part in re.split(r"(\$\{|\})", text):
        if part == "${":
            depth, found = depth + 1, found + OPEN
        elif part == "}":
            depth, found = max(0, depth - 1), found + ","
        elif depth:
            found += part
    return found


def _targets(path: tuple[str, ...], inside: str) -> Iterator[tuple[str, ...]]:
    """The first two keys of each reference; "" as the second key means any key."""
    for dots, name in re.findall(rf"(?<![^{OPEN}:,\s])(\.*)(\w[\w.\['\"\]]*{OPEN}?)", inside):
        keys = [key for key in re.split(r"[.\[\]'\"]+", name.rstrip(OPEN)) if key]
        start = path[: -len(dots)] if dots else ()
        if name.endswith(OPEN):
            keys.append("")
        yield (*start, *keys)[:2]
