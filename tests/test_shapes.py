"""Every shape that experts come in: a tiered file on the patched runtime is its padded twin on an unpatched one.

Nine architectures from tiny random models, through llama.cpp's own converter: shared experts and dense layers, biases,
scales, groups of experts, gate and up in one stack, several gating functions and activations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType as V

from gguftool import cut
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.gguf_file import GgufFile, KeyValue, write_gguf
from gguftool.inspection import check, inspect
from gguftool.plan import PrunePlan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.tensors import TensorSpec
from gguftool.writer import prune
from llama_tools import perplexity, run
from models import sample_text
from synthetic import make_plan
from test_oracles import BOUND, difference, logits
from tiny_archs import ARCHS, N_EMBD, N_FF, TOP_K, edit, mask, never_pick, tiny_ggufs

TOKENS = np.random.default_rng(5).integers(1, 300, 96)


@pytest.fixture(scope="session")
def bases(tmp_path_factory, runtime) -> dict[str, Path]:
    """Every architecture as F32 GGUF."""
    return tiny_ggufs(tmp_path_factory.mktemp("archs"), tuple(ARCHS), runtime)


def plan_of(name: str, base: Path, widths: list[list[int]], gone: dict[int, list[int]] | None = None) -> PrunePlan:
    """A plan with these widths [layers][experts] for the experts that are not `gone`, and random neurons."""
    arch = ARCHS[name]
    router = [[e for e in range(arch.n_expert) if e not in (gone or {}).get(layer, ())] for layer in arch.layers]
    own = [[row[e] for e in kept] for row, kept in zip(widths, router, strict=True)]
    return make_plan(
        own, N_FF, TOP_K, arch=GgufFile(base).arch, layers=arch.layers, router=router, n_expert=arch.n_expert
    )


def even_widths(name: str) -> list[list[int]]:
    """Whole K-quant blocks: four widths with 0, two widths, and a layer that keeps everything."""
    return _for_arch(name, [[768, 512, 512, 256, 0, 256], [256, 256, 768, 256, 768, 256], [768] * 6])


def odd_widths(name: str) -> list[list[int]]:
    """Widths that no block and no kernel likes: one neuron, primes, one short of all."""
    return _for_arch(name, [[1, 767, 33, 768, 0, 33], [500, 7, 500, 500, 7, 96], [64, 64, 64, 64, 31, 64]])


def _for_arch(name: str, layers: list[list[int]]) -> list[list[int]]:
    return [[*row, *row[1:3]][: ARCHS[name].n_expert] for row in layers][: len(ARCHS[name].layers)]


@pytest.mark.parametrize("name", ARCHS)
def test_tiers_are_their_padded_twin(name, bases, runtime, plain_runtime, tmp_path):
    """In F32, Q8_0 and Q4_K: the same blocks, narrow and padded."""
    base = bases[name]
    tools = QuantizeTool(runtime.tool("llama-quantize"), threads=2)
    tiered, padded = [tmp_path / "F32.gguf"], []
    prune(base, plan_of(name, base, even_widths(name)), tiered[0])
    for target in ("Q8_0", "Q4_K_S"):
        tiered.append(tmp_path / f"{target}.gguf")
        quantize(tiered[0], target, tiered[-1], tools=tools)
    for path in tiered:
        assert check(inspect(GgufFile(path))) == []
        padded.append(path.with_suffix(".padded"))
        assert expand(path, padded[-1]) == []
        assert check(inspect(GgufFile(padded[-1]))) == []
    downs = [t for t in GgufFile(tiered[-1]).tensors if re.search(r"ffn_down_exps.*weight", t.name)]
    assert all(re.fullmatch("Q[456]_K", t.type) for t in downs)
    # Windows of their own: where a last bit rounds an activation to another 8-bit step, that ends with the window.
    tokens = TOKENS.reshape(8, 12)
    ours = logits(runtime, tokens, tmp_path, *tiered, n_batch=12)
    *theirs, whole = logits(plain_runtime, tokens, tmp_path, *padded, base, n_batch=12)
    for path, a, b in zip(tiered, ours, theirs, strict=True):
        apart = np.abs(a - b).max(axis=1) / np.abs(b).max()
        assert apart.max() < (BOUND if path.stem == "F32" else 5e-2), path.stem
        assert np.median(apart) < BOUND / 10, path.stem
        # A model that says the same whatever it reads, or whatever was pruned, would pass too.
        assert a.std(axis=0).mean() > 0.3 * a.std()
        assert difference(a, whole) > 0.1


@pytest.mark.parametrize("name", ARCHS)
def test_layers_that_keep_fewer_experts(name, bases, runtime, plain_runtime, tmp_path):
    """Against the base itself, in which neurons that are gone are zeros and no token picks the experts that are gone."""
    arch, base = ARCHS[name], bases[name]
    last = [] if arch.groups > 1 else [0, 4, 5]
    gone = {arch.layers[0]: [1, 6] if arch.groups > 1 else [1], arch.layers[-1]: last}
    plan = plan_of(name, base, odd_widths(name), gone)
    prune(base, plan, tmp_path / "tiered.gguf")
    assert check(inspect(GgufFile(tmp_path / "tiered.gguf"))) == []
    masked = mask(base, tmp_path / "masked.gguf", plan)
    twin = never_pick(masked, tmp_path / "twin.gguf", gone)
    (ours,) = logits(runtime, TOKENS, tmp_path, tmp_path / "tiered.gguf", n_batch=40)
    theirs, *others = logits(plain_runtime, TOKENS, tmp_path, twin, masked, base, n_batch=40)
    assert difference(ours, theirs) < BOUND
    assert all(difference(other, theirs) > 50 * BOUND for other in others)  # both masks do something
    with pytest.raises(GgufToolError, match="stock file cannot hold layers with different numbers of experts"):
        expand(tmp_path / "tiered.gguf", tmp_path / "no.gguf")


def test_scales_of_experts(bases, runtime, plain_runtime, tmp_path):
    """llama.cpp multiplies the output of an expert's projections by `scale`, where a file has it."""
    name, roles = "qwen3moe", ("up", "gate", "down")
    rng = np.random.default_rng(6)
    scales = [(f"blk.{i}.ffn_{role}_exps.scale", rng.uniform(0.2, 5, 6)) for i in range(3) for role in roles]
    base = edit(bases[name], tmp_path / "base.gguf", lambda _spec, _values: None, scales)
    prune(base, plan_of(name, base, odd_widths(name)), tmp_path / "tiered.gguf")
    assert check(inspect(GgufFile(tmp_path / "tiered.gguf"))) == []
    expand(tmp_path / "tiered.gguf", tmp_path / "padded.gguf")
    plain = edit(
        tmp_path / "padded.gguf", tmp_path / "ones.gguf",
        lambda spec, values: np.ones_like(values) if spec.name.endswith(".scale") else None,
    )  # fmt: skip
    (ours,) = logits(runtime, TOKENS, tmp_path, tmp_path / "tiered.gguf", n_batch=40)
    padded, unscaled = logits(plain_runtime, TOKENS, tmp_path, tmp_path / "padded.gguf", plain, n_batch=40)
    assert difference(ours, padded) < BOUND
    assert difference(unscaled, padded) > 50 * BOUND


