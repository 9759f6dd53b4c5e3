"""Disks that are full or read-only, kills, second runs, half-built caches, inputs that change: with real limits.

After every fault the inputs are what they were, outputs are whole or absent, and the next run goes on or says why not.
`scripts/faults` prints how many faults that were.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import killed_stages
from gguftool import bench_calibrate, runtime_build, selftest
from gguftool import runtime as rt
from gguftool.bench import Options, Worker
from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.convert import convert
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.gguf_calibrate import calibrate_gguf
from gguftool.gguf_model import open_gguf
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.processes import ending
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe import Recipe
from gguftool.recipe_file import RunRecipe
from gguftool.recipe_file import save as save_recipe
from gguftool.refit import refit
from gguftool.runs import Ears, carry_out
from gguftool.sources import Source
from gguftool.stats import CalibrationStats, Domain
from gguftool.writer import prune
from models import sample_text, tiny_checkpoint
from test_cli import gguftool
from test_durable import HOLDER


@dataclass(frozen=True)
class Line:
    """A tiny model and everything that is made of it: inputs of every stage."""

    folder: Path
    runtime: Any
    llama: Any
    stats: CalibrationStats
    plan: PrunePlan

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def checkpoint(self) -> Any:
        return open_checkpoint(self.folder / "model")

    @property
    def tool(self) -> QuantizeTool:
        return QuantizeTool(self.runtime.tool("llama-quantize"), threads=1)

    def recipe(self, calib: Path | None = None) -> RunRecipe:
        """A run of compress."""
        return RunRecipe(
            model=self.folder / "model", data=(Source(str(calib or self.folder / "calib.txt")),),
            eval=(self.folder / "eval.txt",), ratio=0.4, quant="Q8_0", align=8, ctx=32, windows=4, eval_windows=2,
            pre_tokenizer="qwen2", backend="cpu",
        )  # fmt: skip

    def hashes(self) -> dict[str, str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def domains() -> list[tuple[Domain, np.ndarray]]:
    ids = np.random.default_rng(1).integers(0, 320, (4, 16))
    return [(Domain("code", "sha", ids.size), ids)]


@pytest.fixture(scope="module")
def line(tmp_path_factory, runtime, llama) -> Line:
    folder = tmp_path_factory.mktemp("line")
    tiny_checkpoint(folder / "model")
    convert(folder / "model", folder / "base.gguf", runtime, pre_tokenizer="qwen2")
    stats = calibrate(open_checkpoint(folder / "model"), domains(), folder / "work")
    plan = make_plan(stats, Recipe("global", 0.5, align=8))
    plan.save(folder / "plan.json")
    prune(folder / "base.gguf", plan, folder / "tiered.gguf")
    (folder / "calib.txt").write_text(sample_text(400, 1))
    (folder / "eval.txt").write_text(sample_text(400, 2))
    stats.save(folder / "stats.safetensors")
    line = Line(folder, runtime, llama, stats, plan)
    save_recipe(line.recipe(), folder / "run.toml")
    return line


def run_calibrate(line: Line, out: Path) -> None:
    calibrate(line.checkpoint, domains(), out.with_name("work"), out=out)


def run_refit(line: Line, out: Path) -> None:
    refit(line.checkpoint, line.plan, domains(), out.with_name("work")).save(out)


def run_calibrate_gguf(line: Line, out: Path) -> None:
    calibrate_gguf(
        open_gguf(line.base), domains(), out.with_name("work"), llama=line.llama, threads=1, out=out, save_seconds=0
    )


def run_convert(line: Line, out: Path) -> None:
    convert(line.folder / "model", out, line.runtime, pre_tokenizer="qwen2")


def run_prune(line: Line, out: Path) -> None:
    prune(line.base, line.plan, out)


def run_expand(line: Line, out: Path) -> None:
    expand(line.folder / "tiered.gguf", out)


def run_quantize(line: Line, out: Path) -> None:
    quantize(line.base, "Q8_0", out, tools=line.tool)


def run_plan(line: Line, out: Path) -> None:
    make_plan(line.stats, Recipe("global", 0.5, align=8)).save(out)


def run_compress(line: Line, out: Path) -> None:
    carry_out(line.recipe(), out)


Stage = Callable[[Line, Path], None]
FILES: list[Stage] = [
    run_calibrate, run_refit, run_calibrate_gguf, run_convert, run_prune, run_expand, run_quantize, run_plan
]  # fmt: skip
STAGES = [*FILES, run_compress]


def contents(out: Path) -> dict[str, bytes]:
    """A file, or a folder's files; without what says where they lie."""
    if not out.is_dir():
        return {"": out.read_bytes()}
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".gguf", ".safetensors")}


