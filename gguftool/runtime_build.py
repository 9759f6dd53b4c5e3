"""Building the patched llama.cpp: fetched from a pinned source distribution, patched, compiled, put into the cache."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .durable import flush, flush_folder, held, scratch, settle
from .errors import GgufToolError
from .runtime_base import (
    BACKENDS,
    OPTIONS,
    TOOLS,
    Base,
    Runtime,
    cache_dir,
    locate,
    options_suffix,
    patch_files,
    read_base,
    read_runtime,
    series,
)
from .toolchain import Toolchain, check_toolchain, suits

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]

BUILD_BYTES = 3_000_000_000
# Names a source distribution that the user has brought, where there is no network.
SDIST = "GGUFTOOL_SDIST"


def build(
    backend: str = "auto", *, patched: bool = True, force: bool = False, jobs: int | None = None,
    cmake: Sequence[str] = (), progress: Progress | None = None, say: Say = lambda _text: None,
) -> Runtime:  # fmt: skip
    """Builds the runtime, or returns the one that is cached; either way it is the one that `find` gives from now on.

    Args:
        patched: False builds the plain base, the reference of tests.
        cmake: further options of cmake, `-DNAME=VALUE`.
        progress: called with (done, total, text) while ninja runs.
        say: called with what the user should know before it starts: the backend that was chosen and why, for what.

    Raises:
        GgufToolError: something is missing that the build needs (all of it is named), the source has another hash, a
            patch does not apply, the build failed.
    """
    name = backend
    if backend == "auto":
        name, reason = suits()
        say(f"backend {name}: {reason}")
    if name not in BACKENDS:
        raise GgufToolError(f"no backend {backend!r}; known are auto, {', '.join(sorted(BACKENDS))}")
    target = locate(name, patched, cmake)
    if not force and (cached := _cached(target)):
        return cached
    tools = check_toolchain(name, cmake)
    for note in tools.notes:
        say(note)
    work = cache_dir() / f"work-{name}"
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < BUILD_BYTES:
        raise GgufToolError(f"{work}: building needs {BUILD_BYTES / 1e9:.0f} GB free")
    with _lock(work):
        if not force and (cached := _cached(target)):
            return cached
        sdist = fetch(progress)
        prepare_source(sdist, work / "src", patched)
        tree = work / f"build{options_suffix(cmake)}"
        chosen = [f"-D{key}={value}" for key, value in (OPTIONS | BACKENDS[name] | tools.options).items()]
        # The plain base is a reference for the libraries alone.
        _compile(work, tree, [*chosen, *cmake], ("llama", *TOOLS) if patched else ("llama",), tools, jobs, progress)
        facts: dict[str, Any] = {
            "base": asdict(read_base()),
            "patches": list(series()) if patched else [],
            "backend": name,
            "options": dict(option.removeprefix("-D").split("=", 1) for option in [*chosen, *cmake]),
        }
        _install(work / "src", tree, target, facts, patched)
    runtime = read_runtime(target)
    assert runtime is not None
    return runtime


def _cached(target: Path) -> Runtime | None:
    """The runtime in `target`, marked as the one that was asked for last."""
    runtime = read_runtime(target)
    if runtime is not None:
        # The file system's own clock is too coarse for two in a row.
        now = time.time_ns()
        os.utime(target / "build.json", ns=(now, now))
    return runtime


def fetch(progress: Progress | None = None) -> Path:
    """The pinned source distribution, its hash checked: from the cache, fetched with pip where it is not there yet.

    Raises GgufToolError, with another way to get it, where pip cannot.
    """
    base = read_base()
    if (given := _given(base)) is not None:
        return given
    folder = cache_dir() / "sdist"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{base.stem}.tar.gz"
    if not path.is_file():
        if progress:
            progress(0, 1, f"fetching {base.package} {base.version}")
        with held(path), scratch(folder / "fetch.partial") as room:
            _download(base, room, path)
            settle(room / path.name, path)
    if (have := _sha256(path)) != base.sha256:
        path.unlink()
        raise GgufToolError(f"{path.name} has sha256 {have}, not the pinned {base.sha256}; removed: run it again")
    return path


def _given(base: Base) -> Path | None:
    """The source distribution that the user names in GGUFTOOL_SDIST. Another file than the pinned one is refused."""
    if not (name := os.environ.get(SDIST)):
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise GgufToolError(f"{SDIST}={name}: no such file")
    if (have := _sha256(path)) != base.sha256:
        raise GgufToolError(f"{SDIST}={name} has sha256 {have}, not the pinned {base.sha256} of {base.stem}.tar.gz")
    return path


def _download(base: Base, room: Path, path: Path) -> None:
    pin = room / "pin.txt"
    pin.write_text(f"{base.package}=={base.version} --hash=sha256:{base.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", base.package]
    done = subprocess.run(
        [*command, "--require-hashes", "-r", str(pin), "-d", str(room)], capture_output=True, text=True
    )
    if done.returncode:
        raise GgufToolError(
            f"pip could not fetch {base.package} {base.version}: {last_line(done.stderr)}; without a network, bring "
            f"{path.name} from PyPI (sha256 {base.sha256}) to {path}, or name it in {SDIST}"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_line(text: str) -> str:
    """The last line that says something: where compilers and pip put their reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")