@pytest.mark.parametrize("name", ["deepseek2", "glm4moe", "qwen2moe"])
def test_equally_narrow_experts_beside_shared_ones(name, bases, runtime, plain_runtime, tmp_path):
    """Where llama.cpp sizes the shared expert like the others, a file of equally narrow experts must be tiered."""
    base, arch = bases[name], ARCHS[name]
    plan = plan_of(name, base, [[512] * arch.n_expert for _ in arch.layers])
    report = prune(base, plan, tmp_path / "pruned.gguf")
    assert report.layout == ("stock" if name == "qwen2moe" else "tiered")
    stock = tmp_path / "pruned.gguf"
    if report.layout == "tiered":
        stock = tmp_path / "stock.gguf"
        expand(tmp_path / "pruned.gguf", stock)
        wish = replace(plan, recipe=replace(plan.recipe, layout="stock"))
        with pytest.raises(GgufToolError, match=r"ffn_\w+_shexp.*leave --layout stock out"):
            prune(base, wish, tmp_path / "no.gguf")
        with pytest.raises(GgufToolError, match=r"counts on a stock file, in which blk.1.ffn_\w+_shexp.weight"):
            prune(base, replace(plan, layout="stock"), tmp_path / "no.gguf")
    (ours,) = logits(runtime, TOKENS[:32], tmp_path, tmp_path / "pruned.gguf")
    padded, whole = logits(plain_runtime, TOKENS[:32], tmp_path, stock, base)
    assert difference(ours, padded) < BOUND
    assert difference(ours, whole) > 50 * BOUND


