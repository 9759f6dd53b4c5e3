"""The types that `assign` gives, against llama-quantize itself and against numbers worked out by hand."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguftool.encoding import (
    TARGETS,
    MixFacts,
    alignment,
    assign,
    expert_types,
    file_type_name,
    fit,
    needs_imatrix,
    parse_target,
    quantizable,
    stock_name,
)
from gguftool.errors import GgufToolError
from gguftool.tensors import BLOCKS, TensorSpec
from synthetic import make_stats


def layer_tensors(i: int, d: int, ff: int, experts: int, shared: bool = False, qkv: bool = False) -> list[TensorSpec]:
    """One decoder layer; only row lengths matter to the mix, so the other dimensions are 2."""
    names = {"attn_qkv": d} if qkv else {"attn_q": d, "attn_k": d, "attn_v": d}
    names["attn_output"] = d
    tensors = [TensorSpec(f"blk.{i}.{name}.weight", (row, 2), "F16") for name, row in names.items()]
    tensors += [TensorSpec(f"blk.{i}.attn_norm.weight", (d,), "F32"), TensorSpec(f"blk.{i}.attn_q.bias", (d,), "F32")]
    stack = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    for kind, row in (("gate", d), ("up", d), ("down", ff)):
        tensors.append(TensorSpec(f"blk.{i}.ffn_{kind}{suffix}.weight", (row, 2, *stack), "F16"))
        if shared:
            tensors.append(TensorSpec(f"blk.{i}.ffn_{kind}_shexp.weight", (row, 2), "F16"))
    if experts:
        tensors.append(TensorSpec(f"blk.{i}.ffn_gate_inp.weight", (d, experts), "F32"))
    return tensors


def model_tensors(n_layer: int, d: int, ff: int, experts: int, tied: bool = False, **kind: bool) -> list[TensorSpec]:
    """A whole model's tensors, in the converter's order (by layer number, so blk.10 after blk.9)."""
    tensors = [TensorSpec("token_embd.weight", (d, 8), "F16"), TensorSpec("output_norm.weight", (d,), "F32")]
    if not tied:
        tensors.append(TensorSpec("output.weight", (d, 8), "F16"))
    for i in range(n_layer):
        tensors += layer_tensors(i, d, ff, experts, **kind)
    return tensors


def write_gguf(path: Path, tensors: list[TensorSpec], arch: str, facts: MixFacts, **kvs: int) -> None:
    """A file of zeros with these tensors: enough for llama-quantize, which looks at hyperparameters and shapes only."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(facts.n_layer)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(8)
    writer.add_head_count_kv(8 // facts.n_gqa)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(32)
    if facts.n_expert:
        writer.add_expert_count(facts.n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(256)
        writer.add_expert_shared_feed_forward_length(256)
    for spec in tensors:
        writer.add_tensor(spec.name, np.zeros(spec.ne[::-1], np.float16 if spec.type == "F16" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix(path: Path) -> None:
    """An importance matrix for no tensor of the model: its presence alone changes the mix."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("none.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("none.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_LINE = re.compile(r"\] (\S+) +- \[.*type = +(\w+),.*MiB(?: ->.*\((\w+)\))?$", re.M)


def chosen_by_llama(tool: Path, model: Path, target: str, imatrix: Path | None) -> dict[str, str]:
    """Tensor -> type, from llama-quantize's dry run (its real run goes through the same code)."""
    options = ["--imatrix", str(imatrix)] if imatrix else []
    command = [str(tool), *options, "--dry-run", str(model), target]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # A fallback's warning stands before its tensor's line, so only lines of the main loop match.
    return {name: (new or old).upper() for name, old, new in _LINE.findall(run.stdout + run.stderr)}


MODELS: dict[str, tuple[str, MixFacts, dict[str, Any]]] = {
    "qwen3moe": ("qwen3moe", MixFacts("qwen3moe", 48, 64, 8), {"d": 256, "ff": 256, "experts": 64}),
    "few layers": ("qwen3moe", MixFacts("qwen3moe", 5, 16, 2), {"d": 256, "ff": 256, "experts": 16, "tied": True}),
    "shared expert": (
        "qwen2moe",
        MixFacts("qwen2moe", 24, 60, 1),
        {"d": 256, "ff": 256, "experts": 60, "shared": True},
    ),
    "8 experts": ("llama", MixFacts("llama", 32, 8, 4), {"d": 256, "ff": 512, "experts": 8}),
    "8 experts of 80 layers": ("llama", MixFacts("llama", 80, 8, 8), {"d": 256, "ff": 256, "experts": 8}),
    "dense": ("llama", MixFacts("llama", 20, 0, 1), {"d": 256, "ff": 256, "experts": 0}),
    "dense 70B": ("llama", MixFacts("llama", 80, 0, 8), {"d": 256, "ff": 256, "experts": 0}),
    "fused qkv": ("llama", MixFacts("llama", 16, 4, 4), {"d": 256, "ff": 256, "experts": 4, "qkv": True}),
    "odd width": ("qwen3moe", MixFacts("qwen3moe", 16, 64, 4), {"d": 256, "ff": 96, "experts": 64}),
    "odd residual": ("qwen3moe", MixFacts("qwen3moe", 16, 64, 4), {"d": 320, "ff": 256, "experts": 64, "tied": True}),
    "not of 32": ("qwen3moe", MixFacts("qwen3moe", 16, 64, 4), {"d": 272, "ff": 48, "experts": 64}),
}


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["blind", "imatrix"])
@pytest.mark.parametrize("model", MODELS)
def test_every_target_equals_llama_quantize(model: str, with_imatrix: bool, runtime: Any, tmp_path: Path) -> None:
    arch, facts, shape = MODELS[model]
    facts = MixFacts(facts.gguf_arch, facts.n_layer, facts.n_expert, facts.n_gqa, has_imatrix=with_imatrix)
    tensors = model_tensors(facts.n_layer, **shape)
    write_gguf(tmp_path / "model.gguf", tensors, arch, facts)
    imatrix = tmp_path / "imatrix.gguf" if with_imatrix else None
    if imatrix:
        write_imatrix(imatrix)
    for target in TARGETS:
        theirs = chosen_by_llama(runtime.tool("llama-quantize"), tmp_path / "model.gguf", target, imatrix)
        ours = {spec.name: spec.type for spec in assign(tensors, target, facts)}
        assert ours == theirs, target


def split_into_tiers(tensors: list[TensorSpec], widths: tuple[int, ...]) -> list[TensorSpec]:
    """The same model with its stacks of experts cut into tiers of these widths, and tier maps."""
    out = []
    for spec in tensors:
        head = spec.name.removesuffix("_exps.weight")
        if head == spec.name:
            out.append(spec)
            continue
        is_down = head.endswith("ffn_down")
        for tier, width in enumerate(widths):
            ne = (width, spec.ne[1], 1) if is_down else (spec.ne[0], width, 1)
            out.append(TensorSpec(f"{head}_exps.{tier}.weight", ne, spec.type))
        if is_down:
            layer = head.removesuffix(".ffn_down")
            out.append(TensorSpec(f"{layer}.ffn_exps_tier.weight", (64, len(widths)), "I32"))
    return out


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", ["qwen3moe", "shared expert", "8 experts"])
def test_tiers_get_the_type_of_their_stack(model: str, target: str) -> None:
    _, facts, shape = MODELS[model]
    stock = model_tensors(facts.n_layer, **shape)
    by_name = {spec.name: spec.type for spec in assign(stock, target, facts)}
    for spec in assign(split_into_tiers(stock, (512, 256)), target, facts):
        expected = "I32" if spec.name.endswith("ffn_exps_tier.weight") else by_name[stock_name(spec.name)]
        assert spec.type == expected, spec.name


def test_narrow_tiers_take_the_twin_and_not_the_fallback() -> None:
    facts = MixFacts("qwen3moe", 48, 64, 8)
    tiers = split_into_tiers(model_tensors(48, 256, 256, 64), (256, 96, 40))
    types = {spec.name: spec.type for spec in assign(tiers, "Q4_K_M", facts)}
    down = "blk.{}.ffn_down_exps.{}.weight".format
    assert [types[down(0, tier)] for tier in range(3)] == ["Q6_K", "Q8_0", "F16"]
    assert [types[down(6, tier)] for tier in range(3)] == ["Q4_K", "IQ4_NL", "F16"]
    assert types["blk.6.ffn_up_exps.1.weight"] == "Q4_K"  # rows of gate and up are n_embd long, whatever the width
    types = {spec.name: spec.type for spec in assign(tiers, "Q5_K_S", facts)}
    assert types[down(0, 1)] == "Q5_0"
    types = {spec.name: spec.type for spec in assign(tiers, "Q2_K", facts)}
    assert types[down(0, 1)] == "IQ4_NL"


def test_a_pruned_file_with_stock_names_takes_twins_only_when_told() -> None:
    stack = [TensorSpec("blk.6.ffn_down_exps.weight", (96, 256, 64), "BF16")]
    plain = MixFacts("qwen3moe", 48, 64, 8)
    assert assign(stack, "Q4_K_M", plain)[0].type == "Q5_0"
    assert assign(stack, "Q4_K_M", MixFacts("qwen3moe", 48, 64, 8, twins=True))[0].type == "IQ4_NL"


def test_twins_of_the_same_size() -> None:
    def bits(name: str) -> float:
        return 8 * BLOCKS[name][1] / BLOCKS[name][0]

    assert bits(fit("Q4_K", 32, True)) == bits("Q4_K") == 4.5
    assert bits(fit("Q5_K", 32, True)) == bits("Q5_K") == 5.5
    assert (bits(fit("Q6_K", 32, True)), bits("Q6_K")) == (8.5, 6.5625)
    assert fit("Q4_K", 100, True) == "F16" and fit("Q8_0", 100, False) == "F16" and fit("BF16", 7, True) == "BF16"


def test_the_alignment_of_single_layers() -> None:
    tensors = model_tensors(48, 256, 256, 64)
    layers = expert_types(tensors, "Q4_K_M", MixFacts("qwen3moe", 48, 64, 8))
    assert sorted(layers) == list(range(48))
    assert (layers[0].down, layers[6].down) == ("Q6_K", "Q4_K") and layers[6].gate == layers[6].up == "Q4_K"
    assert (layers[0].alignment, layers[6].alignment) == (256, 32)


@pytest.mark.parametrize(
    ("target", "multiple"),
    [("F16", 32), ("Q8_0", 32), ("Q4_0", 32), ("Q4_K_M", 32), ("Q4_K_S", 32), ("Q5_K_M", 32), ("Q3_K_M", 32),
     ("Q6_K", 256), ("Q2_K", 256), ("Q3_K_S", 256), ("MXFP4_MOE", 32), ("IQ2_M", 256)],
)  # fmt: skip
def test_alignment(target: str, multiple: int) -> None:
    assert alignment(target) == multiple


def test_names_of_targets() -> None:
    assert parse_target("q4_k").name == "Q4_K_M"
    assert parse_target("bf16").file_type == 32
    assert file_type_name(15) == "Q4_K_M"
    assert file_type_name(999) == "file type 999"
    with pytest.raises(GgufToolError, match="Q4_K_M"):
        parse_target("Q4_KM")


def test_what_is_never_quantized() -> None:
    kept = [
        TensorSpec("blk.0.ffn_gate_inp.weight", (256, 64), "F32"),
        TensorSpec("blk.0.ffn_exps_tier.weight", (64, 2), "I32"),
        TensorSpec("blk.0.attn_q_norm.weight", (128, 2), "F32"),
        TensorSpec("blk.0.ffn_down_exps.bias", (256, 64), "F32"),
        TensorSpec("output_norm.weight", (256,), "F32"),
    ]
    assert not any(map(quantizable, kept))
    assert list(assign(kept, "Q4_K_M", MixFacts("qwen3moe", 1, 64, 8))) == kept


def test_which_types_need_an_imatrix() -> None:
    facts = MixFacts("qwen3moe", 48, 64, 8)
    tensors = model_tensors(48, 256, 256, 64)
    assert needs_imatrix(assign(tensors, "Q4_K_M", facts), "Q4_K_M") == []
    assert needs_imatrix(assign(tensors, "Q2_K", facts), "Q2_K") == []
    assert "blk.9.ffn_up_exps.weight" in needs_imatrix(assign(tensors, "Q2_K_S", facts), "Q2_K_S")
    assert "token_embd.weight" not in needs_imatrix(assign(tensors, "IQ2_XS", facts), "IQ2_XS")


def test_a_layer_that_the_model_does_not_have() -> None:
    stack = [TensorSpec("blk.9.ffn_down_exps.weight", (256, 256, 64), "BF16")]
    with pytest.raises(GgufToolError, match="4 layers"):
        assign(stack, "Q4_K_M", MixFacts("qwen3moe", 4, 64, 8))


def test_facts_of_a_model() -> None:
    """Its query heads per key-value head, or, in stats of an older gguftool, what the rows of layer 0 say of them."""
    tensors = (
        TensorSpec("blk.0.attn_q.weight", (256, 512), "F16"),
        TensorSpec("blk.0.attn_k.weight", (256, 128), "F16"),
    )
    old = replace(make_stats(4, 16).model, tensors=tensors)
    assert old.n_gqa is None and MixFacts.of_model(old) == MixFacts("qwen3moe", 4, 16, 4)
    for n_gqa in (0, 8):
        known = MixFacts.of_model(replace(old, n_gqa=n_gqa), has_imatrix=True)
        assert known == MixFacts("qwen3moe", 4, 16, n_gqa, has_imatrix=True)
    assert MixFacts.of_model(replace(old, pruned=True)).twins
