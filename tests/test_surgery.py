"""Pruning a loaded model and slicing arrays."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gguftool.errors import GgufToolError
from gguftool.surgery import mask_model
from models import MODEL_TYPES, tiny_model

ALL = np.arange(32)


def tokens():
    return torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def moe(model, layer=1):
    block = model.model.layers[layer].mlp
    return block.experts, block.gate


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_keeping_all_changes_nothing(model_type):
    model = tiny_model(model_type)
    before = logits(model)
    mask_model(model, {layer: [ALL] * 6 for layer in range(3)}, {layer: range(6) for layer in range(3)})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_masked_neurons_add_nothing(model_type):
    """Masking is the same as a smaller expert: the experts' output is computed anew from the neurons that stay."""
    model = tiny_model(model_type)
    experts, _ = moe(model)
    original = copy.deepcopy(experts)
    kept = [np.sort(np.random.default_rng(e).permutation(32)[: 6 * e]) for e in range(6)]  # widths 0, 6, ... 30
    mask_model(model, {1: kept})
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    chosen = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:2] for t in range(40)])
    weights = torch.rand(40, 2, generator=torch.Generator().manual_seed(3))
    want = torch.zeros(40, 32)
    for token in range(40):
        for slot in range(2):
            expert = int(chosen[token, slot])
            rows = torch.as_tensor(kept[expert])
            gate_up, down = original.gate_up_proj[expert], original.down_proj[expert]
            h = original.act_fn(gate_up[rows] @ x[token]) * (gate_up[32 + rows] @ x[token])
            want[token] += weights[token, slot] * (down[:, rows] @ h)
    with torch.no_grad():
        assert torch.allclose(experts(x, chosen, weights), want, atol=1e-5)
    assert not experts.down_proj[0].any()
    assert int((experts.down_proj[3].abs().sum(0) > 0).sum()) == 18
    assert int((experts.gate_up_proj[3].abs().sum(1) > 0).sum()) == 36


def test_neurons_without_a_down_column_go_without_a_trace():
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for layer in range(3):
            moe(model, layer)[0].down_proj[:, :, 20:] = 0
    before = logits(model)
    mask_model(model, {layer: [ALL[:20]] * 6 for layer in range(3)})
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_dropped_experts_leave_the_router_to_the_survivors(model_type):
    """The same as a router that gives the dropped experts a logit of -inf before its softmax."""
    model = tiny_model(model_type)
    kept = [0, 2, 3, 5]
    reference = copy.deepcopy(model)
    _, gate = moe(reference)

    def forward(hidden):
        scores = hidden.reshape(-1, 32) @ gate.weight.T
        scores[:, [1, 4]] = -torch.inf
        top, chosen = torch.topk(scores.softmax(-1), 2, dim=-1)
        if getattr(gate, "norm_topk_prob", True):
            top = top / top.sum(-1, keepdim=True)
        return scores, top, chosen

    gate.forward = forward
    before = logits(model)
    mask_model(model, {}, {1: kept})
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_what_cannot_be_masked_is_said():
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    with pytest.raises(GgufToolError, match=r"layer 0: the model has no mlp.experts there"):
        mask_model(model, {0: [ALL] * 6})
    with pytest.raises(GgufToolError, match="neurons of 5 experts are given, the layer has 6"):
        mask_model(model, {1: [ALL] * 5})
    for wrong in ([0, 32], [-1, 3], [3, 3], [4, 2]):
        with pytest.raises(GgufToolError, match="layer 1, expert 5: the neurons are no ascending indices below 32"):
            mask_model(model, {1: [*[ALL] * 5, np.array(wrong)]})
    with pytest.raises(GgufToolError, match="1 experts would remain but 2 are routed per token"):
        mask_model(model, {}, {1: [3]})
    for wrong in ([0, 6], [-1, 3], [3, 3], [4, 2]):
        with pytest.raises(GgufToolError, match="no ascending indices below 6"):
            mask_model(model, {}, {1: wrong})
