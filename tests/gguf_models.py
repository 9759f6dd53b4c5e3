"""Small GGUF files of random weights, for tests that need no model which runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as V

from gguftool.gguf_file import GgufFile, KeyValue, write_gguf
from gguftool.tensors import TensorSpec


def write_random(
    path: Path, specs: Sequence[TensorSpec], *, n_expert: int, top_k: int, n_ff: int, seed: int = 0
) -> Path:
    """A qwen3moe-like file with random weights; quantized types through gguf-py's own quantizers."""
    rng = np.random.default_rng(seed)
    blocks = 1 + max((int(spec.name.split(".")[1]) for spec in specs if spec.name.startswith("blk.")), default=0)
    entries = {
        "general.name": KeyValue("Synthetic", V.STRING),
        "qwen3moe.block_count": KeyValue(blocks, V.UINT32),
        "qwen3moe.expert_count": KeyValue(n_expert, V.UINT32),
        "qwen3moe.expert_used_count": KeyValue(top_k, V.UINT32),
        "qwen3moe.expert_feed_forward_length": KeyValue(n_ff, V.UINT32),
        "tokenizer.ggml.tokens": KeyValue(["a", "b", "ü"], V.ARRAY, V.STRING),
        "tokenizer.ggml.scores": KeyValue([0.5, 1.5], V.ARRAY, V.FLOAT32),
        "general.flag": KeyValue(True, V.BOOL),
    }

    def produce(spec: TensorSpec) -> np.ndarray:
        floats = rng.standard_normal(tuple(reversed(spec.ne))).astype(np.float32)
        data = gguf.quants.quantize(floats.reshape(-1, spec.ne[0]), gguf.GGMLQuantizationType[spec.type])
        return np.ascontiguousarray(data).view(np.uint8).reshape(*reversed(spec.ne[1:]), -1)

    write_gguf(path, "qwen3moe", entries, specs, produce)
    return path


def floats(file: GgufFile, name: str) -> np.ndarray:
    """A tensor's weights as float32, the dimensions of ne reversed."""
    spec = next(spec for spec in file.tensors if spec.name == name)
    raw = file.raw(spec)
    kind = gguf.GGMLQuantizationType[spec.type]
    data = raw.view(np.float32) if spec.type == "F32" else gguf.quants.dequantize(raw, kind)
    return data.reshape(tuple(reversed(spec.ne)))
