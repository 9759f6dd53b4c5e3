"""Tiny seeded MoE checkpoints with a real tokenizer, written as Hugging Face directories."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other cost more than they bring

MODEL_TYPES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")
END_OF_TEXT = "<|endoftext|>"
# qwen2's pre-tokenizer, so that the converter may be told `qwen2`.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "the expert routes a token to its narrow tier and every wider one keeps more neurons than memory allows while "
    "pruning by bytes removes what nobody reads def return import for in while class value = 0 1 2 ( ) + - naïve 语言"
)
WORDS = TEXT.split()

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 8, "num_experts": 6, "moe_intermediate_size": 32, "intermediate_size": 48,
                  "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 32, "intermediate_size": 48,
                  "shared_expert_intermediate_size": 24, "norm_topk_prob": False},
    "olmoe": {"num_experts": 6, "intermediate_size": 32, "num_key_value_heads": 4, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 6, "intermediate_size": 32, "head_dim": 8},
    "qwen3": {"intermediate_size": 48, "head_dim": 8},  # dense
}  # fmt: skip


def sample_text(words: int, seed: int = 0) -> str:
    """Seeded words in lines, the same everywhere."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice("    \n") for _ in range(words))


def tiny_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `sample_text`, with an end-of-text token and no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sample_text(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def tiny_model(model_type: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A seeded float32 causal LM whose routing is uneven: router rows have different lengths and a common direction."""
    tokens = {"vocab_size": 320, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    fields = COMMON | SIZES[model_type] | tokens
    config = AutoConfig.for_model(model_type, **(fields | sizes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter *= torch.linspace(1.0, 6.0, parameter.shape[0])[:, None]
            elif parameter.ndim == 1:  # norms and biases: not all ones or zeros
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny_checkpoint(
    directory: Path, model_type: str = "qwen3_moe", *, dtype: str = "bfloat16", shard: str = "10GB",
    stacked: bool = False, seed: int = 0, **sizes: Any,
) -> Path:  # fmt: skip
    """Writes a checkpoint with a tokenizer and returns its directory.

    `shard` is the largest size of a file ("20KB" makes several), `stacked` keeps experts in 3-D stacks as transformers 5
    has them in memory, `sizes` override config.json.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_model(model_type, seed, vocab_size=len(tokenizer), **sizes).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=shard, save_original_format=not stacked)
    tokenizer.save_pretrained(directory)
    return directory
