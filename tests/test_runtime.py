"""The runtime: pinned, cached by hashes, honest about what is loaded."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from gguftool import runtime as rt
from gguftool import runtime_base, runtime_build, toolchain
from gguftool.cli import cli
from gguftool.devices import devices
from gguftool.errors import GgufToolError

ROOT = Path(__file__).parent.parent


def test_the_series_is_complete_and_applies():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "llama-patches", "check", "--sdist", rt.fetch()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_series_is_another_runtime(tmp_path, monkeypatch):
    shutil.copytree(rt.patches_dir(), tmp_path / "patches")
    before = rt.locate("cpu")
    monkeypatch.setattr(runtime_base, "patches_dir", lambda: tmp_path / "patches")
    assert rt.locate("cpu") == before
    first = tmp_path / "patches" / rt.series()[0]
    first.write_bytes(first.read_bytes() + b"\n")
    assert rt.locate("cpu") != before
    assert rt.locate("cpu", patched=False) != rt.locate("cpu")


def test_a_source_with_another_hash_is_refused_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    base = rt.read_base()
    path = tmp_path / "sdist" / f"llama_cpp_python-{base.version}.tar.gz"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    with pytest.raises(GgufToolError, match=hashlib.sha256(b"something else").hexdigest()):
        rt.fetch()
    assert not path.exists()


def test_a_built_runtime_is_found_at_once_and_says_what_it_is(runtime):
    assert rt.build("cpu") == runtime
    facts = rt.describe("cpu")
    assert facts["built"] and facts["patched"] and facts["ours"] and facts["backend"] == "cpu"
    assert facts["series"] == list(rt.series()) and any("CPU" in device for device in facts["devices"])


def test_the_plain_runtime_is_not_taken_for_ours(plain_runtime, runtime):
    assert not rt.is_patched(plain_runtime.library("llama"))
    assert rt.is_patched(runtime.library("llama"))


def test_without_a_runtime_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    with pytest.raises(GgufToolError, match="gguftool runtime build"):
        rt.require()
    done = CliRunner().invoke(cli, ["runtime", "info"])
    assert done.exit_code == 0 and "built:        False" in done.stdout
    assert "run `gguftool runtime build`" in done.stderr


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with an empty cache on which only the named programs are found; nvidia-smi reports the named GPUs."""
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path / "cache"))
    for name in ("CXX", "CUDACXX", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def have(*programs, gpus=(), platform="linux", machine="x86_64", status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)

        def which(name, path=None):
            return f"{folder}/{name}" if path is None and name in programs else None

        def run(command, **_):
            text = "".join(f"GPU {i}: {gpu} (UUID: GPU-{i})\n" for i, gpu in enumerate(gpus))
            return subprocess.CompletedProcess(command, status, text, "")

        monkeypatch.setattr(toolchain, "shutil", SimpleNamespace(which=which))
        monkeypatch.setattr(toolchain, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
        monkeypatch.setattr(toolchain, "sys", SimpleNamespace(platform=platform, executable=str(folder / "python")))
        monkeypatch.setattr(toolchain, "platform", SimpleNamespace(machine=lambda: machine))
        return folder

    return have


BASIC = ("cmake", "ninja", "g++", "git")


def test_all_that_is_missing_is_named_before_anything_starts(machine, tmp_path, monkeypatch):
    machine()
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        GgufToolError, match=r"cmake .*; ninja .*; a C\+\+ compiler .*; git or patch; pip.*; nvcc"
    ) as error:
        rt.build("cuda")
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()
    machine(*BASIC)
    with pytest.raises(GgufToolError, match="glslc"):
        toolchain.check_toolchain("vulkan")
    machine("cmake", "ninja", "git", "xcode-select", platform="darwin", status=2)
    with pytest.raises(GgufToolError, match="xcode-select --install"):
        toolchain.check_toolchain("metal")


def test_metal_is_refused_where_there_is_no_macos(machine, tmp_path):
    machine()
    with pytest.raises(GgufToolError, match="metal needs macOS, and this is linux"):
        rt.build("metal")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("found", "backend", "reason"),
    [
        ({"platform": "darwin", "machine": "arm64"}, "metal", "Apple silicon"),
        (
            {"programs": ("nvcc", "nvidia-smi"), "gpus": ("NVIDIA RTX 4090",)},
            "cuda",
            "NVIDIA RTX 4090 and .*nvcc are here",
        ),
        ({"programs": ("nvidia-smi",), "gpus": ("NVIDIA RTX 4090",)}, "cpu", "no nvcc: install the CUDA toolkit"),
        ({"programs": ("nvcc", "nvidia-smi"), "status": 9}, "cpu", "nvidia-smi reports no GPU"),
        ({"programs": ("nvcc",)}, "cpu", "reports no GPU"),
        ({}, "cpu", "--backend vulkan"),
    ],
)
def test_auto_says_what_it_chose_and_why(found, backend, reason, machine):
    machine(*found.pop("programs", ()), **found)
    chosen, why = toolchain.suits()
    assert chosen == backend and re.search(reason, why)
    said: list[str] = []
    with pytest.raises(GgufToolError, match=f"building the {backend} runtime needs"):
        rt.build("auto", say=said.append)
    assert said == [f"backend {backend}: {why}"]


