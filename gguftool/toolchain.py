"""What this machine has to build llama.cpp with: found before anything starts, and all that is missing named at once."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import GgufToolError
from .runtime_base import BACKENDS, OPTIONS, cache_dir, read_base

_OPTION = re.compile(r"-D([A-Za-z0-9_]+)(?::[A-Z]+)?=.+")
_ARCHITECTURES = "CMAKE_CUDA_ARCHITECTURES"


@dataclass(frozen=True)
class Toolchain:
    """Paths of cmake and ninja, the options that this machine needs, and what the user should know of them."""

    cmake: str
    ninja: str
    options: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def suits() -> tuple[str, str]:
    """The backend that suits this machine, and why: metal on Apple silicon, cuda where nvcc and a GPU are, else cpu."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "metal", "this is Apple silicon"
    nvcc, gpus = find_nvcc(), nvidia_gpus()
    if nvcc and gpus:
        return "cuda", f"{gpus[0]} and {nvcc} are here"
    if gpus:
        return "cpu", f"{gpus[0]} is here, but no nvcc: install the CUDA toolkit to use it"
    if nvcc:
        return "cpu", f"{nvcc} is here, but nvidia-smi reports no GPU"
    return "cpu", "neither Apple silicon nor an NVIDIA GPU is here; --backend vulkan serves other GPUs"


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, where cmake would look for it too."""
    if (chosen := os.environ.get("CUDACXX")) and shutil.which(chosen):
        return shutil.which(chosen)
    if found := shutil.which("nvcc"):
        return found
    roots = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return next((path for root in roots if root and (path := shutil.which("nvcc", path=f"{root}/bin"))), None)


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver reports."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def check_toolchain(backend: str, cmake: Sequence[str] = ()) -> Toolchain:
    """What the build will use.

    Args:
        cmake: the user's further options of cmake, `-DNAME=VALUE`.

    Raises:
        GgufToolError: a backend that this system cannot have; an option that is none, or that gguftool sets itself;
            or all the tools that are missing, in one line, each with a way to get it.
    """
    if backend == "metal" and sys.platform != "darwin":
        raise GgufToolError(f"metal needs macOS, and this is {sys.platform}; take cuda, vulkan or cpu")
    given = _check_options(backend, cmake)
    paths, missing = {}, []
    for tool in ("cmake", "ninja"):
        if path := find_tool(tool):
            paths[tool] = path
        else:
            missing.append(f"{tool} (pip install {tool})")
    missing += missing_compiler()
    if not shutil.which("git") and not shutil.which("patch"):
        missing.append("git or patch")
    fetched = os.environ.get("GGUFTOOL_SDIST") or (cache_dir() / "sdist" / f"{read_base().stem}.tar.gz").is_file()
    if importlib.util.find_spec("pip") is None and not fetched:
        missing.append("pip, to fetch llama.cpp with (python -m ensurepip)")
    nvcc = find_nvcc()
    if backend == "cuda" and nvcc is None:
        missing.append("nvcc (the CUDA toolkit; where it is installed, put its bin folder on the PATH)")
    if backend == "vulkan" and not shutil.which("glslc"):
        missing.append("glslc (the Vulkan SDK; Debian: apt install glslc libvulkan-dev spirv-headers)")
    if missing:
        raise GgufToolError(f"building the {backend} runtime needs {'; '.join(missing)}")
    options, notes = _cuda(str(nvcc), given) if backend == "cuda" else ({}, [])
    return Toolchain(paths["cmake"], paths["ninja"], options, tuple(notes))


def _check_options(backend: str, cmake: Sequence[str]) -> set[str]:
    """Names of the user's options."""
    names = set()
    for option in cmake:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise GgufToolError(f"--cmake {option}: not an option of cmake; write --cmake -DNAME=VALUE")
        if match[1] in OPTIONS | BACKENDS[backend]:
            raise GgufToolError(f"--cmake {option}: gguftool sets {match[1]} itself")
        names.add(match[1])
    return names


def find_tool(name: str) -> str | None:
    """Path of a program that pip installs beside Python, or of the system's."""
    beside = Path(sys.executable).parent / (name + (".exe" if sys.platform == "win32" else ""))
    return str(beside) if beside.exists() else shutil.which(name)


def missing_compiler() -> list[str]:
    """What to install for a C++ compiler; nothing where there is one."""
    if sys.platform == "darwin":
        # c++ is there even without the tools: a stub that offers to install them.
        tool = shutil.which("xcode-select")
        if tool is None or subprocess.run([tool, "-p"], capture_output=True).returncode:
            return ["the Xcode command line tools (xcode-select --install)"]
        return []
    chosen = os.environ.get("CXX", "c++").split()[:1]
    if any(shutil.which(name) for name in (*chosen, "g++", "clang++", "cl")):
        return []
    return ["a C++ compiler (Debian: apt install g++; Windows: a Visual Studio developer prompt)"]


def _cuda(nvcc: str, given: set[str]) -> tuple[dict[str, str], list[str]]:
    """Options and notes of a CUDA build: for the GPUs that are here, or for those that were named."""
    options, notes = {}, []
    if shutil.which("nvcc") is None and "CMAKE_CUDA_COMPILER" not in given:
        options["CMAKE_CUDA_COMPILER"] = nvcc
    gpus = nvidia_gpus()
    if _ARCHITECTURES in given:
        notes.append(f"building for the {_ARCHITECTURES} that were given")
    elif gpus:
        options[_ARCHITECTURES] = "native"
        notes.append(f"building for {', '.join(dict.fromkeys(gpus))}")
    else:
        # ggml's own default asks for the GPUs of this machine.
        options[_ARCHITECTURES] = "all-major"
        notes.append(
            f"no GPU is here: building for all major architectures; --cmake -D{_ARCHITECTURES}=86 builds for one, sooner"
        )
    if "GGML_CUDA_FA" not in given:
        notes.append("most of the time goes into flash attention; --cmake -DGGML_CUDA_FA=OFF leaves it out")
    return options, notes