def prepare_source(sdist: Path, source: Path, patched: bool) -> None:
    """Brings `source` to the base, patched or not, and touches only files that change, so that ninja builds only those."""
    base = read_base()
    with scratch(source.parent / "unpack.partial") as room:
        with tarfile.open(sdist) as archive:
            # The hash is checked, so an old Python without filters (before 3.11.4) may unpack it too.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(room, **options)
        fresh = room / base.stem / base.root
        for patch in patch_files() if patched else ():
            _apply(patch, fresh)
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
    work: Path, tree: Path, options: Sequence[str], targets: Sequence[str], tools: Toolchain, jobs: int | None,
    progress: Progress | None,
) -> None:  # fmt: skip
    configure = [tools.cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", "-S", str(work / "src")]
    log = work / "build.log"
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([*configure, "-B", str(tree), *options], stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise GgufToolError(f"cmake failed: {last_line(log.read_text())} (all of it: {log})")
        command = [tools.ninja, "-C", str(tree), *(["-j", str(jobs)] if jobs else []), *targets]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
            assert ninja.stdout is not None
            for line in ninja.stdout:
                file.write(line)
                if progress and (step := re.match(r"\[(\d+)/(\d+)\] (.*)", line)):
                    progress(int(step[1]), int(step[2]), Path(step[3].split()[-1]).name)
    if ninja.returncode:
        failed = re.findall(r".*(?:error|FAILED).*", log.read_text(encoding="utf-8", errors="replace"))
        raise GgufToolError(f"the build failed: {failed[-1].strip() if failed else 'see the log'} (all of it: {log})")


def _install(source: Path, tree: Path, target: Path, facts: dict[str, Any], patched: bool) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "convert").mkdir(parents=True)
    # The build folder may hold the tools of a patched build before it; a plain one has only libraries.
    tools = r"|(llama|test)-[a-z-]+(\.exe)?" if patched else ""
    wanted = re.compile(r"lib.*\.(so|dylib)(\..*)?|.*\.(dll|metal|metallib)" + tools)
    shutil.copytree(
        tree / "bin", partial / "bin", symlinks=True,
        ignore=lambda _, names: [name for name in names if not wanted.fullmatch(name)],
    )  # fmt: skip
    shutil.copy(source / "convert_hf_to_gguf.py", partial / "convert")
    for folder in ("conversion", "gguf-py"):
        shutil.copytree(source / folder, partial / "convert" / folder)
    sizes = {
        str(path.relative_to(partial)): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }
    facts |= {"files": sizes}
    (partial / "build.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for path in partial.rglob("*"):
        flush_folder(path) if path.is_dir() else flush(path)
    flush_folder(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    flush_folder(target.parent)


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
