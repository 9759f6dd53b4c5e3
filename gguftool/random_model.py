"""GGUF files of random weights at the layer sizes of real models, for benchmarks: speed depends on shapes and types.

A file has the real sizes of attention, shared experts, router and experts, few layers, and a small vocabulary without a
tokenizer. An expert has the same weights in every file, cut to the width that it has there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFValueType as V
from numpy.typing import NDArray

from .encoding import fit
from .gguf_file import Bytes, KeyValue, write_gguf
from .layout import map_name, parse, tier_name
from .requant import quantize_rows
from .tensors import TensorSpec, row_bytes

N_VOCAB = 2048
Widths = NDArray[np.int64]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder layer. `attention` lists the tensors besides norms and experts: name, ne.

    `n_shared` counts the shared experts; `bias` says whether router and experts have one.
    """

    name: str
    arch: str
    n_embd: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_head: int
    n_head_kv: int
    head_dim: int
    attention: tuple[tuple[str, tuple[int, ...]], ...]
    norms: tuple[tuple[str, int], ...]
    n_shared: int = 0
    bias: bool = False
    metadata: dict[str, KeyValue] = field(default_factory=dict)


def _gqa(n_embd: int, n_head: int, n_head_kv: int, head_dim: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    q, kv = n_head * head_dim, n_head_kv * head_dim
    shapes = (("attn_q", n_embd, q), ("attn_k", n_embd, kv), ("attn_v", n_embd, kv), ("attn_output", q, n_embd))
    return tuple((f"{name}.weight", (rows, columns)) for name, rows, columns in shapes)


# Sizes from the models' config.json: Qwen/Qwen3-30B-A3B, openai/gpt-oss-20b, deepseek-ai/DeepSeek-V2-Lite,
# mistralai/Mixtral-8x7B-v0.1.
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(
            "qwen3-30b-a3b", "qwen3moe", 2048, 128, 8, 768, 32, 4, 128, _gqa(2048, 32, 4, 128),
            (("attn_norm", 2048), ("attn_q_norm", 128), ("attn_k_norm", 128), ("ffn_norm", 2048)),
        ),
        ModelShape(
            "gpt-oss-20b", "gpt-oss", 2880, 32, 4, 2880, 64, 8, 64,
            (*_gqa(2880, 64, 8, 64), ("attn_q.bias", (4096,)), ("attn_k.bias", (512,)), ("attn_v.bias", (512,)),
             ("attn_output.bias", (2880,)), ("attn_sinks.weight", (64,))),
            (("attn_norm", 2880), ("post_attention_norm", 2880)), bias=True,
            metadata={"attention.sliding_window": KeyValue(128, V.UINT32)},
        ),
        ModelShape(
            "deepseek-v2-lite", "deepseek2", 2048, 64, 6, 1408, 16, 1, 576,
            # The query has the low rank of the larger V2: llama.cpp knows the direct one of Lite by its 27 layers.
            (("attn_q_a.weight", (2048, 1536)), ("attn_q_b.weight", (1536, 3072)),
             ("attn_kv_a_mqa.weight", (2048, 576)), ("attn_k_b.weight", (128, 512, 16)),
             ("attn_v_b.weight", (512, 128, 16)), ("attn_output.weight", (2048, 2048))),
            (("attn_norm", 2048), ("attn_q_a_norm", 1536), ("attn_kv_a_norm", 512), ("ffn_norm", 2048)), n_shared=2,
            metadata={
                "expert_shared_count": KeyValue(2, V.UINT32), "leading_dense_block_count": KeyValue(0, V.UINT32),
                "attention.q_lora_rank": KeyValue(1536, V.UINT32),
                "attention.kv_lora_rank": KeyValue(512, V.UINT32), "attention.key_length_mla": KeyValue(192, V.UINT32),
                "attention.value_length_mla": KeyValue(128, V.UINT32), "rope.dimension_count": KeyValue(64, V.UINT32),
                "expert_weights_scale": KeyValue(1.0, V.FLOAT32), "expert_gating_func": KeyValue(1, V.UINT32),
                "attention.value_length": KeyValue(512, V.UINT32),
            },
        ),
        ModelShape(
            "mixtral-8x7b", "llama", 4096, 8, 2, 14336, 32, 8, 128, _gqa(4096, 32, 8, 128),
            (("attn_norm", 4096), ("ffn_norm", 4096)),
            metadata={"rope.dimension_count": KeyValue(128, V.UINT32)},
        ),
    )
}  # fmt: skip


def split_widths(shape: ModelShape) -> tuple[Widths, NDArray[np.int64]]:
    """Every expert whole, alternately in one of two tiers: (width, tier) of each expert."""
    return np.full(shape.n_expert, shape.n_ff_exp), np.arange(shape.n_expert) % 2


