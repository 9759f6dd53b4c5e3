"""doctor: what this machine has of what gguftool needs, and the command that mends what is missing. Changes nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from .durable import write_text
from .runtime_base import BACKENDS, Runtime, built, cache_dir, read_base
from .runtime_build import BUILD_BYTES
from .toolchain import find_nvcc, find_tool, missing_compiler, nvidia_gpus, suits

OK, WARN, MISSING = "ok", "warn", "missing"
PYTHON = (3, 11)
# Below this there is little that can be done beside the built-in model: Python, torch and one layer (see `memory`).
LITTLE_MEMORY = 4 << 30
LITTLE_DISK = 10_000_000_000
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*(?:(>=|==)\s*([0-9.]+))?")


@dataclass(frozen=True)
class Finding:
    """A row: what was looked at, "ok", "warn" (works, but) or "missing" (does not work), in words, and what mends it."""

    name: str
    status: str
    text: str
    mend: str = ""


def examine(folder: Path | None = None) -> list[Finding]:
    """Everything, in the order in which it is to be mended. `folder`: where outputs will go; by default the current one."""
    runtimes = [runtime for name in BACKENDS if (runtime := built(name))]
    return [
        _python(),
        *_packages(),
        *_build_tools(needed=not runtimes),
        _gpu(),
        _disk("disk, cache", cache_dir(), 0 if runtimes else BUILD_BYTES),
        _disk("disk, here", folder or Path.cwd(), 0),
        _memory(),
        *_runtimes(runtimes),
        *map(_selftest, runtimes),
    ]


def _python() -> Finding:
    have, want = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, PYTHON))
    if sys.version_info[:2] < PYTHON:
        return Finding("Python", MISSING, f"{have}, and {want} or newer is needed", f"install Python {want} or newer")
    return Finding("Python", OK, f"{have}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Every package that gguftool depends on, as its own metadata says; those that are fine in one row."""
    try:
        wanted = [text for text in requires("gguftool") or [] if "extra ==" not in text]
    except PackageNotFoundError:
        yield Finding(
            "packages", WARN, "gguftool is not installed, only here: what it needs is unknown", "pip install -e ."
        )
        return
    fine = []
    for text in wanted:
        found = _REQUIREMENT.match(text)
        assert found is not None
        name, how, want = found.groups()
        spec = f"{name}{how or ''}{want or ''}"
        try:
            have = version(name)
        except PackageNotFoundError:
            yield Finding(name, MISSING, "not installed", f"pip install '{spec}'")
            continue
        if how and not _suits(have, how, want):
            yield Finding(name, MISSING, f"{have}, and {how} {want} is needed", f"pip install '{spec}'")
            continue
        fine.append(f"{name} {have}" if name in ("torch", "transformers", "llama-cpp-python") else "")
    named = [text for text in fine if text]
    yield Finding("packages", OK, f"{', '.join(named)} and {len(fine) - len(named)} others")
    try:
        yield Finding("datasets", OK, f"{version('datasets')}, for --data hf:")
    except PackageNotFoundError:
        yield Finding("datasets", OK, "not installed; only --data hf: needs it: pip install 'gguftool[datasets]'")


def _suits(have: str, how: str, want: str) -> bool:
    have_parts, want_parts = (
        [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]] for text in (have, want)
    )
    width = max(len(have_parts), len(want_parts))
    have_parts, want_parts = (parts + [0] * (width - len(parts)) for parts in (have_parts, want_parts))
    return have_parts >= want_parts if how == ">=" else have_parts == want_parts


def _build_tools(needed: bool) -> Iterator[Finding]:
    """What compiles llama.cpp: `needed` where no runtime has been built yet."""
    worse = MISSING if needed else WARN
    lacking = missing_compiler()
    if lacking:
        yield Finding("compiler", worse, f"none: {lacking[0]}", _compiler_command())
    else:
        yield Finding("compiler", OK, _first("c++", "g++", "clang++", "cl") or str(os.environ.get("CXX")))
    for tool in ("cmake", "ninja"):
        path = find_tool(tool)
        yield Finding(tool, OK, path) if path else Finding(tool, worse, "not found", f"pip install {tool}")
    path = _first("git", "patch")
    yield Finding("git", OK, path) if path else Finding("git", worse, "neither git nor patch", _install("git"))


