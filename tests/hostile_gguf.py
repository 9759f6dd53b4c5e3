"""Hostile GGUF files: a name for each, and what makes it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType as V

from gguftool.gguf_file import KeyValue
from gguftool.tensors import TensorSpec
from hostile import ARCH, N_EMBD, N_EXPERT, Tensors, entry, kv, raw_gguf, rebuild, resized, string

MAP = "blk.0.ffn_exps_tier.weight"
UP, DOWN = "blk.0.ffn_up_exps.1.weight", "blk.0.ffn_down_exps.1.weight"
ROUTER = "blk.0.ffn_gate_inp.weight"


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


# Headers: (metadata entries, tensor entries, further arguments of raw_gguf).
_W = "token_embd.weight"
HEADERS: dict[str, tuple[list[bytes], list[bytes], dict[str, Any]]] = {
    "version 1": ([ARCH], [], {"version": 1}),
    "version 99": ([ARCH], [], {"version": 99}),
    "version 0": ([ARCH], [], {"version": 0}),
    "big-endian": ([ARCH], [], {"version": 3 << 24}),
    "2^60 tensors": ([ARCH], [], {"counts": (2**60, 1)}),
    "2^64 - 1 keys": ([ARCH], [], {"counts": (0, 2**64 - 1)}),
    "more tensors than entries": ([ARCH], [], {"counts": (3, 1)}),
    "more keys than entries": ([ARCH], [], {"counts": (0, 5)}),
    "a key's name of 2^63 bytes": ([ARCH, _u64(2**63) + bytes(32)], [], {}),
    "a key's name of 2^64 - 1 bytes": ([ARCH, _u64(2**64 - 1) + bytes(32)], [], {}),
    "a string of 2^62 bytes": ([ARCH, kv("general.name", 8, _u64(2**62))], [], {}),
    "an array of 2^60 bytes": ([ARCH, kv("a", 9, _array(0, 2**60))], [], {}),
    "an array of 2^61 numbers": ([ARCH, kv("a", 9, _array(12, 2**61))], [], {}),
    "an array of 2^61 strings": ([ARCH, kv("a", 9, _array(8, 2**61))], [], {}),
    "an array of as many strings as bytes": ([ARCH, kv("a", 9, _array(8, 300))], [], {}),
    "an array of arrays": ([ARCH, kv("a", 9, _array(9, 1, _array(9, 1, _array(0, 1, b"x"))))], [], {}),
    "a type of value that there is not": ([ARCH, kv("a", 13, bytes(8))], [], {}),
    "a key without a name": ([ARCH, kv("", 0, b"x")], [], {}),
    "a key twice": ([ARCH, ARCH], [], {}),
    "a key's name not in UTF-8": ([ARCH, kv(b"\xff\xfe", 0, b"x")], [], {}),
    "a name not in UTF-8": ([ARCH, kv("general.name", 8, string(b"\xff\xff"))], [], {}),
    "the architecture not in UTF-8": ([kv("general.architecture", 8, string(b"\xff"))], [], {}),
    "no architecture": ([kv("general.name", 8, string("x"))], [], {}),
    "an alignment of 0": ([ARCH, kv("general.alignment", 4, struct.pack("<I", 0))], [], {}),
    "an alignment of 3": ([ARCH, kv("general.alignment", 4, struct.pack("<I", 3))], [], {}),
    "an alignment of 64 bits": ([ARCH, kv("general.alignment", 10, _u64(32))], [], {}),
    "an alignment beyond the file": (
        [ARCH, kv("general.alignment", 4, struct.pack("<I", 1 << 31))], [entry(_W, [8])], {}),
    "a tensor twice": ([ARCH], [entry(_W, [8]), entry(_W, [8], offset=32)], {}),
    "a tensor's name of 64 bytes": ([ARCH], [entry("n" * 64, [8])], {}),
    "a tensor's name of 2^63 bytes": ([ARCH], [_u64(2**63) + bytes(40)], {}),
    "a tensor's name not in UTF-8": ([ARCH], [entry(b"\xff", [8])], {}),
    "5 dimensions": ([ARCH], [entry(_W, [2, 1, 1, 1, 1])], {}),
    "2^32 - 1 dimensions": ([ARCH], [string(_W) + struct.pack("<I", 2**32 - 1) + bytes(64)], {}),
    "a dimension of 0": ([ARCH], [entry(_W, [8, 0])], {}),
    "a dimension of 2^63": ([ARCH], [entry(_W, [2**63])], {}),
    "dimensions whose product overflows": ([ARCH], [entry(_W, [2**32, 2**32])], {}),
    "dimensions whose product overflows to 8": ([ARCH], [entry(_W, [8, 2**63, 2])], {}),
    "bytes that overflow": ([ARCH], [entry(_W, [2**62])], {}),
    "type 99": ([ARCH], [entry(_W, [8], 99)], {}),
    "a type that llama.cpp has given up": ([ARCH], [entry(_W, [32], 4)], {}),
    "half a block": ([ARCH], [entry(_W, [16], 8)], {}),
    "an offset of 2^64 - 32": ([ARCH], [entry(_W, [8], offset=2**64 - 32)], {}),
    "an offset that is not aligned": ([ARCH], [entry(_W, [8], offset=4)], {}),
    "a gap between tensors": ([ARCH], [entry(_W, [8]), entry("b", [8], offset=64)], {}),
    "tensors that overlap": ([ARCH], [entry(_W, [8]), entry("b", [8], offset=0)], {}),
    "a tensor behind the end": ([ARCH], [entry(_W, [2**20])], {}),
    "a name that sends codes to the terminal": ([ARCH], [entry("\x1b[2J\r\nok", [2**20])], {}),
}  # fmt: skip


def _set(name: str, value: Any, kind: V, sub: V | None = None) -> Callable[[dict[str, KeyValue], Tensors], None]:
    return lambda entries, _tensors: entries.update({name: KeyValue(value, kind, sub)})


def _key(name: str, value: int) -> Callable[[dict[str, KeyValue], Tensors], None]:
    return _set(f"qwen3moe.{name}", value, V.UINT32)


def _map(*values: int) -> Callable[[dict[str, KeyValue], Tensors], None]:
    """Layer 0's map with its first entries replaced: tier 0 holds experts 0 and 3, tier 1 has 1, 2, 5, tier 2 has 4."""

    def change(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
        spec, raw = tensors[MAP]
        flat = raw.reshape(-1).view(np.int32).copy()
        flat[: len(values)] = values
        tensors[MAP] = spec, flat.view(np.uint8)

    return change


def _shape(name: str, *ne: int, kind: str | None = None) -> Callable[[dict[str, KeyValue], Tensors], None]:
    def change(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
        tensors[name] = resized(*tensors[name], ne, kind)

    return change


def _without(*names: str) -> Callable[[dict[str, KeyValue], Tensors], None]:
    def change(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def _more(name: str, *ne: int, kind: str = "F32") -> Callable[[dict[str, KeyValue], Tensors], None]:
    def change(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
        spec = TensorSpec(name, ne, kind)
        tensors[name] = spec, np.zeros(spec.nbytes, dtype=np.uint8)

    return change


def _moved(name: str, new: str) -> Callable[[dict[str, KeyValue], Tensors], None]:
    """A second tensor as sound as the first one, under another name."""

    def change(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
        spec, raw = tensors[name]
        tensors[new] = TensorSpec(new, spec.ne, spec.type), raw

    return change


def _value(name: str, value: float) -> Callable[[dict[str, KeyValue], Tensors], None]:
    def change(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
        spec, raw = tensors[name]
        floats = raw.reshape(-1).view(np.float32).copy()
        floats[-1] = value
        tensors[name] = spec, floats.view(np.uint8)

    return change


def _tiers_more(_entries: dict[str, KeyValue], tensors: Tensors) -> None:
    """Layer 0's map with a fourth tier that nobody is in."""
    spec, raw = tensors[MAP]
    flat = np.concatenate([raw.reshape(-1).view(np.int32), np.full(N_EXPERT, -1, np.int32)])
    tensors[MAP] = TensorSpec(MAP, (N_EXPERT, 4), spec.type), flat.view(np.uint8)


# Changes of a sound tiered file that make it one that llama.cpp refuses too: experts, their map and their counts.
STRUCTURE: dict[str, Callable[[dict[str, KeyValue], Tensors], None]] = {
    "an expert in no tier, its place empty": _map(-1),
    "an expert in two tiers": _map(0, 2),
    "an index used twice": _map(1),
    "an index beyond its tier": _map(7),
    "an index of 2^31 - 1": _map(2**31 - 1),
    "an index of -2": _map(-2),
    "an index of -2 where there is none": _map(0, -2),
    "an index of -2^31": _map(-(2**31)),
    "a tier map of floats": _shape(MAP, N_EXPERT, 3, kind="F32"),
    "a tier map of half the width": _shape(MAP, 3, 3),
    "a tier map of 3 dimensions": _shape(MAP, N_EXPERT, 3, 2),
    "a tier map of fewer tiers": _shape(MAP, N_EXPERT, 2),
    "a tier map of more tiers": _tiers_more,
    "a tier map of more experts": _shape(MAP, N_EXPERT + 1, 3),
    "a tier map without tiers": _without(*(f"blk.0.ffn_{r}_exps.{t}.weight" for r in ("gate", "up", "down") for t in (0, 1, 2))),
    "tiers without a map": _without(MAP),
    "a tier's up missing": _without(UP),
    "a tier's down missing": _without(DOWN),
    "a tier's gate missing": _without("blk.0.ffn_gate_exps.2.weight"),
    "a map of a layer that is not there": _moved(MAP, "blk.7.ffn_exps_tier.weight"),
    "a tier too many": _more("blk.0.ffn_up_exps.3.weight", N_EMBD, 8, 1),
    "a stock stack beside the tiers": _more("blk.0.ffn_up_exps.weight", N_EMBD, 32, N_EXPERT),
    "up of another width": _shape(UP, N_EMBD, 8, 3),
    "up of another length": _shape(UP, 16, 16, 3),
    "up of other experts": _shape(UP, N_EMBD, 16, 2),
    "down of another width": _shape(DOWN, 8, N_EMBD, 3),
    "down of another length": _shape(DOWN, 16, 16, 3),
    "down of other experts": _shape(DOWN, 16, N_EMBD, 2),
    "up without experts' dimension": _shape(UP, N_EMBD, 48),
    "a router of other experts": _shape(ROUTER, N_EMBD, N_EXPERT - 1),
    "a router of another length": _shape(ROUTER, 16, N_EXPERT),
    "the router missing": _without(ROUTER),
    "fewer experts in all": _key("expert_count", N_EXPERT - 1),
    "no experts in all": _key("expert_count", 0),
    "more experts used than there are": _key("expert_used_count", N_EXPERT + 1),
    "groups that do not divide": _key("expert_group_count", 4),
    "groups of one expert": _key("expert_group_count", 6),
    "more layers than there are": _key("block_count", 3),
    "2^32 - 1 layers": _key("block_count", 2**32 - 1),
    "no layers": _key("block_count", 0),
    "an embedding of another length": _key("embedding_length", 16),
    "the number of layers as an array": _set("qwen3moe.block_count", [2, 2], V.ARRAY, V.UINT32),
    "the number of experts as text": _set("qwen3moe.expert_count", "6", V.STRING),
    "a negative number of experts": _set("qwen3moe.expert_count", -6, V.INT32),
    "one shard of three": _set("split.count", 3, V.UINT16),
}  # fmt: skip
# What llama.cpp does not look at when it loads a file, and inspect --check refuses all the same.
STRICTER: dict[str, Callable[[dict[str, KeyValue], Tensors], None]] = {
    "NaN in an expert": _value(UP, float("nan")),
    "Inf in an expert": _value(DOWN, float("inf")),
    "-Inf in the embedding": _value("token_embd.weight", float("-inf")),
    "NaN in a norm": _value("output_norm.weight", float("nan")),
    "pruned by a later gguftool": _set("gguftool.version", 9, V.UINT32),
    "pruned, and no word of how": _set("gguftool.version", 1, V.UINT32),
}


def write(name: str, tiered: Path, out: Path) -> Path:
    """The hostile file `name`; `tiered` is the sound one."""
    if name in HEADERS:
        entries, tensors, more = HEADERS[name]
        return raw_gguf(out, entries, tensors, **more)
    return rebuild(tiered, out, (STRUCTURE | STRICTER)[name])


# What a refusal says: a later guard may refuse the file too, but not with these words.
SAYS = {
    "version 1": "version 1;", "version 99": "version 99;", "version 0": "version 0;", "big-endian": "big-endian",
    "2^60 tensors": "claims 1152921504606846976 tensors", "2^64 - 1 keys": "18446744073709551615 keys",
    "more tensors than entries": "tensor '' is there twice", "more keys than entries": "key 1 has no name",
    "a key's name of 2^63 bytes": "wants 9223372036854775808 bytes",
    "a key's name of 2^64 - 1 bytes": "wants 18446744073709551615 bytes",
    "a string of 2^62 bytes": "wants 4611686018427387904 bytes", "an array of 2^60 bytes": "wants 1152921504606846976 bytes",
    "an array of 2^61 numbers": "wants 18446744073709551616 bytes",
    "an array of 2^61 strings": "claims 2305843009213693952 strings",
    "an array of as many strings as bytes": "claims 300 strings", "an array of arrays": "type 9",
    "a type of value that there is not": "type 13", "a key without a name": "key 1 has no name",
    "a key twice": "'general.architecture' is there twice", "a key's name not in UTF-8": "is no UTF-8",
    "the architecture not in UTF-8": "cannot be read", "no architecture": "no general.architecture",
    "an alignment of 0": "no power of two", "an alignment of 3": "no power of two", "an alignment of 64 bits": "no power of two",
    "an alignment beyond the file": "outside the file", "a tensor twice": "'token_embd.weight' is there twice",
    "a tensor's name of 64 bytes": "63 are the most", "a tensor's name of 2^63 bytes": "wants 9223372036854775808 bytes",
    "a tensor's name not in UTF-8": "is no UTF-8", "5 dimensions": "has 5 dimensions",
    "2^32 - 1 dimensions": "has 4294967295 dimensions", "a dimension of 0": "impossible number",
    "a dimension of 2^63": "impossible number", "dimensions whose product overflows": "impossible number",
    "dimensions whose product overflows to 8": "impossible number", "bytes that overflow": "outside the file",
    "type 99": "type 99, which", "a type that llama.cpp has given up": "type 4, which", "half a block": "do not divide",
    "an offset of 2^64 - 32": "is at offset 18446744073709551584", "an offset that is not aligned": "is at offset 4 ",
    "a gap between tensors": "is at offset 64 ", "tensors that overlap": "is at offset 0 ",
    "a tensor behind the end": "outside the file", "a name that sends codes to the terminal": "\\x1b[2J",
    "an expert in no tier, its place empty": "the indices of tier 0 are not 0 to 0",
    "an expert in two tiers": "an expert is in two tiers", "an index used twice": "the indices of tier 0 are not 0 to 1",
    "an index beyond its tier": "the indices of tier 0", "an index of 2^31 - 1": "the indices of tier 0",
    "an index of -2": "the indices of tier 0", "an index of -2 where there is none": "the indices of tier 0",
    "an index of -2^31": "the indices of tier 0",
    "a tier map of floats": "is F32 (6, 3), not I32", "a tier map of 3 dimensions": "is I32 (6, 3, 2), not I32",
    "a tier map of fewer tiers": "ffn_gate_exps.2.weight: left over",
    "a tier map without tiers": "blk.0.ffn_down_exps.0.weight is missing",
    "tiers without a map": "blk.0.ffn_down_exps.weight is missing", "a tier's up missing": f"{UP} is missing",
    "a tier's down missing": f"{DOWN} is missing", "a tier's gate missing": "blk.0.ffn_gate_exps.2.weight is missing",
    "a tier too many": "ffn_up_exps.3.weight: left over",
    "a stock stack beside the tiers": "ffn_up_exps.weight: left over",
    "up of another width": f"{UP} is (32, 8, 3)", "up of another length": f"{UP} is (16, 16, 3)",
    "up of other experts": f"{UP} is (32, 16, 2)", "down of another length": f"{DOWN} is (16, 16, 3)",
    "down of other experts": f"{DOWN} holds 2 experts, its map 3",
    "up without experts' dimension": f"{UP} is (32, 48, 1)", "a router of other experts": f"{ROUTER} has 5 rows for 6",
    "a router of another length": f"{ROUTER} reads 16 numbers", "the router missing": "the router, is missing",
    "fewer experts in all": "layer 0: 6 experts, the metadata says 5", "no experts in all": "says 2 of 0 experts are used",
    "more experts used than there are": "says 7 of 6 experts are used",
    "groups that do not divide": "says 0 of 4 groups of 6 experts", "groups of one expert": "says 0 of 6 groups of 6 experts",
    "more layers than there are": "says 3 blocks, and 2 have tensors",
    "2^32 - 1 layers": "says 4294967295 blocks, and 2 have", "no layers": "says 0 blocks, and 2 have tensors",
    "an embedding of another length": f"{ROUTER} reads 32 numbers, the model has 16",
    "the number of layers as an array": "is an array of 2", "the number of experts as text": "is a str",
    "a negative number of experts": "is of type int32, not uint32", "one shard of three": "one shard of a split model",
    "NaN in an expert": f"{UP}: holds values", "Inf in an expert": f"{DOWN}: holds values",
    "-Inf in the embedding": "token_embd.weight: holds values", "NaN in a norm": "output_norm.weight: holds values",
    "pruned by a later gguftool": "file version 9; this one reads 1", "pruned, and no word of how": "no gguftool.n_expert",
}  # fmt: skip