@pytest.mark.parametrize("fewer", [False, True])
def test_layers_of_multi_token_prediction_stay_whole(fewer, bases, runtime, plain_runtime, tmp_path):
    name = "glm4moe"
    base = with_predictor(bases[name], tmp_path / "base.gguf")
    gone = {1: [2], 2: [5]} if fewer else {}
    plan = plan_of(name, base, [[N_FF] * 6] * 2 if fewer else odd_widths(name), gone)
    assert prune(base, plan, tmp_path / "pruned.gguf").layout == "tiered"
    file, original = GgufFile(tmp_path / "pruned.gguf"), GgufFile(base)
    assert check(inspect(file)) == []
    whole = [spec for spec in file.tensors if spec.name.startswith("blk.3.")]
    assert len(whole) > 15
    assert all(np.array_equal(file.raw(spec), original.raw(spec)) for spec in whole)
    (ours,) = logits(runtime, TOKENS, tmp_path, tmp_path / "pruned.gguf", n_batch=40)
    if fewer:
        with pytest.raises(GgufToolError, match="layer 3 has all 6 experts and the others 5"):
            expand(tmp_path / "pruned.gguf", tmp_path / "no.gguf")
        stock = never_pick(base, tmp_path / "stock.gguf", gone)
    else:
        stock = tmp_path / "stock.gguf"
        expand(tmp_path / "pruned.gguf", stock)
    theirs, unpruned = logits(plain_runtime, TOKENS, tmp_path, stock, base, n_batch=40)
    assert difference(ours, theirs) < BOUND
    assert difference(ours, unpruned) > 50 * BOUND


def with_predictor(base: Path, out: Path) -> Path:
    """glm4moe with a layer 3 that predicts one more token: a copy of layer 2 and two projections of its own."""
    file = GgufFile(base)
    more = [
        (spec.name.replace("blk.2.", "blk.3."), file.raw(spec).view(np.float32))
        for spec in file.tensors
        if spec.name.startswith("blk.2.")
    ]
    more += [(f"blk.3.nextn.{norm}.weight", np.ones(N_EMBD)) for norm in ("enorm", "hnorm")]
    more.append(("blk.3.nextn.eh_proj.weight", np.ones((N_EMBD, 2 * N_EMBD))))
    keys = {f"{file.arch}.{key}": KeyValue(n, V.UINT32) for key, n in (("block_count", 4), ("nextn_predict_layers", 1))}
    return edit(base, out, lambda _spec, _values: None, more, keys)


# --- adapters and warm-up, by llama-perplexity --------------------------------------------------------------------


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(400))
    return path


WINDOWS = ("-c", 64, "--chunks", 4)


