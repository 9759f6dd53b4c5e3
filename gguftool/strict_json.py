"""JSON of unknown origin: what cannot be meant is refused, and whatever is wrong is a ValueError."""

from __future__ import annotations

import json
from typing import Any

# What reading garbled JSON into values may raise; a loader turns all of them into one clear line.
GARBLED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)


def parse(text: str | bytes, *, strict: bool = True) -> Any:
    """The value of a JSON text.

    Raises ValueError (JSONDecodeError for bad syntax) also for values nested too deeply to be read and, if `strict`, for a
    name that an object has twice and for NaN and Infinity, which JSON has not.
    """
    try:
        if not strict:
            return json.loads(text)
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def whole(value: Any, name: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number between `least` and `most`. Raises ValueError for anything else, true and 1.0 too."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {str(value)[:40]} is no whole number from {least} to {most}")
    return value


def text(value: Any, name: str) -> str:
    """A string. Raises ValueError for anything else, and for one that no file can hold: half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: {str(value)[:40]} is no string")
    value.encode("utf-8")
    return value
