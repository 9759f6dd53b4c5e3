"""Running llama.cpp's own programs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any


def run(runtime: Any, tool: str, *options: object) -> tuple[int, str]:
    """Exit status and output of one of the runtime's programs."""
    command = [str(runtime.tool(tool)), *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def perplexity(runtime: Any, model: Path, text: Path, *options: object) -> float:
    """What llama-perplexity finds. It may exit before its logger has written the end, so it gets a few tries."""
    for _ in range(8):
        code, output = run(runtime, "llama-perplexity", "-m", model, "-f", text, "-t", 2, *options)
        assert code == 0, output[-2000:]
        if found := re.search(r"Final estimate: PPL = ([\d.]+)", output):
            return float(found[1])
    raise AssertionError(f"no perplexity in {output[-2000:]}")
