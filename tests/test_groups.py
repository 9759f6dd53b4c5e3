"""Routers that pick from groups of experts: every group loses the same number."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from gguftool.checkpoint import open_checkpoint
from gguftool.errors import GgufToolError
from gguftool.inventory import model_facts
from gguftool.methods import METHODS, drop_experts
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.stats import _model_facts
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


def test_the_facts_of_the_router(tmp_path):
    plain = model_facts(open_checkpoint(tiny_checkpoint(tmp_path / "plain")))
    assert (plain.n_group, plain.n_group_used, plain.norm_topk) == (1, 1, True)
    groups = model_facts(open_checkpoint(tiny_checkpoint(tmp_path / "groups", n_group=3, topk_group=2)))
    assert (groups.n_group, groups.n_group_used) == (3, 2)
    assert (plain.tied, plain.n_gqa) == ((), 2) and _model_facts(asdict(plain)) == plain
    new = ("n_group", "n_group_used", "norm_topk", "n_predict", "tied", "n_gqa")
    old = {name: value for name, value in asdict(plain).items() if name not in new}
    assert _model_facts(old) == replace(plain, norm_topk=None, tied=None, n_gqa=None)
