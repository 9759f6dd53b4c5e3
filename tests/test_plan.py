from dataclasses import replace

import numpy as np
import pytest

from gguftool import layout
from gguftool.encoding import TWINS, MixFacts, assign
from gguftool.errors import GgufToolError
from gguftool.methods import METHODS, drop_experts, residual_weights
from gguftool.plan import PrunePlan, dumps, pack_mask, unpack_mask
from gguftool.planner import fingerprint, make_plan
from gguftool.recipe import Recipe
from gguftool.saliency import expert_criterion, neuron_criterion, super_experts
from gguftool.stats import CalibrationStats
from synthetic import make_plan as plan_of
from synthetic import make_stats


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_every_method_makes_a_plan_that_survives_the_disk(name, ratio, tmp_path):
    stats = make_stats()
    plan = make_plan(stats, Recipe(name, ratio, target="Q8_0", align=8))
    assert abs((1 - plan.kept_share) - ratio) < 0.05
    assert plan.uniform if METHODS[name].stock or ratio == 0 else True
    plan.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json")
    assert dumps(again) == dumps(plan)
    assert again.kept_hash == plan.kept_hash
    assert plan.encoded_bytes < plan.tensor_bytes


def test_auto_is_global_by_obs_costs_where_there_are_any():
    stats = make_stats()
    plain = make_plan(stats, Recipe("auto", 0.4, align=8))
    assert plain.kept_hash == make_plan(stats, Recipe("global", 0.4, align=8)).kept_hash
    assert any("no OBS costs" in note for note in plain.notes)
    stats.neurons["obs"] = np.random.default_rng(3).random(stats.neurons["h_sq"].shape)
    costs = make_plan(stats, Recipe("auto", 0.4, align=8))
    assert costs.kept_hash == make_plan(stats, Recipe("global", 0.4, criterion="obs", align=8)).kept_hash
    assert costs.kept_hash != plain.kept_hash and costs.formula.startswith("obs")


def test_errors_relative_to_the_residual_stream():
    """1, 1/2 and 1/4 of mean 7/12: with a stream whose inverse is half, half the weight."""
    stats = make_stats()
    with pytest.raises(GgufToolError, match="calibrate again"):
        make_plan(stats, Recipe("global", 0.4, align=8, relative=True))
    longer = replace(stats, residual_inverse=np.array([4.0, 2.0, 1.0]))
    weights = (12 / 7, 6 / 7, 3 / 7)
    assert residual_weights(longer) == pytest.approx(weights)
    relative = make_plan(longer, Recipe("global", 0.4, align=8, relative=True))
    given = make_plan(stats, Recipe("global", 0.4, align=8, layer_weights=weights))
    assert relative.kept_hash == given.kept_hash != make_plan(longer, Recipe("global", 0.4, align=8)).kept_hash
    kept = [sum(layer.widths) for layer in relative.layers]
    assert kept[0] > kept[1] > kept[2] and "(1.71, 0.86, 0.43)" in relative.formula
    for wrong in (Recipe("reap", 0.25, relative=True), Recipe("auto", 0.25, relative=True, layer_weights=weights)):
        with pytest.raises(GgufToolError, match="--relative is for auto and global"):
            make_plan(longer, wrong)


def test_experts_without_a_neuron_can_leave_the_router():
    stats = make_stats()
    stats.neurons["gate_sq_h_sq"][0, :7] *= 1e-9  # layer 0: only the last expert is worth anything
    stays = make_plan(stats, Recipe("global", 0.7, align=8))
    cut = make_plan(stats, Recipe("global", 0.7, align=8, cut_router=True))
    assert stays.layers[0].widths[:7] == (0,) * 7 and len(stays.layers[0].router) == 8
    # Two experts are routed per token, so one without a neuron has to stay.
    assert cut.layers[0].router == (0, 7) and cut.layers[0].widths == (0, stays.layers[0].widths[7])
    gone = sum(width == 0 for layer in stays.layers for width in layer.widths) - 1
    assert any(f"{gone} experts without a neuron leave the router" in note for note in cut.notes)
    for old, new in zip(stays.layers[1:], cut.layers[1:], strict=True):
        assert [w for w in old.widths if w] == list(new.widths)
    with pytest.raises(GgufToolError, match="--cut-router is for slices"):
        make_plan(stats, Recipe("reap", 0.25, cut_router=True))


def test_the_calibration_data_pick_the_familys_criterion():
    stats = make_stats()
    for data, name in (("task", "gated-sum"), ("general", "man")):
        plan = make_plan(stats, Recipe("family", 0.25, calibration=data))
        assert plan.kept_hash == make_plan(stats, Recipe(name, 0.25)).kept_hash
        assert any(f"calibration data are {data}: {name}" in note for note in plan.notes)
    assert make_plan(stats, Recipe("gated-sum", 0.25)).kept_hash != make_plan(stats, Recipe("man", 0.25)).kept_hash
    with pytest.raises(GgufToolError, match="--calibration 'code' is not one of task, general"):
        Recipe("family", 0.25, calibration="code")


