"""Where a result comes from: the command, the programs, and the hash of every file that went in or came out.

Section `provenance` of `Report.facts`: command (as typed, or ""), environment (names and values), patches [{name, sha256}],
files [{role, name, bytes, sha256}], role being input or output; sha256 is "" where files were not to be read again.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__
from .runtime_base import Runtime, patch_files
from .verification import sha256

Progress = Callable[[int, int, str], None]
PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "numpy")


def command_line(arguments: Sequence[str]) -> str:
    """A command that can be pasted into a shell again; `arguments` are those behind the program's name."""
    return shlex.join(["gguftool", *arguments])


def provenance(
    runtime: Runtime, command: str, inputs: Iterable[Path], outputs: Iterable[Path], *, hashes: bool = True,
    known: Mapping[str, str] | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The section. A folder among the inputs stands for the files in it. `known`: sha256 of outputs, by name."""
    files = [("input", root, path) for root in inputs for path in files_of(root)]
    files += [("output", path.parent, path) for path in outputs]
    total = sum(path.stat().st_size for _, _, path in files)
    rows, done = [], 0
    for role, root, path in files:
        if progress:
            progress(done >> 20, total >> 20, f"hashing {path.name}")
        name = f"{root.name}/{path.relative_to(root)}" if root.is_dir() and role == "input" else path.name
        size = path.stat().st_size
        there = (known or {}).get(path.name, "") if role == "output" else ""
        found = there or (sha256(path) if hashes else "")
        rows.append({"role": role, "name": name, "bytes": size, "sha256": found})
        done += size
    base = runtime.base
    return {
        "command": command,
        "environment": {
            "gguftool": __version__,
            "llama.cpp": f"{base.llama_cpp_commit}, from {base.package} {base.version} (sha256 {base.sha256})",
            "runtime": runtime.path.name,
            "backend": runtime.backend,
            "Python": platform.python_version(),
            "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "processor": processor(),
        },
        "patches": [{"name": p.name, "sha256": sha256(p)} for p in patch_files() if p.name in runtime.patches],
        "files": rows,
    }


def files_of(root: Path) -> list[Path]:
    """The file itself, or what lies in a folder (nothing deeper, nothing hidden), by name."""
    if root.is_file():
        return [root]
    return sorted(path for path in root.glob("*") if path.is_file() and not path.name.startswith("."))


def processor() -> str:
    """The processor's name, as far as the system tells."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
