"""A tiny random checkpoint of every row of `architectures`, with the tensors and the names of the real one on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models import tiny_tokenizer

Tensors = dict[str, torch.Tensor]
N_EMBD, N_FF = 64, 64

COMMON: dict[str, Any] = {
    "hidden_size": N_EMBD, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "initializer_range": 0.12,
    "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
NARROW = {"moe_intermediate_size": N_FF, "intermediate_size": 96}
DENSE_FIRST = NARROW | {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEPSEEK = DENSE_FIRST | {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
LOCAL = {"num_local_experts": 6, "intermediate_size": N_FF}
GRANITE = LOCAL | {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "num_experts": 6, "shared_expert_intermediate_size": 32, "head_dim": 32,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4, "num_key_value_heads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """One family.

    Attributes:
        sizes: config.json beyond COMMON. stored: names that real checkpoints of the family have, as far as they differ
            from transformers' own or could.
        rewrite: (tensors, config.json) -> what real checkpoints have besides, or have otherwise, in place.
        gone: experts that are dropped in the test that drops some, by MoE layer; `groups` of experts have to stay equal.
    """

    sizes: dict[str, Any]
    stored: tuple[str, ...]
    rewrite: Callable[[Tensors, dict[str, Any]], None] = field(default=lambda _tensors, _config: None)
    model_type: str = ""
    gone: tuple[tuple[int, ...], ...] = ((1,), (0, 4), (3,), (2, 5))


def _predictor_behind_the_last(tensors: Tensors, config: dict[str, Any]) -> None:
    """DeepSeek's and GLM's layer of multi-token prediction: a decoder layer with embedding, norms, a projection, a head."""
    last = config["num_hidden_layers"]
    prefix, own = f"model.layers.{last - 1}.", f"model.layers.{last}."
    tensors |= {own + name.removeprefix(prefix): v.clone() for name, v in tensors.items() if name.startswith(prefix)}
    n = N_EMBD
    tensors |= {f"{own}{name}.weight": torch.ones(n) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{own}eh_proj.weight"] = torch.randn(n, 2 * n)
    tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    config["num_nextn_predict_layers"] = 1


def _qwen_predictor(tensors: Tensors, config: dict[str, Any]) -> None:
    prefix = f"model.layers.{config['num_hidden_layers'] - 1}."
    tensors |= {
        f"mtp.layers.0.{name.removeprefix(prefix)}": v.clone() for name, v in tensors.items() if name.startswith(prefix)
    }
    names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    tensors |= {f"mtp.{name}.weight": torch.ones(N_EMBD) for name in names}
    tensors["mtp.fc.weight"] = torch.randn(N_EMBD, 2 * N_EMBD)


def _part_of_a_model_with_images(tensors: Tensors, config: dict[str, Any]) -> None:
    """Qwen3.5: stacked experts, the text under `language_model`, and tensors for images."""
    _stack(tensors, config)
    _qwen_predictor(tensors, config)
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[f"model.language_model.{name.removeprefix('model.')}"] = tensors.pop(name)
    tensors["model.visual.blocks.0.attn.proj.weight"] = torch.ones(4, 4)
    text = dict(config) | {"model_type": "qwen3_5_moe_text", "mtp_num_hidden_layers": 1}
    config.clear()
    config |= {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": text,
    }
    config["tie_word_embeddings"] = False


def _hybrid_names(_: Tensors, config: dict[str, Any]) -> None:
    """transformers 5 writes other words than the hub's files have."""
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layer_types"] = [words[word] for word in config["layer_types"]]


