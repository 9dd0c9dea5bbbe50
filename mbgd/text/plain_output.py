"""Output to terminals and files that cannot show every character: ASCII for what this program prints itself."""

import codecs
import io
import sys

PLAIN = {
    "·": "-",
    "×": "x",
    "÷": "/",
    "±": "+/-",
    "→": "->",
    "←": "<-",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "≥": ">=",
    "≤": "<=",
    "≠": "!=",
    "≈": "~",
    "∝": "~",
    "²": "^2",
    "µ": "u",
    "Σ": "sum",
    "∇": "grad",
    "█": "#",
    "━": "-",
    "╸": "-",
    "╺": "-",
}
"""What stands for a character that the encoding lacks; others become escapes, such as \\xe9."""


def start() -> None:
    """From now on nothing that is printed raises UnicodeEncodeError."""
    codecs.register_error("mbgd.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook put something else there
            stream.reconfigure(errors="mbgd.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(one) or _escaped(one) for one in lacking), error.end


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")
