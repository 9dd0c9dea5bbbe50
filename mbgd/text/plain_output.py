"""ASCII in place of the characters this program prints, for terminals and files whose encoding lacks them."""

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
    "√": "sqrt",
    "‖": "||",
    "β": "beta",
    "κ": "kappa",
    "λ": "lambda",
    "φ": "phi",
    "\u0302": "^",
    "ä": "ae",
    "█": "#",
    "━": "-",
    "╸": "-",
    "╺": "-",
}
"""Replacements of characters that the encoding lacks; other characters become escapes, such as \\xe9."""


def start() -> None:
    """From now on, printing never raises UnicodeEncodeError."""
    codecs.register_error("mbgd.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests and notebooks replace it by other streams
            stream.reconfigure(errors="mbgd.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(one) or _escaped(one) for one in lacking), error.end


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")
