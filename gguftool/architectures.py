"""Architectures as rows of data: what differs between the MoE families that gguftool knows.

A row names things; it holds no code. transformers 5 gives every MoE an experts module that is called with (hidden states,
top-k indices, top-k weights) and keeps 3-D `gate_up_proj` and `down_proj`, and says itself how these lie (`experts.canonical`
reads that), so calibration needs nothing more than where that module is and how its weights are named on disk.

To add a row, given that both transformers and the pinned llama.cpp know the family:

1. Build a tiny random model of it and compare the names of `model.state_dict()` with those of a real checkpoint: what differs
   inside a layer goes into `renamed` (or `single`, `gate`, `up`, `down` for one tensor an expert), what a forward pass never
   reads into `unused`.
2. `router_rows` lists whatever has an entry for every expert beside the experts themselves: the router's matrix, its bias,
   the bias that only chooses. All of them lose entries when experts are dropped.
3. Run llama.cpp's converter on it. Where it cuts, renames or reshapes a tensor, `converted` says by which rule
   (`inventory.RULES`); `expert_order` is the order in which it writes an expert's stacks.
4. Add the tiny model to tests/archs.py. The tests then hold names, tensors, the forward pass, calibration, plan, prune
   and the runtime's logits against transformers. A family whose logits differ has no row: the numbers would be about
   another function than the one that is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .errors import GgufToolError

# How the down projection of a dense layer is called in a GGUF, and every matrix of a shared expert.
DENSE, SHARED = ".ffn_down.weight", "_shexp.weight"


@dataclass(frozen=True)
class Converted:
    """A tensor that the converter does not only rename: in a layer its name ends in `suffix`; `rule` is one of
    `inventory.RULES`; `to` is what the rule makes of it, where it does not follow from the name."""

    suffix: str
    rule: str
    to: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One MoE family.

    Attributes:
        model_type: `model_type` in config.json.
        gguf_arch: `general.architecture` in the GGUF.
        reference: a public checkpoint of this family, for whoever wants to check the row.
        title: what people call it. special: what is special about it, for people.
        also: other values of `model_type` that mean the same (the text part of a model with images).
        layers: path of the decoder layers' list inside the causal LM module.
        experts: path of the experts module inside a decoder layer.
        router: path of the router module inside a decoder layer.
        router_rows: parameters and buffers inside a decoder layer that have an entry for every expert; the first is the
            router's matrix.
        renamed: (in transformers, in the checkpoint) beginnings of tensor names inside a layer, the first match wins.
        outside: (in transformers, in the checkpoint) beginnings of all tensor names, where a text model is part of another.
        single: path of single experts in checkpoint tensor names, inside a layer.
        gate, up, down: names of an expert's three projections there.
        transposed, interleaved: how stacks lie on disk: [E, d, 2K] and [E, K, d]; gate and up in turns. As in transformers.
        expert_bias: whether the projections of an expert have biases.
        unused: regular expressions of stored tensors that no forward pass of the text model reads.
        predictors: what the converter does with layers of multi-token prediction: "" where there are none, "skipped", "kept".
        predictor_names: (in the checkpoint, inside the layer behind the last one) of such layers with names of their own.
        width_key, count_key, top_k_key: config.json's keys for the neurons of one expert, the routed experts, and the
            experts used by a token.
        shared_tied: whether llama.cpp sizes the shared experts by the width of the others: a family whose converter writes no
            `expert_shared_feed_forward_length`.
        heads_by_layer: whether the converter writes 0 key-value heads for layers without attention.
        norm_topk: whether the weights of a token's experts are made to add up to 1; None where config.json's
            `norm_topk_prob` says so.
        expert_order: in which the converter writes single experts' stacks.
        converted: tensors that the converter does not only rename.
        refused: (config.json's key, value, why) of variants that cannot be handled.
    """

    model_type: str
    gguf_arch: str
    reference: str
    title: str
    special: str = ""
    also: tuple[str, ...] = ()
    layers: str = "model.layers"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    router_rows: tuple[str, ...] = ("mlp.gate.weight",)
    renamed: tuple[tuple[str, str], ...] = ()
    outside: tuple[str, str] = ("", "")
    single: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False
    expert_bias: bool = False
    unused: tuple[str, ...] = ()
    predictors: str = ""
    predictor_names: tuple[tuple[str, str], ...] = ()
    width_key: str = "moe_intermediate_size"
    count_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    shared_tied: bool = False
    heads_by_layer: bool = False
    norm_topk: bool | None = None
    expert_order: tuple[str, ...] = ("down", "gate", "up")
    converted: tuple[Converted, ...] = ()
    refused: tuple[tuple[str, object, str], ...] = ()

    @property
    def tied(self) -> tuple[str, ...]:
        """How names of tensors end that llama.cpp sizes by the experts' width."""
        # Where config.json has one width, the GGUF has one: a dense layer's would be the same.
        dense = (DENSE,) if self.width_key == "intermediate_size" else ()
        return (SHARED,) * self.shared_tied + dense


