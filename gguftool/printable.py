"""Text of unknown origin, as a terminal may have it: what it would do more with than print it is written out."""

from __future__ import annotations

import unicodedata

# They join letters and parts of pictures, and change nothing else.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""`text` with line ends and tabs as they are, and every other character that is not just printed written out, as `\x1b`.

    Those are control characters, the ones that turn the direction of a line around, and halves of characters that cannot be
    encoded.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in "\n\t" or c in _JOINERS or unicodedata.category(c) == "Zs"


def one_line(text: str, most: int = 1000) -> str:
    """`text` as one line, cut off behind `most` characters: names out of a file may be long and hold line ends."""
    shown = printable(text.replace("\n", " ").replace("\t", " ").strip())
    return shown if len(shown) <= most else shown[:most] + "…"
