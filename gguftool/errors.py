"""The one exception that a user is meant to see."""

from __future__ import annotations


class GgufToolError(Exception):
    """A stated failure: what is wrong, with the numbers, and what to do about it.

    The library raises it; only `cli` turns it into one line on stderr and exit code 1.
    """
