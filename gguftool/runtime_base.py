"""What the patched llama.cpp is: its pinned source, its patches, its options, and where in the cache its builds lie.

The cache (`$GGUFTOOL_CACHE`, else the platform's cache folder) holds
    sdist/            the source distribution, checked against its sha256
    work-<backend>/   unpacked, patched source and build trees; kept, so that a changed patch compiles only what it touches
    runtime-<key>/    bin/ (shared libraries and tools), convert/ (llama.cpp's converter), build.json
The key hashes the base, the patches and the build options: another series is another runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import GgufToolError

TOOLS = (
    "llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench", "llama-cli", "llama-server", "llama-gguf-split",
    "test-backend-ops", "test-moe-skip",
)  # fmt: skip
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_UI": "OFF",
    # Else the server's build fetches the web page that goes with it.
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}
if sys.platform != "win32":
    # Where the inner loops lie decides a few per cent of their speed. With functions at cache lines a patch to one file
    # does not move the loops of the others. No kernels for AMX: those who compile with GCC 12 lose the stores of a tile
    # configuration to its dead-store elimination, and the first prompt ends in SIGSEGV (ggml-org/llama.cpp#20824); experts
    # have no such kernels anyway.
    _FLAGS = "-O3 -DNDEBUG -falign-functions=64 -U__AMX_INT8__"
    OPTIONS |= {f"CMAKE_{language}_FLAGS_RELEASE": _FLAGS for language in ("C", "CXX")}
# From the fastest to the slowest: what `auto` takes first of what has been built.
BACKENDS = {"cuda": {"GGML_CUDA": "ON"}, "metal": {"GGML_METAL": "ON"}, "vulkan": {"GGML_VULKAN": "ON"}, "cpu": {}}


@dataclass(frozen=True)
class Base:
    """The pinned source distribution: patches/base.toml."""

    package: str
    version: str
    sha256: str
    root: str
    llama_cpp_commit: str

    @property
    def stem(self) -> str:
        """The source distribution's file name without .tar.gz, and the folder that it unpacks to."""
        return f"{self.package.replace('-', '_')}-{self.version}"


@dataclass(frozen=True)
class Runtime:
    """A built runtime. `lib_dir` holds the shared libraries and the tools; `convert_dir` llama.cpp's converter."""

    path: Path
    base: Base
    patches: tuple[str, ...]
    backend: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def lib_dir(self) -> Path:
        """Folder of libllama, libggml and the tools."""
        return self.path / "bin"

    @property
    def convert_dir(self) -> Path:
        """Folder of convert_hf_to_gguf.py, conversion/ and gguf-py/."""
        return self.path / "convert"

    @property
    def n_gpu_layers(self) -> int:
        """How many layers to put on its GPU: all, or none."""
        return 0 if self.backend == "cpu" else 999

    def tool(self, name: str) -> Path:
        """Path of a tool such as `llama-quantize`."""
        path = self.lib_dir / (name + (".exe" if sys.platform == "win32" else ""))
        if not path.is_file():
            raise GgufToolError(f"the runtime has no {name}; `gguftool runtime build --force` builds it anew")
        return path

    @property
    def ggml(self) -> Path:
        """The shared library with ggml's quantizers."""
        return self.library("ggml-base")

    def library(self, name: str) -> Path:
        """Path of a shared library by its base name."""
        for pattern in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
            if (self.lib_dir / pattern).exists():
                return self.lib_dir / pattern
        raise GgufToolError(f"the runtime has no lib{name}; `gguftool runtime build --force` builds it anew")


def patches_dir() -> Path:
    """Where the patch series lies: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "_patches"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "patches"


def cache_dir() -> Path:
    """The cache folder."""
    if chosen := os.environ.get("GGUFTOOL_CACHE"):
        return Path(chosen).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gguftool"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "gguftool"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "gguftool"


def read_base() -> Base:
    """The pinned base."""
    raw = tomllib.loads((patches_dir() / "base.toml").read_text(encoding="utf-8"))
    return Base(**{name: raw[name] for name in Base.__dataclass_fields__})


def series() -> tuple[str, ...]:
    """File names of the patches, in order."""
    lines = (patches_dir() / "series").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def patch_files() -> list[Path]:
    """The patches, in order."""
    return [patches_dir() / name for name in series()]


def locate(backend: str, patched: bool = True, cmake: Sequence[str] = ()) -> Path:
    """Folder that the runtime of today's series has, whether or not it has been built.

    Args:
        cmake: further options of cmake (`-DNAME=VALUE`), which make it another runtime.
    """
    digest = hashlib.sha256(json.dumps([asdict(read_base()), OPTIONS, BACKENDS[backend], TOOLS]).encode())
    digest.update(f"{platform.machine()} {sys.platform} {_cpu_features()}".encode())
    for path in patch_files() if patched else ():
        digest.update(path.read_bytes())
    kind = backend if patched else f"{backend}-unpatched"
    return cache_dir() / f"runtime-{kind}-{digest.hexdigest()[:12]}{options_suffix(cmake)}"


def options_suffix(cmake: Sequence[str]) -> str:
    """What further options of cmake add to the name of a runtime and of its build tree; nothing where there are none."""
    return "-" + hashlib.sha256(json.dumps(sorted(cmake)).encode()).hexdigest()[:8] if cmake else ""


def _cpu_features() -> str:
    """What the compiler may use of this CPU: a runtime built for another one would die of an illegal instruction."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def read_runtime(path: Path) -> Runtime | None:
    """The runtime built in `path`, or None where there is none, or not all of it: `build` then makes it anew."""
    try:
        raw = json.loads((path / "build.json").read_text(encoding="utf-8"))
        if any((path / name).stat().st_size != size for name, size in raw.get("files", {}).items()):
            return None
        return Runtime(path, Base(**raw["base"]), tuple(raw["patches"]), raw["backend"], raw["options"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def built(backend: str) -> Runtime | None:
    """The runtime of today's series for one backend that was asked for last, whatever further options it has, or None."""
    usual = locate(backend)
    found = [(path.stat().st_mtime_ns, path.parent) for path in usual.parent.glob(f"{usual.name}*/build.json")]
    for _, path in sorted(found, reverse=True):
        if not path.name.endswith(".partial") and (runtime := read_runtime(path)):
            return runtime
    return None
