"""Overrides: matrices of experts that stand beside a plan and replace the base file's, and their file.

Together they may be as big as the pruned model in float32 (60 GB for half of Qwen3-30B), so they stay on disk: one matrix
is in memory at a time, when they are made, when they are saved and when the pruned file is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .durable import note_saved, replacing
from .errors import GgufToolError
from .plan import PrunePlan
from .strict_json import GARBLED, parse, text

FORMAT = "gguftool.weights"
VERSION = 2
# What version 1 called itself: refitted down columns only, without a role in their names.
OLD_FORMAT = "gguftool.refit"

ROLES = ("gate", "up", "down")

# Decoder index, original id of the expert, role.
Key = tuple[int, int, str]
Shape = tuple[int, ...]
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """Where overrides come from.

    Attributes:
        made_by: the command or method that made them, such as `refit` or `dern`; a pruned file names it.
        kept_hash: of the plan that they were made for.
        dataset: the texts that they were fitted on.
        notes: what a person should know.
    """

    made_by: str
    kept_hash: str
    dataset: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Overrides:
    """New matrices: (decoder index, expert, role) -> float32 in the pruned shape.

    Gate and up are [w, d] and down is [d, w], their w neurons in the order of the kept ones.

    Attributes:
        origin: what made them, and for which plan.
        places: the safetensors file that holds each matrix, and its name there.
        saved: called when `save` has written everything; may remove the files in `places`.
        work_dir: where these files are, which is told what they were saved as (see `durable.note_saved`).
    """

    origin: Origin
    places: Mapping[Key, tuple[Path, str]]
    saved: Callable[[], None] | None = None
    work_dir: Path | None = None
    _opened: tuple[Path, Any] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def keys(self) -> KeysView[Key]:
        """Which matrices are new: (decoder index, expert, role)."""
        return self.places.keys()

    @property
    def files(self) -> set[Path]:
        """The files that hold them."""
        return {path for path, _ in self.places.values()}

    @property
    def experts(self) -> set[tuple[int, int]]:
        """Which experts have a new matrix: (decoder index, expert)."""
        return {(layer, expert) for layer, expert, _ in self.places}

    def get(self, layer: int, expert: int, role: str) -> Matrix | None:
        """The new matrix of an expert in its pruned shape, read now, or None where it keeps its own."""
        from safetensors import SafetensorError

        if (layer, expert, role) not in self.places:
            return None
        path, name = self.places[layer, expert, role]
        try:
            found = np.asarray(self._open(path).get_tensor(name), dtype=np.float32)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise GgufToolError(f"{path}: damaged weights file ({error})") from error
        if not np.isfinite(found).all():
            raise GgufToolError(f"{path}: the weights' {name} is not finite; make them again")
        return found

    def shape(self, key: Key) -> Shape:
        """The shape of a matrix, from its file's header."""
        path, name = self.places[key]
        return tuple(int(n) for n in self._open(path).get_slice(name).get_shape())

    def save(self, path: Path) -> None:
        """Writes all of them to `path`, first to `path`.partial. What they come from is untouched until that is done."""
        with writing(
            path, self.origin, ((key, self.shape(key)) for key in self.places), work_dir=self.work_dir
        ) as writer:
            for key in self.places:
                values = self.get(*key)
                assert values is not None
                writer.add(key, values)
        self._opened = None
        if self.saved is not None:
            self.saved()
        self.places, self.saved, self.work_dir = {key: (path, _name(key)) for key in self.places}, None, None

    @classmethod
    def load(cls, path: Path) -> Overrides:
        """Opens saved weights. Raises GgufToolError for a file that is missing, damaged, old or something else."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise GgufToolError(f"{path}: no such file; `gguftool refit` and `gguftool dern` make weights")
        try:
            with safe_open(path, "numpy") as file:
                header = parse((file.metadata() or {}).get("gguftool", "{}"))
                _check_version(path, header)
                origin = _origin(header)
                places = {_key(name): (path, name) for name in file.keys()}
                if len(places) < len(file.keys()):
                    raise ValueError("the same matrix twice")
        except (SafetensorError, *GARBLED, OSError) as error:
            raise GgufToolError(f"{path}: damaged weights file ({error})") from error
        return cls(origin, places)

    def check(self, plan: PrunePlan, n_embd: int) -> None:
        """Raises GgufToolError unless every matrix belongs to an expert that `plan` keeps and has its pruned shape.

        `n_embd` is the width of the residual stream.
        """
        if self.origin.kept_hash != plan.kept_hash:
            raise GgufToolError(
                f"the weights were made for another plan; run `gguftool {self.origin.made_by}` on this one"
            )
        widths = {layer.index: dict(zip(layer.router, layer.widths, strict=True)) for layer in plan.layers}
        for key in self.places:
            layer, expert, role = key
            if layer not in widths:
                raise GgufToolError(f"the weights have layer {layer}, which the plan does not prune")
            if not widths[layer].get(expert):
                raise GgufToolError(f"the weights have layer {layer}, expert {expert}, which the plan does not keep")
            path, name = self.places[key]
            if (kind := self._open(path).get_slice(name).get_dtype()) != "F32":
                raise GgufToolError(f"{path}: the weights' {name} is {kind}, not F32; make them again")
            width = widths[layer][expert]
            want, have = ((n_embd, width) if role == "down" else (width, n_embd)), self.shape(key)
            if have != want:
                raise GgufToolError(
                    f"the weights' {role} of layer {layer}, expert {expert} is {list(have)}, the plan needs {list(want)}"
                )

    def _open(self, path: Path) -> Any:
        """The file, kept open until another one is asked for: its header lists thousands of matrices."""
        from safetensors import safe_open

        if self._opened is None or self._opened[0] != path:
            self._opened = (path, safe_open(path, "numpy"))
        return self._opened[1]


class Writer:
    """Appends matrices to a weights file whose header is written last; see `writing`."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.notes: list[str] = []
        self.entries: dict[str, Any] = {}
        self.end = 0

    def add(self, key: Key, values: Matrix) -> None:
        """Appends one matrix."""
        data = np.ascontiguousarray(values, dtype="<f4")
        self.entries |= _entry(key, data.shape, self.end)
        self.end += data.nbytes
        self.stream.write(data.data)


