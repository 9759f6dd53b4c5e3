"""Depth schedules and the mix of calibration texts, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gguftool.errors import GgufToolError
from gguftool.plan import PrunePlan, dumps
from gguftool.planner import make_plan
from gguftool.recipe import SCHEDULE_NAMES, Recipe
from gguftool.saliency import tenp_importance
from gguftool.schedules import SCHEDULES, whole_by_layer
from gguftool.stats import CalibrationStats
from synthetic import make_stats


@pytest.mark.parametrize(
    ("total", "weights", "want"),
    [
        (12, [1, 1.5, 2], [3, 4, 5]),  # 12 / 4.5 = 8/3 a unit: 2.67, 4, 5.33, and the largest remainder is the first's
        (12, [1, 1, 1], [4, 4, 4]),
        (7, [1, 1], [4, 3]),  # 3.5 each: of equals the shallower
        (24, [1, 1.5, 2], [8, 8, 8]),
        (20, [1, 3, 5], [4, 8, 8]),  # 11.1 does not fit: the other 12 go 1 : 3, and 9 does not fit either
        (10, [0, 1, 0], [1, 8, 1]),  # what the only weight cannot take goes to the others alike
        (5, [0, 0, 1], [0, 0, 5]),
        (30, [1, 2, 3], [8, 8, 8]),  # more than there are
        (0, [1, 2, 3], [0, 0, 0]),
    ],
)
def test_shares_by_largest_remainder(total, weights, want):
    assert whole_by_layer(total, np.array(weights, dtype=float), 8).tolist() == want


def test_weights_of_every_schedule():
    recipe = Recipe("tenp", 0.4, depth=(1.0, 3.0), layer_weights=(0.5, 0.5, 2.0))
    assert {name: weights(recipe, 3).tolist() for name, weights in SCHEDULES.items()} == {
        "trapezoid": [1, 2, 3],
        "uniform": [1, 1, 1],
        "reverse": [3, 2, 1],
        "measured": [0.5, 0.5, 2],
    }
    assert tuple(SCHEDULES) == SCHEDULE_NAMES


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (dict(), [3, 3, 4, 5]),  # 15 x (1, 4/3, 5/3, 2) / 6 = 2.5, 3.33, 4.17, 5: of 14 one more, to 2.5
        (dict(schedule="uniform"), [4, 4, 4, 3]),
        (dict(schedule="reverse"), [5, 4, 3, 3]),
        (dict(schedule="measured", layer_weights=(3.0, 1.0, 1.0, 0.0)), [9, 3, 3, 0]),
    ],
)
def test_whole_experts_of_a_plan(options, want):
    plan = make_plan(make_stats(n_layer=4, n_expert=16), Recipe("tenp", 0.4, align=8, whole=15 / 64, **options))
    assert [sum(width == 64 for width in layer.widths) for layer in plan.layers] == want
    assert any(f"by layer {want} ({options.get('schedule', 'trapezoid')})" in note for note in plan.notes)


def test_a_plan_with_weights_is_made_again_from_its_json(tmp_path):
    stats = make_stats(n_layer=4, n_expert=16)
    for recipe in (
        Recipe("tenp", 0.4, align=8, schedule="measured", mix=(2.0,), layer_weights=(0.1, 1.9, 1 / 3, 1.0)),
        Recipe("global", 0.4, align=8, layer_weights=(0.1, 1.9, 1 / 3, 1.0)),
    ):
        plan = make_plan(stats, recipe)
        plan.save(tmp_path / "plan.json")
        again = PrunePlan.load(tmp_path / "plan.json")
        assert again.recipe == plan.recipe == recipe
        assert dumps(make_plan(stats, again.recipe)) == dumps(plan)


def test_an_older_plan_has_no_schedule(tmp_path):
    text = dumps(make_plan(make_stats(), Recipe("global", 0.4)))
    for key in ('"schedule": "trapezoid", ', '"mix": null, ', '"layer_weights": null, '):
        assert key in text
        text = text.replace(key, "")
    (tmp_path / "plan.json").write_text(text)
    assert PrunePlan.load(tmp_path / "plan.json").recipe.schedule == "trapezoid"


def two_texts() -> CalibrationStats:
    """One layer of two experts; in the first text they turn by (3, 4), in the second by (0, 100)."""
    stats = make_stats(n_layer=1, n_expert=2)
    experts = {k: np.concatenate([v, v]) for k, v in stats.experts.items()}
    experts["turn"] = np.array([[[3.0, 4.0]], [[0.0, 100.0]]])
    code, prose = (replace(stats.domains[0], name=name) for name in ("code.txt", "prose.txt"))
    return replace(stats, domains=(code, prose), experts=experts)


def test_texts_are_mixed_with_weights():
    """The normalised importances are (0.6, 0.8) and (0, 1)."""
    stats = two_texts()
    assert tenp_importance(stats).tolist() == pytest.approx(np.array([[0.6, 1.8]]))
    assert tenp_importance(stats, (2, 1)) == pytest.approx(np.array([[1.2, 2.6]]))
    assert tenp_importance(stats, (1, 0)) == pytest.approx(np.array([[0.6, 0.8]]))
    plan = make_plan(stats, Recipe("tenp", 0.4, mix=(2.0, 0.5)))
    assert "importance is 2 x code.txt + 0.5 x prose.txt" in plan.notes


def test_a_mix_changes_which_expert_stays_whole():
    stats = two_texts()
    stats.experts["turn"][:] = [[[4.0, 3.0]], [[0.0, 9.0]]]  # (0.8, 0.6) and (0, 1)
    for mix, whole in ((None, 1), ((1.0, 1.0), 1), ((6.0, 1.0), 0)):  # 0.8 < 1.6; 4.8 > 4.6
        plan = make_plan(stats, Recipe("tenp", 0.4, align=8, whole=0.5, mix=mix))
        assert [width == 64 for width in plan.layers[0].widths] == [whole == 0, whole == 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="global", schedule="uniform"), "--schedule is only for tenp, not for global"),
        (dict(method="enp", mix=(1.0,)), "--mix is only for tenp"),
        (
            dict(method="random-slices", layer_weights=(1.0,) * 3),
            "--layers is only for auto, global and tenp, not for rand",
        ),
        (dict(method="reap", layer_weights=(1.0,) * 3), "--layers is only for"),
        (dict(method="tenp", schedule="measured"), "--schedule measured needs weights: `gguftool sensitivity`"),
        (dict(method="tenp", layer_weights=(1.0,) * 3), "tenp takes them by --schedule measured, not trapezoid"),
        (dict(method="tenp", schedule="uniform", depth=(1.0, 3.0)), "--depth: the schedule uniform has no ends"),
        (dict(method="tenp", schedule="measured", layer_weights=(1.0,) * 3, depth=(1.0, 3.0)), "measured has no ends"),
        (dict(method="tenp", whole=0.0, schedule="reverse"), "--schedule shares out whole experts, and --whole 0"),
        (dict(method="tenp", whole=0.0, depth=(1.0, 3.0)), "--depth shares out whole experts"),
        (dict(method="tenp", mix=(1.0, 2.0)), r"--mix has 2 weights, the stats hold 1 calibration texts \(text\)"),
        (dict(method="global", layer_weights=(1.0, 2.0)), "2 weights of layers for 3 layers"),
        (dict(method="tenp", schedule="flat"), "--schedule 'flat' is not one of trapezoid, uniform"),
        (dict(method="tenp", mix=(1.0, -1.0)), "--mix: 1.0,-1.0 are not finite weights"),
        (dict(method="tenp", mix=()), "--mix"),
        (dict(method="tenp", mix=(0.0, 0.0)), "--mix"),
        (dict(method="global", layer_weights=(float("nan"), 1.0, 1.0)), "weights of the layers: nan"),
    ],
)
def test_what_would_be_ignored_or_does_not_fit_is_refused(options, message):
    with pytest.raises(GgufToolError, match=message):
        make_plan(make_stats(), Recipe(ratio=0.4, **options))


def test_reverse_has_ends():
    recipe = Recipe("tenp", 0.4, align=8, whole=0.25, schedule="reverse", depth=(0.0, 1.0))
    plan = make_plan(make_stats(n_layer=2, n_expert=4), recipe)
    assert [sum(width == 64 for width in layer.widths) for layer in plan.layers] == [2, 0]


def test_blank_stats_try_a_mix_of_as_many_texts():
    blank = CalibrationStats.blank(make_stats().model, 2)
    make_plan(blank, Recipe("tenp", 0.4, mix=(2.0, 1.0)))
    with pytest.raises(GgufToolError, match="--mix has 2 weights"):
        make_plan(CalibrationStats.blank(make_stats().model), Recipe("tenp", 0.4, mix=(2.0, 1.0)))
