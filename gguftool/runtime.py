"""The patched llama.cpp that has been built: found in the cache, loaded into this process, described."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .devices import devices
from .errors import GgufToolError
from .runtime_base import BACKENDS, Runtime, built, cache_dir, locate, patches_dir, read_base, series
from .runtime_build import build, fetch, last_line
from .toolchain import suits

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = [
    "BACKENDS", "Runtime", "build", "built", "cache_dir", "describe", "fetch", "find", "is_patched", "last_line", "load",
    "load_for", "locate", "not_built", "patches_dir", "read_base", "require", "series",
]  # fmt: skip

LOADED = "GGUFTOOL_RUNTIME"


def find(backend: str = "auto") -> Runtime | None:
    """The built runtime of today's series, or None. `auto`: the fastest backend that has been built."""
    names = BACKENDS if backend == "auto" else (backend,)
    return next((runtime for name in names if (runtime := built(name))), None)


def require(backend: str = "auto") -> Runtime:
    """The built runtime. Raises GgufToolError with the command that builds it."""
    runtime = find(backend)
    if runtime is None:
        raise not_built(backend)
    return runtime


def not_built(backend: str) -> GgufToolError:
    """What to say where there is no runtime, with the command that builds it."""
    kind, option = ("", "") if backend == "auto" else (f" for {backend}", f" --backend {backend}")
    return GgufToolError(f"no patched llama.cpp{kind} has been built; run `gguftool runtime build{option}`")


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

    tiered = [path for path in models if _is_tiered(GgufFile(path))]
    found = find(backend)
    if found is not None:
        return load(found), found.n_gpu_layers, found.backend
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


def _is_tiered(file: GgufFile) -> bool:
    # The key beside the tensors: the first shard of a split model may hold none of them.
    named = file.value("gguftool.layout", "stock") == "tiered"
    return named or any(tensor.name.endswith("ffn_exps_tier.weight") for tensor in file.tensors)


def describe(backend: str = "auto") -> dict[str, Any]:
    """What `runtime info` says: base, patches, backend, and what llama-cpp-python would load."""
    base = read_base()
    found = find(backend)
    facts: dict[str, Any] = {
        "base": f"{base.package} {base.version} (llama.cpp {base.llama_cpp_commit})",
        "series": list(series()),
        "built": found is not None,
        "path": str(found.path if found else locate(suits()[0] if backend == "auto" else backend)),
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
        "devices": [f"{device.name} ({device.description})" for device in devices(found)],
    }
