"""The runtime: pinned, cached by hashes, honest about what is loaded."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gguftool import runtime as rt
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
    monkeypatch.setattr(rt, "patches_dir", lambda: tmp_path / "patches")
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


def test_what_is_missing_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(rt.shutil, "which", lambda _name: None)
    monkeypatch.setattr(rt.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(GgufToolError, match=r"cmake .*; ninja .*; a C\+\+ compiler .*; nvcc"):
        rt.build("cuda")
    assert not list(tmp_path.iterdir())


def test_a_patch_that_does_not_apply_is_one_line(tmp_path, monkeypatch):
    sdist = rt.fetch()
    shutil.copytree(rt.patches_dir(), tmp_path / "patches")
    (tmp_path / "patches" / "series").write_text("bad.patch\n")
    (tmp_path / "patches" / "bad.patch").write_text(
        "--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-no such line\n+x\n"
    )
    monkeypatch.setattr(rt, "patches_dir", lambda: tmp_path / "patches")
    with pytest.raises(GgufToolError, match="bad.patch does not apply"):
        rt._prepare_source(sdist, tmp_path / "src", True)
    assert not (tmp_path / "src").exists()