@pytest.fixture(scope="module")
def wanted(line, tmp_path_factory) -> Callable[[Stage], dict[str, bytes]]:
    """What a stage writes where nothing goes wrong."""
    made: dict[Stage, dict[str, bytes]] = {}

    def of(stage: Stage) -> dict[str, bytes]:
        if stage not in made:
            out = tmp_path_factory.mktemp("wanted") / "out"
            stage(line, out)
            assert stage is run_compress or os.listdir(out.parent) == ["out"]
            made[stage] = contents(out)
        return made[stage]

    return of


@pytest.fixture
def small(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A disk of its own, mounted anew with other options whenever it is called."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        again = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True)
        except FileNotFoundError:
            pytest.skip("no mount")
        if done.returncode:
            pytest.skip("nothing may be mounted here; the limit of file sizes is tested all the same")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def unlimited(monkeypatch) -> None:
    """The check before the work sees a disk that is large, as it is until somebody else fills it."""
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        found = real(path)
        # Full is seen as full: that is asked for behind a failure.
        return found._replace(free=1 << 50) if found.free >= 1 << 14 else found

    monkeypatch.setattr(shutil, "disk_usage", usage)


def complaint(stage: Stage, line: Line, out: Path) -> str:
    """The one line that a stage ends with."""
    before = line.hashes()
    with pytest.raises(GgufToolError) as error:
        stage(line, out)
    assert line.hashes() == before, "an input was written to"
    assert "\n" not in str(error.value)
    return str(error.value)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, which needs no right to mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_disk_that_fills_up(stage, share, line, wanted, small, unlimited, fault):
    want = wanted(stage)
    size = max(8192, int(share * sum(map(len, want.values()))))
    out = small(f"size={size}") / "out"
    with fault():
        told = complaint(stage, line, out)
        assert any(word in told for word in ("No space left", "make room", "os error 28", " free")), told
        assert not out.exists() or (out.is_dir() and all(want[n] == v for n, v in contents(out).items() if n in want))
        assert not list(out.parent.glob("*.partial")) and not list(out.parent.glob(".*.lock"))
        small("size=64m")
        stage(line, out)
        assert contents(out) == want


@pytest.mark.parametrize(
    "stage", [stage for stage in STAGES if stage is not run_plan], ids=lambda stage: stage.__name__
)
def test_a_limit_of_file_sizes(stage, line, wanted, tmp_path, fault):
    """`ulimit -f`, where nothing can be mounted."""
    want, out = wanted(stage), tmp_path / "out"
    with fault():
        with file_limit(max(map(len, want.values())) // 2):
            told = complaint(stage, line, out)
        assert any(word in told for word in ("File too large", "SIGXFSZ", "os error 27", "0 written")), told
        assert not out.is_file()
        stage(line, out)
        assert contents(out) == want


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_target_that_cannot_be_written(stage, line, wanted, small, unlimited, fault):
    want, folder = wanted(stage), small("size=64m")
    small("ro")
    with fault():
        told = complaint(stage, line, folder / "out")
        assert "Read-only file system" in told and str(folder) in told
        assert os.listdir(folder) == []
        small("rw")
        stage(line, folder / "out")
        assert contents(folder / "out") == want


@pytest.fixture(scope="module")
def stages_killed(line, tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    before = line.hashes()
    command = [sys.executable, killed_stages.__file__, str(line.folder), str(root), *killed_stages.MOMENTS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert line.hashes() == before
    return json.loads(done.stdout), root


# They say when they were made, and by which process.
DATED = ("out/report.html", "out/report.json")


@pytest.mark.parametrize("what", killed_stages.MOMENTS)
def test_killed_at_any_moment_the_next_run_ends_the_same(stages_killed, what, fault):
    facts, root = stages_killed

    def everything(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != ".lock"}

    want = everything(root / what / "whole")
    assert len(want) >= (10 if what == "compress" else 1) and facts[what]["calls"] > 30, want.keys()
    with fault(len(facts[what]["moments"])):
        for moment in facts[what]["moments"]:
            got = everything(root / what / f"at-{moment}")
            assert got.keys() == want.keys(), (moment, got.keys() ^ want.keys())
            assert [name for name in want if got[name] != want[name] and name not in DATED] == [], moment
            if what == "compress":
                ends = [json.loads(files["out/report.json"])["status"] for files in (got, want)]
                assert ends[0]["state"] == ends[1]["state"] and ends[0]["message"] == ends[1]["message"], moment


OUTPUTS = [stage for stage in FILES if stage not in (run_calibrate, run_refit, run_calibrate_gguf)]


@pytest.mark.parametrize("stage", [*OUTPUTS, run_compress], ids=lambda stage: stage.__name__)
def test_a_second_run_on_one_output(stage, line, wanted, tmp_path, fault):
    """The second says who is there; when the first has been killed, it goes on."""
    want, out = wanted(stage), tmp_path / "out"
    code, target = HOLDER, out
    if stage is run_compress:
        code = HOLDER.replace("durable import held", "workspace import Workspace")
        code = code.replace("with held(Path(sys.argv[1])):", "work = Workspace(Path(sys.argv[1]), print)\nif work:")
    with (
        fault(),
        subprocess.Popen(
            [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout.readline() == "here\n"
        told = complaint(stage, line, out)
        assert f"{out}: process {other.pid} on " in told and "is writing it" in told
        assert not list(tmp_path.rglob("*.gguf*"))
        other.kill()
        other.wait()
        stage(line, out)
        assert contents(out) == want


@pytest.mark.parametrize("command", ["calibrate", "refit"])
def test_a_second_run_on_one_work_directory(command, line, tmp_path, fault):
    out = tmp_path / "out.safetensors"
    more = ["--plan", line.folder / "plan.json"] if command == "refit" else []
    arguments = [command, line.folder / "model", "--data", line.folder / "calib.txt", "--ctx", 32, "-o", out, *more]
    with (
        fault(),
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, f"{out}.work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout.readline() == "here\n"
        told = gguftool(*arguments, code=1)
        assert f"out.safetensors.work: process {other.pid} on " in told
        other.kill()
        other.wait()
        gguftool(*arguments)
        assert os.listdir(tmp_path) == [out.name]


KILLED = "#!/bin/sh\nkill -9 $$\n"


@pytest.mark.parametrize("worker", ["quantize", "convert", "bench", "selftest", "calibration bench"])
def test_a_worker_that_is_killed_is_one_clear_line(worker, line, tmp_path, monkeypatch, fault):
    """As the system does it when memory runs out."""
    script, out = tmp_path / "worker", tmp_path / "out"
    script.write_text(KILLED)
    script.chmod(0o755)
    if worker != "quantize":
        monkeypatch.setattr(sys, "executable", str(script))

    def work(_line: Line, _out: Path) -> None:
        if worker == "quantize":
            quantize(line.base, "Q8_0", out, tools=QuantizeTool(script))
        elif worker == "convert":
            run_convert(line, out)
        elif worker == "bench":
            Worker(line.runtime, line.base, Options())
        elif worker == "selftest":
            selftest._ask({"runtime": str(line.runtime.path)})
        else:
            bench_calibrate._watched({})

    with fault():
        assert "killed by SIGKILL, as a system does when its memory runs out" in complaint(work, line, out)
        assert os.listdir(tmp_path) == ["worker"]


def test_a_worker_that_dies_between_two_questions(line, fault):
    with fault():
        worker = Worker(line.runtime, line.base, Options(threads=1))
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(GgufToolError, match="killed by SIGKILL"):
            worker.ask("decode", 1)
        worker.close()


def test_a_worker_without_memory(line, base_gguf, tmp_path, fault):
    """llama-quantize itself, with less address space than the built-in model needs."""
    limited = tmp_path / "limited"
    limited.write_text(f'#!/bin/sh\nulimit -v 30000\nexec {line.tool.binary} "$@"\n')
    limited.chmod(0o755)

    def work(_line: Line, out: Path) -> None:
        quantize(base_gguf, "Q8_0", out, tools=QuantizeTool(limited, threads=1))

    with fault():
        assert "llama-quantize failed (it ended with exit code 1)" in complaint(work, line, tmp_path / "out")
        assert os.listdir(tmp_path) == ["limited"]
        quantize(base_gguf, "Q8_0", tmp_path / "out", tools=line.tool)


def test_endings_have_names():
    assert ending(1) == "it ended with exit code 1" and "SIGSEGV" in ending(-11) and "memory" not in ending(-11)
    assert "signal 250" in ending(-250)


def change(path: Path) -> Callable[..., None]:
    """A progress callback that writes to an input, once, as somebody else would."""
    done = []

    def touched(*_: object) -> None:
        if not done:
            done.append(1)
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            os.utime(path, ns=(1, 1))

    return touched


@pytest.mark.parametrize("stage", ["prune", "expand", "quantize", "convert", "calibrate", "refit", "calibrate GGUF"])
def test_an_input_that_changes_while_it_is_read(stage, line, wanted, tmp_path, fault):
    """Nothing is made of two versions; the next run goes on from nothing that was."""
    folder, out = tmp_path / "copy", tmp_path / "here" / "out"
    shutil.copytree(line.folder, folder)
    own = replace(line, folder=folder)
    names = {"expand": "tiered.gguf", "prune": "base.gguf", "quantize": "base.gguf", "calibrate GGUF": "base.gguf"}
    changed = folder / names.get(stage, "model/model.safetensors")
    spoil, work = change(changed), out.with_name("work")
    runs = {
        "prune": lambda: prune(own.base, own.plan, out, progress=spoil),
        "expand": lambda: expand(folder / "tiered.gguf", out, progress=spoil),
        "quantize": lambda: quantize(own.base, "Q8_0", out, tools=replace(own.tool, progress=spoil)),
        "convert": lambda: convert(folder / "model", out, own.runtime, pre_tokenizer="qwen2", progress=spoil),
        "calibrate": lambda: calibrate(own.checkpoint, domains(), work, out=out, progress=spoil),
        "refit": lambda: refit(own.checkpoint, own.plan, domains(), work, progress=spoil).save(out),
        "calibrate GGUF": lambda: calibrate_gguf(
            open_gguf(own.base), domains(), work, llama=own.llama, threads=1, out=out, progress=spoil, save_seconds=0
        ),
    }  # fmt: skip
    with fault():
        with pytest.raises(GgufToolError, match=f"{changed} was changed while it was read") as error:
            runs[stage]()
        assert "\n" not in str(error.value) and not out.exists()
        assert not list(out.parent.glob("*.partial"))


def test_an_input_that_is_cut_short_under_the_map_of_it(line, tmp_path, fault):
    """llama-quantize dies of it (SIGBUS): what is said is why."""
    own = tmp_path / "base.gguf"
    shutil.copy(line.base, own)
    with fault():
        with pytest.raises(GgufToolError, match="was changed while it was read"):
            quantize(
                own, "Q8_0", tmp_path / "out", tools=replace(line.tool, progress=lambda *_: os.truncate(own, 8192))
            )
        assert os.listdir(tmp_path) == ["base.gguf"]


# A stage whose GGUF is cut off behind the first tensor.
CUT_OFF = """
import os, sys
from pathlib import Path
from gguftool import inspection
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.gguf_file import GgufFile
from gguftool.plan import PrunePlan
from gguftool.writer import prune

stage, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
path, finite = folder / ("base.gguf" if stage == "prune" else "tiered.gguf"), inspection._finite

def cut(*_):
    os.truncate(path, 4096)

def cut_and_look(*rows):
    cut()
    return finite(*rows)

inspection._finite = cut_and_look
try:
    if stage == "prune":
        prune(path, PrunePlan.load(folder / "plan.json"), out, progress=cut)
    elif stage == "expand":
        expand(path, out, progress=cut)
    else:
        inspection.check(inspection.inspect(GgufFile(path)))
except GgufToolError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("stage", ["prune", "expand", "inspect"])
def test_a_gguf_that_is_cut_off_while_it_is_read(stage, line, tmp_path, fault):
    """In a process of its own: one that had mapped the file would be ended by the system (SIGBUS)."""
    folder, out = tmp_path / "copy", tmp_path / "here" / "out"
    folder.mkdir()
    for name in ("base.gguf", "tiered.gguf", "plan.json"):
        shutil.copy(line.folder / name, folder)
    with fault():
        command = [sys.executable, "-c", CUT_OFF, stage, str(folder), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done
        assert ".gguf was changed while it was read" in done.stderr.splitlines()[-1]
        assert not out.exists() and not list(tmp_path.rglob("*.partial"))


def test_a_checkpoint_that_is_cut_off_under_the_converter(line, tmp_path, monkeypatch, fault):
    """The converter maps it and is ended by the system, which is not what has to be said."""
    model = shutil.copytree(line.folder / "model", tmp_path / "model")
    shard, script = model / "model.safetensors", tmp_path / "worker"
    script.write_text(f"#!/bin/sh\n: > '{shard}'\nkill -BUS $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with fault():
        with pytest.raises(GgufToolError, match=f"{shard} was changed while it was read"):
            convert(model, tmp_path / "out", line.runtime, pre_tokenizer="qwen2")
        assert sorted(os.listdir(tmp_path)) == ["model", "worker"]


def test_what_belongs_to_another_model_is_refused(line, tmp_path, fault):
    """The base, the plan or the stats are of another training of the same architecture."""
    tiny_checkpoint(tmp_path / "model", seed=5)
    base = tmp_path / "base.gguf"
    convert(tmp_path / "model", base, line.runtime, pre_tokenizer="qwen2")
    with fault(2):
        with pytest.raises(GgufToolError, match="another model, or another version of it"):
            prune(base, line.plan, tmp_path / "out")
        with pytest.raises(GgufToolError, match="the stats are of model"):
            quantize(base, "Q4_K_M", tmp_path / "out", tools=line.tool, imatrix=line.stats)
    own = calibrate_gguf(open_gguf(line.base), domains(), tmp_path / "work", llama=line.llama, threads=1)
    plan = make_plan(own, Recipe("global", 0.5, align=8))
    prune(line.base, plan, tmp_path / "right.gguf")
    with fault(), pytest.raises(GgufToolError, match="another model, or another version of it"):
        prune(base, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_edited_between_two_runs(line, wanted, tmp_path, fault):
    """Everything that depends on it is made again, and ends as if it had been so from the start."""
    text, said = tmp_path / "calib.txt", []
    text.write_text(sample_text(400, 1))
    carry_out(line.recipe(text), tmp_path / "out", Ears(say=said.append))
    with fault():
        text.write_text(sample_text(400, 9))
        said.clear()
        carry_out(line.recipe(text), tmp_path / "out", Ears(say=said.append))
        assert [word for word in said if word.startswith(("stats", "base")) or "refit" in word] == [
            "base.gguf: already there",
            "stats.safetensors: was made from other inputs or by another recipe; replacing it",
            next(word for word in said if "refit" in word and "replacing it" in word),
        ]
        carry_out(line.recipe(text), tmp_path / "new", Ears(say=said.append))
        assert contents(tmp_path / "out") == contents(tmp_path / "new") != wanted(run_compress)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_truncated_source_is_fetched_anew(cache, monkeypatch, fault):
    monkeypatch.delenv("GGUFTOOL_CACHE")
    whole = rt.fetch()
    monkeypatch.setenv("GGUFTOOL_CACHE", str(cache))
    path = cache / "sdist" / whole.name
    path.parent.mkdir(parents=True)
    (path.parent / "fetch.partial").mkdir()
    (path.parent / "fetch.partial" / "half").write_text("x")
    monkeypatch.setattr(runtime_build, "_download", lambda base, room, _: shutil.copy(whole, room / whole.name))
    with fault():
        path.write_bytes(whole.read_bytes()[:100_000])
        with pytest.raises(GgufToolError, match="not the pinned .*; removed: run it again"):
            rt.fetch()
        assert rt.fetch() == path and os.listdir(path.parent) == [path.name]


def test_patching_that_was_interrupted_is_done_again(tmp_path, fault):
    source = tmp_path / "src"
    runtime_build.prepare_source(rt.fetch(), source, True)

    def tree() -> dict[str, str]:
        files = (path for path in source.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    want = tree()
    files = sorted(want)
    with fault():
        os.truncate(files[10], 3)
        os.unlink(files[20])
        (source / "stray.cpp").write_text("x")
        (tmp_path / "unpack.partial").mkdir()
        (tmp_path / "unpack.partial" / "half").write_text("x")
        runtime_build.prepare_source(rt.fetch(), source, True)
        assert tree() == want and os.listdir(tmp_path) == ["src"]


@pytest.fixture
def installed(cache, tmp_path) -> Path:
    """A runtime as `build` installs it, of empty programs."""
    for name in ("bin/libllama.so", "bin/llama-quantize", "src/convert_hf_to_gguf.py", "src/conversion/base.py",
                 "src/gguf-py/gguf.py"):  # fmt: skip
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("program")
    target = rt.locate("cpu")
    facts = {"base": vars(rt.read_base()), "patches": [], "backend": "cpu", "options": {}}
    runtime_build._install(tmp_path / "tree" / "src", tmp_path / "tree", target, facts, True)
    return target


@pytest.mark.parametrize(
    "damage", ["a library is missing", "a tool is truncated", "no build.json", "killed before its name"]
)
def test_a_runtime_that_is_not_whole_is_built_anew(damage, installed, monkeypatch, fault):
    assert rt.find("cpu") is not None and rt.build("cpu").path == installed
    if damage == "a library is missing":
        (installed / "bin" / "libllama.so").unlink()
    elif damage == "a tool is truncated":
        os.truncate(installed / "bin" / "llama-quantize", 2)
    elif damage == "no build.json":
        (installed / "build.json").unlink()
    else:
        installed.rename(installed.with_name(installed.name + ".partial"))

    def building(*_: object) -> None:
        raise GgufToolError("it is being built")

    monkeypatch.setattr(runtime_build, "check_toolchain", building)
    with fault():
        assert rt.find("cpu") is None
        with pytest.raises(GgufToolError, match="gguftool runtime build"):
            rt.require("cpu")
        with pytest.raises(GgufToolError, match="it is being built"):
            rt.build("cpu")
