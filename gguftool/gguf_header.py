"""The header of a GGUF file, read without trust: every count, length and offset is compared with the file before it is used.

Nothing is allocated by a number that the file claims. The rules are those of llama.cpp's ggml/src/gguf.cpp, so that what it
refuses is refused here: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Values stay in the file until they
are asked for. It is read and not mapped: where another program cuts off a mapped file, the system ends ours (SIGBUS).
"""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import changed
from .errors import GgufToolError

STRING, ARRAY = 8, 9
# GGUF value type -> its little-endian form; STRING and ARRAY have none.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
VERSIONS = (2, 3)
_UINT32 = 4
_ALIGNMENT = "general.alignment"
# Smallest a key/value pair or a tensor entry can be: a count larger than the file allows is refused unread.
_LEAST_ENTRY = 13
# ggml.h: GGML_MAX_NAME, with its zero byte, and GGML_MAX_DIMS.
_MAX_NAME, _MAX_DIMS = 64, 4
# Read at once of what is taken in small pieces.
_WINDOW = 1 << 18


@dataclass(frozen=True)
class Field:
    """Where a metadata value lies: `count` values of `type` at byte `start`; an array where `is_array`.

    `size` are the bytes of the whole entry, its name included.
    """

    type: int
    is_array: bool
    start: int
    count: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the list: `ne` in ggml's order, `type` as a number, `offset` from the start of the data."""

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int