BIASED = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
KV_B = (Converted("self_attn.kv_b_proj.weight", "kv_b"),)
QWEN_MTP = (
    ("mtp.layers.0.", ""),
    ("mtp.fc.", "eh_proj."),
    ("mtp.pre_fc_norm_embedding.", "enorm."),
    ("mtp.pre_fc_norm_hidden.", "hnorm."),
    ("mtp.norm.", "shared_head.norm."),
)
GRANITE: dict[str, Any] = {
    "experts": "block_sparse_moe.experts",
    "router": "block_sparse_moe.router",
    "router_rows": ("block_sparse_moe.router.weight",),
    "renamed": (
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
    ),
    "width_key": "intermediate_size",
    "count_key": "num_local_experts",
    "norm_topk": True,
    "converted": (Converted("shared_mlp.input_linear.weight", "halves", ("ffn_gate_shexp", "ffn_up_shexp")),),
}
GRANITE_HYBRID = GRANITE | {
    "heads_by_layer": True,
    "converted": (
        *GRANITE["converted"],
        Converted("mamba.conv1d.weight", "squeezed"),
        Converted("mamba.A_log", "column"),
        Converted("mamba.D", "column"),
        Converted("mamba.norm.weight", "grouped"),
        Converted("mamba.dt_bias", "renamed", ("mamba.dt_proj.bias",)),
    ),
}
W_ORDER = ("gate", "down", "up")  # w1, w2, w3

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("qwen3_moe", "qwen3moe", "Qwen/Qwen3-30B-A3B", "Qwen3-MoE"),
    Architecture(
        "qwen2_moe", "qwen2moe", "Qwen/Qwen1.5-MoE-A2.7B", "Qwen1.5-MoE, Qwen2-MoE", "shared expert of its own width"
    ),
    Architecture("olmoe", "olmoe", "allenai/OLMoE-1B-7B-0924", "OLMoE", width_key="intermediate_size"),
    Architecture(
        "mixtral",
        "llama",
        "mistralai/Mixtral-8x7B-v0.1",
        "Mixtral",
        renamed=(("mlp.", "block_sparse_moe."),),
        single="block_sparse_moe.experts",
        gate="w1",
        up="w3",
        down="w2",
        width_key="intermediate_size",
        count_key="num_local_experts",
        norm_topk=True,
        expert_order=W_ORDER,
    ),
    Architecture(
        "deepseek_v2",
        "deepseek2",
        "deepseek-ai/DeepSeek-V2-Lite",
        "DeepSeek-V2-Lite",
        "latent attention, shared experts, dense first layers",
        count_key="n_routed_experts",
        shared_tied=True,
        norm_topk=False,
        converted=KV_B,
        refused=(
            (
                "topk_method",
                "group_limited_greedy",
                "llama.cpp scores the groups of such a router in another way than DeepSeek-V2 does; DeepSeek-V2-Lite has none",
            ),
        ),
    ),
    Architecture(
        "deepseek_v3",
        "deepseek2",
        "deepseek-ai/DeepSeek-V3",
        "DeepSeek-V3, R1",
        "latent attention, sigmoid router with groups and a bias that only chooses, shared expert, dense first layers",
        router_rows=BIASED,
        count_key="n_routed_experts",
        shared_tied=True,
        predictors="skipped",
        converted=KV_B,
    ),
    Architecture(
        "glm4_moe",
        "glm4moe",
        "zai-org/GLM-4.5-Air",
        "GLM-4.5, GLM-4.5-Air",
        "sigmoid router with a bias that only chooses, shared expert, dense first layers; MTP layers stay whole",
        router_rows=BIASED,
        count_key="n_routed_experts",
        shared_tied=True,
        predictors="kept",
    ),
    Architecture(
        "gpt_oss",
        "gpt-oss",
        "openai/gpt-oss-20b",
        "gpt-oss",
        "experts with biases and a clamped gate, transposed and interleaved, read from MXFP4 too; attention sinks",
        router="mlp.router",
        router_rows=("mlp.router.weight", "mlp.router.bias"),
        transposed=True,
        interleaved=True,
        expert_bias=True,
        width_key="intermediate_size",
        count_key="num_local_experts",
        norm_topk=True,
        converted=(Converted("self_attn.sinks", "renamed", ("self_attn.sinks.weight",)),),
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        "Granite-MoE",
        "gate and up in one stack",
        **GRANITE,
    ),
    Architecture(
        "granitemoeshared",
        "granitemoe",
        "ibm-research/moe-7b-1b-active-shared-experts",
        "Granite-MoE with a shared expert",
        "gate and up in one stack, shared expert of its own width",
        **GRANITE,
    ),
    Architecture(
        "granitemoehybrid",
        "granitehybrid",
        "ibm-granite/granite-4.0-h-tiny",
        "Granite-4 hybrid",
        "Mamba-2 layers between attention, gate and up in one stack, shared expert of its own width",
        **GRANITE_HYBRID,
    ),
    Architecture(
        "qwen3_next",
        "qwen3next",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "Qwen3-Next",
        "linear attention in three of four layers, gated shared expert; MTP layers stay whole",
        predictors="kept",
        predictor_names=QWEN_MTP,
        converted=(
            Converted("linear_attn.in_proj_qkvz.weight", "qkvz"),
            Converted("linear_attn.conv1d.weight", "squeezed"),
            Converted("linear_attn.dt_bias", "renamed", ("linear_attn.dt_proj.bias",)),
        ),
    ),
    Architecture(
        "ernie4_5_moe",
        "ernie4_5-moe",
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "ERNIE-4.5",
        "softmax router with a bias that only chooses, shared experts, dense first layers",
        router_rows=("mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias"),
        renamed=(("mlp.gate.moe_statics.", "mlp.moe_statics."),),
        unused=(r"model\.mtp_",),
        count_key="moe_num_experts",
        top_k_key="moe_k",
        norm_topk=True,
        expert_order=("gate", "up", "down"),
    ),
    Architecture(
        "lfm2_moe",
        "lfm2moe",
        "LiquidAI/LFM2-8B-A1B",
        "LFM2-MoE",
        "short convolutions between attention, sigmoid router with a bias that only chooses, dense first layers",
        experts="feed_forward.experts",
        router="feed_forward.gate",
        router_rows=("feed_forward.gate.weight", "feed_forward.expert_bias"),
        single="feed_forward.experts",
        gate="w1",
        up="w3",
        down="w2",
        heads_by_layer=True,
        expert_order=W_ORDER,
        converted=(
            Converted("conv.conv.weight", "squeezed"),
            Converted("feed_forward.expert_bias", "renamed", ("feed_forward.expert_bias.bias",)),
        ),
    ),
    Architecture(
        "qwen3_5_moe",
        "qwen35moe",
        "Qwen/Qwen3.5-35B-A3B",
        "Qwen3.5-MoE",
        "text part of a model with images; linear attention in three of four layers; MTP layers stay whole",
        also=("qwen3_5_moe_text",),
        outside=("model.", "model.language_model."),
        unused=(r"model\.visual\.",),
        predictors="kept",
        predictor_names=QWEN_MTP,
        norm_topk=True,
        converted=(
            Converted("linear_attn.conv1d.weight", "squeezed"),
            Converted("linear_attn.dt_bias", "renamed", ("linear_attn.dt_proj.bias",)),
            Converted("linear_attn.out_proj.weight", "tiled_heads"),
        ),
    ),
    Architecture(
        "dots1",
        "dots1",
        "rednote-hilab/dots.llm1.inst",
        "dots.llm1",
        "sigmoid router with a bias that only chooses, shared experts, dense first layers",
        router_rows=BIASED,
        count_key="n_routed_experts",
        shared_tied=True,
    ),
    Architecture(
        "minimax_m2",
        "minimax-m2",
        "MiniMaxAI/MiniMax-M2",
        "MiniMax-M2",
        "sigmoid router with a bias that only chooses",
        router_rows=("mlp.gate.weight", "mlp.e_score_correction_bias"),
        renamed=(("mlp.", "block_sparse_moe."),),
        single="block_sparse_moe.experts",
        gate="w1",
        up="w3",
        down="w2",
        width_key="intermediate_size",
        count_key="num_local_experts",
        norm_topk=True,
        expert_order=W_ORDER,
    ),
    Architecture(
        "exaone_moe",
        "exaone-moe",
        "LGAI-EXAONE/K-EXAONE-236B-A23B",
        "K-EXAONE",
        "sigmoid router with a bias that only chooses, shared expert, dense first layers",
        router_rows=BIASED,
        renamed=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
    ),
)