def _stack(tensors: Tensors, config: dict[str, Any]) -> None:
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}.mlp.experts"
        single = [
            [tensors.pop(f"{path}.{e}.{role}_proj.weight") for role in ("gate", "up", "down")]
            for e in range(config["num_experts"])
        ]
        tensors[f"{path}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in single])
        tensors[f"{path}.down_proj"] = torch.stack([down for _, _, down in single])


TINY: dict[str, Tiny] = {
    "qwen3_moe": Tiny(
        NARROW | {"head_dim": 32, "num_experts": 6, "norm_topk_prob": True},
        ("model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.gate.weight"),
    ),
    "qwen2_moe": Tiny(
        NARROW | {"num_experts": 6, "shared_expert_intermediate_size": 32, "norm_topk_prob": False},
        ("model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.shared_expert_gate.weight"),
    ),
    "olmoe": Tiny(
        {"num_experts": 6, "intermediate_size": N_FF, "num_key_value_heads": 4, "norm_topk_prob": False},
        ("model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.gate.weight"),
    ),
    "mixtral": Tiny(
        LOCAL | {"head_dim": 32},
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ),
    "deepseek_v2": Tiny(
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "q_lora_rank": None, "scoring_func": "softmax",
                    "num_hidden_layers": 27, "norm_topk_prob": False},
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.gate.weight",
            "model.layers.1.mlp.shared_experts.gate_proj.weight", "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.self_attn.q_proj.weight",
        ),
    ),
    "deepseek_v3": Tiny(
        DEEPSEEK | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "norm_topk_prob": True,
                    "routed_scaling_factor": 1.5, "scoring_func": "sigmoid"},
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
            "model.layers.0.self_attn.q_a_layernorm.weight", "model.layers.3.eh_proj.weight",
        ),
        _predictor_behind_the_last,
        gone=((1, 6), (0, 7)),
    ),
    "glm4_moe": Tiny(
        DENSE_FIRST | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "head_dim": 32, "routed_scaling_factor": 1.5,
                       "use_qk_norm": True, "attention_bias": True},
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
            "model.layers.0.self_attn.q_norm.weight", "model.layers.3.shared_head.head.weight",
        ),
        _predictor_behind_the_last,
    ),
    "gpt_oss": Tiny(
        LOCAL | {"head_dim": 32, "sliding_window": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        (
            "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj_bias",
            "model.layers.0.mlp.router.bias", "model.layers.0.self_attn.sinks",
        ),
    ),
    "granitemoe": Tiny(
        GRANITE,
        (
            "model.layers.0.block_sparse_moe.input_linear.weight", "model.layers.0.block_sparse_moe.output_linear.weight",
            "model.layers.0.block_sparse_moe.router.layer.weight",
        ),
    ),
    "granitemoeshared": Tiny(
        GRANITE | {"shared_intermediate_size": 32},
        ("model.layers.0.block_sparse_moe.input_linear.weight", "model.layers.0.shared_mlp.input_linear.weight"),
    ),
    "granitemoehybrid": Tiny(
        GRANITE | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
                   "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "position_embedding_type": "nope"},
        (
            "model.layers.0.block_sparse_moe.input_linear.weight", "model.layers.0.mamba.in_proj.weight",
            "model.layers.0.shared_mlp.input_linear.weight",
        ),
        _hybrid_names,
    ),
    "qwen3_next": Tiny(
        LINEAR | NARROW | {"norm_topk_prob": True},
        (
            "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight",
            "model.layers.0.mlp.shared_expert_gate.weight", "mtp.layers.0.mlp.experts.5.up_proj.weight",
        ),
        _qwen_predictor,
    ),
    "ernie4_5_moe": Tiny(
        NARROW | {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
                  "moe_layer_end_index": 2, "moe_layer_interval": 1, "intermediate_size": 128},
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.moe_statics.e_score_correction_bias",
            "model.layers.1.mlp.shared_experts.gate_proj.weight", "model.layers.1.mlp.gate.weight",
        ),
    ),
    "lfm2_moe": Tiny(
        NARROW | {"num_experts": 6, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
                  "conv_L_cache": 3, "use_expert_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True},
        (
            "model.layers.1.feed_forward.experts.0.w1.weight", "model.layers.1.feed_forward.expert_bias",
            "model.layers.1.feed_forward.gate.weight", "model.layers.0.conv.conv.weight", "model.embedding_norm.weight",
        ),
    ),
    "qwen3_5_moe": Tiny(
        LINEAR | {"moe_intermediate_size": N_FF},
        (
            "model.language_model.layers.0.mlp.experts.gate_up_proj", "model.language_model.layers.0.mlp.gate.weight",
            "model.language_model.layers.0.linear_attn.in_proj_qkv.weight", "mtp.layers.0.mlp.experts.down_proj",
            "lm_head.weight",
        ),
        _part_of_a_model_with_images,
        "qwen3_5_moe_text",
    ),
    "dots1": Tiny(
        DENSE_FIRST | {"head_dim": 32, "num_key_value_heads": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
                       "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid"},
        ("model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ),
    "minimax_m2": Tiny(
        LOCAL | {"head_dim": 32, "rotary_dim": 32, "scoring_func": "sigmoid"},
        (
            "model.layers.0.block_sparse_moe.experts.0.w1.weight",
            "model.layers.0.block_sparse_moe.e_score_correction_bias", "model.layers.0.block_sparse_moe.gate.weight",
        ),
    ),
    "exaone_moe": Tiny(
        NARROW | {"num_experts": 6, "num_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32,
                  "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid"},
        ("model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.e_score_correction_bias"),
    ),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A seeded float32 causal LM: uneven routing, biases and norms that are not all alike."""
    tiny = TINY[name]
    tokens = {"vocab_size": len(tiny_tokenizer())}
    config = AutoConfig.for_model(tiny.model_type or name, **(COMMON | tokens | tiny.sizes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, value in model.state_dict().items():
            if path.endswith(("gate.weight", "router.weight", "wg.weight")):
                value *= torch.linspace(1.0, 5.0, value.shape[0])[:, None]
            elif path.endswith(("e_score_correction_bias", "expert_bias")):
                value += 0.1 * torch.rand_like(value)
            elif "bias" in path or value.ndim == 1:
                value += 0.1 * torch.randn_like(value)
    return model


def tiny_checkpoint(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the checkpoint with a tokenizer and returns its directory."""
    tiny_model(name).to(dtype).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    TINY[name].rewrite(tensors, config)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    tiny_tokenizer().save_pretrained(directory)
    return directory
