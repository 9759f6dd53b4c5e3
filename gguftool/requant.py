"""Taking columns out of quantized rows: bit for bit where whole blocks stay, else through ggml's own quantizer."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .gguf_file import Bytes
from .tensors import BLOCKS, row_bytes

# These have no quantizer without an importance matrix.
NEED_IMATRIX = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "IQ3_XXS"}


def take_columns(
    rows: Bytes, source: str, target: str, columns: NDArray[np.int64], ggml: Path | None
) -> tuple[Bytes, bool]:
    """The given columns of every row.

    Args:
        rows: uint8 [n_rows, row bytes] of type `source`.
        columns: ascending indices of the weights that stay.
        ggml: the shared library with ggml_quantize_chunk; needed only where something must be quantized anew.

    Returns:
        uint8 [n_rows, row bytes] of type `target`, and whether anything was quantized anew.
    """
    block, size = BLOCKS[source]
    if source == target and (blocks := whole_blocks(columns, block)) is not None:
        return rows.reshape(len(rows), -1, size)[:, blocks].reshape(len(rows), -1), False
    floats = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[source])[:, columns]
    return quantize_rows(floats, target, ggml), True


def copies(source: str, target: str, columns: NDArray[np.int64]) -> bool:
    """Whether `take_columns` takes these columns bit for bit."""
    return source == target and whole_blocks(columns, BLOCKS[source][0]) is not None


def whole_blocks(columns: NDArray[np.int64], block: int) -> NDArray[np.int64] | None:
    """Indices of the blocks that `columns` consists of, or None where it cuts into one."""
    if block == 1:
        return columns
    if len(columns) % block:
        return None
    grouped = columns.reshape(-1, block)
    aligned = (grouped[:, 0] % block == 0).all() and (np.diff(grouped, axis=1) == 1).all()
    return grouped[:, 0] // block if aligned else None


def check_quantizer(target: str, ggml: Path | None) -> None:
    """Raises GgufToolError, with the remedy, where `quantize_rows` could not write rows of `target`."""
    if BLOCKS[target][0] == 1:
        return
    if target in NEED_IMATRIX:
        raise GgufToolError(f"{target} cannot be quantized without an imatrix: prune the BF16 file, then quantize that")
    if ggml is None or not ggml.is_file():
        raise GgufToolError(f"narrowing {target} tensors needs ggml's quantizer: run `gguftool runtime build` first")


def quantize_rows(floats: NDArray[np.float32], target: str, ggml: Path | None) -> Bytes:
    """float32 [n_rows, columns] as rows of `target`, uint8 [n_rows, row bytes]."""
    floats = np.ascontiguousarray(floats, dtype=np.float32)
    if BLOCKS[target][0] == 1:
        kind = gguf.GGMLQuantizationType[target]
        return gguf.quants.quantize(floats, kind).view(np.uint8).reshape(len(floats), -1)
    check_quantizer(target, ggml)
    out = np.empty((len(floats), row_bytes(target, floats.shape[1])), dtype=np.uint8)
    written = _library(str(ggml)).ggml_quantize_chunk(
        int(gguf.GGMLQuantizationType[target]), floats.ctypes.data, out.ctypes.data, 0, *floats.shape, None
    )
    if written != out.nbytes:
        raise GgufToolError(f"ggml wrote {written} bytes of {target}, {out.nbytes} were expected")
    return out


def dequantize_rows(rows: Bytes, source: str, ggml: Path) -> NDArray[np.float32]:
    """uint8 [n_rows, row bytes] of type `source` as float32 [n_rows, columns], by ggml's own kernels.

    gguf-py has the same formulas in numpy, which take twenty times as long.
    """
    rows = np.ascontiguousarray(rows)
    block, size = BLOCKS[source]
    if source == "F32":
        return rows.view(np.float32).copy()
    out = np.empty((len(rows), rows.shape[1] // size * block), dtype=np.float32)
    traits = _library(str(ggml)).ggml_get_type_traits(int(gguf.GGMLQuantizationType[source])).contents
    if not traits.to_float:
        raise GgufToolError(f"this ggml cannot read {source}")
    traits.to_float(rows.ctypes.data, out.ctypes.data, out.size)
    return out


class _TypeTraits(ctypes.Structure):
    """ggml.h, `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )  # fmt: skip


@cache
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library