# Families that were tried and have no row, and why.
LEFT_OUT = {
    "phimoe": "llama.cpp computes another function: RMS norms for its layer norms, one softmax for its SparseMixer",
    "llama4": "its experts are not told which of them were chosen, and get inputs that the router has weighted",
    "llama4_text": "its experts are not told which of them were chosen, and get inputs that the router has weighted",
    "hunyuan_v1_moe": "its converter reads lists with a value for every layer from config.json, which nothing here does",
}


def tied_in(gguf_arch: str) -> tuple[str, ...]:
    """`Architecture.tied` of the families that are called `gguf_arch` in a GGUF; of an unknown one all that can be tied."""
    rows = [row for row in ARCHITECTURES if row.gguf_arch == gguf_arch]
    return tuple(end for end in (SHARED, DENSE) if not rows or any(end in row.tied for row in rows))


def for_model_type(model_type: str) -> Architecture:
    """The row for config.json's `model_type`. Raises GgufToolError for one that has no row."""
    known = {name: row for row in ARCHITECTURES for name in (row.model_type, *row.also)}
    if model_type in known:
        return known[model_type]
    if model_type in LEFT_OUT:
        raise GgufToolError(f"the architecture {model_type} is left out: {LEFT_OUT[model_type]}")
    near = get_close_matches(model_type, known, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise GgufToolError(
        f"no MoE architecture {model_type!r} is known{hint}; known are {', '.join(sorted(known))}; it lacks a row in "
        "gguftool/architectures.py, where the docstring says how to add one"
    )
