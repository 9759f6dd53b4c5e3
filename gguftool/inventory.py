"""Every tensor that llama.cpp's converter would write for a checkpoint, before anything is converted.

The rules are those of llama.cpp's conversion/base.py (`prepare_tensors`) with `--outtype auto`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import gguf

from .checkpoint import IGNORED, Checkpoint, StoredTensor
from .errors import GgufToolError
from .stats import ModelFacts
from .tensors import TensorSpec

# Matrices that the converter keeps in F32 whatever the rest is.
ALWAYS_F32 = (gguf.MODEL_TENSOR.FFN_GATE_INP, gguf.MODEL_TENSOR.FFN_GATE_INP_SHEXP)
EXPERT_TENSORS = {
    "gate": gguf.MODEL_TENSOR.FFN_GATE_EXP,
    "up": gguf.MODEL_TENSOR.FFN_UP_EXP,
    "down": gguf.MODEL_TENSOR.FFN_DOWN_EXP,
}
# The order in which the converter writes a layer's three stacks: that of its loops over the projections' names.
EXPERT_ORDER = {"llama": ("gate", "down", "up")}
DEFAULT_ORDER = ("down", "gate", "up")


def gguf_name(checkpoint: Checkpoint, name: str) -> str:
    """The GGUF name of a checkpoint tensor that is no routed expert's, for example `blk.0.attn_q.weight`.

    Raises GgufToolError for a name that llama.cpp does not know in this architecture.
    """
    arch = checkpoint.architecture.gguf_arch
    mapped = _name_map(arch, checkpoint.n_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if mapped is None:
        raise GgufToolError(f"{checkpoint.path}: llama.cpp has no name for {name} in {arch}")
    return str(mapped)


def expert_name(layer: int, projection: str) -> str:
    """The GGUF name of a layer's stack of experts, for example `blk.0.ffn_down_exps.weight`."""
    return _format(EXPERT_TENSORS[projection], layer)


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
    f32 = {_format(key, layer) for key in ALWAYS_F32 for layer in range(checkpoint.n_layers)}
    specs: list[TensorSpec] = []
    for layer, tensor in _without_single_experts(checkpoint):
        if layer is not None:
            specs += _expert_specs(checkpoint, layer, tensor, matrix_type)
            continue
        name = gguf_name(checkpoint, tensor.name)
        kept = len(tensor.shape) < 2 or name in f32 or name.endswith("_norm.weight") or not name.endswith(".weight")
        specs.append(TensorSpec(name, tensor.shape[::-1], "F32" if kept else matrix_type))
    return tuple(specs)


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """What the stats and the plan keep of a checkpoint."""
    return ModelFacts(
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        model_type=checkpoint.architecture.model_type,
        gguf_arch=checkpoint.architecture.gguf_arch,
        block_count=checkpoint.n_layers,
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
    )


def _without_single_experts(checkpoint: Checkpoint) -> Iterator[tuple[int | None, StoredTensor]]:
    """The stored tensors in order: (None, tensor), or (layer, tensor) for a stack or for the last expert of a layer."""
    experts = {tensor.name: layer for layer in checkpoint.moe_layers for tensor in checkpoint.expert_tensors(layer)}
    left = Counter(experts.values())
    for tensor in checkpoint.tensors.values():
        layer = experts.get(tensor.name)
        if layer is None:
            if not tensor.name.endswith(IGNORED):
                yield None, tensor
            continue
        left[layer] -= 1
        if not left[layer] or checkpoint.is_stacked(layer):
            yield layer, tensor


def _expert_specs(checkpoint: Checkpoint, layer: int, tensor: StoredTensor, matrix_type: str) -> list[TensorSpec]:
    """The merged stacks that the converter writes when it meets `tensor`."""
    n_embd, width, n_expert = checkpoint.n_embd, checkpoint.n_ff_exp, checkpoint.n_expert
    order: tuple[str, ...] = EXPERT_ORDER.get(checkpoint.architecture.gguf_arch, DEFAULT_ORDER)
    if checkpoint.is_stacked(layer):
        order = ("down",) if tensor.name.endswith("down_proj") else ("gate", "up")
    ne = {"gate": (n_embd, width, n_expert), "up": (n_embd, width, n_expert), "down": (width, n_embd, n_expert)}
    return [TensorSpec(expert_name(layer, projection), ne[projection], matrix_type) for projection in order]


@lru_cache(maxsize=4)
def _name_map(gguf_arch: str, n_layers: int) -> gguf.TensorNameMap:
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[gguf_arch]
    return gguf.get_tensor_name_map(arch, n_layers)


def _format(key: gguf.MODEL_TENSOR, layer: int) -> str:
    return gguf.TENSOR_NAMES[key].format(bid=layer) + ".weight"