def test_cuda_is_built_for_what_is_here_or_for_what_was_given(machine):
    machine(*BASIC, "nvcc", "nvidia-smi", gpus=("NVIDIA RTX 4090", "NVIDIA RTX 4090"))
    made = toolchain.check_toolchain("cuda")
    assert made.options == {"CMAKE_CUDA_ARCHITECTURES": "native"}
    assert made.notes[0] == "building for NVIDIA RTX 4090" and "-DGGML_CUDA_FA=OFF" in made.notes[1]
    machine(*BASIC, "nvcc")
    made = toolchain.check_toolchain("cuda")
    assert made.options == {"CMAKE_CUDA_ARCHITECTURES": "all-major"} and "no GPU is here" in made.notes[0]
    made = toolchain.check_toolchain("cuda", ["-DCMAKE_CUDA_ARCHITECTURES=90", "-DGGML_CUDA_FA=OFF"])
    assert made.options == {}
    assert made.notes == ("building for the CMAKE_CUDA_ARCHITECTURES that were given",)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("GGML_X=ON", "write --cmake -DNAME=VALUE"),
        ("-DGGML_X", "write --cmake -DNAME=VALUE"),
        ("-GNinja", "write --cmake -DNAME=VALUE"),
        ("-DGGML_CUDA=OFF", "gguftool sets GGML_CUDA itself"),
        ("-DLLAMA_BUILD_UI:BOOL=ON", "gguftool sets LLAMA_BUILD_UI itself"),
    ],
)
def test_options_that_are_none_or_that_are_ours_are_refused(option, message, machine):
    machine(*BASIC, "nvcc")
    with pytest.raises(GgufToolError, match=message):
        rt.build("cuda", cmake=[option])


def test_further_options_are_another_runtime_in_any_order():
    one, two = "-DGGML_OPENMP=OFF", "-DGGML_LTO=ON"
    assert rt.locate("cpu", cmake=[one, two]) == rt.locate("cpu", cmake=[two, one])
    assert len({rt.locate("cpu"), rt.locate("cpu", cmake=[one]), rt.locate("cpu", cmake=[two])}) == 3


def test_options_reach_cmake_and_the_build_tree_is_their_own(runtime, tmp_path, monkeypatch):
    """Everything but the compiler: the commands that would run, and what the runtime says of itself."""
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    seen = []
    monkeypatch.setattr(runtime_build, "fetch", lambda _progress: tmp_path)
    monkeypatch.setattr(runtime_build, "prepare_source", lambda *_: None)

    def compiled(work, tree, options, targets, *_):
        seen.append((tree, options, targets))
        for folder in (tree / "bin", work / "src" / "conversion", work / "src" / "gguf-py"):
            folder.mkdir(parents=True, exist_ok=True)
        (work / "src" / "convert_hf_to_gguf.py").touch()
        (tree / "bin" / "libllama.so").touch()

    monkeypatch.setattr(runtime_build, "_compile", compiled)
    usual, other = rt.build("cpu"), rt.build("cpu", cmake=["-DGGML_OPENMP=OFF"])
    assert usual.path != other.path and seen[0][0] != seen[1][0]
    assert "-DGGML_OPENMP=OFF" in seen[1][1] and "-DGGML_OPENMP=OFF" not in seen[0][1]
    assert {"llama-cli", "llama-server", "llama-gguf-split"} <= set(seen[0][2])
    # Else the build of the server would fetch a page from the net.
    assert {"-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"} <= set(seen[0][1])
    assert other.options["GGML_OPENMP"] == "OFF"
    assert rt.find("cpu") == other
    assert rt.build("cpu") == usual == rt.find("cpu") and len(seen) == 2


def test_the_devices_of_the_runtime_are_listed(runtime):
    found = devices(runtime)
    assert [device.type for device in found] == ["cpu"] and found[0].runs_models and found[0].description


def test_a_patch_that_does_not_apply_is_one_line(tmp_path, monkeypatch):
    sdist = rt.fetch()
    shutil.copytree(rt.patches_dir(), tmp_path / "patches")
    (tmp_path / "patches" / "series").write_text("bad.patch\n")
    (tmp_path / "patches" / "bad.patch").write_text(
        "--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-no such line\n+x\n"
    )
    monkeypatch.setattr(runtime_base, "patches_dir", lambda: tmp_path / "patches")
    with pytest.raises(GgufToolError, match="bad.patch does not apply"):
        runtime_build.prepare_source(sdist, tmp_path / "src", True)
    assert not (tmp_path / "src").exists()


def test_no_kernels_for_amx():
    """GCC 12 compiles llama.cpp's own into a crash; the flags leave them out, whatever `-march=native` stands for."""
    flags = runtime_base.OPTIONS["CMAKE_CXX_FLAGS_RELEASE"].split()
    command = [shutil.which("c++") or "c++", "-march=sapphirerapids", "-dM", "-E", "-x", "c++", "/dev/null"]
    if "__AMX_INT8__" not in (plain := subprocess.run(command, capture_output=True, text=True)).stdout:
        pytest.skip(f"no compiler for such a processor: {plain.stderr.strip()[-100:]}")
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    assert "__AMX_INT8__" not in done.stdout and "__AVX512VNNI__" in done.stdout