def pruned_widths(shape: ModelShape, kept: float = 0.6) -> tuple[Widths, NDArray[np.int64]]:
    """Three tiers, near 3/3, 2/3 and 1/3 of the full width, that keep about `kept`: (width, tier) of each expert.

    A quarter of the experts stay whole. Widths are multiples of 256 where the full width is, else of 32.
    """
    step = 256 if shape.n_ff_exp % 256 == 0 else 32
    widths = np.array([shape.n_ff_exp, *(round(shape.n_ff_exp * part / 3 / step) * step for part in (2, 1))])
    whole = round(shape.n_expert / 4)
    budget = kept * shape.n_expert * shape.n_ff_exp - whole * widths[0]
    rest = shape.n_expert - whole
    middle = round((budget - rest * widths[2]) / (widths[1] - widths[2]))
    tier = np.repeat([0, 1, 2], [whole, middle, rest - middle])
    # Strewn over the indices, as pruning leaves them.
    tier = tier[np.random.default_rng(0).permutation(shape.n_expert)]
    return widths[tier], tier


def write_random_model(
    out: Path, shape: ModelShape, type_name: str, n_layer: int, ggml: Path | None,
    widths: tuple[Widths, NDArray[np.int64]] | None = None, progress: Callable[[int, int, str], None] | None = None,
) -> None:  # fmt: skip
    """Writes the model with `n_layer` layers: stock without `widths`, else tiered by (width, tier) of each expert.

    Args:
        type_name: type of every matrix whose rows its blocks divide; others get its twin, as in a pruned file.
        ggml: the library with ggml's quantizers, for types that have blocks.
    """
    specs = list(_specs(shape, type_name, n_layer, widths))
    maker = _Maker(shape, ggml, widths)
    write_gguf(out, shape.arch, _entries(shape, n_layer), specs, maker.produce, progress)


def active_bytes(
    shape: ModelShape, type_name: str, n_layer: int, chosen: NDArray[np.float64], widths: Widths | None = None
) -> float:
    """Bytes of weights that one generated token reads.

    Args:
        chosen: how often the router chose each expert, [n_layer, n_expert]; a row sums to n_expert_used per token.
        widths: of each expert; None where all are whole.
    """
    fixed = sum(
        spec.nbytes
        for spec in _specs(shape, type_name, n_layer, None)
        if "_exps." not in spec.name and spec.name != "token_embd.weight"
    )
    per_expert = np.array(
        [_expert_bytes(shape, type_name, int(w)) for w in (widths if widths is not None else [shape.n_ff_exp] * shape.n_expert)]
    )  # fmt: skip
    return float(fixed + (chosen / chosen.sum(axis=1, keepdims=True) * shape.n_expert_used @ per_expert).sum())


def _expert_bytes(shape: ModelShape, type_name: str, width: int) -> int:
    rows = 2 * width * row_bytes(fit(type_name, shape.n_embd, True), shape.n_embd)
    return rows + shape.n_embd * row_bytes(fit(type_name, width, True), width)


def _entries(shape: ModelShape, n_layer: int) -> dict[str, KeyValue]:
    numbers = {
        "block_count": n_layer, "context_length": 32768, "embedding_length": shape.n_embd, "vocab_size": N_VOCAB,
        "feed_forward_length": shape.n_ff_exp, "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv, "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim, "expert_count": shape.n_expert,
        "expert_used_count": shape.n_expert_used, "expert_feed_forward_length": shape.n_ff_exp,
    }  # fmt: skip
    entries = {f"{shape.arch}.{key}": KeyValue(value, V.UINT32) for key, value in numbers.items()}
    entries[f"{shape.arch}.attention.layer_norm_rms_epsilon"] = KeyValue(1e-6, V.FLOAT32)
    entries["general.name"] = KeyValue(f"{shape.name}, random weights", V.STRING)
    entries["tokenizer.ggml.model"] = KeyValue("no_vocab", V.STRING)
    return entries | {f"{shape.arch}.{key}": entry for key, entry in shape.metadata.items()}


