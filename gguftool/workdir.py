"""The state of a calibration between two layers, on disk.

`state.json` says what the state belongs to and how many layers are done; `hidden-N.bin` is the input of layer N for all
windows; `layer-N.safetensors` holds the sums of a finished layer. Every file is written under another name, flushed to the
disk and renamed, and `state.json` is the last, so that a run may be stopped, killed or cut off from its power at any moment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from torch import Tensor

from .durable import SAVED, check_place, held, is_saved, replacing, stated, write_text
from .errors import GgufToolError

# Rises where what a layer leaves behind changes.
VERSION = 2
PATTERNS = ("state.json", "hidden-*.bin", "layer-*.safetensors", "*.partial", ".*.lock")
KINDS = {"<f8": "F64", "<f4": "F32"}
# Work directories that may lie inside of one: the two streams of a sequential refit, and those of ranks.
INSIDE = ("original", "pruned", "rank-*-of-*")


class WorkDir:
    """A work directory of one calibration.

    Attributes:
        position: the layer to run next (0 behind the embedding), or None where nothing is there yet.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        resident: bool = False,
    ) -> None:
        """Takes up the state in `path` where it has the same `identity`, else clears it.

        `shape` is that of the hidden states, [windows, n_ctx, d]. They are always written to disk, to go on from; `resident`
        keeps them in memory too, where the output of a layer takes the place of its input.
        """
        self.path, self.shape, self.dtype, self.resident = path, shape, dtype, resident
        self._held: Tensor | None = None
        self.identity = json.loads(json.dumps({"version": VERSION, **identity}))
        with _stated(path):
            path.mkdir(parents=True, exist_ok=True)
            self.position = self._find_position()
            if self.position is None:
                self._clear()
            else:
                self._sweep(self.position)
            need, free = 2 * self._bytes(), shutil.disk_usage(path).free
            if self.position is None and free < need:
                raise GgufToolError(
                    f"{path}: {need} bytes are needed for hidden states, {free} are free; use less text"
                )

    def hidden(self) -> Tensor:
        """The input of layer `position`, [windows, n_ctx, d], mapped from disk or in memory."""
        if self.resident:
            if self._held is None:
                values = np.fromfile(self._hidden(self._at()), dtype=np.uint8)
                self._held = torch.from_numpy(values).view(self.dtype).view(self.shape)
            return self._held
        return torch.from_file(str(self._hidden(self._at())), size=prod(self.shape), dtype=self.dtype).view(self.shape)

    @contextmanager
    def next_hidden(self) -> Iterator[Callable[[Tensor], None]]:
        """Gives a function that appends windows [B, n_ctx, d] to the next layer's input; complete when the block ends."""
        position = 0 if self.position is None else self.position + 1
        target = self._hidden(position)
        # Until all of it is there, what is in memory is neither the input nor the output.
        held, self._held = self._held, None
        if self.resident and held is None:
            held = torch.empty(self.shape, dtype=self.dtype)
        done = 0
        with _stated(self.path), replacing(target) as partial, partial.open("wb") as stream:

            def append(windows: Tensor) -> None:
                nonlocal done
                if held is not None:
                    held[done : done + len(windows)] = windows.to(self.dtype)
                    done += len(windows)
                stream.write(windows.to(self.dtype).contiguous().cpu().view(torch.uint8).numpy().data)

            yield append
            if stream.tell() != self._bytes():
                raise GgufToolError(f"{partial}: {stream.tell()} bytes were written, not {self._bytes()}")
        self._held = held

    def advance(self, sums: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Marks layer `position` done with these sums (None: the embedding is done). Its input is there until `free`."""
        finished = self.position
        with _stated(self.path):
            if finished is not None:
                with replacing(self.sums_path(finished)) as partial:
                    _write(partial, sums or {})
            self.position = 0 if finished is None else finished + 1
            write_text(self.path / "state.json", json.dumps({"identity": self.identity, "position": self.position}))

    def free(self) -> None:
        """Removes the input of the layer that was finished last."""
        if self._at():
            self._hidden(self._at() - 1).unlink(missing_ok=True)

    def go_back(self) -> None:
        """Takes back the last `advance`, whose layer's input is still there."""
        position = self._at() - 1
        hidden = self._hidden(position)
        if position < 0 or not hidden.is_file() or hidden.stat().st_size != self._bytes():
            self.restart()
            return
        self.position, self._held = position, None

    def restart(self) -> None:
        """Forgets everything."""
        self._clear()
        self._held = None
        self.position = None

    def sums(self, layer: int) -> dict[str, NDArray[np.float64]]:
        """The sums of a finished layer."""
        return load_file(self.sums_path(layer))

    def names(self, layer: int) -> list[str]:
        """The names of a finished layer's sums, sorted; its header is read only."""
        with safe_open(self.sums_path(layer), "numpy") as file:
            return sorted(file.keys())

    def sums_path(self, layer: int) -> Path:
        """The safetensors file of a finished layer's sums."""
        return self.path / f"layer-{layer:03}.safetensors"

    def remove(self) -> None:
        """Removes the state, and the directory where nothing else is in it."""
        self._clear()
        with suppress(OSError):
            self.path.rmdir()

    def _at(self) -> int:
        assert self.position is not None, "nothing was embedded yet"
        return self.position

    def _find_position(self) -> int | None:
        """Where the state in the directory stands, or None where it is another's, incomplete or absent."""
        try:
            state = json.loads((self.path / "state.json").read_text())
            position = int(state["position"])
            same = state["identity"] == self.identity
        except (OSError, ValueError, KeyError, TypeError):
            return None
        hidden = self._hidden(position)
        whole = hidden.is_file() and hidden.stat().st_size == self._bytes()
        return position if same and whole and all(self._is_saved(layer) for layer in range(position)) else None

    def _is_saved(self, layer: int) -> bool:
        """Whether a layer's file is whole; opening compares its length with its header."""
        try:
            with safe_open(self.sums_path(layer), "numpy"):
                return True
        except (OSError, SafetensorError):
            return False

    def _clear(self) -> None:
        _clear(self.path)

    def _sweep(self, position: int) -> None:
        """Removes what a killed run left behind and nobody reads any more."""
        kept = {self._hidden(position), self._hidden(position - 1)}
        for file in (file for kind in ("hidden-*.bin", "*.partial", ".*.lock") for file in self.path.glob(kind)):
            if file not in kept:
                file.unlink()

    def _bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def _hidden(self, layer: int) -> Path:
        return self.path / f"hidden-{layer:03}.bin"


@contextmanager
def own_work_dir(out: Path) -> Iterator[Path]:
    """Gives the work directory of the run that makes `out`, which is this process' alone while the block runs.

    Two runs on one output would take each other's state for their own, or clear it. Raises GgufToolError, with the number of
    the process, where another one has it, and where nothing can be written there or `out` is no file.
    """
    check_place(out)
    work_dir = work_dir_of(out)
    with ExitStack() as stack:
        with stated(work_dir):
            stack.enter_context(held(work_dir))
            clear_leftovers(work_dir, out)
        yield work_dir


def work_dir_of(out: Path) -> Path:
    """Where the state of the run that makes `out` lies meanwhile."""
    return out.with_name(out.name + ".work")


def clear_leftovers(work_dir: Path, out: Path) -> None:
    """Removes the work directory of a run that was killed behind the saving of its result `out`."""
    with held(out):
        pass  # removes the lock file that a killed run may have left beside its result
    with suppress(OSError):
        # Killed between the last file and the folder: an empty one holds nothing to go on from.
        work_dir.rmdir()
    if not is_saved(work_dir, out):
        return
    with _stated(work_dir):
        for pattern in INSIDE:
            for folder in work_dir.glob(pattern):
                _clear(folder)
                with suppress(OSError):
                    folder.rmdir()
        _clear(work_dir)
        with suppress(OSError):
            work_dir.rmdir()


def _clear(folder: Path) -> None:
    """Removes the files of a work directory, the note of what was saved last."""
    for pattern in (*PATTERNS, SAVED):
        for file in folder.glob(pattern):
            file.unlink()


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file, one array after the other; safetensors' own writer copies all of them into memory first."""
    header: dict[str, Any] = {}
    end = 0
    for name, value in arrays.items():
        header[name] = {
            "dtype": KINDS[value.dtype.str],
            "shape": value.shape,
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for value in arrays.values():
            stream.write(np.ascontiguousarray(value).data)


@contextmanager
def _stated(path: Path) -> Iterator[None]:
    """Turns failures of the file system (a full disk, no right to write) into stated ones."""
    try:
        yield
    except OSError as error:
        raise GgufToolError(f"{path}: the work directory cannot be written ({error})") from error
