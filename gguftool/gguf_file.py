"""Reading and streaming GGUF files (written through gguf-py): a tensor at a time, never a model, never a half-written file."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from .durable import check_place, check_unchanged, identity, replacing
from .errors import GgufToolError
from .gguf_header import Entry, Header
from .layout import full_shape
from .tensors import BLOCKS, GGUF_ALIGNMENT, TensorSpec, row_bytes

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int, str], None]

_TYPE_NAMES = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry, with its GGUF types, so that it can be written again as it was."""

    value: Any
    type: gguf.GGUFValueType
    sub_type: gguf.GGUFValueType | None = None


class GgufFile:
    """A GGUF file, opened and checked: every tensor lies inside it. It stays open, and is read where it is asked for.

    Attributes:
        path: of the file.
        tensors: every tensor, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Raises GgufToolError for a file that is missing, truncated, hostile or no GGUF."""
        self.path = path
        self._header = Header(path)
        self._identity = identity(path)
        self._offsets: dict[str, int] = {}
        self._end = 0
        self.tensors = tuple(self._spec(entry) for entry in self._header.tensors)

    def _spec(self, entry: Entry) -> TensorSpec:
        """A tensor of the list, checked to lie where llama.cpp wants it: right behind the one before, inside the file."""
        header = self._header
        name = _TYPE_NAMES.get(entry.type, str(entry.type))
        if name not in BLOCKS:
            raise header.fail(f"{entry.name} has type {name}, which gguftool does not know")
        spec = TensorSpec(entry.name, full_shape(entry.name, entry.ne), name)
        if entry.offset != self._end:
            raise header.fail(f"{entry.name} is at offset {entry.offset} of the data, not at {self._end}: damaged")
        start = header.start + entry.offset
        if start + spec.nbytes > header.size:
            raise header.fail(f"{entry.name} {entry.ne} lies outside the file of {header.size} bytes: truncated?")
        self._offsets[entry.name] = start
        self._end += -(-spec.nbytes // header.alignment) * header.alignment
        return spec

    def check_whole(self) -> None:
        """Raises GgufToolError for a shard of a split model, which has some of the tensors only."""
        if self.integer("split.count", 0) > 1:
            raise GgufToolError(f"{self.path}: one shard of a split model; join it with llama-gguf-split --merge first")

    def check_unchanged(self) -> None:
        """Raises GgufToolError where the file was written to or replaced since it was opened: what was read may be of both."""
        check_unchanged({self.path: self._identity})

    @property
    def arch(self) -> str:
        """`general.architecture`."""
        return str(self.value("general.architecture"))

    @property
    def data_start(self) -> int:
        """Where the first tensor begins: before it lie the metadata and the list of tensors."""
        return min(self._offsets.values(), default=self._header.size)

    def keys(self) -> Iterator[str]:
        """Names of the metadata entries, in file order."""
        return iter(self._header.fields)

    def entry(self, key: str) -> KeyValue:
        """The metadata entry `key`."""
        field = self._header.fields[key]
        kind = gguf.GGUFValueType(field.type)
        if field.is_array:
            return KeyValue(self.value(key), gguf.GGUFValueType.ARRAY, kind)
        return KeyValue(self.value(key), kind)

    def entry_bytes(self, key: str) -> int:
        """Bytes that the metadata entry `key` takes in the file, its name included."""
        return self._header.fields[key].size

    def value(self, key: str, default: Any = ...) -> Any:
        """The metadata value of `key`. Raises GgufToolError where it is missing and there is no default."""
        if key in self._header.fields:
            try:
                return self._header.value(key)
            except UnicodeDecodeError as error:
                raise GgufToolError(f"{self.path}: {key} cannot be read ({error})") from error
        if default is ...:
            raise GgufToolError(f"{self.path}: has no {key}; not a model that gguftool can use")
        return default

    def arch_value(self, key: str, default: Any = ...) -> Any:
        """The metadata value of `<arch>.<key>`."""
        return self.value(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """The metadata value of `key`, one whole number. Raises GgufToolError where it is anything else, or missing."""
        value = self.value(key, ... if default is None else default)
        if not isinstance(value, int):
            kind = f"an array of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
            raise GgufToolError(f"{self.path}: {key} is {kind}, and gguftool needs one whole number there")
        return value

    def arch_integer(self, key: str, default: int | None = None) -> int:
        """The metadata value of `<arch>.<key>`, one whole number; raises as `integer` does."""
        return self.integer(f"{self.arch}.{key}", default)

    def raw(self, spec: TensorSpec) -> Bytes:
        """The bytes of a tensor, read now: uint8, the dimensions of `ne` reversed, the last one in bytes."""
        size = row_bytes(spec.type, spec.ne[0], spec.name)
        return self.piece(spec, 0, spec.nbytes).reshape(*reversed(spec.ne[1:]), size)

    def rows(self, spec: TensorSpec, start: int, stop: int) -> Bytes:
        """Some rows of a tensor that is seen as one matrix, read now: uint8 [stop - start, row bytes]."""
        size = row_bytes(spec.type, spec.ne[0], spec.name)
        return self.piece(spec, start * size, stop * size).reshape(stop - start, size)

    def expert(self, spec: TensorSpec, index: int) -> Bytes:
        """One expert's part of a stack, or its row of biases, or its number, read now: uint8, the shape that `raw` has
        behind its first dimension."""
        size = spec.nbytes // spec.ne[-1]
        return self.piece(spec, index * size, (index + 1) * size).reshape(*reversed(spec.ne[1:-1]), -1)

    def piece(self, spec: TensorSpec, start: int, stop: int) -> Bytes:
        """Some bytes of a tensor, read now. Raises GgufToolError where the file does not have them any more."""
        return self._header.read(self._offsets[spec.name] + start, stop - start)

    def ints(self, spec: TensorSpec) -> NDArray[np.int32]:
        """An I32 tensor, the dimensions of `ne` reversed."""
        return self.raw(spec).view(np.int32)


def write_gguf(
    out: Path,
    arch: str,
    entries: Mapping[str, KeyValue],
    tensors: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Bytes],
    progress: Progress | None = None,
    source: GgufFile | None = None,
) -> None:
    """Streams a GGUF: the header first, then every tensor as `produce` gives it (the shape that GgufFile.raw has).

    The finished file is opened and checked before it takes its name; `source`, which it is made from, must be what it was.

    Raises GgufToolError where the disk is too small, the metadata cannot be written, or `produce` gives something else
    than was announced.
    """
    specs = list(tensors)
    total = sum(spec.padded_bytes for spec in specs)
    check_space(out, total)
    with replacing(out) as partial:
        writer = _announce(partial, arch, entries, specs)
        done = 0
        try:
            for spec in specs:
                data = produce(spec)
                if data.nbytes != spec.nbytes:
                    raise GgufToolError(f"{spec.name}: {data.nbytes} bytes were made, {spec.nbytes} announced")
                _write_data(writer, np.ascontiguousarray(data))
                done += spec.padded_bytes
                if progress:
                    progress(done, total, spec.name)
        finally:
            writer.close()
        GgufFile(partial)
        if source is not None:
            source.check_unchanged()


def _write_data(writer: gguf.GGUFWriter, data: Bytes) -> None:
    try:
        writer.write_tensor_data(data)
    except OSError as error:
        if error.errno is None and writer.fout:
            # numpy only counts what it could not write. The system says why when it is asked again.
            os.write(writer.fout[0].fileno(), data.reshape(-1)[:1].tobytes())
        raise


def header_bytes(arch: str, entries: Mapping[str, KeyValue], specs: Iterable[TensorSpec]) -> int:
    """Bytes that a file has before its tensors, found by writing just that into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="gguftool-") as folder:
        probe = Path(folder) / "header.gguf"
        _announce(probe, arch, entries, list(specs)).close()
        return -(-probe.stat().st_size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def write_sparse(
    out: Path, arch: str, entries: Mapping[str, KeyValue], specs: Sequence[TensorSpec], known: Mapping[str, Bytes]
) -> None:
    """A GGUF whose tensors are zeros but for those in `known`. The zeros take no room where the disk knows sparse files."""
    _announce(out, arch, entries, list(specs)).close()
    start = -(-out.stat().st_size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
    with out.open("r+b") as stream:
        stream.truncate(start + sum(spec.padded_bytes for spec in specs))
        for spec in specs:
            if spec.name in known:
                stream.seek(start)
                stream.write(np.ascontiguousarray(known[spec.name]).data)
            start += spec.padded_bytes


# The writer names the architecture itself, and aligns to 32 whatever the file did that the entries come from.
_NOT_COPIED = {"general.architecture", "general.alignment"}


def _announce(path: Path, arch: str, entries: Mapping[str, KeyValue], specs: list[TensorSpec]) -> gguf.GGUFWriter:
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, entry in entries.items():
            if key not in _NOT_COPIED:
                writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
        for spec in specs:
            shape = (*reversed(spec.ne[1:]), row_bytes(spec.type, spec.ne[0], spec.name))
            writer.add_tensor_info(
                spec.name, shape, np.dtype(np.uint8), spec.nbytes, raw_dtype=gguf.GGMLQuantizationType[spec.type]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException as error:
        writer.close()
        if not isinstance(error, Exception) or isinstance(error, (OSError, GgufToolError)):
            raise
        raise GgufToolError(f"a GGUF header cannot be written: {error}") from error  # gguf-py raises what struct raises
    return writer


def check_space(out: Path, needed: int) -> None:
    """Raises GgufToolError where the disk of `out`, a file or a folder, has less than `needed` bytes free."""
    folder = out if out.is_dir() else out.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GgufToolError(f"{out}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


# What the folder of a checkpoint or of a dataset is read from, beside model*.safetensors and what its index names. Whatever
# else is in it is somebody's own: stats and GGUF files may lie there, and be made again.
_READ = (".json", ".jsonl", ".txt", ".model", ".jinja", ".parquet", ".arrow", ".csv")


def check_output(out: Path, force: bool, *inputs: Path) -> None:
    """Raises GgufToolError where `out` is no file, is one of the inputs, or exists already (unless `force`).

    An input that is a folder stands for the files in it that a checkpoint or a dataset is read from.
    """
    check_place(out)
    if not out.exists():
        return
    if any(_is_read(out, place) for place in inputs):
        raise GgufToolError(f"{out} is an input; choose another output")
    if not force:
        raise GgufToolError(f"{out} exists; --force replaces it")


def _is_read(out: Path, place: Path) -> bool:
    """Whether the file `out` is the input `place`, or one that is read in the folder `place`, under whatever name."""
    if not place.is_dir():
        return place.exists() and out.samefile(place)
    index = place / "model.safetensors.index.json"
    named = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""

    def is_of_it(path: Path) -> bool:
        shard = path.suffix == ".safetensors" and (path.name.startswith("model") or f'"{path.name}"' in named)
        return (shard or path.suffix in _READ) and path.is_file()

    return any(is_of_it(path) and out.samefile(path) for path in place.rglob("*"))


def copied_entries(file: GgufFile) -> tuple[dict[str, KeyValue], list[str]]:
    """The metadata of `file` that can be written again, and a note on the rest: gguf-py writes no empty array."""
    entries = {key: file.entry(key) for key in file.keys()}
    empty = [key for key, entry in entries.items() if entry.type == gguf.GGUFValueType.ARRAY and not entry.value]
    notes = [f"empty arrays of the metadata are left out: {', '.join(empty)}"] if empty else []
    return {key: entry for key, entry in entries.items() if key not in empty}, notes
