"""Files that are whole or absent, also behind a power cut.

A rename reaches the disk before the bytes that were written in front of it may do, so the bytes are flushed first; and the
rename itself is only on disk when its folder is flushed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

# In a work directory: which file its results were saved as, written right before that file gets its name.
SAVED = "saved.json"


def settle(partial: Path, path: Path) -> None:
    """Gives the written file `partial` the name `path`, which then holds all of its bytes whatever happens."""
    flush(partial)
    partial.replace(path)
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


def note_saved(work_dir: Path, partial: Path) -> None:
    """Leaves a note that the file which is `partial` now is the result of `work_dir`; renaming it keeps it the same."""
    if work_dir.is_dir():
        (work_dir / SAVED).write_text(json.dumps(_identity(partial)))


def is_saved(work_dir: Path, path: Path) -> bool:
    """Whether `path` is the result of `work_dir`, whose run was stopped before it removed what it had worked with."""
    try:
        return bool(json.loads((work_dir / SAVED).read_text()) == _identity(path))
    except (OSError, ValueError):
        return False


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
