"""What a router without renormalisation does after a drop, by hand and on whole models."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.convert import convert
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.inventory import model_facts
from gguftool.overrides import Overrides
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.refit import can_refit, refit
from gguftool.router_fix import RouterFix
from gguftool.stats import Domain
from gguftool.surgery import mask_model
from gguftool.writer import prune
from models import tiny_checkpoint
from synthetic import make_stats
from test_oracles import BOUND, difference, logits

# Logits of the token 1: shares 0.5, 0.3, 0.2; of the token -1: 6/31, 10/31, 15/31.
ROUTER = torch.tensor([[log(5)], [log(3)], [log(2)]])


def test_by_hand():
    fix = RouterFix(ROUTER, (0, 1), 0)
    fix.add(
        torch.tensor([[1.0], [-1.0]]), torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0.5, 0.3], [15 / 31, 10 / 31]])
    )
    scales = fix.scales()
    # Without expert 2 the shares are 5/8 and 3/8, then 3/8 and 5/8.
    assert scales[0] == pytest.approx(0.8)
    assert scales[1] == pytest.approx((0.3 * 0.375 + 10 / 31 * 0.625) / (0.375**2 + 0.625**2))
    assert set(scales) == {0, 1}


def test_who_was_never_chosen_stays_as_it_is():
    fix = RouterFix(ROUTER, (0, 1), 0)
    fix.add(torch.tensor([[1.0]]), torch.tensor([[0]]), torch.tensor([[0.5]]))
    assert fix.scales() == {0: pytest.approx(0.8)}


def test_a_router_that_is_no_plain_softmax_is_refused():
    fix = RouterFix(ROUTER, (0, 1), 7)
    with pytest.raises(GgufToolError, match="layer 7: the router's weights are no plain softmax"):
        fix.add(torch.tensor([[1.0]]), torch.tensor([[0, 1]]), torch.tensor([[0.625, 0.375]]))


def domains(vocab: int = 320):
    ids = np.random.default_rng(1).integers(0, vocab, (6, 32))
    return [(Domain("random", "sha", ids.size), ids)]


@pytest.fixture(scope="module", params=["qwen2_moe", "olmoe"])
def dropped(request, tmp_path_factory):
    """A checkpoint without renormalisation, a plan that drops a third of its experts, and the fix."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(tiny_checkpoint(folder / "model", request.param, dtype="float32"))
    stats = calibrate(checkpoint, domains(checkpoint.n_vocab), folder / "calibrate")
    plan = make_plan(stats, Recipe("random", 1 / 3, seed=2))
    refit(checkpoint, plan, domains(checkpoint.n_vocab), folder / "work").save(folder / "w.safetensors")
    assert not (folder / "work").exists()
    return checkpoint, plan, Overrides.load(folder / "w.safetensors")


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)


@torch.no_grad()
def test_the_scales_are_those_of_the_whole_model(dropped):
    checkpoint, plan, weights = dropped
    model, (_, ids) = load(checkpoint), domains(checkpoint.n_vocab)[0]
    seen: dict[int, tuple] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, index=index: seen.setdefault(index, out))
    model(torch.tensor(ids))
    for layer in plan.layers:
        logits, gates, chosen = seen[layer.index]
        after = torch.zeros_like(logits)
        after[:, list(layer.router)] = logits[:, list(layer.router)].softmax(dim=1)
        for expert in layer.router:
            tokens, slots = torch.nonzero(chosen == expert, as_tuple=True)
            have = weights.get(layer.index, expert, "down")
            if not len(tokens):
                assert have is None
                continue
            g, grown = gates[tokens, slots], after[tokens, expert]
            scale = float((g * grown).sum() / grown.square().sum())
            assert 0 < scale < 1
            down = model.model.layers[layer.index].mlp.experts.down_proj[expert]
            assert np.allclose(have, scale * down.numpy(), rtol=1e-3, atol=1e-6)
    assert {role for _, _, role in weights.keys()} == {"down"} and len(weights) > 8


