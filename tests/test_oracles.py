"""The oracles: masked torch = tiered file on the patched runtime = padded file on an unpatched one.

Logits are compared as the largest difference over the largest logit; 1e-3 is the bound for F32 weights.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguftool import cut, surgery
from gguftool.checkpoint import open_checkpoint
from gguftool.corpus import load_domain
from gguftool.expand import expand
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe import Recipe
from gguftool.writer import prune
from synthetic import make_plan as random_plan

BOUND = 1e-3


def logits(runtime, tokens, folder: Path, *models: Path, n_batch: int = 256) -> list[np.ndarray]:
    """Logits of `models` under `runtime`, each [tokens, vocabulary]."""
    np.save(folder / "tokens.npy", tokens)
    outs = [folder / f"{index}.npy" for index in range(len(models))]
    pairs = [str(part) for pair in zip(models, outs, strict=True) for part in pair]
    script = Path(__file__).with_name("dump_logits.py")
    command = [sys.executable, str(script), str(runtime.lib_dir), str(folder / "tokens.npy"), str(n_batch), *pairs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(out) for out in outs]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def tokens(checkpoint_dir, eval_text):
    return load_domain(eval_text, open_checkpoint(checkpoint_dir).tokenizer(), 256, 1)[1][0]


def masked_logits(checkpoint_dir, plan: PrunePlan, tokens) -> np.ndarray:
    """Logits of the torch model with everything masked that the plan prunes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    retained = {}
    for layer in plan.layers:
        rows = dict(zip(layer.router, layer.retained, strict=True))
        retained[layer.index] = [rows.get(e, np.arange(0)) for e in range(plan.n_expert)]
    surgery.mask_model(model, retained, {layer.index: layer.router for layer in plan.layers})
    with torch.no_grad():
        return model(torch.tensor(tokens[None])).logits[0].numpy()


