"""Every tensor that llama.cpp's converter would write for a checkpoint, before anything is converted.

The rules are those of llama.cpp's conversion/base.py (`prepare_tensors`) with `--outtype auto`, and what the families' own
converters do beside, as their rows in `architectures` name it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from .architectures import Architecture, Converted
from .checkpoint import EXPERT_PARAMETERS, IGNORED, Checkpoint, StoredTensor
from .errors import GgufToolError
from .stats import ModelFacts
from .tensors import TensorSpec

# Matrices that the converter keeps in F32 whatever the rest is.
ALWAYS_F32 = (
    gguf.MODEL_TENSOR.FFN_GATE_INP,
    gguf.MODEL_TENSOR.FFN_GATE_INP_SHEXP,
    gguf.MODEL_TENSOR.SSM_CONV1D,
    gguf.MODEL_TENSOR.SHORTCONV_CONV,
)
EXPERT_TENSORS = {
    "gate": gguf.MODEL_TENSOR.FFN_GATE_EXP,
    "up": gguf.MODEL_TENSOR.FFN_UP_EXP,
    "down": gguf.MODEL_TENSOR.FFN_DOWN_EXP,
}
# What becomes of a stack that is stored whole.
OF_STACK = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_BIAS_RENAMED = ("e_score_correction_bias", "e_score_correction.bias")
# Of a layer that predicts further tokens, whatever the family.
_NEXTN = ("eh_proj.", "embed_tokens.", "enorm.", "hnorm.", "shared_head.")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """What becomes of a stored tensor: a name that the name map knows (or, with `final`, the GGUF's), its shape, and
    whether its rows are multiplied by what the stored matrix is multiplied by."""

    name: str
    shape: Shape
    same_input: bool = True
    final: bool = False


def gguf_name(checkpoint: Checkpoint, name: str) -> str:
    """The GGUF name of a checkpoint tensor that is no routed expert's, for example `blk.0.attn_q.weight`.

    Raises GgufToolError for a name that llama.cpp does not know in this architecture.
    """
    arch = checkpoint.architecture.gguf_arch
    looked_up = name.replace(*_BIAS_RENAMED)
    layer, suffix = checkpoint.split_layer(name)
    if layer is not None and layer >= checkpoint.n_layers and suffix.startswith(_NEXTN):
        return f"blk.{layer}.nextn.{suffix.replace('shared_head.', 'shared_head_')}"
    mapped = _name_map(arch, checkpoint.n_layers + checkpoint.n_predict).get_name(looked_up, (".weight", ".bias"))
    if mapped is None:
        raise GgufToolError(f"{checkpoint.path}: llama.cpp has no name for {name} in {arch}")
    return str(mapped)


def expert_name(layer: int, projection: str, suffix: str = "weight") -> str:
    """The GGUF name of a layer's stack of experts, for example `blk.0.ffn_down_exps.weight`."""
    return _format(EXPERT_TENSORS[projection], layer, suffix)


def matrices(checkpoint: Checkpoint, stored: str) -> list[str]:
    """The names of the GGUF's matrices that are multiplied by what the stored matrix is multiplied by."""
    tensor = checkpoint.tensors[stored]
    pieces = [piece for piece in _written(checkpoint, checkpoint.converter_name(stored), tensor) if piece.same_input]
    return [piece.name if piece.final else gguf_name(checkpoint, piece.name) for piece in pieces]


def in_gguf_order(checkpoint: Checkpoint, sums: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Sums over the inputs of matrices, GGUF name -> [columns], in the order of the GGUF's columns."""
    out = dict(sums)
    for rule in checkpoint.architecture.converted:
        for layer in range(checkpoint.n_layers) if rule.rule == "tiled_heads" else ():
            stored = checkpoint.layer_name(layer, rule.suffix)
            for name in matrices(checkpoint, stored) if stored in checkpoint.tensors else ():
                out[name] = out[name][_tiled(checkpoint)]
    return out


def weight_type(checkpoint: Checkpoint) -> str:
    """The type of the matrices with `--outtype auto`: that of the first BF16 or F16 matrix, F16 where there is none."""
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) > 1 and tensor.dtype in ("BF16", "F16"):
            return tensor.dtype
    return "F16"


def gguf_tensors(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """The tensors of the unpruned GGUF in the order in which the converter writes them.

    Experts are merged to `blk.L.ffn_{gate,up,down}_exps.weight` [n_embd or K, K or n_embd, E] (ne order). A tied output
    is absent. Raises GgufToolError for a tensor that llama.cpp has no name for.
    """
    matrix_type = weight_type(checkpoint)
    last = checkpoint.n_layers + checkpoint.n_predict
    f32 = {_format(key, layer) for key in ALWAYS_F32 for layer in range(last)}
    packed: list[TensorSpec] = []
    specs: list[TensorSpec] = []
    single: Counter[int] = Counter()
    for tensor in _converted_tensors(checkpoint):
        name = checkpoint.converter_name(tensor.name)
        layer, suffix = checkpoint.split_layer(name)
        if layer is not None and re.match(rf"{re.escape(checkpoint.architecture.single)}\.\d+\.", suffix):
            single[layer] += 1
            if single[layer] == 3 * checkpoint.n_expert:
                specs += [_expert_spec(checkpoint, layer, p, matrix_type) for p in checkpoint.architecture.expert_order]
        elif layer is not None and (leaf := _stack_leaf(checkpoint.architecture, suffix)):
            stack, _, part = leaf.partition("_proj")
            kind = {"": matrix_type, "_scales": "MXFP4", "_bias": "F32"}.get(part)
            into = [_expert_spec(checkpoint, layer, p, kind) for p in OF_STACK[f"{stack}_proj"]] if kind else []
            (packed if part == "_scales" else specs).extend(into)
        else:
            for piece in _written(checkpoint, name, tensor):
                out = piece.name if piece.final else gguf_name(checkpoint, piece.name)
                kept = len(piece.shape) < 2 or out in f32 or out.endswith("_norm.weight") or not out.endswith(".weight")
                specs.append(TensorSpec(out, piece.shape[::-1], "F32" if kept else matrix_type))
    return (*packed, *specs)


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """What the stats and the plan keep of a checkpoint."""
    return ModelFacts(
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        model_type=checkpoint.architecture.model_type,
        gguf_arch=checkpoint.architecture.gguf_arch,
        block_count=checkpoint.n_layers + checkpoint.n_predict,
        moe_layers=checkpoint.moe_layers,
        n_expert=checkpoint.n_expert,
        n_expert_used=checkpoint.n_expert_used,
        n_ff_exp=checkpoint.n_ff_exp,
        n_embd=checkpoint.n_embd,
        n_vocab=checkpoint.n_vocab,
        tensors=gguf_tensors(checkpoint),
        n_group=checkpoint.n_group,
        n_group_used=checkpoint.n_group_used,
        norm_topk=checkpoint.norm_topk,
        n_predict=checkpoint.n_predict,
        tied=checkpoint.architecture.tied,
        n_gqa=_n_gqa(checkpoint),
    )


def _n_gqa(checkpoint: Checkpoint) -> int:
    """Query heads per key-value head of layer 0, as the converter writes them into the metadata.

    A linear attention counts as the others' heads do, but for families whose converter counts layer by layer. Latent
    attention with the key projection absorbed has one key-value head for all.
    """
    config, row = checkpoint.config, checkpoint.architecture
    if row.heads_by_layer and checkpoint.layer_name(0, "self_attn.k_proj.weight") not in checkpoint.tensors:
        return 0
    heads = int(config.num_attention_heads)
    if any(rule.rule == "kv_b" for rule in row.converted):
        return heads
    return heads // int(getattr(config, "num_key_value_heads", None) or heads)


def _converted_tensors(checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    """The stored tensors that the converter takes, in its order."""
    row = checkpoint.architecture
    for name, tensor in checkpoint.tensors.items():
        if checkpoint.is_predictor(name):
            if row.predictors == "kept":
                yield tensor
        elif not name.endswith(IGNORED) and not any(re.match(pattern, name) for pattern in row.unused):
            yield tensor


def _stack_leaf(row: Architecture, suffix: str) -> str:
    """`gate_up_proj`, `down_proj_bias`, `down_proj_blocks` ... where a tensor of a layer is a stack's, else ""."""
    for leaf in EXPERT_PARAMETERS:
        ours = f"{row.experts}.{leaf}"
        names = [ours, *(theirs for name, theirs in row.renamed if name == ours)]
        for part in ("", "_bias", "_blocks", "_scales"):
            if suffix in (f"{name}{part}" for name in names):
                return f"{leaf}{part}"
    return ""


def _expert_spec(checkpoint: Checkpoint, layer: int, projection: str, kind: str) -> TensorSpec:
    """A layer's merged stack of one projection, or, in F32, of its biases."""
    n_embd, width, n_expert = checkpoint.n_embd, checkpoint.n_ff_exp, checkpoint.n_expert
    rows, columns = (n_embd, width) if projection == "down" else (width, n_embd)
    if kind == "F32":
        return TensorSpec(expert_name(layer, projection, "bias"), (rows, n_expert), kind)
    return TensorSpec(expert_name(layer, projection), (columns, rows, n_expert), kind)


def _written(checkpoint: Checkpoint, name: str, tensor: StoredTensor) -> list[Written]:
    """What becomes of a tensor that is no routed expert's; `name` is the converter's."""
    layer, suffix = checkpoint.split_layer(name)
    rule = next((r for r in checkpoint.architecture.converted if layer is not None and suffix == r.suffix), None)
    if rule is None or layer is None:
        return [Written(name, tensor.shape)]
    return RULES[rule.rule](checkpoint, name.removesuffix(suffix), layer, tensor.shape, rule)


Rule = Callable[[Checkpoint, str, int, Shape, Converted], list[Written]]


def _renamed(_: Checkpoint, prefix: str, __: int, shape: Shape, rule: Converted) -> list[Written]:
    return [Written(prefix + rule.to[0], shape)]


def _squeezed(_: Checkpoint, prefix: str, __: int, shape: Shape, rule: Converted) -> list[Written]:
    return [Written(prefix + rule.suffix, tuple(n for n in shape if n != 1))]


def _halves(_: Checkpoint, __: str, layer: int, shape: Shape, rule: Converted) -> list[Written]:
    return [Written(f"blk.{layer}.{to}.weight", (shape[0] // 2, *shape[1:]), final=True) for to in rule.to]


def _kv_b(checkpoint: Checkpoint, prefix: str, _: int, shape: Shape, __: Converted) -> list[Written]:
    """MLA with the key projection absorbed: k_b transposed [heads, rank, nope], v_b [heads, v, rank].

    What llama.cpp multiplies v_b by is the attention's mean of what the stored matrix is multiplied by; k_b's input is the
    query, which nothing here sees.
    """
    config = checkpoint.config
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    return [
        Written(f"{prefix}self_attn.k_b_proj.weight", (heads, shape[1], nope), same_input=False),
        Written(f"{prefix}self_attn.v_b_proj.weight", (heads, value, shape[1])),
    ]


def _qkvz(checkpoint: Checkpoint, _: str, layer: int, shape: Shape, __: Converted) -> list[Written]:
    """Queries, keys and values of a linear attention in one matrix, its gate in another."""
    z = checkpoint.config.linear_num_value_heads * checkpoint.config.linear_value_head_dim
    return [
        Written(f"blk.{layer}.attn_qkv.weight", (shape[0] - z, shape[1]), final=True),
        Written(f"blk.{layer}.attn_gate.weight", (z, shape[1]), final=True),
    ]


def _column(_: Checkpoint, prefix: str, __: int, shape: Shape, rule: Converted) -> list[Written]:
    return [Written(prefix + rule.suffix, (*shape, 1))]


def _grouped(checkpoint: Checkpoint, prefix: str, _: int, shape: Shape, rule: Converted) -> list[Written]:
    groups = checkpoint.config.mamba_n_groups
    return [Written(prefix + rule.suffix, (groups, shape[0] // groups))]


def _tiled_heads(_: Checkpoint, prefix: str, __: int, shape: Shape, rule: Converted) -> list[Written]:
    """Columns in another order of heads, see `_tiled`."""
    return [Written(prefix + rule.suffix, shape)]


def _tiled(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Which of the stored columns stands where: value heads by key head become those of all key heads in turns."""
    config = checkpoint.config
    keys, values, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    return np.arange(values * size).reshape(keys, values // keys, size).transpose(1, 0, 2).reshape(-1)


RULES: dict[str, Rule] = {
    "renamed": _renamed,
    "squeezed": _squeezed,
    "halves": _halves,
    "kv_b": _kv_b,
    "qkvz": _qkvz,
    "column": _column,
    "grouped": _grouped,
    "tiled_heads": _tiled_heads,
}


@lru_cache(maxsize=4)
def _name_map(gguf_arch: str, n_layers: int) -> gguf.TensorNameMap:
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[gguf_arch]
    return gguf.get_tensor_name_map(arch, n_layers)


def _format(key: gguf.MODEL_TENSOR, layer: int, suffix: str = "weight") -> str:
    return f"{gguf.TENSOR_NAMES[key].format(bid=layer)}.{suffix}"
