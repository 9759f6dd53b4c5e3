"""Checkpoints of random weights at the layer sizes of real models, for benchmarks of calibration.

A directory has config.json and a safetensors shard for each layer, BF16, a small vocabulary and no tokenizer. All matrices
are cut from one pool of normal numbers at random places, scaled so that every layer puts out what has about the length of
what came in; a checkpoint of 15 GB is written as fast as the disk takes it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .random_model import SHAPES, ModelShape

N_VOCAB = 2048
# Not a multiple of any row, so that rows differ when a matrix is longer than the pool.
POOL = (1 << 23) + 9973

# Decoder layers of the whole models.
N_LAYERS = {"qwen3-30b-a3b": 48, "mixtral-8x7b": 32}

Bits = NDArray[np.uint16]

# What is not the same for all: model_type, names of experts and router, and whether q and k are normalised.
KINDS = {
    "qwen3-30b-a3b": ("qwen3_moe", "mlp.experts", "mlp.gate", ("gate_proj", "up_proj", "down_proj"), True),
    "mixtral-8x7b": (
        "mixtral",
        "block_sparse_moe.experts",
        "block_sparse_moe.gate",
        ("w1", "w3", "w2"),
        False,
    ),
}


def write_random_checkpoint(directory: Path, shape: ModelShape, n_layers: int, seed: int = 0) -> Path:
    """Writes a checkpoint of `n_layers` layers and returns its directory; a layer is the same whatever their number.

    Raises GgufToolError for a shape whose family transformers would name in a way that is not known here.
    """
    if shape.name not in KINDS:
        raise GgufToolError(f"no checkpoint of {shape.name} can be made; known are {', '.join(KINDS)}")
    directory.mkdir(parents=True, exist_ok=True)
    pool = _bf16(np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32))
    weight_map: dict[str, str] = {}
    for number in range(-1, n_layers):
        file = directory / f"model-{number + 2:05}-of-{n_layers + 1:05}.safetensors"
        shapes = dict(_outer(shape) if number < 0 else _layer(shape, number))
        _write_shard(file, shapes, pool, seed)
        weight_map |= dict.fromkeys(shapes, file.name)
    _write_index(directory, weight_map)
    (directory / "config.json").write_text(json.dumps(_config(shape, n_layers), indent=1))
    return directory


def first_layers(directory: Path, whole: Path, n_layers: int) -> Path:
    """A checkpoint of the first layers of `whole`, whose shards are linked and not copied."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((whole / "config.json").read_text())
    weight_map = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    gone = tuple(f"model.layers.{layer}." for layer in range(n_layers, config["num_hidden_layers"]))
    weight_map = {name: file for name, file in weight_map.items() if not name.startswith(gone)}
    for file in set(weight_map.values()):
        os.symlink((whole / file).resolve(), directory / file)
    _write_index(directory, weight_map)
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layers}, indent=1))
    return directory


def _write_index(directory: Path, weight_map: dict[str, str]) -> None:
    """The list of shards; some versions of transformers read `metadata` though it may be empty."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def _config(shape: ModelShape, n_layers: int) -> dict[str, object]:
    model_type = KINDS[shape.name][0]
    qwen = model_type == "qwen3_moe"
    return {
        "architectures": ["Qwen3MoeForCausalLM" if qwen else "MixtralForCausalLM"],
        "model_type": model_type,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": n_layers,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "num_experts" if qwen else "num_local_experts": shape.n_expert,
        "num_experts_per_tok": shape.n_expert_used,
        "moe_intermediate_size" if qwen else "intermediate_size": shape.n_ff_exp,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 32768,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    } | ({"intermediate_size": 3 * shape.n_embd} if qwen else {})  # fmt: skip


def _outer(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (N_VOCAB, shape.n_embd)
    yield "model.norm.weight", (shape.n_embd,)
    yield "lm_head.weight", (N_VOCAB, shape.n_embd)


def _layer(shape: ModelShape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one decoder layer."""
    _, experts, router, (gate, up, down), normalised = KINDS[shape.name]
    d, prefix = shape.n_embd, f"model.layers.{layer}."
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield f"{prefix}input_layernorm.weight", (d,)
    yield f"{prefix}post_attention_layernorm.weight", (d,)
    for name, size in (("q_proj", (q, d)), ("k_proj", (kv, d)), ("v_proj", (kv, d)), ("o_proj", (d, q))):
        yield f"{prefix}self_attn.{name}.weight", size
    for name in ("q_norm", "k_norm") if normalised else ():
        yield f"{prefix}self_attn.{name}.weight", (shape.head_dim,)
    yield f"{prefix}{router}.weight", (shape.n_expert, d)
    for expert in range(shape.n_expert):
        for name, size in ((gate, (shape.n_ff_exp, d)), (up, (shape.n_ff_exp, d)), (down, (d, shape.n_ff_exp))):
            yield f"{prefix}{experts}.{expert}.{name}.weight", size


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], pool: Bits, seed: int) -> None:
    # transformers before 5 refuses a file that does not name its framework.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _numbers(name, shape, pool, seed):
                stream.write(piece.tobytes())


def _numbers(name: str, shape: tuple[int, ...], pool: Bits, seed: int) -> Iterator[Bits]:
    """The numbers of a tensor as BF16 bits, in pieces."""
    if len(shape) == 1:
        yield _bf16(np.ones(shape, dtype=np.float32))
        return
    # A power of two changes the exponent only, so that a piece of the pool is scaled by adding to its bits.
    scale = 0 if name.startswith("model.embed") else round(-0.5 * np.log2(shape[1]))
    left, start = prod(shape), zlib.crc32(f"{seed} {name}".encode()) % len(pool)
    while left:
        piece = pool[start : start + left]
        yield np.where(piece & 0x7F80 > 64 << 7, piece + np.uint16((scale << 7) & 0xFFFF), np.uint16(0))
        left, start = left - len(piece), 0


def _bf16(values: NDArray[np.float32]) -> Bits:
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def layer_parameters(shape: ModelShape) -> int:
    """How many numbers one decoder layer has."""
    return sum(prod(size) for _, size in _layer(shape, 0))


def shape_named(name: str) -> ModelShape:
    """The sizes of a model by its name. Raises GgufToolError for one that is not known."""
    if name not in KINDS:
        raise GgufToolError(f"no model {name!r}; known are {', '.join(KINDS)}")
    return SHAPES[name]
