"""What each layer costs alone: the weights by hand, the file, and the measurement on the built-in model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguftool import probe
from gguftool.errors import GgufToolError
from gguftool.evaluate import compare
from gguftool.planner import make_plan
from gguftool.probe import Probe, measure_layers
from gguftool.recipe import Recipe
from gguftool.sensitivity import Conditions, LayerCost, Sensitivity, conditions, layer_plan, weighted
from gguftool.stats import CalibrationStats
from gguftool.writer import prune
from synthetic import make_stats
from test_cli import gguftool

MEASURED_ON = dict(base_bytes=10, text="t.txt", text_sha256="0" * 64, n_ctx=512, windows=2, backend="cpu")


def by_hand() -> CalibrationStats:
    """Two layers of two experts of four neurons; value of neuron k of expert e in layer l, all numbers chosen."""
    stats = make_stats(n_layer=2, n_expert=2, n_ff=4, top_k=1)
    stats.neurons["gate_sq_h_sq"][:] = [[[9, 1, 8, 7], [2, 6, 1, 5]], [[90, 40, 80, 70], [20, 60, 30, 50]]]
    stats.neurons["down_norm_sq"][:] = 1.0
    return stats


def conditions_of(stats: CalibrationStats, ratio: float = 0.5, **recipe) -> Conditions:
    return conditions(stats, Recipe("global", ratio, align=1, **recipe), **MEASURED_ON)


def test_one_layer_is_pruned_and_what_it_loses_is_counted():
    """Half of layer 0 goes: 9, 8, 7, 6 stay, and 5 + 2 + 1 + 1 are lost. Of layer 1, 90, 80, 70, 60 and 50 + 40 + 30 + 20."""
    stats = by_hand()
    recipe = conditions_of(stats).recipe
    whole = make_plan(stats, replace(recipe, ratio=0.0))
    plan, lost = layer_plan(stats, whole, recipe, 0)
    assert [[own.tolist() for own in layer.retained] for layer in plan.layers] == [
        [[0, 2, 3], [1]],
        [[0, 1, 2, 3], [0, 1, 2, 3]],
    ]
    assert lost == 9.0
    plan, lost = layer_plan(stats, whole, recipe, 1)
    assert [layer.widths for layer in plan.layers] == [(4, 4), (3, 1)] and lost == 140.0


def test_weights_by_hand():
    """KL / lost = 0.001 and 0.004, their mean 0.0025; KL alone 0.01 and 0.02, their mean 0.015."""
    found = Sensitivity(conditions_of(by_hand()), (LayerCost(0, 0.01, 0.001, 10.0), LayerCost(1, 0.02, 0.001, 5.0)))
    assert found.weights() == pytest.approx((0.4, 1.6))
    assert found.shares() == pytest.approx((2 / 3, 4 / 3))
    nothing = replace(found, costs=(LayerCost(0, 0.0, 0.0, 0.0), LayerCost(1, 0.02, 0.001, 5.0)))
    assert nothing.weights() == (1.0, 1.0)
    assert replace(found, costs=(LayerCost(0, 0.0, 0.0, 0.0),)).weights() == (1.0,)


def test_weights_move_the_budget_between_layers():
    """By value alone layer 1 keeps everything and layer 0 nothing but what it must. With 0.05 its neurons are worth 4.5,
    2, 4, 3.5 | 1, 3, 1.5, 2.5 beside 9, 1, 8, 7 | 2, 6, 1, 5, times 1.95: 17.55, 1.95, 15.6, 13.65 | 3.9, 11.7, 1.95, 9.75.
    The best eight are 17.55, 15.6, 13.65, 11.7, 9.75 of layer 0, 4.5, 4 of layer 1, and 3.9 of layer 0."""
    stats = by_hand()
    plain = make_plan(stats, Recipe("global", 0.5, align=1))
    assert [sum(layer.widths) for layer in plain.layers] == [1, 7]
    moved = make_plan(stats, Recipe("global", 0.5, align=1, layer_weights=(1.95, 0.05)))
    assert [layer.widths for layer in moved.layers] == [(3, 3), (2, 0)]
    assert [own.tolist() for own in moved.layers[0].retained] == [[0, 2, 3], [0, 1, 3]]
    assert "times the weight of the layer" in moved.formula
    alike = make_plan(stats, Recipe("global", 0.5, align=1, layer_weights=(3.0, 3.0)))
    assert alike.kept_hash == plain.kept_hash


def test_the_file_survives_the_disk_and_goes_into_a_recipe(tmp_path):
    stats = by_hand()
    found = Sensitivity(conditions_of(stats), (LayerCost(0, 0.01, 0.001, 10.0), LayerCost(1, 0.02, 0.001, 5.0)))
    found.save(tmp_path / "layers.json")
    assert Sensitivity.load(tmp_path / "layers.json") == found
    assert [file.name for file in tmp_path.iterdir()] == ["layers.json"]
    assert weighted(found, stats, Recipe("global", 0.3)).layer_weights == found.weights()
    assert weighted(found, stats, Recipe("tenp", 0.3, schedule="measured")).layer_weights == found.shares()
    assert weighted(found, stats, Recipe("auto", 0.3)).layer_weights == found.weights()


def test_costs_that_do_not_belong_to_the_plan_are_refused():
    stats = by_hand()
    found = Sensitivity(conditions_of(stats), (LayerCost(0, 0.01, 0.001, 10.0), LayerCost(1, 0.02, 0.001, 5.0)))
    other = replace(stats, model=replace(stats.model, fingerprint="e" * 64))
    with pytest.raises(GgufToolError, match="the layers were measured on synthetic"):
        weighted(found, other, Recipe("global", 0.3))
    with pytest.raises(GgufToolError, match="the layers 1 were not measured"):
        weighted(replace(found, costs=found.costs[:1]), stats, Recipe("global", 0.3))
    message = "measured by gated-second-moment, global goes by enp: measure them with --criterion enp"
    with pytest.raises(GgufToolError, match=message):
        weighted(found, stats, Recipe("global", 0.3, criterion="enp"))
    stats.neurons["obs"] = np.ones(stats.neurons["h_sq"].shape)
    with pytest.raises(GgufToolError, match="auto goes by obs"):
        weighted(found, stats, Recipe("auto", 0.3))
    with pytest.raises(GgufToolError, match="--ratio 0 prunes nothing"):
        conditions_of(stats, 0.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "not measured layers"),
        (lambda text: "[]", "not measured layers"),
        (lambda text: text.replace("gguftool.layers", "gguftool.plan"), "not measured layers"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "layers of version 2"),
        (lambda text: text.replace('"n_ctx": 512,', ""), "lacks or garbles"),
        (lambda text: text.replace('"kld": 0.02', '"kld": "much"'), "lacks or garbles"),
        (lambda text: text.replace('"kld": 0.02', '"kld": -0.02'), "layer 1: .* are not costs"),
        (lambda text: text.replace('"kld": 0.02', '"kld": NaN'), "NaN is no number of JSON"),
        (lambda text: text.replace('{"layer": 1', '{"layer": 0'), "costs of the layers"),
        (lambda text: text.replace('{"layer": 1', '{"layer": 7'), "costs of the layers"),
    ],
)
def test_a_wrong_file_is_one_clear_line(damage, message, tmp_path):
    found = Sensitivity(conditions_of(by_hand()), (LayerCost(0, 0.01, 0.001, 10.0), LayerCost(1, 0.02, 0.001, 5.0)))
    (tmp_path / "l.json").write_text(damage(found.dumps()))
    with pytest.raises(GgufToolError, match=message) as caught:
        Sensitivity.load(tmp_path / "l.json")
    assert "\n" not in str(caught.value)


# --- on the built-in model ------------------------------------------------------------------------------------------


def probed(base_gguf, stats, eval_text, llama, folder: Path, said: list[str], **changed) -> Sensitivity:
    where = conditions(stats, Recipe("global", 0.4), **MEASURED_ON | dict(windows=1) | changed)
    how = Probe(base_gguf, eval_text.read_text(), llama, at_once=2)
    return measure_layers(how, stats, where, folder / "layers.json", say=said.append)


def test_a_stopped_measurement_goes_on_and_leaves_nothing_behind(
    base_gguf, stats, eval_text, llama, tmp_path, monkeypatch
):
    def files() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    groups = []
    real = probe.compare_many

    def counted(base, paths, *args, **options):
        groups.append([path.name for path in paths])
        # The files of the groups before are gone, and there are no more than these.
        (scratch,) = tmp_path.glob(".*.files")
        assert sorted(scratch.iterdir()) == paths
        if stop and len(groups) == 2:
            raise KeyboardInterrupt
        return real(base, paths, *args, **options)

    monkeypatch.setattr(probe, "compare_many", counted)
    said: list[str] = []
    stop = True
    with pytest.raises(KeyboardInterrupt):
        probed(base_gguf, stats, eval_text, llama, tmp_path, said)
    assert files() == ["layers.json.partial"]
    assert "4 layers, at most 2 files at a time: 0.027 GB of disk" in said[0]
    stop = False
    found = probed(base_gguf, stats, eval_text, llama, tmp_path, said)
    assert groups == [["layer-0.gguf", "layer-1.gguf"], *[["layer-2.gguf", "layer-3.gguf"]] * 2]
    assert files() == ["layers.json"] and Sensitivity.load(tmp_path / "layers.json") == found
    assert any("2 layers are measured already" in line for line in said)
    # The same by the ordinary way: a plan, a file, a comparison.
    recipe = found.conditions.recipe
    plan, lost = layer_plan(stats, make_plan(stats, replace(recipe, ratio=0.0)), recipe, 2)
    prune(base_gguf, plan, tmp_path / "two.gguf")
    alone = compare(base_gguf, tmp_path / "two.gguf", eval_text.read_text(), llama=llama, max_windows=1).divergence.kld
    assert found.costs[2] == LayerCost(2, alone.mean, alone.err, lost)
    assert sum(found.weights()) / 4 == pytest.approx(1) and min(found.weights()) > 0


def test_other_conditions_start_anew(base_gguf, stats, eval_text, llama, tmp_path):
    said: list[str] = []
    where = conditions(stats, Recipe("global", 0.3), **MEASURED_ON)
    Sensitivity(where, (LayerCost(0, 9.0, 9.0, 9.0),)).save(tmp_path / "layers.json.partial")
    found = probed(base_gguf, stats, eval_text, llama, tmp_path, said)
    assert "under other conditions; starting anew" in said[0] and found.costs[0].kld < 1
    (tmp_path / "layers.json.partial").write_text("{")
    probed(base_gguf, stats, eval_text, llama, tmp_path, said)
    assert any("not measured layers" in line and "starting anew" in line for line in said)


def test_the_commands(base_gguf, stats, eval_text, runtime, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    out = tmp_path / "layers.json"
    arguments = ["sensitivity", base_gguf, "--stats", tmp_path / "stats.safetensors", "--data", eval_text, "-o", out]
    made = json.loads(gguftool(*arguments, "--windows", 1, "--backend", "cpu", "--json"))
    assert [row["layer"] for row in made["layers"]] == [0, 1, 2, 3]
    assert "--force replaces it" in gguftool(*arguments, code=1)
    plan = ["plan", tmp_path / "stats.safetensors", "--ratio", 0.4, "--layers", out, "-o"]
    gguftool(*plan, tmp_path / "global.json")
    recipe = json.loads((tmp_path / "global.json").read_text())["recipe"]
    assert recipe["layer_weights"] == pytest.approx([row["weight"] for row in made["layers"]])
    gguftool(*plan, tmp_path / "tenp.json", "--method", "tenp", "--schedule", "measured", "--mix", "3")
    recipe = json.loads((tmp_path / "tenp.json").read_text())["recipe"]
    assert recipe["layer_weights"] == pytest.approx([row["share"] for row in made["layers"]])
    assert recipe["mix"] == [3.0] and recipe["schedule"] == "measured"
    assert "--layers is only for" in gguftool(*plan, tmp_path / "x", "--method", "reap", code=1)
    assert "--mix '2;1'" in gguftool(*plan, tmp_path / "x", "--method", "tenp", "--mix", "2;1", code=2)
    assert "not measured layers" in gguftool(*plan[:-2], tmp_path / "global.json", "-o", tmp_path / "x", code=1)