def write_adapter(path: Path, parts: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Path:
    """A LoRA adapter for qwen3moe: (tensor, A [..., rank, inputs], B [..., outputs, rank])."""
    values = {f"{name}.lora_{which}": m for name, *pair in parts for which, m in zip("ab", pair, strict=True)}
    specs = [TensorSpec(name, matrix.shape[::-1], "F32") for name, matrix in values.items()]
    entries = {
        "general.type": KeyValue("adapter", V.STRING),
        "adapter.type": KeyValue("lora", V.STRING),
        "adapter.lora.alpha": KeyValue(4.0, V.FLOAT32),
    }
    write_gguf(path, "qwen3moe", entries, specs, lambda s: np.ascontiguousarray(values[s.name], "<f4").view(np.uint8))
    return path


def random_pair(*shape: int, rank: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A and B of an adapter for [..., outputs, inputs]."""
    *stack, outputs, inputs = shape
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*stack, rank, inputs)) * 0.5, rng.standard_normal((*stack, outputs, rank)) * 0.5


@pytest.fixture
def twins(bases, tmp_path) -> tuple[Path, Path]:
    """A tiered qwen3moe and its padded twin."""
    base = bases["qwen3moe"]
    prune(base, plan_of("qwen3moe", base, even_widths("qwen3moe")), tmp_path / "tiered.gguf")
    expand(tmp_path / "tiered.gguf", tmp_path / "padded.gguf")
    return tmp_path / "tiered.gguf", tmp_path / "padded.gguf"


def test_an_adapter_of_the_attention_works(twins, runtime, text, tmp_path):
    parts = [(f"blk.{i}.attn_output.weight", *random_pair(N_EMBD, N_EMBD, seed=i)) for i in range(3)]
    adapter = write_adapter(tmp_path / "lora.gguf", parts)
    plain = [perplexity(runtime, model, text, *WINDOWS) for model in twins]
    adapted = [perplexity(runtime, model, text, *WINDOWS, "--lora", adapter) for model in twins]
    assert plain[0] == pytest.approx(plain[1], rel=1e-4) and adapted[0] == pytest.approx(adapted[1], rel=1e-4)
    assert abs(adapted[0] / plain[0] - 1) > 2e-3


def test_an_adapter_of_a_tier_works_and_one_of_the_stock_stack_is_refused(twins, runtime, text, tmp_path):
    tiered, padded = twins
    file = GgufFile(tiered)
    tier = next(t for t in file.tensors if t.name == "blk.0.ffn_up_exps.1.weight")
    a, b = random_pair(tier.ne[2], tier.ne[1], tier.ne[0])
    all_a, all_b = np.zeros((6, *a.shape[1:])), np.zeros((6, N_FF, b.shape[2]))
    for expert, index in enumerate(cut.read_tier_map(file, 0)[1]):
        if index >= 0:
            all_a[expert], all_b[expert, : tier.ne[1]] = a[index], b[index]
    ours = write_adapter(tmp_path / "tier.gguf", [(tier.name, 3 * a, 3 * b)])
    theirs = write_adapter(tmp_path / "stock.gguf", [("blk.0.ffn_up_exps.weight", 3 * all_a, 3 * all_b)])
    adapted = perplexity(runtime, tiered, text, *WINDOWS, "--lora", ours)
    assert adapted == pytest.approx(perplexity(runtime, padded, text, *WINDOWS, "--lora", theirs), rel=1e-4)
    assert abs(adapted / perplexity(runtime, tiered, text, *WINDOWS) - 1) > 2e-3
    # llama-perplexity prints from a thread of its own, and on a busy machine may be gone before that has begun.
    for _ in range(5):
        code, output = run(runtime, "llama-perplexity", "-m", tiered, "-f", text, *WINDOWS, "--lora", theirs)
        assert code == 1
        if output:
            break
    assert "LoRA tensor 'blk.0.ffn_up_exps.weight' does not exist in base model" in output


def test_warm_up_with_fewer_experts_in_some_layers(bases, runtime, text, tmp_path):
    """Warm-up runs all experts of the model, and these layers have fewer."""
    base, path = bases["qwen3moe"], tmp_path / "tiered.gguf"
    prune(base, plan_of("qwen3moe", base, odd_widths("qwen3moe"), {0: [1, 2], 2: [0]}), path)
    warm = perplexity(runtime, path, text, *WINDOWS, "--warmup")
    assert warm == perplexity(runtime, path, text, *WINDOWS, "--no-warmup")
    assert warm != perplexity(runtime, base, text, *WINDOWS)
