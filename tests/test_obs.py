"""OBS costs: by hand, against brute force, and what a plan makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gguftool import obs
from gguftool.errors import GgufToolError
from gguftool.obs import RIDGE, costs
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.saliency import neuron_criterion
from synthetic import make_stats


def eliminate(gram, down, tokens):
    """The costs of one expert, [K]."""
    return costs(gram[None], down[None], torch.tensor([tokens]))[0]


def test_independent_neurons_cost_what_they_bring():
    """C diagonal: no neuron can take over from another, and the cost is (C_kk + ridge) ||W_:k||^2."""
    gram, down = torch.diag(torch.tensor([4.0, 1.0, 9.0])), torch.tensor([[1.0, 3.0, 0.5], [0.0, 4.0, 0.0]])
    ridge = RIDGE * 14 / 3
    cost = eliminate(gram, down, tokens=1000)
    assert cost.tolist() == pytest.approx([4 + ridge, 25 * (1 + ridge), (9 + ridge) / 4])


def test_a_copy_goes_first_and_costs_nearly_nothing():
    """h_1 = h_0: the first of the two costs a ridge, and the one that is left then carries both columns."""
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    down = torch.tensor([[1.0, 1.0, 1.0]])
    cost = eliminate(gram, down, tokens=1000)
    first, last = sorted(cost[:2].tolist())
    assert first < 0.03 < 0.9 < cost[2].item() < 1.1
    assert last == pytest.approx(4.0, rel=0.05)  # (1 + 1)^2: twice the column
    assert torch.argsort(cost).tolist()[0] in (0, 1)


def test_each_step_is_the_cheapest_and_costs_what_the_refit_loses():
    rng = np.random.default_rng(0)
    h = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8))
    gram, down = h.T @ h, rng.standard_normal((5, 8))
    damped = gram + RIDGE * np.diag(gram).mean() * np.eye(8)

    def lost(kept: list[int]) -> float:
        """The least ||(W - W')h||^2 + ridge ||W - W'||^2 over all W' that are zero outside `kept`."""
        fit = np.zeros_like(down)
        fit[:, kept] = np.linalg.solve(damped[np.ix_(kept, kept)], (down @ damped)[:, kept].T).T
        return float(np.trace((down - fit) @ damped @ (down - fit).T))

    cost = eliminate(torch.tensor(gram), torch.tensor(down), tokens=400).numpy()
    order, kept = np.argsort(cost), list(range(8))
    for step, neuron in enumerate(order):
        steps = {k: lost([i for i in kept if i != k]) - lost(kept) for k in kept}
        assert min(steps, key=steps.__getitem__) == neuron
        kept.remove(int(neuron))
        # Costs only rise: one cheaper than its predecessor counts like that.
        assert cost[neuron] == pytest.approx(max(steps[neuron], cost[order[step - 1]] if step else 0), rel=1e-6)


def test_a_block_costs_what_its_neurons_cost_together(monkeypatch):
    """Two go in each step, of neurons that depend on each other: what a pair costs is the refit without both."""
    monkeypatch.setattr(obs, "MIN_STEPS", 4)
    rng = np.random.default_rng(1)
    h = rng.standard_normal((300, 4)) @ rng.standard_normal((4, 8)) + 0.3 * rng.standard_normal((300, 8))
    gram, down = h.T @ h, rng.standard_normal((5, 8))
    damped = gram + RIDGE * np.diag(gram).mean() * np.eye(8)

    def lost(kept: list[int]) -> float:
        fit = np.zeros_like(down)
        if kept:
            fit[:, kept] = np.linalg.solve(damped[np.ix_(kept, kept)], (down @ damped)[:, kept].T).T
        return float(np.trace((down - fit) @ damped @ (down - fit).T))

    cost = eliminate(torch.tensor(gram), torch.tensor(down), tokens=300).numpy()
    order, kept, floor = np.argsort(cost), list(range(8)), 0.0
    for step in range(0, 8, 2):
        pair = [int(k) for k in order[step : step + 2]]
        single = np.array([lost([i for i in kept if i != k]) - lost(kept) for k in pair])
        left = [i for i in kept if i not in pair]
        shares = (lost(left) - lost(kept)) * single / single.sum()
        for neuron, share in zip(pair, shares, strict=True):
            floor = max(floor, share)
            assert cost[neuron] == pytest.approx(floor, rel=1e-6)
        kept = left


def test_few_tokens_trust_the_refit_less():
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    down = torch.tensor([[1.0, 1.5]])
    alone = torch.tensor([1.0, 2.25])
    full, half, none = (eliminate(gram, down, tokens) for tokens in (4, 2, 0))
    assert torch.allclose(half, (full + alone) / 2, rtol=1e-6) and torch.allclose(none.float(), alone)
    assert torch.equal(eliminate(torch.zeros(2, 2), down, 9), torch.zeros(2, dtype=torch.float64))


def test_stats_without_costs_say_so():
    stats = make_stats()
    with pytest.raises(GgufToolError, match="calibrate --obs"):
        neuron_criterion("obs").measure(stats)
    stats.neurons["obs"] = np.random.default_rng(2).random(stats.neurons["h_sq"].shape)
    plan = make_plan(stats, Recipe("global", 0.5, criterion="obs", align=8))
    worst = np.argsort(stats.neurons["obs"][0, 0])
    kept = plan.layers[0].retained[0]
    assert not set(kept) & set(worst[: 64 - len(kept)])


def test_each_expert_is_worked_on_for_itself():
    rng = np.random.default_rng(3)
    h = torch.tensor(rng.standard_normal((5, 60, 12)))
    h[2] = 0  # a silent expert
    grams, downs = h.transpose(1, 2) @ h, torch.tensor(rng.standard_normal((5, 7, 12)))
    tokens = torch.tensor([60, 12, 60, 0, 60])
    together = costs(grams, downs, tokens)
    for gram, down, n, own in zip(grams, downs, tokens, together, strict=True):
        assert torch.allclose(eliminate(gram, down, int(n)), own)
    assert together[2].tolist() == [0.0] * 12 and torch.isfinite(together).all()
