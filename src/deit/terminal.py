"""Text of strangers (file names, labels, what files hold) as a terminal or a spreadsheet may see it."""

from __future__ import annotations

import re

BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Characters that turn the direction of text around, for a regular expression."""
_SPEAKING = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029{BIDI}]")
"""Characters that end a line, command a terminal or change the order of what is shown."""
_FORMULA = "=+-@\t\r\n'\uff1d\uff0b\uff0d\uff20"
"""First characters of a cell that spreadsheets compute, and the apostrophe that marks text."""
_LONGEST = 4000
"""Largest number of characters of a message."""


def shown(text: object) -> str:
    """The text with Python's escapes (\\n, \\x1b, \\u202e) for each character that would not be shown as itself."""
    return _SPEAKING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shortened(message: str) -> str:
    """The message without the middle of what a file made too long."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"


def cell(text: str) -> str:
    """The text for a CSV file. It gets an apostrophe in front if a spreadsheet would compute it.

    A text that begins with an apostrophe gets another, so a reader may remove one from each cell that begins with it.
    """
    return f"'{text}" if text.startswith(tuple(_FORMULA)) else text