def test_coarse_steps_are_said():
    plan = make_plan(make_stats(), Recipe("enp", 0.25, align=32))
    assert plan.kept_share == 1.0 and any("0.0 % of routed-expert parameters go, not 25.0 %" in n for n in plan.notes)


def test_ratio_zero_keeps_every_tensor():
    stats = make_stats()
    for name in METHODS:
        assert make_plan(stats, Recipe(name, 0.0)).tensors == stats.model.tensors


def test_family_by_hand():
    stats = make_stats(n_layer=1, n_expert=2)
    for name, values in {"count": [4, 0], "norm": [8, 0], "norm_sq": [20, 0], "gate_norm": [2, 0]}.items():
        stats.experts[name][:] = np.array(values, dtype=float)
    assert expert_criterion("man").measure(stats).tolist() == [[2.0, 0.0]]
    assert expert_criterion("msan").measure(stats).tolist() == [[5.0, 0.0]]
    assert expert_criterion("reap").measure(stats).tolist() == [[0.5, 0.0]]
    assert expert_criterion("frequency").measure(stats).tolist() == [[4.0, 0.0]]
    assert expert_criterion("1,0,2").measure(stats).tolist() == [[5.0, 0.0]]
    assert neuron_criterion("enp").measure(stats)[0, 1].tolist() == [0.0] * 64


def test_tenp_importance_is_normalised_by_layer_and_domain():
    stats = make_stats(n_layer=1, n_expert=2)
    domain = stats.domains[0]
    experts = {k: np.concatenate([v, v]) for k, v in stats.experts.items()}
    experts["turn"] = np.array([[[3.0, 4.0]], [[0.0, 100.0]]])
    stats = replace(stats, domains=(domain, domain), experts=experts)
    assert expert_criterion("tenp-importance").measure(stats).tolist() == [[0.6, 1.8]]


def test_tenp_shape():
    stats = make_stats(n_layer=4, n_expert=16)
    plan = make_plan(stats, Recipe("tenp", 0.4, align=8))
    whole = [sum(width == 64 for width in layer.widths) for layer in plan.layers]
    assert whole == sorted(whole) and sum(whole) == round(0.3 * 64)
    rest = {width for layer in plan.layers for width in layer.widths if width != 64}
    assert max(rest) - min(rest) <= 8
    assert plan.kept_share == pytest.approx(0.6, abs=8 / (4 * 16 * 64))


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.7])
def test_tenp_keeps_to_the_tiers(ratio):
    stats = make_stats(n_layer=4, n_expert=16)
    widths = [
        {width for width in layer.widths if width}
        for layer in make_plan(stats, Recipe("tenp", ratio, align=8, max_tiers=2)).layers
    ]
    assert max(map(len, widths)) == 2
    narrow = set.union(*widths) - {64}
    assert len(narrow) == 1
    with pytest.raises(GgufToolError, match="max-tiers 2 or more"):
        make_plan(stats, Recipe("tenp", ratio, align=8, max_tiers=1))
    alike = make_plan(stats, Recipe("tenp", 0.5, align=8, max_tiers=1, whole=0.0))
    assert alike.uniform and alike.kept_share == 0.5


def test_the_types_count_with_or_without_an_imatrix():
    stats = make_stats(n_layer=8, n_ff=256, n_embd=256)
    with_one, blind = (make_plan(stats, Recipe("global", 0.25, target="IQ4_XS", imatrix=i)) for i in (True, False))
    assert with_one.encoded != blind.encoded
    assert next(s.type for s in blind.encoded if s.name.startswith("blk.0.ffn_down")).startswith("Q5")
    with pytest.raises(GgufToolError, match="IQ2_XS needs an importance matrix"):
        make_plan(stats, Recipe("global", 0.25, target="IQ2_XS", imatrix=False))


def test_a_plan_that_keeps_all_counts_llama_cpps_own_fallbacks():
    stats = make_stats(n_ff=96, n_embd=256)
    whole, cut = (make_plan(stats, Recipe("global", ratio, target="Q5_K_S", align=32)) for ratio in (0.0, 0.3))
    facts = stats.model
    own = assign(facts.tensors, "Q5_K_S", MixFacts.of_model(facts, has_imatrix=True))
    assert whole.encoded == own
    down = {spec.type for spec in whole.encoded if "ffn_down" in spec.name}
    assert down != {spec.type for spec in cut.encoded if "ffn_down" in spec.name}


