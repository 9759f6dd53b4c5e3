"""doctor: a machine that lacks things, made by hand, and what it says of each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from gguftool.runtime_base import Runtime, read_base
from test_cli import gguftool

# The package itself has the command of that name.
doctor = import_module("gguftool.doctor")

GONE = {"c++", "g++", "clang++", "cl", "cc", "cmake", "ninja", "git", "patch", "nvcc", "nvidia-smi", "glslc"}


def findings(**changes):
    return {one.name: one for one in doctor.examine(**changes)}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without tools, an empty cache."""
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **how: None if name in GONE else real(name, **how))
    monkeypatch.setattr(doctor, "find_tool", lambda name: None)
    monkeypatch.setattr(doctor, "built", lambda name: None)
    monkeypatch.setattr(doctor, "missing_compiler", lambda: ["a C++ compiler (…)"])
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path / "cache"))


def test_all_that_is_missing_has_a_command(bare):
    found = findings()
    for name in ("compiler", "cmake", "ninja", "git", "runtime"):
        assert found[name].status == "missing" and found[name].mend, name
    assert found["cmake"].mend == "pip install cmake" and found["runtime"].mend == "gguftool runtime build"
    assert "g++" in found["compiler"].mend or "gcc" in found["compiler"].mend
    assert all(one.mend for one in found.values() if one.status != "ok")
    assert not [name for name in found if name.startswith("selftest")]


def test_tools_matter_less_where_the_runtime_is_built(bare, monkeypatch, tmp_path):
    runtime = Runtime(tmp_path, read_base(), ("a", "b"), "cpu")
    monkeypatch.setattr(doctor, "built", lambda name: runtime if name == "cpu" else None)
    monkeypatch.setattr(doctor, "suits", lambda: ("cuda", "a GPU and nvcc are here"))
    found = findings()
    assert [found[name].status for name in ("compiler", "cmake", "ninja", "git")] == ["warn"] * 4
    assert found["runtime"].mend == "gguftool runtime build --backend cuda"
    assert found["selftest, cpu"].status == "warn" and "--backend cpu" in found["selftest, cpu"].mend
    doctor.note_selftest([("cpu", True), ("cpu", True)])
    assert findings()["selftest, cpu"].status == "ok"
    doctor.note_selftest([("cpu", True), ("cpu", False), ("cuda", True)])
    assert findings()["selftest, cpu"].text.startswith("failed")


def test_disk_and_memory_by_their_numbers(bare, monkeypatch):
    usage = type("usage", (), {"free": 2_999_999_999})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (3 << 30, None))
    found = findings(folder=Path("/nowhere/at/all"))
    assert found["disk, cache"].status == "missing" and "3.0 GB free" in found["disk, cache"].text
    assert found["disk, here"].status == "warn" and "/nowhere/at/all" in found["disk, here"].text
    assert found["memory"].status == "warn" and found["memory"].text.startswith("3.0 GiB")
    usage.free = 10_000_000_000
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (4 << 30, 1 << 30))
    found = findings()
    assert [found[name].status for name in ("disk, cache", "disk, here", "memory")] == ["ok"] * 3


def test_a_gpu_without_its_compiler(bare, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ["NVIDIA X"])
    monkeypatch.setattr(doctor, "suits", lambda: ("cpu", ""))
    assert findings()["GPU"].status == "warn" and "nvidia-cuda-toolkit" in findings()["GPU"].mend


def test_packages_by_their_metadata(monkeypatch):
    wanted = ["torch>=2.6", "gguf>=0.19", "llama-cpp-python==0.3.36", "ruff>=0.15; extra == 'dev'"]
    have = {"torch": "2.13.0+cpu", "gguf": "0.9.5", "llama-cpp-python": "0.3.37"}

    def known(name):
        if name not in have:
            raise PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    monkeypatch.setattr(doctor, "version", known)
    found = findings()
    assert found["gguf"].mend == "pip install 'gguf>=0.19'" and "0.9.5" in found["gguf"].text
    assert found["llama-cpp-python"].mend == "pip install 'llama-cpp-python==0.3.36'"
    assert "torch" in found["packages"].text and "ruff" not in found
    del have["gguf"]
    assert findings()["gguf"].text == "not installed"
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    assert findings()["Python"].status == "missing"


def test_the_command_fails_where_something_is_missing(tmp_path, monkeypatch, runtime):
    facts = json.loads(gguftool("doctor", "--json"))
    assert facts["ok"] and {"Python", "compiler", "runtime", "memory"} <= {one["name"] for one in facts["findings"]}
    assert f"torch {version('torch')}" in next(o["text"] for o in facts["findings"] if o["name"] == "packages")
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    said = gguftool("doctor", code=1)
    assert "gguftool runtime build" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete"), ("zsh", "compdef"), ("fish", "complete")])
def test_completion_is_a_script_of_that_shell(shell, word):
    script = gguftool("completion", shell)
    assert (
        "_GGUFTOOL_COMPLETE" in script and word in script and f"gguftool completion {shell}" in script.splitlines()[-1]
    )


def test_bash_completes_with_it(tmp_path):
    """The printed script in a bash of its own: commands, and the options of one."""
    (tmp_path / "gguftool").write_text(f'#!/bin/sh\nexec {sys.executable} -m gguftool "$@"\n')
    (tmp_path / "gguftool").chmod(0o755)
    script = (
        f'PATH={tmp_path}:$PATH; eval "$(gguftool completion bash)"; '
        'COMP_WORDS=(gguftool comp); COMP_CWORD=1; _gguftool_completion gguftool; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(gguftool compress --rec); COMP_CWORD=2; _gguftool_completion gguftool; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(gguftool plan s --method gated-sum-); COMP_CWORD=4; _gguftool_completion gguftool; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(gguftool quantize a Q4_K); COMP_CWORD=3; _gguftool_completion gguftool; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(gguftool compress --recipe sm); COMP_CWORD=3; _gguftool_completion gguftool; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert set(done.stdout.split()) == {
        "compress",
        "completion",
        "--recipe",
        "gated-sum-sq",
        "Q4_K_S",
        "Q4_K_M",
        "smallest",
    }, done.stderr
