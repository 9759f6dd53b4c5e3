"""The order in which files reach the disk, for every writer; and that no module writes in another way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gguf_models import write_random
from gguftool import durable
from gguftool.errors import GgufToolError
from gguftool.gguf_pass import StageDir
from gguftool.overrides import Origin, writing
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.report import Report
from gguftool.report_files import publish
from gguftool.sensitivity import LayerCost, Sensitivity, conditions
from gguftool.sweep import Store
from gguftool.tensors import TensorSpec
from gguftool.verification import Verified
from gguftool.workdir import WorkDir
from gguftool.workspace import Workspace
from synthetic import make_stats
from test_sensitivity import MEASURED_ON

PACKAGE = Path(__file__).parent.parent / "gguftool"


@pytest.fixture
def order(monkeypatch):
    """What is flushed and renamed, by name, in order; and which partial files had changed behind their last flush."""
    found: list[tuple[str, str]] = []
    fsync, rename, flushed = os.fsync, os.replace, {}

    def name(handle: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{handle}"))

    def watched_fsync(handle: int) -> None:
        path = name(handle)
        found.append(("folder" if path.is_dir() else "flush", path.name))
        flushed[path] = path.stat().st_mtime_ns, path.stat().st_size
        fsync(handle)

    def watched_replace(old, new) -> None:
        stat = os.stat(old)
        assert flushed.get(Path(old).resolve()) == (stat.st_mtime_ns, stat.st_size), (
            f"{old} was written to behind its flush"
        )
        found.append(("rename", f"{Path(old).name} {Path(new).name}"))
        rename(old, new)

    monkeypatch.setattr(durable.os, "fsync", watched_fsync)
    monkeypatch.setattr(durable.os, "replace", watched_replace)
    return found


def write_stats(folder: Path) -> None:
    make_stats().save(folder / "stats.safetensors")


def write_plan(folder: Path) -> None:
    make_plan(make_stats(), Recipe("global", 0.5)).save(folder / "plan.json")


def write_weights(folder: Path) -> None:
    with writing(folder / "weights.safetensors", Origin("refit", "0"), [((0, 0, "down"), (2, 3))]) as writer:
        writer.add((0, 0, "down"), np.ones((2, 3), dtype=np.float32))


def report() -> Report:
    return Report("m", 10, {}, [], "p")


def write_report(folder: Path) -> None:
    publish(report(), folder)


def write_verified(folder: Path) -> None:
    verified = Verified({"a.gguf": "0" * 64})
    verified.save(folder)


def write_gguf_file(folder: Path) -> None:
    specs = [TensorSpec("token_embd.weight", (32, 4), "F32")]
    write_random(folder / "model.gguf", specs, n_expert=2, top_k=1, n_ff=32)


def write_state(folder: Path) -> None:
    Workspace(folder, print).step("made", {}, lambda path: path.write_text("x"))


def write_row(folder: Path) -> None:
    Store(folder).save({"a": 1}, {"b": 2})


def write_layers(folder: Path) -> None:
    where = conditions(make_stats(), Recipe("global", 0.3), **MEASURED_ON)
    Sensitivity(where, (LayerCost(0, 1.0, 1.0, 1.0),)).save(folder / "layers.json")


def write_layer(folder: Path) -> None:
    work = WorkDir(folder, {}, (1, 2, 3), torch.float32)
    for sums in (None, {"a": np.ones(3)}):
        with work.next_hidden() as append:
            append(torch.zeros(1, 2, 3))
        work.advance(sums)


def write_stage(folder: Path) -> None:
    StageDir(folder, {}).finish(0, {"a": np.ones(3)})


def write_note(folder: Path) -> None:
    (folder / "result").write_text("x")
    durable.note_saved(folder, folder / "result")


WRITERS = {
    write_stats: ["stats.safetensors"],
    write_plan: ["plan.json"],
    write_weights: ["weights.safetensors"],
    write_report: ["report.json", "report.html", "report.md"],
    write_verified: ["verified.json"],
    write_gguf_file: ["model.gguf"],
    write_state: ["state.json", "state.json"],
    write_row: None,
    write_layers: ["layers.json"],
    write_layer: ["hidden-000.bin", "state.json", "hidden-001.bin", "layer-000.safetensors", "state.json"],
    write_stage: ["stage-000.safetensors"],
    write_note: ["saved.json"],
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of handles are read from /proc")
def test_bytes_are_on_disk_before_the_name_and_the_name_before_what_follows(write, order, tmp_path):
    write(tmp_path)
    renamed = [text.split()[1] for what, text in order if what == "rename"]
    assert renamed and renamed == (WRITERS[write] or renamed)
    for index, (what, text) in enumerate(order):
        if what == "rename":
            partial, name = text.split()
            assert partial == f"{name}.partial"
            assert order[index - 1] == ("flush", partial) and order[index + 1] == ("folder", tmp_path.name), order
    assert (not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.lock"))) or write is write_state


def test_the_order_is_that_of_the_system_calls(tmp_path):
    """The same seen from outside, where strace is there."""
    if subprocess.run(["sh", "-c", "command -v strace"], capture_output=True).returncode:
        pytest.skip("no strace")
    code = "import sys; from pathlib import Path; from gguftool.durable import write_text; write_text(Path(sys.argv[1]), 'x')"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(tmp_path / "log")]
    done = subprocess.run([*command, sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    lines = (tmp_path / "log").read_text().splitlines() if done.returncode == 0 else []
    if not lines:
        pytest.skip("strace may not trace here")
    own = [line for line in lines if str(tmp_path) in line]
    assert ["fsync" in line for line in own] == [True, False, True]
    assert "out.partial>" in own[0] and "rename" in own[1] and f"<{tmp_path}>" in own[2]


# How a file comes to be other than through durable, by the names of calls.
WRITES = {"write_text", "write_bytes", "savez", "save", "save_file", "tofile", "savefig", "copyfile", "copy", "copytree", "move",
          "rename", "link", "symlink", "touch"}  # fmt: skip
# (module, function, call): why that is no output, or why it is whole all the same.
EXCEPTIONS = {
    ("durable", "write_text", "write_text"): "the partial file of replacing",
    ("durable", "settle", "replace"): "the rename itself",
    ("stats", "save", "save_file"): "the partial file of replacing",
    ("overrides", "writing", "open"): "the partial file of replacing",
    ("gguf_pass", "_write", "save_file"): "the partial file of replacing",
    ("workdir", "next_hidden", "open"): "the partial file of replacing",
    ("workdir", "_write", "open"): "the partial file of replacing",
    ("plot", "save", "savefig"): "the partial file of replacing",
    ("routes", "allocate", "open"): "a mapping that lives as long as a layer, cleared by the next run",
    ("quantize", "quantize", "write_text"): "in a scratch folder, read by llama-quantize",
    ("selftest_worker", "_run", "savez"): "in the parent's temporary folder",
    ("bench_worker", "serve", "open"): "the pipe of the answers",
    ("budget_worker", "main", "open"): "the pipe of the answers",
    ("loading", "_serve", "open"): "the pipe of the answers",
    ("demo", "unpack", "write_bytes"): "the partial file of replacing",
    ("gguf_file", "write_sparse", "open"): "a skeleton in a scratch folder, run and removed",
    ("builtin", "unpack", "copyfile"): "in a partial folder, flushed before it is renamed",
    ("builtin", "unpack", "rename"): "the rename of that folder",
    ("builtin", "_write_stamp", "write_text"): "in that folder",
    ("builtin", "_write_bf16", "open"): "in that folder",
    ("random_checkpoint", "_write_index", "write_text"): "a benchmark's temporary folder",
    ("random_checkpoint", "write_random_checkpoint", "write_text"): "a benchmark's temporary folder",
    ("random_checkpoint", "first_layers", "write_text"): "a benchmark's temporary folder",
    ("random_checkpoint", "first_layers", "symlink"): "a benchmark's temporary folder",
    ("random_checkpoint", "_write_shard", "open"): "a benchmark's temporary folder",
    ("runtime_build", "_download", "write_text"): "in a scratch folder, read by pip",
    ("runtime_build", "_sync", "copy"): "source in the cache, compared byte by byte with the pinned one before each build",
    ("runtime_build", "_compile", "open"): "the build's log",
    ("runtime_build", "_install", "copytree"): "in a partial folder, flushed before it is renamed",
    ("runtime_build", "_install", "copy"): "in that folder",
    ("runtime_build", "_install", "write_text"): "in that folder",
    ("runtime_build", "_install", "replace"): "the rename of that folder",
    ("runtime_build", "_lock", "open"): "a lock",
}  # fmt: skip


def writes(tree: ast.AST) -> set[tuple[str, str]]:
    """(function, call) of everything that may write a file."""
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            attribute, name = getattr(node.func, "attr", ""), getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            mode = [
                value for value in node.args[:2] if isinstance(value, ast.Constant) and isinstance(value.value, str)
            ]
            mode += [
                word.value for word in node.keywords if word.arg == "mode" and isinstance(word.value, ast.Constant)
            ]
            opens = name == "open" or attribute in ("open", "fdopen")
            if opens and any(set("wax+") & set(value.value) and len(value.value) < 4 for value in mode):
                found.add((function.name, "open"))
            elif (attribute or name) in WRITES and owner not in ("copy", "np") and not _is_ours(node, attribute, owner):
                found.add((function.name, attribute or name))
            elif attribute == "savez" or (owner == "np" and attribute in ("save", "savez", "savetxt")):
                found.add((function.name, attribute))
            elif attribute == "replace" and (owner == "os" or _is_one_path(node)):
                found.add((function.name, "replace"))
    return found


def _is_one_path(node: ast.Call) -> bool:
    """Path.replace takes one argument, that of texts two, that of dataclasses and arrays names."""
    return len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)


def _is_ours(node: ast.Call, attribute: str, owner: str) -> bool:
    """Our own save methods, and durable's write_text, which is called as a function."""
    own_text = isinstance(node.func, ast.Name) and node.func.id in ("write_text", "save")
    return own_text or (attribute == "save" and owner not in ("torch", "np")) or (attribute == "copy" and not node.args)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_module_writes_in_another_way(path):
    found = {(path.stem, *each) for each in writes(ast.parse(path.read_text(encoding="utf-8")))}
    # A function within a function is found in both.
    outer = {("overrides", "writing", "open")}
    assert found - EXCEPTIONS.keys() - outer == set()
    unused = {key for key in EXCEPTIONS if key[0] == path.stem} - found
    assert not unused, f"no exception is needed for {unused}"


