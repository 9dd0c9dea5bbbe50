"""Tracebacks of exceptions in a user's code: the user's own frames, and few others."""

import functools
import importlib.util
import re
import sys
import sysconfig
import traceback
from pathlib import Path

AROUND = ("mbgd", "torch", "hydra", "omegaconf", "antlr4")
"""Packages whose frames are left out."""

MOST_FRAMES = 6
MOST_LINES = 8
"""Lines shown of an exception's message."""

MOST_CAUSES = 2


def of_user(error: BaseException) -> str:
    """The traceback with the user's own frames and those they called, without mbgd's, torch's and Hydra's.

    Empty if it has no frame of the user's code.
    """
    causes = list(_causes(error))
    shown = [one for one in causes if _frames(one) or _of_loader(one)]
    if not shown:
        return ""
    main, *others = shown
    parts = [_described(main)]
    for other in others[:MOST_CAUSES]:
        where = _frames(other)[-1:]
        place = f", {where[0].filename}:{where[0].lineno}" if where else ""
        parts.append(f"caused by {_message(other, 1)}{place}")
    return "\n".join(parts)


def of_ours(error: BaseException) -> str:
    """The end of the traceback, for exceptions without a frame of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)[-MOST_FRAMES:]
    return "\n".join(["Traceback (its end):", *_lines(frames), _message(error, MOST_LINES)])


def _described(error: BaseException) -> str:
    if told := _of_loader(error):
        return told
    frames = _frames(error)
    half = MOST_FRAMES // 2
    if len(frames) > MOST_FRAMES:
        left_out = [f"  … {len(frames) - 2 * half} more frames …"]
        lines = [*_lines(frames[:half]), *left_out, *_lines(frames[-half:])]
    else:
        lines = _lines(frames)
    return "\n".join(["Traceback (most recent call last):", *lines, _message(error, MOST_LINES)])


def _causes(error: BaseException) -> list[BaseException]:
    """The exception and its causes, as Python shows them, the outermost first."""
    found = [error]
    while (cause := found[-1].__cause__ or (None if found[-1].__suppress_context__ else found[-1].__context__)) and (
        cause not in found
    ):
        found.append(cause)
    return found


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames from the user's first one on, without those of the packages AROUND."""
    frames = list(traceback.extract_tb(error.__traceback__))
    first = next((number for number, one in enumerate(frames) if _is_users(one.filename)), len(frames))
    kept = [one for one in frames[first:] if not _is_around(one.filename)]
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        line = traceback.FrameSummary(error.filename, error.lineno, "<module>", line=(error.text or "").strip())
        kept.append(line)
    return kept


def _lines(frames: list[traceback.FrameSummary]) -> list[str]:
    lines = []
    for frame in frames:
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}')
        if frame.line:
            lines.append(f"    {frame.line}")
    return lines


def _message(error: BaseException, most_lines: int) -> str:
    lines = "".join(traceback.format_exception_only(error)).rstrip().splitlines()
    if isinstance(error, SyntaxError):
        lines = lines[-1:]
    return "\n".join(lines[:most_lines] + (["…"] if len(lines) > most_lines > 1 else []))


def _of_loader(error: BaseException) -> str:
    """The user's part of the traceback that a loader process sent as text."""
    text = str(error)
    if "Original Traceback (most recent call last):" not in text:
        return ""
    head, _, original = text.partition("Original Traceback (most recent call last):\n")
    frames: list[list[str]] = []
    message: list[str] = []
    for line in original.rstrip().splitlines():
        if re.match(r'  File "', line):
            frames.append([line])
        elif frames and line.startswith("    ") and not message:
            if not set(line.strip()) <= set("^~"):
                frames[-1].append(line)
        else:
            message.append(line)
    users = [one for one in frames if (named := re.match(r'  File "([^"]+)"', one[0])) and _is_users(named[1])]
    if not users:
        return ""
    where = re.sub(r"^Caught \w+ in ", "In ", head.strip().splitlines()[0])
    lines = [line for frame in users[-MOST_FRAMES:] for line in frame]
    return "\n".join([f"{where.rstrip('.')}:", *lines, *message[:MOST_LINES]])


def _is_around(filename: str) -> bool:
    return filename.startswith("<") or any(Path(filename).is_relative_to(folder) for folder in _around())


def _is_users(filename: str) -> bool:
    library = sysconfig.get_path("stdlib")
    is_library = Path(filename).is_relative_to(library) and "site-packages" not in filename
    return not _is_around(filename) and not is_library


@functools.cache
def _around() -> list[str]:
    found = []
    for name in AROUND:
        spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
        found += list(spec.submodule_search_locations or []) if spec is not None else []
    main = Path(__file__).parents[2]
    return [*found, *(str(path) for path in (main / "train.py", main / "hydra_plugins"))]