def _specs(
    shape: ModelShape, type_name: str, n_layer: int, widths: tuple[Widths, NDArray[np.int64]] | None
) -> Iterator[TensorSpec]:
    def matrix(name: str, ne: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(name, ne, fit(type_name, ne[0], True) if len(ne) > 1 else "F32")

    yield matrix("token_embd.weight", (shape.n_embd, N_VOCAB))
    yield TensorSpec("output_norm.weight", (shape.n_embd,), "F32")
    yield matrix("output.weight", (shape.n_embd, N_VOCAB))
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        for name, size in shape.norms:
            yield TensorSpec(f"{prefix}{name}.weight", (size,), "F32")
        for name, ne in shape.attention:
            yield matrix(prefix + name, ne)
        if shape.n_shared:
            for part, ne in _parts(shape.n_embd, shape.n_shared * shape.n_ff_exp):
                yield matrix(f"{prefix}ffn_{part}_shexp.weight", ne)
        yield TensorSpec(f"{prefix}ffn_gate_inp.weight", (shape.n_embd, shape.n_expert), "F32")
        if shape.bias:
            yield TensorSpec(f"{prefix}ffn_gate_inp.bias", (shape.n_expert,), "F32")
        if widths is None:
            tiers: Sequence[tuple[int | None, int, int]] = [(None, shape.n_ff_exp, shape.n_expert)]
        else:
            tiers = [(t, int(widths[0][widths[1] == t][0]), int((widths[1] == t).sum())) for t in np.unique(widths[1])]
            yield TensorSpec(map_name(layer), (shape.n_expert, len(tiers)), "I32")
        for tier, width, count in tiers:
            for part, ne in _parts(shape.n_embd, width):
                yield matrix(_name(layer, part, tier, "weight"), (*ne, count))
                if shape.bias:
                    yield TensorSpec(_name(layer, part, tier, "bias"), (ne[1], count), "F32")


def _parts(n_embd: int, width: int) -> list[tuple[str, tuple[int, int]]]:
    return [("gate", (n_embd, width)), ("up", (n_embd, width)), ("down", (width, n_embd))]


def _name(layer: int, part: str, tier: int | None, suffix: str) -> str:
    return f"blk.{layer}.ffn_{part}_exps.{suffix}" if tier is None else tier_name(layer, part, int(tier), suffix)


class _Maker:
    """Makes tensors, the same for a name in every file, whatever the layout.

    Quantizing is slow and what it gives has no bearing on speed, so the rows of all matrices come from one sheet.
    """

    def __init__(self, shape: ModelShape, ggml: Path | None, widths: tuple[Widths, NDArray[np.int64]] | None) -> None:
        self.shape, self.ggml = shape, ggml
        self.tier = None if widths is None else widths[1]
        self.sheets: dict[tuple[str, int, int], Bytes] = {}

    def produce(self, spec: TensorSpec) -> Bytes:
        name = parse(spec.name)
        if name is not None and name.role == "map":
            return self._tier_map().view(np.uint8)
        if name is None or name.role == "router":
            return self._whole(spec)
        members = np.arange(self.shape.n_expert) if name.tier is None else np.flatnonzero(self.tier == name.tier)
        if name.suffix == "bias":
            full = self.shape.n_embd if name.role == "down" else self.shape.n_ff_exp
            bias = _rng(name.layer, name.role).standard_normal((self.shape.n_expert, full)).astype(np.float32) * 0.02
            return np.ascontiguousarray(bias[members, : spec.ne[0]]).view(np.uint8)
        full = self.shape.n_ff_exp if name.role == "down" else self.shape.n_embd
        sheet = self._sheet(spec.type, spec.ne[0], full)
        starts = _rng(name.layer, name.role).integers(0, len(sheet), self.shape.n_expert)[members]
        out = np.empty((len(members), spec.ne[1], sheet.shape[1]), dtype=np.uint8)
        for index, start in enumerate(starts):
            out[index] = np.resize(np.roll(sheet, -int(start), axis=0), out.shape[1:])
        return out

    def _whole(self, spec: TensorSpec) -> Bytes:
        if spec.name.endswith("norm.weight"):
            return np.ones(spec.ne, dtype=np.float32).view(np.uint8)
        if spec.type == "F32":
            scale = 1.0 if spec.name.endswith("ffn_gate_inp.weight") else 0.02
            data = _rng(spec.name).standard_normal(tuple(reversed(spec.ne))).astype(np.float32) * np.float32(scale)
            return np.ascontiguousarray(data).view(np.uint8)
        sheet = self._sheet(spec.type, spec.ne[0], spec.ne[0])
        start = int(_rng(spec.name).integers(0, len(sheet)))
        rows = np.resize(np.roll(sheet, -start, axis=0), (math.prod(spec.ne[1:]), sheet.shape[1]))
        return rows.reshape(*reversed(spec.ne[1:]), -1)

    def _sheet(self, type_name: str, length: int, full: int) -> Bytes:
        key = type_name, length, full
        if key not in self.sheets:
            floats = _rng("sheet", full).standard_normal((2048, full)) / math.sqrt(full)
            self.sheets[key] = quantize_rows(floats[:, :length].astype(np.float32), type_name, self.ggml)
        return self.sheets[key]

    def _tier_map(self) -> NDArray[np.int32]:
        assert self.tier is not None
        out = np.full((int(self.tier.max()) + 1, len(self.tier)), -1, dtype=np.int32)
        for t in range(len(out)):
            members = np.flatnonzero(self.tier == t)
            out[t, members] = np.arange(len(members))
        return out


def _rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))
