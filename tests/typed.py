"""A command as it was typed, run in this process: what it imports is imported once for all of them."""

from __future__ import annotations

import contextlib
import io
import sys
from unittest import mock

from gguftool import cli


def typed(*arguments: object, code: int = 0) -> str:
    """Stdout of a command that ends with `code` 0, stderr of one that does not."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["gguftool", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        found = cli.run()
    assert found == code, out.getvalue() + err.getvalue()
    return err.getvalue() if code else out.getvalue()
