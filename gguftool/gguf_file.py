"""Reading and streaming GGUF files through gguf-py: a tensor at a time, never a model, never a half-written file."""

from __future__ import annotations

import logging
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .layout import full_shape
from .tensors import BLOCKS, GGUF_ALIGNMENT, TensorSpec, row_bytes

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int, str], None]

# Smallest a key/value pair or a tensor entry can be: a hostile count larger than the file allows is refused unread.
_LEAST_ENTRY = 13


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry, with its GGUF types, so that it can be written again as it was."""

    value: Any
    type: gguf.GGUFValueType
    sub_type: gguf.GGUFValueType | None = None


class GgufFile:
    """A GGUF file, mapped and checked: every tensor lies inside it.

    Attributes:
        path: of the file.
        tensors: every tensor, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Raises GgufToolError for a file that is missing, truncated, hostile or no GGUF."""
        self.path = path
        _check_header(path)
        try:
            self._reader = gguf.GGUFReader(path)
            self._data = {tensor.name: tensor for tensor in self._reader.tensors}
            self.tensors = tuple(
                TensorSpec(t.name, full_shape(t.name, tuple(int(n) for n in t.shape)), t.tensor_type.name)
                for t in self._reader.tensors
            )
        except Exception as error:  # gguf-py raises whatever numpy or struct raise on garbage
            raise GgufToolError(f"{path}: damaged or truncated GGUF ({error})") from error
        self._check_extent()

    def _check_extent(self) -> None:
        size = self.path.stat().st_size
        spans = []
        for spec in self.tensors:
            start = int(self._data[spec.name].data_offset)
            if spec.type not in BLOCKS:
                raise GgufToolError(f"{self.path}: {spec.name} has type {spec.type}, which gguftool does not know")
            if prod(spec.ne) <= 0 or start + spec.nbytes > size:
                raise GgufToolError(
                    f"{self.path}: {spec.name} {spec.ne} lies outside the file of {size} bytes: truncated?"
                )
            spans.append((start, start + spec.nbytes, spec.name))
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise GgufToolError(f"{self.path}: {first} and {second} overlap")

    def check_whole(self) -> None:
        """Raises GgufToolError for a shard of a split model, which has some of the tensors only."""
        if self.integer("split.count", 0) > 1:
            raise GgufToolError(f"{self.path}: one shard of a split model; join it with llama-gguf-split --merge first")

    @property
    def arch(self) -> str:
        """`general.architecture`."""
        return str(self.value("general.architecture"))

    @property
    def data_start(self) -> int:
        """Where the first tensor begins: before it lie the metadata and the list of tensors."""
        return min((int(tensor.data_offset) for tensor in self._data.values()), default=self.path.stat().st_size)

    def keys(self) -> Iterator[str]:
        """Names of the metadata entries, in file order."""
        return (name for name in self._reader.fields if not name.startswith("GGUF."))

    def entry(self, key: str) -> KeyValue:
        """The metadata entry `key`."""
        field = self._reader.fields[key]
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        return KeyValue(self.value(key), field.types[0], field.types[-1] if is_array else None)

    def entry_bytes(self, key: str) -> int:
        """Bytes that the metadata entry `key` takes in the file, its name included."""
        return sum(int(part.nbytes) for part in self._reader.fields[key].parts)

    def value(self, key: str, default: Any = ...) -> Any:
        """The metadata value of `key`. Raises GgufToolError where it is missing and there is no default."""
        if key in self._reader.fields:
            try:
                return self._reader.fields[key].contents()
            except (ValueError, IndexError) as error:  # bytes that are no UTF-8
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

    def has(self, name: str) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._data

    def raw(self, spec: TensorSpec) -> Bytes:
        """The mapped bytes of a tensor: uint8, the dimensions of `ne` reversed, the last one in bytes."""
        flat = np.asarray(self._data[spec.name].data).reshape(-1).view(np.uint8)
        return flat.reshape(*reversed(spec.ne[1:]), row_bytes(spec.type, spec.ne[0], spec.name))

    def ints(self, spec: TensorSpec) -> NDArray[np.int32]:
        """An I32 tensor, the dimensions of `ne` reversed."""
        return self.raw(spec).view(np.int32)


def _check_header(path: Path) -> None:
    if not path.is_file():
        raise GgufToolError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(24)
    if head[:4] != b"GGUF":
        raise GgufToolError(f"{path}: not a GGUF file")
    if len(head) < 24:
        raise GgufToolError(f"{path}: truncated: {size} bytes")
    version, n_tensors, n_kv = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise GgufToolError(f"{path}: GGUF version {version}; gguftool reads 2 and 3")
    if (n_tensors + n_kv) * _LEAST_ENTRY > size:
        raise GgufToolError(f"{path}: claims {n_tensors} tensors and {n_kv} keys in {size} bytes: damaged")


def write_gguf(
    out: Path,
    arch: str,
    entries: Mapping[str, KeyValue],
    tensors: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Bytes],
    progress: Progress | None = None,
) -> None:
    """Streams a GGUF: the header first, then every tensor as `produce` gives it (the shape that GgufFile.raw has).

    The finished file is opened and checked before it takes its name.

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
                writer.write_tensor_data(np.ascontiguousarray(data))
                done += spec.padded_bytes
                if progress:
                    progress(done, total, spec.name)
        finally:
            writer.close()
        GgufFile(partial)


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


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Gives `out`.partial to write to; it becomes `out` when all went well and is removed when not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        yield partial
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def check_space(out: Path, needed: int) -> None:
    """Raises GgufToolError where the disk of `out` has less than `needed` bytes free."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GgufToolError(f"{out}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


def check_output(out: Path, force: bool, *inputs: Path) -> None:
    """Raises GgufToolError where `out` exists already (unless `force`) or is one of the inputs."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise GgufToolError(f"{out} is an input; choose another output")
    if out.exists() and not force:
        raise GgufToolError(f"{out} exists; --force replaces it")


def copied_entries(file: GgufFile) -> tuple[dict[str, KeyValue], list[str]]:
    """The metadata of `file` that can be written again, and a note on the rest: gguf-py writes no empty array."""
    entries = {key: file.entry(key) for key in file.keys()}
    empty = [key for key, entry in entries.items() if entry.type == gguf.GGUFValueType.ARRAY and not entry.value]
    notes = [f"empty arrays of the metadata are left out: {', '.join(empty)}"] if empty else []
    return {key: entry for key, entry in entries.items() if key not in empty}, notes
