"""Architectures as rows of data: what differs between the MoE families that gguftool knows.

A row names things; it holds no code. transformers 5 gives every MoE an experts module that is called with
(hidden states, top-k indices, top-k weights) and keeps 3-D `gate_up_proj` and `down_proj`, so calibration needs
nothing more than where that module is and how its rows are laid out.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from .errors import GgufToolError


@dataclass(frozen=True)
class Architecture:
    """One MoE family.

    Attributes:
        model_type: `model_type` in config.json.
        gguf_arch: `general.architecture` in the GGUF.
        layers: path of the decoder layers' list inside the causal LM module.
        experts: path of the experts module inside a decoder layer.
        router: path of the router module inside a decoder layer; its `weight` has a row for every expert.
        checkpoint_experts: path of the experts in checkpoint tensor names, inside a layer.
        gate, up, down: names of an expert's three projections in the checkpoint.
        width_key: config.json's key for the neurons of one expert.
        count_key: config.json's key for the number of routed experts.
        top_k_key: config.json's key for the experts used by a token.
        norm_topk: whether the weights of a token's experts are made to add up to 1; None where config.json's
            `norm_topk_prob` says so.
        reference: a public checkpoint of this family, for whoever wants to check the row.
    """

    model_type: str
    gguf_arch: str
    reference: str
    layers: str = "model.layers"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    checkpoint_experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    width_key: str = "moe_intermediate_size"
    count_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    norm_topk: bool | None = None


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("qwen3_moe", "qwen3moe", "Qwen/Qwen3-30B-A3B"),
    Architecture("qwen2_moe", "qwen2moe", "Qwen/Qwen1.5-MoE-A2.7B"),
    Architecture("olmoe", "olmoe", "allenai/OLMoE-1B-7B-0924", width_key="intermediate_size"),
    Architecture(
        "mixtral",
        "llama",
        "mistralai/Mixtral-8x7B-v0.1",
        checkpoint_experts="block_sparse_moe.experts",
        gate="w1",
        up="w3",
        down="w2",
        width_key="intermediate_size",
        count_key="num_local_experts",
        norm_topk=True,
    ),
)


def for_model_type(model_type: str) -> Architecture:
    """The row for config.json's `model_type`. Raises GgufToolError for one that has no row."""
    known = {row.model_type: row for row in ARCHITECTURES}
    if model_type in known:
        return known[model_type]
    near = get_close_matches(model_type, known, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise GgufToolError(f"no MoE architecture {model_type!r} is known{hint}; known are {', '.join(sorted(known))}")