@contextmanager
def writing(
    path: Path, origin: Origin, room: Iterable[tuple[Key, Shape]], notes: int = 0, work_dir: Path | None = None
) -> Iterator[Writer]:
    """Gives a writer of a weights file, which takes its name `path` when the block ends well.

    safetensors' own writer wants all arrays in memory. The format is 8 bytes of length, JSON that may end in blanks, the
    data; so the header's place is kept free, and filled when it is known what was written.

    Args:
        room: everything that might be added, with its shape.
        notes: bytes to keep free for notes that the writer is given on the way.
        work_dir: is told what its results were saved as.

    Raises:
        GgufToolError: `path` cannot be written.
    """
    most: dict[str, Any] = {}
    end = 0
    for key, shape in room:
        most |= _entry(key, shape, end)
        end += 4 * prod(shape)
    size = -(-(len(_header(origin, (), most)) + notes) // 8) * 8
    try:
        with replacing(path) as partial:
            with partial.open("wb") as stream:
                stream.seek(8 + size)
                writer = Writer(stream)
                yield writer
                header = _header(origin, writer.notes, writer.entries)
                assert len(header) <= size, "more was added than there is room for"
                stream.seek(0)
                stream.write(size.to_bytes(8, "little") + header.ljust(size))
                stream.truncate(8 + size + writer.end)
            if work_dir is not None:
                note_saved(work_dir, partial)
    except OSError as error:
        raise GgufToolError(f"{path}: cannot be written ({error})") from error


def _header(origin: Origin, notes: Iterable[str], entries: Mapping[str, Any]) -> bytes:
    facts = {
        "format": FORMAT, "version": VERSION, "made_by": origin.made_by, "kept_hash": origin.kept_hash,
        "dataset": list(origin.dataset), "notes": [*origin.notes, *notes],
    }  # fmt: skip
    return json.dumps({"__metadata__": {"gguftool": json.dumps(facts)}, **entries}).encode()


def _entry(key: Key, shape: Shape, start: int) -> dict[str, Any]:
    offsets = [start, start + 4 * prod(shape)]
    return {_name(key): {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}}


def _origin(header: Mapping[str, Any]) -> Origin:
    dataset = tuple(dict(item) for item in header["dataset"])
    notes = tuple(text(note, "notes") for note in header["notes"])
    return Origin(text(header["made_by"], "made_by"), text(header["kept_hash"], "kept_hash"), dataset, notes)


def _check_version(path: Path, header: Mapping[str, Any]) -> None:
    kind, version = header.get("format"), header.get("version")
    if kind == OLD_FORMAT or (kind == FORMAT and version != VERSION):
        raise GgufToolError(f"{path}: weights version {version}, this gguftool reads {VERSION}; make them again")
    if kind != FORMAT:
        raise GgufToolError(f"{path}: not weights of gguftool; `gguftool refit` and `gguftool dern` make them")


def _name(key: Key) -> str:
    return ".".join(map(str, key))


def _key(name: str) -> Key:
    layer, expert, role = name.split(".")
    if role not in ROLES or not (layer.isdecimal() and expert.isdecimal()):
        raise ValueError(f"{name} is no gate, up or down of an expert")
    return int(layer), int(expert), role
