"""The tensors of a safetensors checkpoint on disk: headers, checked before any work, and values one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import GgufToolError
from .strict_json import GARBLED, parse, text, whole

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# The sixteen 4-bit floats of MXFP4, one sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Weights of older checkpoints. Reading a pickle may run what is in it.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What the fingerprint reads of each tensor: so many pieces of so many bytes, first and last included.
PIECES, PIECE_BYTES = 10, 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`, row-major, `dtype` one of DTYPES."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint: shards in the order of their names, tensors in theirs."""
    index = directory / "model.safetensors.index.json"
    indexed: dict[str, str] | None = None
    if index.is_file():
        try:
            weight_map = parse(index.read_bytes())["weight_map"]
            indexed = {name: _shard(index, shard) for name, shard in weight_map.items()}
        except (*GARBLED, OSError) as error:
            raise GgufToolError(f"{index}: not a safetensors index ({first_line(error)})") from error
        files = [directory / file for file in sorted(set(indexed.values()))]
    else:
        files = sorted(directory.glob("model*.safetensors"))
    if not files:
        pickled = [path.name for kind in PICKLED for path in sorted(directory.glob(kind))]
        if pickled:
            raise GgufToolError(
                f"{directory}: {pickled[0]} is a pickle, which can run code when it is read; gguftool reads safetensors "
                "only, into which the model's hub page can convert it"
            )
        raise GgufToolError(f"{directory}: no model*.safetensors; other formats have to be converted to it first")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise GgufToolError(f"{file}: {tensor.name} is in {tensors[tensor.name].file.name} as well")
            if indexed is not None and indexed.get(tensor.name) != file.name:
                raise GgufToolError(f"{file}: {tensor.name} is not there according to {index.name}")
            tensors[tensor.name] = tensor
    for name, shard in (indexed or {}).items():
        if name not in tensors:
            raise GgufToolError(f"{directory / shard}: lacks {name}, which {index.name} promises")
    return tensors


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one shard in the order of their names. Every one is checked to lie inside the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise GgufToolError(f"{file}: truncated: {size} bytes do not hold the header; download it again")
            header = parse(stream.read(length))
        header.pop("__metadata__", None)
        found = [_stored_tensor(file, size, 8 + length, name, header[name]) for name in sorted(header)]
    except FileNotFoundError as error:
        raise GgufToolError(f"{file}: the shard is missing; download it again") from error
    except (*GARBLED, OSError) as error:
        raise GgufToolError(f"{file}: damaged safetensors header ({first_line(error)}); download it again") from error
    for first, second in pairwise(
        sorted((tensor for tensor in found if tensor.nbytes), key=lambda tensor: tensor.offset)
    ):
        if first.offset + first.nbytes > second.offset:
            raise GgufToolError(f"{file}: {first.name} and {second.name} overlap; download it again")
    return found


def _shard(index: Path, name: Any) -> str:
    """The file name of a shard, which lies beside the index. Raises ValueError for one that leads elsewhere."""
    if text(name, "a shard") != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError(f"the shard {name[:80]!r} is no name of a .safetensors file")
    return str(name)


def _stored_tensor(file: Path, size: int, start: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    """One entry of a safetensors header, checked."""
    dtype, shape = str(entry["dtype"]), tuple(whole(n, name) for n in entry["shape"])
    begin, end = (whole(n, name) for n in entry["data_offsets"])
    if dtype not in DTYPES:
        raise GgufToolError(f"{file}: {name} is {dtype}; gguftool reads {', '.join(DTYPES)} checkpoints")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise GgufToolError(f"{file}: {name} has {end - begin} bytes, which is not {list(shape)} in {dtype}")
    if start + end > size:
        raise GgufToolError(
            f"{file}: truncated: {name} ends at byte {start + end}, the file at {size}; download it again"
        )
    return StoredTensor(name, file, dtype, shape, start + begin, end - begin)


def map_tensor(stored: StoredTensor) -> Tensor:
    """The tensor's bytes mapped copy-on-write, so that nothing is read before it is needed."""
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    try:
        data = np.memmap(stored.file, dtype=np.uint8, mode="c", offset=stored.offset, shape=(stored.nbytes,))
    except (OSError, ValueError) as error:
        raise GgufToolError(f"{stored.file}: {stored.name} cannot be read ({first_line(error)})") from error
    return torch.from_numpy(data).view(DTYPES[stored.dtype]).reshape(stored.shape)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 (OCP Microscaling Formats 1.0): blocks uint8 [rows, n, 16], two 4-bit floats a byte, the lower half first, and
    scales uint8 [rows, n], exponents with a bias of 127 -> float32 [rows, 32 n]."""
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.tensor(_FP4, dtype=torch.float32)[pairs.int()]
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pieces(nbytes: int) -> list[tuple[int, int]]:
    """What is read of a tensor of `nbytes` bytes: all of a small one, else PIECES evenly spaced pieces."""
    if nbytes <= PIECES * PIECE_BYTES:
        return [(0, nbytes)]
    starts = (i * (nbytes - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES))
    return [(start, start + PIECE_BYTES) for start in starts]
