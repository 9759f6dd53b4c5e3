"""Stats and plans made of seeded random numbers, for tests that need no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gguftool.plan import LayerPlan, PrunePlan
from gguftool.recipe import Recipe
from gguftool.stats import EXPERT_SUMS, NEURON_SUMS, CalibrationStats, Domain, ModelFacts
from gguftool.tensors import TensorSpec


def tensors(n_layer: int, n_expert: int, n_ff: int, n_embd: int, kind: str = "BF16") -> tuple[TensorSpec, ...]:
    """The tensors of a small qwen3moe-like file."""
    specs = [TensorSpec("token_embd.weight", (n_embd, 100), kind), TensorSpec("output_norm.weight", (n_embd,), "F32")]
    for i in range(n_layer):
        specs += [
            TensorSpec(f"blk.{i}.attn_q.weight", (n_embd, n_embd), kind),
            TensorSpec(f"blk.{i}.attn_k.weight", (n_embd, n_embd // 2), kind),
            TensorSpec(f"blk.{i}.ffn_gate_inp.weight", (n_embd, n_expert), "F32"),
            TensorSpec(f"blk.{i}.ffn_gate_exps.weight", (n_embd, n_ff, n_expert), kind),
            TensorSpec(f"blk.{i}.ffn_up_exps.weight", (n_embd, n_ff, n_expert), kind),
            TensorSpec(f"blk.{i}.ffn_down_exps.weight", (n_ff, n_embd, n_expert), kind),
        ]
    return tuple(specs)


def make_stats(
    n_layer: int = 3,
    n_expert: int = 8,
    n_ff: int = 64,
    n_embd: int = 32,
    top_k: int = 2,
    seed: int = 0,
    tokens: int = 400,
) -> CalibrationStats:
    """Stats in which every number is random but possible."""
    rng = np.random.default_rng(seed)
    shape = (1, n_layer, n_expert)
    experts = {name: rng.random(shape) * 10 for name in EXPERT_SUMS}
    share = rng.dirichlet(np.ones(n_expert), n_layer)
    count = np.floor(share * tokens * top_k)
    count[:, 0] += tokens * top_k - count.sum(axis=1)
    experts["count"] = count[None]
    neurons = {name: rng.random((n_layer, n_expert, n_ff)) for name in (*NEURON_SUMS, "down_norm_sq")}
    facts = ModelFacts(
        name="synthetic", fingerprint="f" * 64, model_type="qwen3_moe", gguf_arch="qwen3moe", block_count=n_layer,
        moe_layers=tuple(range(n_layer)), n_expert=n_expert, n_expert_used=top_k, n_ff_exp=n_ff, n_embd=n_embd,
        n_vocab=100, tensors=tensors(n_layer, n_expert, n_ff, n_embd),
    )  # fmt: skip
    return CalibrationStats(
        facts, (Domain("text", "0" * 64, tokens),), 512, experts, neurons, rng.random((n_layer, n_expert, n_embd))
    )


def make_plan(
    widths: Sequence[Sequence[int]], n_ff: int, top_k: int, *, arch: str = "qwen3moe", layers: Sequence[int] | None = None,
    router: Sequence[Sequence[int]] | None = None, n_expert: int | None = None, seed: int = 0,
) -> PrunePlan:  # fmt: skip
    """A plan that keeps random neurons at the given widths, [layers][router rows]."""
    rng = np.random.default_rng(seed)
    made = []
    for row, (index, own) in enumerate(zip(layers or range(len(widths)), widths, strict=True)):
        retained = tuple(np.sort(rng.permutation(n_ff)[:width]).astype(np.int64) for width in own)
        made.append(LayerPlan(index, tuple(router[row]) if router else tuple(range(len(own))), retained))
    ratio = 0.5
    return PrunePlan(
        Recipe("random-slices", ratio), "by hand", "synthetic", "f" * 64, arch, None, (),
        n_expert or len(widths[0]), top_k, n_ff, tuple(made),
    )  # fmt: skip
