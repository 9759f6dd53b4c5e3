"""Handing a model to a program of the patched llama.cpp: llama-cli to chat, llama-server to serve."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .gguf_file import GgufFile
from .runtime import require


def launch(tool: str, model: Path, arguments: Sequence[str], backend: str = "auto") -> int:
    """Runs `tool` on `model` with the user's own arguments in the place of this process (on Windows beside it).

    Returns:
        The exit status of the program, where it returns at all.

    Raises:
        GgufToolError: no runtime has been built, or the model is missing, truncated or no GGUF.
    """
    program = require(backend).tool(tool)
    GgufFile(model)
    command = [str(program), "-m", str(model), *arguments]
    if sys.platform == "win32":
        return subprocess.call(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, command)
