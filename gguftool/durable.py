"""Files that are whole or absent, also behind a power cut, and that one process alone writes.

The order is always the same: the bytes go to `NAME.partial`, are flushed to the disk, the file gets its name, the folder is
flushed. A rename reaches the disk before the bytes that were written in front of it may do, so the bytes are flushed first;
and the rename itself is only on disk when its folder is flushed.

Every file that gguftool leaves behind goes through `replacing` or `write_text`; a test reads the syntax trees for others.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import GgufToolError

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not noticed there
    fcntl = None  # type: ignore[assignment]

# In a work directory: which file its results were saved as, written right before that file gets its name.
SAVED = "saved.json"
# What a full, locked or read-only disk says. Everything else that goes wrong in a block has its own words.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
# Locks of this process by the path of the lock file: the handle, and how many blocks hold it.
_held: dict[str, tuple[int, int]] = {}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives `path`.partial to write to; it becomes `path` when the block ends well, and is removed when not.

    Raises GgufToolError where another process writes `path`, or where the disk is full or lets nothing be written.
    """
    partial = path.with_name(path.name + ".partial")
    with stated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path):
            # What a killed run left. A program that it had started may still write to that file; it has no name from now on.
            partial.unlink(missing_ok=True)
            try:
                yield partial
                settle(partial, path)
            finally:
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8 in one step; raises as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder that is empty when the block begins and gone when it ends; what a killed run left in it goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raises GgufToolError where `path` is taken by what no file can replace: a folder, a device."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise GgufToolError(f"{path}: {kind}, and the output is a file; choose another")


def settle(partial: Path, path: Path) -> None:
    """Gives the written file `partial` the name `path`, which then holds all of its bytes whatever happens."""
    flush(partial)
    os.replace(partial, path)
    flush_folder(path.parent)


def flush(path: Path) -> None:
    """Waits until the bytes of a file are on disk."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        # Windows flushes only what was opened for writing.
        with suppress(PermissionError):
            os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk, where the system can do that."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def stated(path: Path) -> Iterator[None]:
    """Turns what a full or a read-only disk says into a stated failure that names `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        if not full and error.errno != errno.EROFS and not (error.errno in _REFUSED and _is_about(error, path)):
            raise
        advice = "make room and run it again" if full else "choose another place, or make that one writable"
        raise GgufToolError(f"{path}: cannot be written ({error.strerror}); {advice}") from error


def full(path: Path) -> str:
    """What to add to the last words of a program that failed to write `path`, where its disk has no room left."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return ""
    return f"; the disk of {path} has only {free} bytes free: make room and run it again" if free < 1 << 20 else ""


def _is_about(error: OSError, path: Path) -> bool:
    """Whether it is `path`, its folder or what is written beside it that cannot be had, and not an input."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return error.filename is None
    name = Path(os.fsdecode(error.filename))
    own = (path, path.with_name(path.name + ".partial"), path.with_name(f".{path.name}.lock"))
    return name in (*own, *path.parents)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """This process alone writes the file or folder `path` while the block runs.

    See `hold`, which it does to `.NAME.lock` beside `path`.
    """
    lock = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    hold(lock, path)
    try:
        yield
    finally:
        release(lock)


def hold(lock: Path, path: Path) -> None:
    """Locks the file `lock`, by which processes that write `path` find each other; `release` undoes it.

    The system gives the lock back when the process ends, however it ends, so that a file left behind blocks nobody. Within
    one process a lock may be held several times. Nothing is guarded where there are no such locks: on Windows, and on
    network file systems whose server has none.

    Raises GgufToolError, with the number of the process, where another one holds it.
    """
    name = os.path.abspath(lock)
    if name in _held:
        handle, count = _held[name]
        _held[name] = (handle, count + 1)
        return
    if fcntl is None:
        return
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(lock)
        except BlockingIOError:
            who = _holder(handle)
            os.close(handle)
            raise GgufToolError(f"{path}: {who}; wait until it ends, or choose another output") from None
        except FileNotFoundError:  # whoever held it has just removed it
            os.close(handle)
            continue
        except OSError:  # no locks on this file system
            os.close(handle)
            os.unlink(lock)
            return
        if (there.st_dev, there.st_ino) == (os.fstat(handle).st_dev, os.fstat(handle).st_ino):
            break
        os.close(handle)
    os.truncate(handle, 0)
    # A full disk has no room for the number; the lock holds all the same.
    with suppress(OSError):
        os.write(handle, f"{os.getpid()} {socket.gethostname()}".encode())
    _held[name] = (handle, 1)


def release(lock: Path) -> None:
    """Gives back what `hold` took. The file goes first: whoever opened it in between sees that it is not there any more."""
    name = os.path.abspath(lock)
    if name not in _held:
        return
    handle, count = _held.pop(name)
    if count > 1:
        _held[name] = (handle, count - 1)
        return
    with suppress(OSError):
        os.unlink(lock)
    os.close(handle)


def held_handles() -> tuple[int, ...]:
    """For `subprocess`' pass_fds: a program that writes in our place keeps our locks where we are killed and it is not."""
    return tuple(handle for handle, _ in _held.values())


def _holder(handle: int) -> str:
    """Who holds a lock, by what stands in its file."""
    pid, _, host = os.pread(handle, 300, 0).decode("utf-8", "replace").partition(" ")
    if not pid.isdecimal():
        return "another process is writing it"
    if host == socket.gethostname():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return f"process {pid} was writing it and is gone, but a program that it had started still runs"
        except OverflowError:  # no number of a process
            return "another process is writing it"
        except PermissionError:
            pass  # somebody else's
    return f"process {pid} on {host} is writing it"


def changed(path: Path) -> GgufToolError:
    """What is said where another program wrote to an input while it was read."""
    return GgufToolError(f"{path} was changed while it was read, so nothing was written; run it again")


def check_unchanged(files: Mapping[Path, list[int]]) -> None:
    """Raises GgufToolError where an input has not the `identity` any more that it had when it was opened."""
    for path, before in files.items():
        try:
            same = identity(path) == before
        except OSError:
            same = False
        if not same:
            raise changed(path)


def note_saved(work_dir: Path, partial: Path) -> None:
    """Leaves a note that the file which is `partial` now is the result of `work_dir`; renaming it keeps it the same."""
    if work_dir.is_dir():
        write_text(work_dir / SAVED, json.dumps(identity(partial)))


def is_saved(work_dir: Path, path: Path) -> bool:
    """Whether `path` is the result of `work_dir`, whose run was stopped before it removed what it had worked with."""
    try:
        return bool(json.loads((work_dir / SAVED).read_text()) == identity(path))
    except (OSError, ValueError):
        return False


def identity(path: Path) -> list[int]:
    """What is the same as long as nobody writes a file or puts another one in its place, short of hiding it on purpose."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