def test_the_fingerprint_is_over_everything_and_survives_the_disk(tmp_path):
    stats = replace(make_stats(), linears={"b": np.ones(3), "a": np.zeros(2)}, linear_tokens=400)
    before = fingerprint(stats)
    stats.save(tmp_path / "stats")
    assert fingerprint(CalibrationStats.load(tmp_path / "stats")) == before
    others = (
        {"linears": {"b": np.ones(3), "a": np.ones(2)}},
        {"linears": {"b": np.ones(3), "c": np.zeros(2)}},
        {"linear_tokens": 401},
        {"n_ctx": 256},
        {"expert_inputs": stats.expert_inputs + 1},
    )
    assert before not in {fingerprint(replace(stats, **other)) for other in others}


def test_super_experts_are_protected_and_reported():
    stats = make_stats(n_layer=1)
    stats.experts["max_out"][:] = 1.0
    stats.experts["max_out"][0, 0, 3] = 50.0
    saliency = np.arange(8.0)[None]
    assert super_experts(stats) == [(0, 3)]
    layers, notes = drop_experts(stats, saliency, Recipe("man", 0.5))
    assert layers[0].router == (3, 5, 6, 7) and "super expert 3" in notes[0]
    layers, notes = drop_experts(stats, saliency, Recipe("man", 0.5, guard=False))
    assert layers[0].router == (4, 5, 6, 7) and not notes
    stats.experts["max_out"][0, 0, 3] = 9.0  # the largest of eight, but no outlier
    assert super_experts(stats) == []


def test_controls():
    stats = make_stats()
    best = make_plan(stats, Recipe("gated-sum", 0.5, guard=False))
    worst = make_plan(stats, Recipe("inverted", 0.5))
    for good, bad in zip(best.layers, worst.layers, strict=True):
        assert set(good.router).isdisjoint(bad.router)
    assert (
        make_plan(stats, Recipe("random", 0.5, seed=1)).kept_hash != make_plan(stats, Recipe("random", 0.5)).kept_hash
    )


def test_unrouted_experts_are_named():
    stats = make_stats(n_layer=1)
    stats.experts["count"][0, 0, :2] = 0
    plan = make_plan(stats, Recipe("man", 0.25))
    assert any("2 experts were never routed" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (dict(method="reap", ratio=0.9), "2 are routed per token"),
        (dict(method="raep", ratio=0.4), "did you mean reap"),
        (dict(method="global", ratio=0.4, layout="stock"), "tiered layout"),
        (dict(method="global", ratio=0.4, criterion="engp"), "enp"),
        (dict(method="0,1,2", ratio=0.4), "not measured"),
        (dict(method="global", ratio=0.4, align=128), "only 64 neurons"),
        (dict(method="global", ratio=0.4, target="Q4_KM"), "Q4_K_M"),
        (dict(method="random", ratio=0.4, criterion="reap"), "random takes none"),
        (dict(method="random-slices", ratio=0.4, criterion="enp"), "random-slices takes none"),
        (dict(method="global", ratio=0.4, whole=0.1), "--whole is only for tenp"),
        (dict(method="enp", ratio=0.4, depth=(1.0, 3.0)), "--depth is only for tenp"),
        (dict(method="reap", ratio=0.4, calibration="general"), "--calibration picks the criterion of family"),
        (dict(method="family", ratio=0.4, criterion="man"), "--criterion: family picks its own"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(recipe, message):
    with pytest.raises(GgufToolError, match=message):
        make_plan(make_stats(), Recipe(**recipe))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 40.0, float("nan")])
def test_ratio_is_a_share(ratio):
    with pytest.raises(GgufToolError, match="share from 0 up to, but without, 1: write 40 % as 0.4"):
        Recipe("global", ratio)


