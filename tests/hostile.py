"""Small sound files of every kind that gguftool reads, and the ways in which a file may be hostile or broken."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest import mock

import gguf
import numpy as np

from gguftool import random_model
from gguftool.gguf_file import GgufFile, KeyValue, write_gguf
from gguftool.random_model import ModelShape, write_random_model
from gguftool.tensors import TensorSpec

N_EMBD, N_FF, N_EXPERT, TOP = 32, 32, 6, 2
# Width and tier of each expert: three tiers of 32, 16 and 8; the last expert but one is alone in its tier.
WIDTHS = np.array([32, 16, 16, 32, 8, 16])
TIERS = np.array([0, 1, 1, 0, 2, 1])


def _shape(arch: str) -> ModelShape:
    known = {"qwen3moe": "qwen3-30b-a3b", "gpt-oss": "gpt-oss-20b"}
    biases = (("attn_q.bias", (32,)), ("attn_k.bias", (16,)), ("attn_v.bias", (16,)), ("attn_output.bias", (32,)),
              ("attn_sinks.weight", (4,)))  # fmt: skip
    norms = (("attn_norm", 32), ("attn_q_norm", 8), ("attn_k_norm", 8), ("ffn_norm", 32))
    return dataclasses.replace(
        random_model.SHAPES[known[arch]], name="tiny", n_embd=N_EMBD, n_expert=N_EXPERT, n_expert_used=TOP, n_ff_exp=N_FF,
        n_head=4, n_head_kv=2, head_dim=8,
        attention=random_model._gqa(N_EMBD, 4, 2, 8) + (biases if arch == "gpt-oss" else ()),
        norms=norms if arch == "qwen3moe" else (("attn_norm", 32), ("post_attention_norm", 32)),
    )  # fmt: skip


def tiny_gguf(path: Path, arch: str = "qwen3moe", *, tiered: bool = True, layers: int = 2) -> Path:
    """A model of random F32 weights that llama.cpp loads; about 150 KB."""
    with mock.patch.object(random_model, "N_VOCAB", 32):
        write_random_model(path, _shape(arch), "F32", layers, None, (WIDTHS, TIERS) if tiered else None)
    return path


Tensors = dict[str, tuple[TensorSpec, np.ndarray]]


def rebuild(source: Path, out: Path, change: Callable[[dict[str, KeyValue], Tensors], None]) -> Path:
    """`source` with its metadata and tensors changed: `change` may do what it likes to both."""
    file = GgufFile(source)
    entries = {key: file.entry(key) for key in file.keys()}
    tensors: Tensors = {spec.name: (spec, file.raw(spec)) for spec in file.tensors}
    change(entries, tensors)
    data = {spec.name: raw for spec, raw in tensors.values()}
    arch = str(entries["general.architecture"].value)
    with mock.patch("gguftool.gguf_file.GgufFile"):  # which would refuse what is meant to be broken
        write_gguf(out, arch, entries, [spec for spec, _ in tensors.values()], lambda spec: data[spec.name])
    return out


def resized(
    spec: TensorSpec, raw: np.ndarray, ne: Sequence[int], kind: str | None = None
) -> tuple[TensorSpec, np.ndarray]:
    """A tensor with another shape or type, its bytes repeated or cut to fit."""
    new = TensorSpec(spec.name, tuple(ne), kind or spec.type)
    return new, np.resize(raw.reshape(-1), new.nbytes)


def raw_gguf(
    path: Path, kv: Iterable[bytes] = (), tensors: Iterable[bytes] = (), *, counts: tuple[int, int] | None = None,
    version: int = 3, data: int = 256,
) -> Path:  # fmt: skip
    """A GGUF of given entries, whatever they are."""
    kv, tensors = list(kv), list(tensors)
    n_tensors, n_kv = counts or (len(tensors), len(kv))
    head = struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_kv) + b"".join(kv) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def entry(name: str | bytes, ne: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


ARCH = kv("general.architecture", gguf.GGUFValueType.STRING.value, string("qwen3moe"))


def safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header and any claim of its length."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def reheader(
    source: Path, out: Path, change: Callable[[dict], None], data: Callable[[bytes], bytes] = lambda d: d
) -> Path:
    """A safetensors file with its header changed, and its data."""
    raw = source.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    return safetensors(out, json.dumps(header).encode(), data(raw[8 + size :]))


def edited(source: Path, out: Path, change: Callable[[dict], None]) -> Path:
    """A JSON file with its value changed."""
    value = json.loads(source.read_text(encoding="utf-8"))
    change(value)
    out.write_text(json.dumps(value), encoding="utf-8")
    return out


DEEP = "[" * 100_000
