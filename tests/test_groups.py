"""Routers that pick from groups of experts: every group loses the same number."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from gguftool.checkpoint import open_checkpoint
from gguftool.errors import GgufToolError
from gguftool.inventory import model_facts
from gguftool.methods import METHODS, drop_experts, leave_router
from gguftool.plan import LayerPlan
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.stats import CalibrationStats, _model_facts
from gguftool.tensors import TensorSpec
from models import tiny_checkpoint
from synthetic import make_stats


def test_every_group_loses_the_same_number():
    stats = make_stats(n_layer=1)
    stats = replace(stats, model=replace(stats.model, n_group=2, n_group_used=1))
    stats.experts["max_out"][:] = 1.0
    saliency = np.arange(8.0)[None]
    layers, notes = drop_experts(stats, saliency, Recipe("man", 0.5))
    assert layers[0].router == (2, 3, 6, 7) and not notes
    layers, _ = drop_experts(stats, saliency, Recipe("man", 0.25))
    assert layers[0].router == (1, 2, 3, 5, 6, 7)
    stats.experts["max_out"][0, 0, 0] = 50.0
    layers, notes = drop_experts(stats, saliency, Recipe("man", 0.5))
    assert layers[0].router == (0, 3, 6, 7) and "expert 2 goes instead" in notes[0]
    for name in (name for name, how in METHODS.items() if how.stock and name != "enp"):
        router = make_plan(stats, Recipe(name, 0.25)).layers[0].router
        assert np.bincount([expert // 4 for expert in router]).tolist() == [3, 3]
    with pytest.raises(GgufToolError, match="1 of 4 experts would remain in each of the router's 2 groups"):
        drop_experts(stats, saliency, Recipe("man", 0.75))
    odd = replace(stats, model=replace(stats.model, n_group=3))
    with pytest.raises(GgufToolError, match="8 experts do not divide into the router's 3 groups"):
        drop_experts(odd, saliency, Recipe("man", 0.25))


def layer_of(*widths: int) -> LayerPlan:
    return LayerPlan(0, tuple(range(len(widths))), tuple(np.arange(width) for width in widths))


def test_experts_without_a_neuron_leave_every_group_alike():
    facts = replace(make_stats().model, n_group=2, n_group_used=1)  # 2 of 8 experts
    for widths, groups, router in (
        ((0, 0, 5, 0, 3, 0, 4, 2), 2, (0, 1, 2, 4, 6, 7)),  # three of the second group have neurons
        ((0, 0, 5, 0, 0, 0, 0, 3), 2, (0, 2, 4, 7)),  # two are needed to rate a group by
        ((0, 0, 5, 0, 3, 0, 4, 2), 1, (2, 4, 6, 7)),
        ((0, 0, 5, 0, 0, 0, 0, 0), 1, (0, 2)),
    ):
        left = leave_router(layer_of(*widths), replace(facts, n_group=groups))
        assert left.router == router and left.widths == tuple(widths[expert] for expert in router)
    with pytest.raises(GgufToolError, match="8 experts do not divide into the router's 3 groups"):
        leave_router(layer_of(*[8] * 8), replace(facts, n_group=3))
    stats = make_stats()
    stats.neurons["gate_sq_h_sq"][0, :6] *= 1e-9  # in layer 0 the first group is worth nothing
    stats.neurons["gate_sq_h_sq"][1, 5:] *= 1e-9
    plan = make_plan(replace(stats, model=facts), Recipe("global", 0.7, align=8, cut_router=True))
    counts = [np.bincount([expert // 4 for expert in layer.router]).tolist() for layer in plan.layers]
    assert all(first == second for first, second in counts) and counts[0] == [2, 2]
    stays = sum(width == 0 for layer in plan.layers for width in layer.widths)
    assert stays > 0 and any(f"leave the router, {stays} stay: each of its 2 groups" in note for note in plan.notes)


def test_a_router_with_a_table_of_experts_keeps_all_of_them():
    """Refused when the plan is made, and so before the first dear step."""
    stats, name = make_stats(), "blk.0.ffn_gate_tid2eid.weight"
    table = TensorSpec(name, (2, 100), "I32")
    stats = replace(stats, model=replace(stats.model, tensors=(*stats.model.tensors, table)))
    for recipe in (Recipe("global", 0.4, align=8), Recipe("enp", 0.5, align=8), Recipe("reap", 0.0)):
        assert table in make_plan(stats, recipe).tensors
    with pytest.raises(GgufToolError, match=f"{name} routes tokens by a table of expert ids: no expert can be dropped"):
        make_plan(stats, Recipe("reap", 0.25))
    with pytest.raises(GgufToolError, match=f"--cut-router: {name} routes tokens by a table"):
        make_plan(CalibrationStats.blank(stats.model), Recipe("global", 0.1, align=8, cut_router=True))


def test_the_facts_of_the_router(tmp_path):
    plain = model_facts(open_checkpoint(tiny_checkpoint(tmp_path / "plain")))
    assert (plain.n_group, plain.n_group_used, plain.norm_topk) == (1, 1, True)
    groups = model_facts(open_checkpoint(tiny_checkpoint(tmp_path / "groups", n_group=3, topk_group=2)))
    assert (groups.n_group, groups.n_group_used) == (3, 2)
    assert (plain.tied, plain.n_gqa) == ((), 2) and _model_facts(asdict(plain)) == plain
    new = ("n_group", "n_group_used", "norm_topk", "n_predict", "tied", "n_gqa", "pruned")
    old = {name: value for name, value in asdict(plain).items() if name not in new}
    assert _model_facts(old) == replace(plain, norm_topk=None, tied=None, n_gqa=None)
    with pytest.raises(ValueError, match="pruned: yes"):
        _model_facts(asdict(plain) | {"pruned": "yes"})
