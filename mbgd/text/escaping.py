"""Text from elsewhere, made safe to show: names and values may hold what a terminal obeys."""

import html


def plain(text: object) -> str:
    """The text in one line: newlines, control characters, invisible and half characters as escapes such as \\x1b."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)


def in_html(text: object) -> str:
    """As `plain`, and text wherever it stands in a page."""
    return html.escape(plain(text))
