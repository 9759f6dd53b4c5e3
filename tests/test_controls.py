"""Pruning at random or the wrong way round must cost more than pruning by a criterion, beyond doubt."""

from __future__ import annotations

from math import hypot

import pytest

from gguftool.divergence import KlStatistics
from gguftool.evaluate import compare_many
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.writer import prune

WINDOWS = 4
# What must win, and what it must beat.
PAIRS = [("gated-sum", "random"), ("gated-sum", "inverted"), ("global", "random-slices")]


@pytest.fixture(scope="module")
def costs(base_gguf, stats, eval_text, llama, tmp_path_factory) -> dict[str, KlStatistics]:
    """KL divergence of each method at 40 %, on held-out code."""
    folder = tmp_path_factory.mktemp("controls")
    names = sorted({name for pair in PAIRS for name in pair})
    plans = [make_plan(stats, Recipe(name, 0.4)) for name in names]
    # Nobody wins by pruning less.
    assert max(plan.kept_share for plan in plans) - min(plan.kept_share for plan in plans) < 0.03
    files = [folder / f"{name}.gguf" for name in names]
    for plan, path in zip(plans, files, strict=True):
        prune(base_gguf, plan, path)
    found = compare_many(base_gguf, files, eval_text.read_text(), llama=llama, max_windows=WINDOWS)
    return {name: item.divergence.kld for name, item in zip(names, found, strict=True)}


@pytest.mark.parametrize(("method", "control"), PAIRS)
def test_controls_lose(costs, method, control):
    better, worse = costs[method], costs[control]
    assert worse.mean - better.mean > 3 * hypot(worse.err, better.err) > 0
