"""Every method on a model of two layers with two experts each, all sums chosen and everything that stays worked out by hand.

`test_every_method_is_here` fails when a method comes without such a test.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn

from gguftool.errors import GgufToolError
from gguftool.methods import METHODS
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.recorders import ExpertRecorder
from gguftool.saliency import EXPERT_CRITERIA, NEURON_CRITERIA, expert_criterion, neuron_criterion
from gguftool.stats import EXPERT_SUMS, NEURON_SUMS, WEIGHT_NORMS, CalibrationStats, Domain
from synthetic import make_stats

# Sums of [layer][expert]; layer 0 takes 4 + 2 tokens, layer 1 takes 1 + 5.
SUMS = {
    "count": [[4, 2], [1, 5]],
    "gate": [[1, 1.5], [0.75, 3]],
    "gate_sq": [[0.5, 1.25], [0.5625, 2]],
    "norm": [[8, 6], [7, 5]],
    "norm_sq": [[20, 8], [49, 50]],
    "gate_norm": [[2, 3], [5.25, 4]],
    "gate_sq_norm_sq": [[1.5, 6], [27.5625, 30]],
    "turn": [[3, 4], [12, 5]],
    "max_out": [[1, 1], [1, 1]],
}
# Sums of [layer][expert][neuron].
NEURONS = {
    "h_sq": [[[4, 1, 2, 3], [8, 5, 7, 6]], [[1, 9, 1, 1], [2, 2, 2, 6]]],
    "gate_sq_h_sq": [[[1, 1, 1, 1], [2, 5, 1, 4]], [[1, 3, 1, 1], [1, 2, 1, 3]]],
    "proj": [[[4, -8, 2, 6], [1, 2, -2, 4]], [[3, -1, 2, 0], [-5, 10, 15, 5]]],
    "proj_abs": [[[4, 8, 2, 6], [1, 2, 3, 4]], [[3, 5, 2, 6], [7, 10, 15, 8]]],
    "down_norm_sq": [[[1, 6, 2, 1], [1, 1, 3, 1]], [[2, 1, 1, 1], [1, 4, 1, 1]]],
}


def by_hand() -> CalibrationStats:
    stats = make_stats(n_layer=2, n_expert=2, n_ff=4, top_k=1, tokens=6)
    assert set(SUMS) == set(EXPERT_SUMS) and set(NEURONS) == {*NEURON_SUMS, *WEIGHT_NORMS}
    return replace(
        stats,
        experts={name: np.array([value], dtype=float) for name, value in SUMS.items()},
        neurons={name: np.array(value, dtype=float) for name, value in NEURONS.items()},
    )


def routers(method: str, **options) -> list[tuple[int, ...]]:
    """Which experts stay when half of them go."""
    return [layer.router for layer in make_plan(by_hand(), Recipe(method, 0.5, **options)).layers]


def kept(method: str, ratio: float, **options) -> list[list[list[int]]]:
    """Which neurons stay."""
    plan = make_plan(by_hand(), Recipe(method, ratio, align=1, **options))
    assert all(layer.router == (0, 1) for layer in plan.layers)
    return [[own.tolist() for own in layer.retained] for layer in plan.layers]


# Scores [layer][expert], and the expert of each layer that stays.
WHOLE = {
    "frequency": ([[4, 2], [1, 5]], [0, 1]),
    "seer": ([[1, 1.5], [0.75, 3]], [1, 1]),
    "ean": ([[8, 6], [7, 5]], [0, 0]),
    "reap": ([[2 / 4, 3 / 2], [5.25 / 1, 4 / 5]], [1, 0]),
    "man": ([[8 / 4, 6 / 2], [7 / 1, 5 / 5]], [1, 0]),
    "msan": ([[20 / 4, 8 / 2], [49 / 1, 50 / 5]], [0, 0]),
    "gated-sum": ([[2, 3], [5.25, 4]], [1, 0]),
    "gated-sum-sq": ([[1.5, 6], [27.5625, 30]], [1, 1]),
    "1,2,0": ([[0.5 / 4, 1.25 / 2], [0.5625 / 1, 2 / 5]], [1, 0]),
    "0,0,2": ([[20, 8], [49, 50]], [0, 1]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_experts(name):
    scores, stay = WHOLE[name]
    assert expert_criterion(name).measure(by_hand()) == pytest.approx(np.array(scores))
    assert routers(name) == [(expert,) for expert in stay]


def test_tenp_importance():
    """Layer 0 has (3, 4) of norm 5, layer 1 (12, 5) of norm 13."""
    want = np.array([[0.6, 0.8], [12 / 13, 5 / 13]])
    assert expert_criterion("tenp-importance").measure(by_hand()) == pytest.approx(want)


# Scores [layer][expert][neuron].
SCORES = {
    "second-moment": [[[4, 6, 4, 3], [8, 5, 21, 6]], [[2, 9, 1, 1], [2, 8, 2, 6]]],
    "gated-second-moment": [[[1, 6, 2, 1], [2, 5, 3, 4]], [[2, 3, 1, 1], [1, 8, 1, 3]]],
    "projection": [[[4, 8, 2, 6], [1, 2, 3, 4]], [[3, 5, 2, 6], [7, 10, 15, 8]]],
    "enp": [[[1, -2, 0.5, 1.5], [0.5, 1, -1, 2]], [[3, -1, 2, 0], [-1, 2, 3, 1]]],
}


@pytest.mark.parametrize("name", SCORES)
def test_neurons(name):
    assert neuron_criterion(name).measure(by_hand()) == pytest.approx(np.array(SCORES[name]))


def test_global():
    """Seven of the 16 neurons stay, from one budget: 8, 6, 5, 4 and the three 3s."""
    assert kept("global", 9 / 16) == [[[1], [1, 2, 3]], [[1], [1, 3]]]
    # By the other criterion they are 21, 9, 8, 8, 6, 6, 6.
    assert kept("global", 9 / 16, criterion="second-moment") == [[[1], [0, 2, 3]], [[1], [1, 3]]]


def test_auto():
    """By OBS costs where there are any: the three 9s and the three 8s. Without, as global."""
    assert kept("auto", 9 / 16) == kept("global", 9 / 16)
    stats = by_hand()
    stats.neurons["obs"] = np.array([[[9, 0, 0, 1], [8, 0, 0, 0]], [[0, 9, 8, 0], [9, 0, 8, 0]]], dtype=float)
    plan = make_plan(stats, Recipe("auto", 10 / 16, align=1))
    assert [[own.tolist() for own in layer.retained] for layer in plan.layers] == [[[0], [0]], [[1, 2], [0, 2]]]


def test_enp():
    """Half of every expert: the two neurons with the largest signed mean projection; a large negative one goes first."""
    assert kept("enp", 0.5) == [[[0, 3], [1, 3]], [[0, 2], [1, 2]]]
    assert kept("enp", 0.25) == [[[0, 2, 3], [0, 1, 3]], [[0, 2, 3], [1, 2, 3]]]
    # By magnitude it would stay.
    assert kept("enp", 0.5, criterion="projection") == [[[1, 3], [2, 3]], [[1, 3], [1, 2]]]


def test_tenp():
    """rho = 10/16 of the neurons stay. Half of the experts are whole; of these two the trapezoid 1 : 2 gives
    2/3 and 4/3, so 1 and 1: the remainder 2/3 is the larger one. Whole are expert 1 of layer 0 (0.8) and expert 0 of
    layer 1 (12/13). The others keep beta = (10/16 - 1/2) / (1 - 1/2) = 1/4 of their neurons, the best one by ENP."""
    assert kept("tenp", 6 / 16, whole=0.5) == [[[3], [0, 1, 2, 3]], [[0, 1, 2, 3], [2]]]
    # Three whole experts would be 1 and 2; at rho = 13/16 the one that is left keeps (13/16 - 3/4) / (1/4) = 1/4.
    assert kept("tenp", 3 / 16, whole=0.75) == [[[3], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]]
    # Turned round, layer 0 has both.
    assert kept("tenp", 3 / 16, whole=0.75, schedule="reverse") == [
        [[0, 1, 2, 3], [0, 1, 2, 3]],
        [[0, 1, 2, 3], [2]],
    ]
    # One slice more than beta gives: the more important of the narrow experts, 0.6 against 5/13, has it.
    assert kept("tenp", 5 / 16, whole=0.5) == [[[0, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [2]]]


def test_family():
    assert routers("family", calibration="task") == [(1,), (0,)] == routers("gated-sum")
    stats = by_hand()
    stats.experts["norm"][:] = [[[8, 3], [7, 5]]]  # mean norms 2 and 1.5, 7 and 1
    for data, stay in (("task", [(1,), (0,)]), ("general", [(0,), (0,)])):
        plan = make_plan(stats, Recipe("family", 0.5, calibration=data))
        assert [layer.router for layer in plan.layers] == stay


def test_dern():
    """r = sum of the weights / 6 tokens."""
    plan = make_plan(by_hand(), Recipe("dern", 0.5))
    assert [layer.router for layer in plan.layers] == [(1,), (1,)]
    assert [layer.importance for layer in plan.layers] == [(1 / 6, 1.5 / 6), (0.75 / 6, 3 / 6)]


def test_inverted():
    assert routers("inverted") == [(0,), (1,)]  # the others of gated-sum
    assert routers("inverted", criterion="frequency") == [(1,), (0,)]


def test_random():
    """numpy's generator of the seed draws [layer][expert]: 0.637, 0.270 | 0.041, 0.017 for 0, 0.512, 0.950 | 0.144, 0.949
    for 1; the larger stays."""
    assert routers("random") == [(0,), (0,)] == routers("random", seed=0)
    assert routers("random", seed=1) == [(1,), (1,)]


def test_random_slices():
    """As many neurons as asked for, the same for the same seed, others for another."""
    first, again, other = (kept("random-slices", 0.5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sum(len(own) for layer in first for own in layer) == 8
    drawn = np.random.default_rng(0).random((2, 2, 4))
    best = sorted(np.ndindex(2, 2, 4), key=lambda at: -drawn[at])[:8]
    assert sorted((at, e, k) for at, layer in enumerate(first) for e, own in enumerate(layer) for k in own) == sorted(
        best
    )


def test_every_method_is_here():
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert set(METHODS) <= tested | set(WHOLE)
    assert set(EXPERT_CRITERIA) <= set(WHOLE) | {"tenp-importance"}
    assert set(NEURON_CRITERIA) <= set(SCORES) | {"obs"}  # `test_obs` has that one


# --- TENP from the tokens to the plan -----------------------------------------------------------------------------------


class TwoExperts(nn.Module):
    """2 experts of 2 neurons in a model of width 2: gate and up are the identity and act(x) = x, so that h = x * x."""

    def __init__(self):
        super().__init__()
        eye = torch.eye(2)
        self.gate_up_proj = nn.Parameter(torch.cat([eye, eye]).repeat(2, 1, 1))
        self.down_proj = nn.Parameter(torch.tensor([[[3.0, 0], [4, 1]], [[0.0, -1], [2, 0]]]))
        self.act_fn = nn.Identity()


def test_tenp_step_by_step():
    """Text 0: x = (1, 0) goes to expert 0 with g = 1/2 and to expert 1 with g = 1; text 1: (0, 2) to expert 0 with g = 1,
    to expert 1 with g = 1/4, and (1, 2) to expert 1 with g = 1/2.

    expert 0, text 0: h = (1, 0), f = (3, 4), |f| = 5, cos(x, f) = 3/5: I = 1/2 x 5 x 2/5 = 1
    expert 1, text 0: h = (1, 0), f = (0, 2), |f| = 2, cos = 0:          I = 1 x 2 x 1 = 2
    expert 0, text 1: h = (0, 4), f = (0, 4), |f| = 4, cos = 1:          I = 0
    expert 1, text 1: h = (0, 4), f = (-4, 0), |f| = 4, cos = 0:         I = 1/4 x 4 x 1 = 1
                      h = (1, 4), f = (-4, 2), |f| = sqrt 20, cos = 0:   I = 1/2 sqrt 20 = sqrt 5
    """
    recorder = ExpertRecorder(TwoExperts(), 2, (2, 2, 2), layer=0)
    recorder(torch.tensor([[1.0, 0]]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 1]]))
    recorder.domain = 1
    recorder(torch.tensor([[0.0, 2]]), torch.tensor([[0, 1]]), torch.tensor([[1, 0.25]]))
    recorder(torch.tensor([[1.0, 2]]), torch.tensor([[1]]), torch.tensor([[0.5]]))
    turn = [[1, 2], [0, 1 + sqrt(5)]]
    assert recorder.experts["turn"].numpy() == pytest.approx(np.array(turn), rel=1e-6, abs=1e-6)
    # The signed projections h_k <W_:k, f> / |f|, added. Expert 0: 1 x (3, 4).(3, 4) / 5 and 4 x (0, 1).(0, 4) / 4.
    # Expert 1: neuron 0 adds 1 x (0, 2).(0, 2) / 2 = 2 and 1 x (0, 2).(-4, 2) / sqrt 20 = 4 / sqrt 20;
    # neuron 1 adds 4 x (-1, 0).(-4, 0) / 4 = 4 and 4 x (-1, 0).(-4, 2) / sqrt 20 = 16 / sqrt 20.
    proj = [[5, 4], [2 + 4 / sqrt(20), 4 + 16 / sqrt(20)]]
    assert recorder.neurons["proj"].numpy() == pytest.approx(np.array(proj), rel=1e-6)

    arrays = recorder.arrays()
    blank = make_stats(n_layer=1, n_expert=2, n_ff=2, n_embd=2, top_k=1)
    stats = replace(
        blank,
        domains=(Domain("code", "0", 1), Domain("prose", "1", 2)),
        experts={name: arrays[f"expert.{name}"][:, None] for name in EXPERT_SUMS},
        neurons={name: arrays[f"neuron.{name}"][None] for name in (*NEURON_SUMS, *WEIGHT_NORMS)},
    )
    # Each text by its L2 norm, then added: (1, 2) / sqrt 5 + (0, 1). Expert 1 matters more; without the cosine it were
    # expert 0 in text 0 (2.5 against 2) and in text 1 (4 against 3.24).
    importance = np.array([[1 / sqrt(5), 2 / sqrt(5) + 1]])
    assert expert_criterion("tenp-importance").measure(stats) == pytest.approx(importance)
    without = np.array([[[2.5, 2]], [[4, 1 + sqrt(5)]]])
    assert stats.experts["gate_norm"] == pytest.approx(without, rel=1e-6)
    assert (without[..., 0] > without[..., 1]).all()
    # Means over 2 and 3 tokens, all texts together.
    enp = np.array([[[2.5, 2], [(2 + 4 / sqrt(20)) / 3, (4 + 16 / sqrt(20)) / 3]]])
    assert neuron_criterion("enp").measure(stats) == pytest.approx(enp)
    # rho = 3/4, alpha = 1/2, so beta = (3/4 - 1/2) / (1 - 1/2) = 1/2: expert 1 whole, expert 0 keeps its neuron 0.
    plan = make_plan(stats, Recipe("tenp", 0.25, align=1, whole=0.5))
    assert [own.tolist() for own in plan.layers[0].retained] == [[0], [0, 1]]


def test_the_published_budget():
    """rho = 0.6 and alpha = 0.3 over 4 layers of 10 experts of 70 neurons: beta = (0.6 - 0.3) / (1 - 0.3) = 3/7, 30 neurons.

    12 experts are whole: by weights 1, 4/3, 5/3, 2 of sum 6 that is 2, 2.67, 3.33, 4, so 2, 3, 3, 4.
    """
    stats = make_stats(n_layer=4, n_expert=10, n_ff=70)
    plan = make_plan(stats, Recipe("tenp", 0.4, align=1, whole=0.3))
    assert [layer.widths.count(70) for layer in plan.layers] == [2, 3, 3, 4]
    assert {width for layer in plan.layers for width in layer.widths} == {70, 30}
    assert plan.kept_share == pytest.approx(0.6)
    importance, scores = expert_criterion("tenp-importance").measure(stats), neuron_criterion("enp").measure(stats)
    for row, layer in enumerate(plan.layers):
        whole = {e for e, width in enumerate(layer.widths) if width == 70}
        assert whole == set(np.argsort(-importance[row])[: len(whole)].tolist())
        for expert in set(range(10)) - whole:
            assert set(layer.retained[expert].tolist()) == set(np.argsort(-scores[row, expert])[:30].tolist())
    with pytest.raises(GgufToolError, match="at most 0.6 of the experts can stay whole"):
        Recipe("tenp", 0.4, whole=0.61)