def _first(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _install(package: str) -> str:
    """The command that installs a package of the system."""
    if sys.platform == "darwin":
        return f"brew install {package}"
    known = {"apt-get": "apt-get install", "dnf": "dnf install", "pacman": "pacman -S", "zypper": "zypper install"}
    found = next((how for tool, how in known.items() if shutil.which(tool)), "apt-get install")
    return f"sudo {found} {package}" if sys.platform != "win32" else f"winget install {package}"


def _compiler_command() -> str:
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        return "winget install Microsoft.VisualStudio.2022.BuildTools"
    return _install("gcc-c++" if shutil.which("dnf") else "gcc" if shutil.which("pacman") else "g++")


def _gpu() -> Finding:
    gpus, nvcc = nvidia_gpus(), find_nvcc()
    backend, reason = suits()
    if backend in ("metal", "cuda"):
        return Finding("GPU", OK, f"{backend}: {reason}")
    if gpus and not nvcc:
        return Finding("GPU", WARN, f"{gpus[0]}, but no nvcc: it is not used", _install("nvidia-cuda-toolkit"))
    if glslc := shutil.which("glslc"):
        return Finding("GPU", OK, f"no CUDA, no Metal; {glslc} is here for runtime build --backend vulkan")
    return Finding("GPU", OK, "none that is used; another than NVIDIA's or Apple's needs the Vulkan SDK (glslc)")


def _disk(name: str, place: Path, needed: int) -> Finding:
    folder = place
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {place}"
    if free < needed:
        return Finding(name, MISSING, f"{text}, and building the runtime needs {needed / 1e9:.0f} GB",
                       "GGUFTOOL_CACHE=/a/larger/disk gguftool runtime build")  # fmt: skip
    if not needed and free < LITTLE_DISK:
        return Finding(name, WARN, f"{text}: compress needs about three times the model", "free some, or -o elsewhere")
    return Finding(name, OK, text)


def _memory() -> Finding:
    total, free = memory_bytes()
    text = f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB of them free" if free is not None else "")
    if total < LITTLE_MEMORY:
        return Finding("memory", WARN, f"{text}: little beside torch and a layer", "gguftool compress … --memory 2GiB")
    return Finding("memory", OK, text)


def memory_bytes() -> tuple[int, int | None]:
    """(all, what is free or could be at once; None where the system does not say)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[1].isdigit()}
        return found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError, IndexError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):  # no sysconf on this system
        return 8 << 30, None


def _runtimes(runtimes: list[Runtime]) -> Iterator[Finding]:
    base = read_base()
    if not runtimes:
        yield Finding(
            "runtime", MISSING, f"no patched llama.cpp {base.version} has been built", "gguftool runtime build"
        )
        return
    names = ", ".join(runtime.backend for runtime in runtimes)
    yield Finding("runtime", OK, f"{names}: llama.cpp {base.llama_cpp_commit}, {len(runtimes[0].patches)} patches")
    best, reason = suits()
    if best not in [runtime.backend for runtime in runtimes]:
        yield Finding("runtime", WARN, f"{reason}, and no {best} runtime", f"gguftool runtime build --backend {best}")


def _selftest(runtime: Runtime) -> Finding:
    name, command = f"selftest, {runtime.backend}", f"gguftool runtime selftest --backend {runtime.backend}"
    try:
        ok = json.loads((runtime.path / "selftest.json").read_text(encoding="utf-8"))["ok"]
    except (OSError, ValueError, KeyError, TypeError):
        return Finding(name, WARN, f"not done yet on this {platform.machine()}", command)
    return Finding(name, OK, "passed") if ok is True else Finding(name, WARN, "failed when it was run last", command)


def note_selftest(found: Iterable[tuple[str, bool]]) -> None:
    """Leaves in every runtime of `found`, (backend, whether a check passed), whether its selftest passed."""
    passed: dict[str, bool] = {}
    for backend, ok in found:
        passed[backend] = passed.get(backend, True) and ok
    for backend, ok in passed.items():
        if runtime := built(backend):
            write_text(runtime.path / "selftest.json", json.dumps({"ok": ok}) + "\n")
