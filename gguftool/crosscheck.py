"""validate on several backends: one process each, as a process can load one runtime only; perplexities side by side."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import GgufToolError
from .evaluate import ln_ppl_tolerance
from .gguf_file import GgufFile
from .runtime import last_line, require

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CrossCheck:
    """What `validate` measured by backend: the same two files on the same tokens.

    Attributes:
        found: by backend, `Comparison.as_dict()`.
        difference: the largest difference of ln(perplexity) of one file between two backends.
        tolerance: how large it may be: `evaluate.ln_ppl_tolerance`.
    """

    found: dict[str, dict[str, Any]]
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the backends agree."""
        return self.difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "backends": self.found, "ln_ppl_difference": self.difference, "ln_ppl_tolerance": self.tolerance, "ok": self.ok,
        }  # fmt: skip


def crosscheck(
    backends: Sequence[str],
    base: Path,
    pruned: Path,
    data: Path,
    *,
    n_ctx: int = 512,
    max_windows: int | None = None,
    progress: Progress = lambda *_: None,
) -> CrossCheck:
    """Runs `gguftool validate` on each of `backends` in turn.

    Raises:
        GgufToolError: a backend that has not been built, with the command that builds it, before any of them runs; a
            file that cannot be read; or what a run gave for its reason.
    """
    for name in backends:
        require(name)
    for path in (base, pruned):
        GgufFile(path)
    found = {}
    for done, name in enumerate(backends):
        progress(done, len(backends), f"validate on {name}")
        found[name] = _validate(name, base, pruned, data, n_ctx, max_windows)
    return judge(found)


def judge(found: dict[str, dict[str, Any]]) -> CrossCheck:
    """The largest difference between the backends of `found`, and how large it may be."""
    differences = []
    for side in ("base", "pruned"):
        values = [math.log(one[side]["ppl"]) for one in found.values()]
        # Beside a nan nothing agrees; max and min may pass over it.
        finite = all(math.isfinite(value) for value in values)
        differences.append(max(values) - min(values) if finite else math.inf)
    return CrossCheck(found, max(differences), ln_ppl_tolerance(min(one["tokens"] for one in found.values())))


def _validate(backend: str, base: Path, pruned: Path, data: Path, n_ctx: int, windows: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "gguftool", "validate", str(base), str(pruned), "--data", str(data)]
    command += ["--ctx", str(n_ctx), "--backend", backend, "--json", "--quiet"]
    command += ["--windows", str(windows)] if windows is not None else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        how = f"killed by signal {-done.returncode}: " if done.returncode < 0 else ""
        raise GgufToolError(f"on {backend}: {how}{last_line(done.stderr).removeprefix('error: ')}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
