"""Makes foreign text safe to print: names and values may hold a terminal's control sequences."""

import html


def plain(text: object) -> str:
    """The text in one line: newlines, control and invisible characters and lone surrogates as escapes such as \\x1b."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)


def in_html(text: object) -> str:
    """Like `plain`, and escaped for HTML."""
    return html.escape(plain(text))