@pytest.mark.parametrize("method", ["global", "tenp", "reap", "random-slices"])
def test_masked_torch_is_tiered_is_padded(
    method, stats, checkpoint_dir, base_f32, tokens, runtime, plain_runtime, tmp_path
):
    plan = make_plan(stats, Recipe(method, 0.4))
    prune(base_f32, plan, tmp_path / "pruned.gguf")
    assert check(inspect(GgufFile(tmp_path / "pruned.gguf"))) == []
    reference = masked_logits(checkpoint_dir, plan, tokens)
    (pruned,) = logits(runtime, tokens, tmp_path, tmp_path / "pruned.gguf")
    assert difference(pruned, reference) < BOUND
    top = np.sort(reference, axis=1)
    clear = top[:, -1] - top[:, -2] > 2 * BOUND * np.abs(reference).max()
    assert clear.mean() > 0.9 and np.array_equal(pruned.argmax(1)[clear], reference.argmax(1)[clear])
    stock = tmp_path / "pruned.gguf"
    if not plan.uniform:
        stock = tmp_path / "stock.gguf"
        expand(tmp_path / "pruned.gguf", stock)
    (padded,) = logits(plain_runtime, tokens, tmp_path, stock)
    assert difference(padded, reference) < BOUND


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_widths_run_as_the_masked_model(
    data, stats, checkpoint_dir, base_f32, tokens, runtime, plain_runtime, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("property")
    facts = stats.model
    align = data.draw(st.sampled_from([1, 8, 16, 32]))
    choice = st.integers(0, facts.n_ff_exp // align).map(lambda step: step * align)
    row = st.lists(choice, min_size=facts.n_expert, max_size=facts.n_expert).filter(any)
    equal = st.sampled_from([align, facts.n_ff_exp]).map(lambda width: [width] * facts.n_expert)
    widths = [data.draw(st.one_of(row, equal)) for _ in facts.moe_layers]
    plan = random_plan(widths, facts.n_ff_exp, facts.n_expert_used, seed=data.draw(st.integers(0, 99)))
    layers = tuple(replace(p, index=i) for p, i in zip(plan.layers, facts.moe_layers, strict=True))
    plan = replace(plan, layers=layers, model_fingerprint=facts.fingerprint)
    prune(base_f32, plan, folder / "pruned.gguf")
    (pruned,) = logits(
        runtime, tokens[:64], folder, folder / "pruned.gguf", n_batch=data.draw(st.sampled_from([1, 5, 64]))
    )
    assert difference(pruned, masked_logits(checkpoint_dir, plan, tokens[:64])) < BOUND
    if plan.kept_share < 1:
        assert [list(layer.widths) for layer in cut.read(GgufFile(folder / "pruned.gguf")).layers] == widths


@pytest.mark.parametrize("target", ["Q8_0", "Q4_K_M", "IQ4_NL", "Q6_K", "Q2_K"])
def test_quantized_tiers_are_their_padded_twin(target, stats, base_gguf, tokens, runtime, plain_runtime, tmp_path):
    """The same quantized blocks, narrow on the patched runtime and padded on a plain one."""
    plan = make_plan(stats, Recipe("global", 0.4, target=target))
    prune(base_gguf, plan, tmp_path / "pruned.gguf")
    quantize(
        tmp_path / "pruned.gguf",
        target,
        tmp_path / "q.gguf",
        imatrix=stats,
        tools=QuantizeTool(runtime.tool("llama-quantize")),
    )
    assert {t.name: t for t in GgufFile(tmp_path / "q.gguf").tensors} == {t.name: t for t in plan.encoded}
    notes = expand(tmp_path / "q.gguf", tmp_path / "stock.gguf")
    (tiered,) = logits(runtime, tokens, tmp_path, tmp_path / "q.gguf")
    (padded,) = logits(plain_runtime, tokens, tmp_path, tmp_path / "stock.gguf")
    # A layer whose tiers have two types is padded as F32; only there do the activations keep more bits.
    assert difference(tiered, padded) < (2e-2 if notes else BOUND)


def test_stock_files_are_bit_identical_with_and_without_the_patches(
    base_gguf, tokens, runtime, plain_runtime, stats, tmp_path
):
    quantize(
        base_gguf, "Q4_K_M", tmp_path / "q4.gguf", imatrix=stats, tools=QuantizeTool(runtime.tool("llama-quantize"))
    )
    for model in (base_gguf, tmp_path / "q4.gguf"):
        for n_batch in (1, 256):
            (ours,) = logits(runtime, tokens[:128], tmp_path, model, n_batch=n_batch)
            (plain,) = logits(plain_runtime, tokens[:128], tmp_path, model, n_batch=n_batch)
            assert np.array_equal(ours, plain)


def test_layers_with_different_numbers_of_experts_run(stats, checkpoint_dir, base_f32, tokens, runtime, tmp_path):
    facts = stats.model
    rng = np.random.default_rng(3)
    router = [
        sorted(rng.permutation(facts.n_expert)[: facts.n_expert - 2 * i].tolist()) for i in range(len(facts.moe_layers))
    ]
    widths = [[facts.n_ff_exp] * len(own) for own in router]
    plan = random_plan(
        widths, facts.n_ff_exp, facts.n_expert_used, layers=facts.moe_layers, router=router, n_expert=facts.n_expert
    )
    plan = replace(plan, model_fingerprint=facts.fingerprint)
    prune(base_f32, plan, tmp_path / "pruned.gguf")
    (pruned,) = logits(runtime, tokens, tmp_path, tmp_path / "pruned.gguf")
    assert difference(pruned, masked_logits(checkpoint_dir, plan, tokens)) < BOUND


def test_a_tiered_file_without_our_patches_is_refused_with_the_command(stats, base_gguf, tmp_path, monkeypatch):
    from gguftool import runtime as runtime_module
    from gguftool.errors import GgufToolError

    prune(base_gguf, make_plan(stats, Recipe("global", 0.4)), tmp_path / "pruned.gguf")
    monkeypatch.setattr(runtime_module, "find", lambda _backend: None)
    with pytest.raises(GgufToolError, match="gguftool runtime build"):
        runtime_module.load_for("auto", base_gguf, tmp_path / "pruned.gguf")


def test_op_tests_of_the_patches_pass(runtime):
    """id -1 in every CPU path (plain, tiled, repacked), against a reference in double."""
    done = subprocess.run([runtime.tool("test-moe-skip")], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


@pytest.mark.parametrize(("operation", "least"), [("MUL_MAT_ID_SKIP", 300), ("ADD_ID_SKIP", 10)])
def test_backend_ops_of_the_patches_pass(runtime, operation, least):
    done = subprocess.run(
        [runtime.tool("test-backend-ops"), "test", "-b", "CPU", "-o", operation], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert done.stdout.count("OK") > least


def test_llama_cpp_python_writes_text_with_a_tiered_file(stats, base_gguf, llama, tmp_path):
    prune(base_gguf, make_plan(stats, Recipe("global", 0.4)), tmp_path / "pruned.gguf")
    widths = {width for _, width in inspect(GgufFile(tmp_path / "pruned.gguf")).layers[0].experts}
    assert len(widths) > 1
    model = llama.Llama(model_path=str(tmp_path / "pruned.gguf"), n_ctx=128, n_threads=2, verbose=False)
    answer = model("import os\n\ndef main(", max_tokens=24, temperature=0.0)
    assert answer["usage"]["completion_tokens"] > 8 and answer["choices"][0]["text"].strip()
    model.close()
