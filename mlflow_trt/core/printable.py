"""Text from models, records and servers, made fit for a terminal and a log."""

from __future__ import annotations

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of what shows nothing of itself: control characters, marks of direction, halves of characters."""
_ALLOWED = "\n\t\u200c\u200d"
"""The last two join and separate letters in some scripts."""


def printable(text: str) -> str:
    r"""The text with an escape, such as `\x1b`, for each character that could steer a terminal or not be encoded."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _ALLOWED or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