@torch.no_grad()
def pruned_model(checkpoint, plan, weights):
    """The torch model without the dropped experts; with `weights` in place of its down projections."""
    model = load(checkpoint)
    every = [np.arange(plan.n_ff_exp)] * plan.n_expert
    mask_model(model, {p.index: every for p in plan.layers}, {p.index: p.router for p in plan.layers})
    for layer, expert, role in weights.keys() if weights is not None else ():
        row = next(p for p in plan.layers if p.index == layer).router.index(expert)
        new = torch.from_numpy(weights.get(layer, expert, role))
        model.model.layers[layer].mlp.experts.down_proj[row].copy_(new)
    return model


@torch.no_grad()
def test_the_fix_brings_the_model_nearer_to_the_original(dropped):
    checkpoint, plan, weights = dropped
    ids = torch.tensor(np.random.default_rng(9).integers(0, checkpoint.n_vocab, (4, 32)))
    want = load(checkpoint)(ids).logits
    plain, fixed = (
        float((pruned_model(checkpoint, plan, own)(ids).logits - want).square().mean()) for own in (None, weights)
    )
    assert fixed < 0.95 * plain


@torch.no_grad()
def test_the_file_is_the_torch_model_with_the_fix(dropped, runtime, plain_runtime, tmp_path):
    """llama.cpp's router does not make the weights add up to 1 either."""
    checkpoint, plan, weights = dropped
    convert(checkpoint.path, tmp_path / "base.gguf", runtime, pre_tokenizer="qwen2", outtype="f32")
    prune(tmp_path / "base.gguf", plan, tmp_path / "fixed.gguf", overrides=weights)
    assert GgufFile(tmp_path / "fixed.gguf").value("gguftool.weights") == "refit"
    ids = domains(checkpoint.n_vocab)[0][1][0]
    want = pruned_model(checkpoint, plan, weights)(torch.tensor(ids[None])).logits[0].numpy()
    for engine in (runtime, plain_runtime):
        (have,) = logits(engine, ids, tmp_path, tmp_path / "fixed.gguf")
        assert difference(have, want) < BOUND


def test_a_layer_that_is_narrowed_and_loses_experts_gets_both(dropped, tmp_path):
    checkpoint, plan, weights = dropped
    narrow = tuple(replace(p, retained=(np.arange(16), *p.retained[1:])) for p in plan.layers)
    whole_router = tuple(
        replace(p, router=tuple(range(6)), retained=tuple(np.arange(16 if e == p.router[0] else 32) for e in range(6)))
        for p in plan.layers
    )
    texts = domains(checkpoint.n_vocab)
    both = refit(checkpoint, replace(plan, layers=narrow), texts, tmp_path / "both")
    only = refit(checkpoint, replace(plan, layers=whole_router), texts, tmp_path / "only")
    assert set(both.keys()) == set(weights.keys()) | {(p.index, p.router[0], "down") for p in plan.layers}
    down = checkpoint.expert(plan.layers[0].index, plan.layers[0].router[0])["down"].numpy()
    for layer in plan.layers:
        key = (layer.index, layer.router[0], "down")
        scaled = weights.get(*key)
        down = checkpoint.expert(layer.index, layer.router[0])["down"].float().numpy()
        scale = 1.0 if scaled is None else float((scaled * down).sum() / (down * down).sum())
        assert np.allclose(both.get(*key), scale * only.get(*key), rtol=1e-4, atol=1e-6)
        assert np.allclose(
            both.get(layer.index, layer.router[1], "down"), weights.get(layer.index, layer.router[1], "down")
        )


def test_renormalised_models_have_nothing_to_refit_after_a_drop(tmp_path):
    stats = make_stats(n_layer=3, n_expert=6, n_ff=32, n_embd=32)
    for model_type, sizes in (("qwen3_moe", {}), ("mixtral", {}), ("qwen2_moe", {"norm_topk_prob": True})):
        checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / model_type, model_type, **sizes))
        facts = model_facts(checkpoint)
        assert checkpoint.norm_topk and facts.norm_topk
        plan = make_plan(replace(stats, model=facts), Recipe("random", 1 / 3))
        assert not can_refit(checkpoint, plan)
        with pytest.raises(GgufToolError, match="nothing to refit"):
            refit(checkpoint, plan, domains(checkpoint.n_vocab), tmp_path / "work")
    assert not open_checkpoint(tiny_checkpoint(tmp_path / "olmoe", "olmoe")).norm_topk
