"""What a plan should cost: by hand, and against what the README measured."""

from __future__ import annotations

import re
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest

from gguftool.plan import LayerPlan
from gguftool.planner import make_plan
from gguftool.prediction import FLOOR, LIMIT, bound, noise
from gguftool.recipe import Recipe
from gguftool.stats import CalibrationStats


def test_noise_by_hand(stats):
    """Two layers of the built-in model's shape, all sums 1 but those of what goes."""
    blank = CalibrationStats.blank(stats.model)
    n_layers, n_expert, width = blank.neurons["h_sq"].shape
    gate_sq_h_sq = np.ones((n_layers, n_expert, width))
    gate_sq_h_sq[0, 3, 5], gate_sq_h_sq[1, 0] = 7.0, 2.0
    norms = np.full((n_layers, n_expert, width), 3.0)
    tokens = 10
    found = replace(
        blank,
        domains=(replace(blank.domains[0], tokens=tokens),),
        neurons={**blank.neurons, "gate_sq_h_sq": gate_sq_h_sq, "down_norm_sq": norms},
        residual_inverse=np.array([0.5, 0.25, *([1.0] * (n_layers - 2))]),
    )
    plan = make_plan(blank, Recipe("global", 0.0))
    assert noise(found, plan) == 0.0
    first = list(plan.layers[0].retained)
    first[3] = np.array([k for k in range(width) if k not in (5, 6)])
    second = plan.layers[1]
    layers = (
        replace(plan.layers[0], retained=tuple(first)),
        LayerPlan(second.index, second.router[1:], second.retained[1:]),
        *plan.layers[2:],
    )
    # (7 + 1) x 3 x 0.5 in layer 0, 128 x 2 x 3 x 0.25 in layer 1, over 10 tokens twice.
    assert noise(found, replace(plan, layers=layers)) == pytest.approx((12 + 192) / 100)
    assert noise(replace(found, residual_inverse=None), plan) is None


def test_the_bound_by_hand():
    assert bound(0.01, 0.1, 1000, 10.0) == pytest.approx(LIMIT * 0.01 + 0.3 + FLOOR)
    assert bound(1.0, 0.0, 1000, 10.0) == pytest.approx(log(100))
    assert bound(None, 0.0, 1000, 10.0) == pytest.approx(log(100))
    assert bound(None, 0.0, 1000, 2000.0) == pytest.approx(log(1000))  # an untrained model is no fault of the file


def test_the_noise_is_what_the_table_measured(stats):
    """KL on code of the table in docs/results.md over the noise by these few windows: near one for every method and ratio."""
    page = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) (\d+) %(?: \+ [a-z ]*refit)? \| [^|]+\| [^|]+\| ([\d.]+) ±", page, re.M)
    assert len(rows) > 30
    for method, percent, kld in rows:
        expected = noise(stats, make_plan(stats, Recipe(method, int(percent) / 100)))
        assert 0.3 < float(kld) / expected < 3, (method, percent)