class Header:
    """A GGUF file's metadata and its list of tensors.

    Attributes:
        size: bytes of the file.
        fields: by key, in file order. tensors: in file order.
        alignment: of the tensors' offsets. start: byte at which the data begins.
    """

    def __init__(self, path: Path) -> None:
        """Raises GgufToolError, one line, for a file that is missing, no GGUF, truncated or contradicts itself."""
        self.path = path
        self._file, self.size = _open(path)
        weakref.finalize(self, self._file.close)
        self._window, self._window_start = b"", 0
        self.position = 0
        counts = self._counts()
        self.fields = self._fields(counts[1])
        self.tensors = self._tensors(counts[0])
        self.alignment = self._alignment()
        self.start = -(-self.position // self.alignment) * self.alignment

    def value(self, key: str) -> Any:
        """The value of a key: a number, bool, string, or a list of them. Raises UnicodeDecodeError for strings not in UTF-8."""
        field = self.fields[key]
        if field.type != STRING:
            item = np.dtype(SCALARS[field.type])
            values = np.frombuffer(self._bytes(field.start, field.count * item.itemsize), item).tolist()
            return values if field.is_array else values[0]
        strings, at = [], field.start
        for _ in range(field.count):
            size = int.from_bytes(self._bytes(at, 8), "little")
            strings.append(self._bytes(at + 8, size).decode("utf-8"))
            at += 8 + size
        return strings if field.is_array else strings[0]

    def fail(self, text: str) -> GgufToolError:
        """The error that says what is wrong with this file."""
        return GgufToolError(f"{self.path}: {text}")

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes of the file, read now. Raises GgufToolError where it does not have them any more."""
        found = np.empty(size, np.uint8)
        left = found.data
        try:
            self._file.seek(start)
            while left:
                if not (got := self._file.readinto(left)):
                    raise changed(self.path)
                left = left[got:]
        except OSError as error:
            raise self.fail(f"cannot be read ({error})") from error
        return found

    def _bytes(self, start: int, size: int) -> bytes:
        """The same for small pieces one behind the other, out of a window that is read at once."""
        if size > self.size - start:  # every length was compared with the file before
            raise changed(self.path)
        at = start - self._window_start
        if at < 0 or at + size > len(self._window):
            wanted = min(max(size, _WINDOW), self.size - start)
            self._window, self._window_start, at = self.read(start, wanted).tobytes(), start, 0
        return self._window[at : at + size]

    def _counts(self) -> tuple[int, int]:
        if self._bytes(0, min(4, self.size)) != b"GGUF":
            raise self.fail("not a GGUF file")
        if self.size < 24:
            raise self.fail(f"truncated: {self.size} bytes")
        version, n_tensors, n_kv = struct.unpack("<IQQ", self._bytes(4, 20))
        if version & 0xFFFF == 0 and version:
            raise self.fail(
                "a big-endian GGUF; gguftool reads little-endian ones, gguf-convert-endian turns one into the other"
            )
        if version not in VERSIONS:
            raise self.fail(f"GGUF version {version}; gguftool reads 2 and 3")
        if (n_tensors + n_kv) * _LEAST_ENTRY > self.size:
            raise self.fail(f"claims {n_tensors} tensors and {n_kv} keys in {self.size} bytes: damaged")
        self.position = 24
        return n_tensors, n_kv

    def _take(self, size: int, what: str) -> int:
        """Where the next `size` bytes begin; goes on behind them."""
        start = self.position
        if size > self.size - start:
            raise self.fail(
                f"truncated or damaged: {what} at byte {start} wants {size} bytes, the file has {self.size}"
            )
        self.position = start + size
        return start

    def _number(self, size: int, what: str) -> int:
        start = self._take(size, what)
        return int.from_bytes(self._bytes(start, size), "little")

    def _string(self, what: str) -> str:
        size = self._number(8, what)
        start = self._take(size, what)
        try:
            return self._bytes(start, size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"damaged: {what} at byte {start} is no UTF-8") from error

    def _fields(self, count: int) -> dict[str, Field]:
        fields: dict[str, Field] = {}
        for number in range(count):
            before = self.position
            key = self._string(f"the name of key {number}")
            if not key or key in fields:
                raise self.fail(f"key {key!r} is there twice" if key else f"key {number} has no name")
            fields[key] = self._field(key, before)
        return fields

    def _field(self, key: str, before: int) -> Field:
        """The entry `key`, whose name began at byte `before`."""
        kind, count = self._number(4, key), 1
        is_array = kind == ARRAY
        if is_array:
            kind, count = self._number(4, key), self._number(8, key)
        start = self.position
        if kind == STRING:
            if count * 8 > self.size - start:
                raise self.fail(f"damaged: {key} claims {count} strings, the file has {self.size} bytes")
            for _ in range(count):
                self._take(self._number(8, key), key)
        elif kind in SCALARS:
            self._take(count * np.dtype(SCALARS[kind]).itemsize, key)
        else:
            raise self.fail(f"{key} has the type {kind}, which GGUF has not")
        return Field(kind, is_array, start, count, self.position - before)

    def _tensors(self, count: int) -> list[Entry]:
        entries: list[Entry] = []
        names: set[str] = set()
        for number in range(count):
            name = self._string(f"the name of tensor {number}")
            if name in names:
                raise self.fail(f"tensor {name!r} is there twice")
            if len(name.encode()) >= _MAX_NAME:
                raise self.fail(
                    f"the name of tensor {number} has {len(name.encode())} bytes; {_MAX_NAME - 1} are the most"
                )
            names.add(name)
            n_dims = self._number(4, name)
            if n_dims > _MAX_DIMS:
                raise self.fail(f"{name} has {n_dims} dimensions; {_MAX_DIMS} are the most")
            ne = tuple(self._number(8, name) for _ in range(n_dims)) or (1,)
            if not 0 < prod(ne) < 2**63 or max(ne) >= 2**63:
                raise self.fail(f"{name} {ne} has an impossible number of weights")
            entries.append(Entry(name, ne, self._number(4, name), self._number(8, name)))
        return entries

    def _alignment(self) -> int:
        if _ALIGNMENT not in self.fields:
            return 32
        field = self.fields[_ALIGNMENT]
        value = self.value(_ALIGNMENT) if (field.type, field.is_array) == (_UINT32, False) else 0
        if value == 0 or value & (value - 1):
            raise self.fail(f"{_ALIGNMENT} is no power of two of type uint32")
        return int(value)


def refuse_missing(path: Path) -> None:
    """Raises GgufToolError where there is no file, and says where it is a folder, such as a checkpoint's."""
    if path.is_dir():
        raise GgufToolError(f"{path}: a folder, no GGUF; `gguftool convert` makes one of a checkpoint")
    if not path.is_file():
        raise GgufToolError(f"{path}: no such file")


def _open(path: Path) -> tuple[FileIO, int]:
    """The opened file and its size."""
    refuse_missing(path)
    try:
        file = path.open("rb", buffering=0)
        return file, file.seek(0, 2)
    except OSError as error:
        raise GgufToolError(f"{path}: cannot be read ({error})") from error
