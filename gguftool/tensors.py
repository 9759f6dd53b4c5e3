"""What a GGUF tensor is before it exists: name, shape, type, bytes. Pure values, no third party."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from .errors import GgufToolError
from .strict_json import text, whole

# ggml types: (weights in a block, bytes of a block). llama.cpp, ggml.c `type_traits`; a test holds it against gguf-py.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "I32": (1, 4),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "IQ4_NL": (32, 18), "MXFP4": (32, 17),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_XS": (256, 136), "IQ3_S": (256, 110), "IQ3_XXS": (256, 98), "IQ2_S": (256, 82), "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip

GGUF_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. `ne` is ggml's order: ne[0] is the length of a row, the dimension that blocks run along."""

    name: str
    ne: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without the padding after it. Raises GgufToolError where a row is no number of blocks."""
        return row_bytes(self.type, self.ne[0], self.name) * prod(self.ne[1:])

    @property
    def padded_bytes(self) -> int:
        """Bytes that the tensor takes in a file: data and padding to the GGUF alignment."""
        return -(-self.nbytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def specs_from_json(raw: Any) -> tuple[TensorSpec, ...]:
    """The tensors that a JSON file lists as {name, ne, type}. Raises ValueError (or what garbled JSON leads to)."""
    specs = []
    for entry in raw:
        name, kind = text(entry["name"], "the name of a tensor"), text(entry["type"], "the type of a tensor")
        ne = tuple(whole(n, f"{name}: ne", 1) for n in entry["ne"])
        if not 1 <= len(ne) <= 4 or kind not in BLOCKS or ne[0] % BLOCKS[kind][0]:
            raise ValueError(f"{name}: there is no tensor {list(ne)[:5]} of type {kind}")
        specs.append(TensorSpec(name, ne, kind))
    if len({spec.name for spec in specs}) < len(specs):
        raise ValueError("the same tensor twice")
    return tuple(specs)


def row_bytes(type_name: str, length: int, name: str = "a tensor") -> int:
    """Bytes of one row of `length` weights. Raises GgufToolError where the row is no whole number of blocks."""
    if type_name not in BLOCKS:
        raise GgufToolError(f"{name}: type {type_name} is not one that gguftool can count")
    block, size = BLOCKS[type_name]
    if length % block:
        raise GgufToolError(f"{name}: rows of {length} do not divide into {type_name} blocks of {block}")
    return length // block * size