def test_the_search_finds_what_it_is_for():
    code = """
def one():
    path.write_text("x"); open(path, "wb"); path.open("w"); partial.replace(path); os.replace(a, b); shutil.copy(a, b)
    np.savez(path); save_file(a, path); path.rename(b); text.replace("a", "b"); open(path, "rb"); values.copy()
"""
    assert {call for _, call in writes(ast.parse(code))} == {
        "write_text", "open", "replace", "copy", "savez", "save_file", "rename"
    }  # fmt: skip


def test_a_failure_leaves_what_was_there(tmp_path):
    out = tmp_path / "deep" / "out"
    durable.write_text(out, "first")
    with pytest.raises(RuntimeError), durable.replacing(out) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert out.read_text() == "first" and os.listdir(out.parent) == ["out"]


def test_a_scratch_folder_begins_empty_and_is_gone_however_the_block_ends(tmp_path):
    folder = tmp_path / "work"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "left").write_text("by a run that was killed")
    with durable.scratch(folder) as room:
        assert room == folder and os.listdir(room) == []
        (room / "made").write_text("x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError), durable.scratch(folder) as room:
        (room / "half").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


HOLDER = """
import sys
from pathlib import Path
from gguftool.durable import held
with held(Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that writes `out`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_by_number_until_the_first_has_gone(other, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(GgufToolError, match=f"{out}: process {other.pid} on .* is writing it; wait"):
        durable.write_text(out, "x")
    assert not out.exists() and not out.with_name("out.partial").exists()
    other.kill()
    other.wait()
    assert (tmp_path / ".out.lock").exists()  # left behind, and nobody's
    durable.write_text(out, "x")
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_is_given_back_by_those_who_end_well(other, tmp_path):
    other.communicate("")
    assert os.listdir(tmp_path) == []
    with durable.held(tmp_path / "out"), durable.held(tmp_path / "out"):
        assert os.listdir(tmp_path) == [".out.lock"]
    assert os.listdir(tmp_path) == [] and not durable.held_handles()


def test_a_program_that_was_left_behind_keeps_the_lock(tmp_path):
    """Killed while its child writes: the child holds the lock, and the message says so."""
    code = HOLDER.replace(
        'print("here", flush=True)',
        "import subprocess, os; from gguftool.durable import held_handles\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=held_handles(), stdout=-3); print(child.pid, flush=True)",
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        with pytest.raises(GgufToolError, match=f"process {parent.pid} was writing it and is gone, but a program"):
            durable.write_text(tmp_path / "out", "x")
    finally:
        os.kill(child, 9)


def test_without_locks_everything_is_written_all_the_same(monkeypatch, tmp_path):
    """A network file system whose server has none, and Windows."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(durable.fcntl, "flock", refuse)
    durable.write_text(tmp_path / "one", "x")
    monkeypatch.setattr(durable, "fcntl", None)
    durable.write_text(tmp_path / "two", "x")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