@pytest.mark.parametrize("depth", [(float("nan"), 1.0), (1.0, float("inf")), (-1.0, 1.0), (0.0, 0.0)])
def test_depth_is_two_weights(depth):
    with pytest.raises(GgufToolError, match="finite weights"):
        Recipe("tenp", 0.4, depth=depth)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "not a plan"),
        (lambda text: "[]", "not a gguftool plan"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "version 9"),
        (lambda text: text.replace('"width": ', '"width": 1'), "garbles"),
        (lambda text: text.replace('"n_expert": 8', '"n_expert": 4'), "ids below 4"),
        (lambda text: text.replace('"n_expert_used": 2', '"n_expert_used": 9'), "9 are routed"),
        (lambda text: text.replace('"layout": "tiered"', '"layout": "flat"'), "layout: flat is not stock or tiered"),
        (lambda text: text.replace('"layout": "tiered"', '"layout": "stock"'), "file is stock, but its experts"),
    ],
)
def test_a_wrong_plan_is_one_clear_line(damage, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(damage(dumps(make_plan(make_stats(), Recipe("global", 0.4)))))
    with pytest.raises(GgufToolError, match=message) as caught:
        PrunePlan.load(path)
    assert "\n" not in str(caught.value)


def test_masks():
    kept = np.array([0, 3, 8, 9])
    assert pack_mask(kept, 10) == bytes([0b1001, 0b11])
    assert unpack_mask(bytes([0b1001, 0b11]), 10).tolist() == kept.tolist()
    with pytest.raises(ValueError):
        unpack_mask(bytes([0, 0b100]), 10)


def with_tensors(stats: CalibrationStats, *names: str, **facts) -> CalibrationStats:
    """Stats of a model that has further matrices, and other facts."""
    kind = stats.model.tensors[-1]
    more = tuple(replace(kind, name=name, ne=kind.ne if "_exps" in name else kind.ne[:2]) for name in names)
    return replace(stats, model=replace(stats.model, tensors=(*stats.model.tensors, *more), **facts))


def test_the_plan_says_what_a_stock_file_cannot_hold():
    """A shared expert whose width is that of the others, a layer that predicts further tokens and keeps its experts."""
    narrow, fewer, whole = Recipe("enp", 0.5, align=8), Recipe("reap", 0.25), Recipe("reap", 0.0)
    shared, ending = "blk.1.ffn_up_shexp.weight", ("_shexp.weight",)
    mtp = {"block_count": 4, "n_predict": 1}
    for stats, layouts in (
        (with_tensors(make_stats(), shared, tied=ending), ("tiered", "stock", "stock")),
        (with_tensors(make_stats(), shared, tied=()), ("stock", "stock", "stock")),
        (with_tensors(make_stats(), tied=ending), ("stock", "stock", "stock")),
        (with_tensors(make_stats(), "blk.3.ffn_down_exps.weight", tied=(), **mtp), ("tiered", "tiered", "stock")),
        # Stats of an older gguftool do not say it: a family that is known to be free, one that is not, an unknown one.
        (with_tensors(make_stats(), shared), ("stock", "stock", "stock")),
        (with_tensors(make_stats(), shared, gguf_arch="glm4moe"), ("tiered", "stock", "stock")),
        (with_tensors(make_stats(), shared, gguf_arch="bailingmoe"), ("tiered", "stock", "stock")),
    ):
        plans = [make_plan(stats, recipe) for recipe in (narrow, fewer, whole)]
        assert tuple(plan.layout for plan in plans) == layouts
        for plan in plans:
            maps = [spec.name for spec in plan.tensors if "ffn_exps_tier" in spec.name]
            assert len(maps) == (3 if plan.layout == "tiered" else 0)
    tied = with_tensors(make_stats(), shared, tied=ending)
    with pytest.raises(GgufToolError, match=rf"{shared} would have to change .* leave --layout stock out"):
        make_plan(tied, replace(narrow, layout="stock"))
    assert make_plan(tied, replace(fewer, layout="stock")).layout == "stock"


def test_a_plan_of_an_older_gguftool_is_read_and_leaves_the_layout_open(tmp_path):
    made = make_plan(make_stats(), Recipe("reap", 0.25))
    text = dumps(made)
    assert text.count('  "layout": "stock",\n') == 1
    (tmp_path / "old.json").write_text(text.replace('  "layout": "stock",\n', ""))
    old = PrunePlan.load(tmp_path / "old.json")
    assert old.layout == "" and dumps(replace(old, layout="stock")) == text


def test_layout_of_a_tiered_layer():
    plan = plan_of([[64, 32, 0, 32], [64, 64, 64, 64]], 64, 2)
    specs = {p.spec.name: p.spec for p in layout.pieces(plan, make_stats(2, 4).model.tensors, TWINS, layout="tiered")}
    assert specs["blk.0.ffn_exps_tier.weight"].ne == (4, 2)
    assert specs["blk.0.ffn_gate_exps.0.weight"].ne == (32, 64, 1)
    assert specs["blk.0.ffn_down_exps.1.weight"].ne == (32, 32, 2)
    assert "blk.0.ffn_up_exps.weight" not in specs and "blk.1.ffn_up_exps.weight" in specs


def test_layout_refuses_another_model():
    plan = plan_of([[64, 32, 0, 32], [64, 64, 64, 64]], 64, 2)
    with pytest.raises(GgufToolError, match="another model"):
        layout.pieces(plan, make_stats(2, 8).model.tensors, TWINS, layout="tiered")
    with pytest.raises(GgufToolError, match="no layer 2"):
        layout.pieces(plan, make_stats(3, 4).model.tensors, TWINS, layout="tiered")
    with pytest.raises(GgufToolError, match="no experts in layer 1"):
        layout.pieces(plan, make_stats(1, 4).model.tensors, TWINS, layout="tiered")
