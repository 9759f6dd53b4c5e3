from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguftool.errors import GgufToolError
from gguftool.tiers import MAX_GRID, Budget, allocate, best_widths, value_curves, width_grid


def brute_force(curves, grid, price, max_tiers):
    best = np.inf
    for size in range(max_tiers + 1):
        for chosen in combinations(range(1, len(grid)), size):
            allowed = [0, *chosen]
            best = min(best, (price * grid[allowed] - curves[:, allowed]).min(axis=1).sum())
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.0, 0.4))
def test_the_set_of_tiers_is_the_best_there_is(seed, max_tiers, price):
    rng = np.random.default_rng(seed)
    grid = width_grid(48, 8)
    curves = value_curves(rng.random((1, 6, 48)) ** 4, grid)[0]
    chosen = best_widths(curves, grid, price, max_tiers)
    assert len(set(chosen[chosen > 0])) <= max_tiers
    found = (price * grid[chosen] - curves[np.arange(6), chosen]).sum()
    assert found == pytest.approx(brute_force(curves, grid, price, max_tiers), abs=1e-9)


def by_loops(curves, grid, price, max_tiers):
    """`best_widths` in plain loops: the same sums in another order, the same ties."""
    cost = price * grid[None, :] - curves
    wish, count = cost.argmin(axis=1), len(grid)
    between = np.full((count, count), np.inf)
    for i in range(count):
        for j in range(i + 1, count):
            inside = (wish > i) & (wish <= j)
            between[i, j] = np.minimum(cost[inside, i], cost[inside, j]).sum()
    above = np.array([cost[wish > i, i].sum() for i in range(count)])
    best = np.full((max_tiers + 1, count), np.inf)
    came = np.zeros((max_tiers + 1, count), dtype=np.int64)
    best[0, 0] = cost[wish == 0, 0].sum()
    for used in range(1, max_tiers + 1):
        step = best[used - 1][:, None] + between
        came[used], best[used] = step.argmin(axis=0), step.min(axis=0)
    used, last = np.unravel_index(np.argmin(best + above[None, :]), best.shape)
    chosen = [int(last)]
    while used > 0:
        chosen.append(int(came[used, chosen[-1]]))
        used -= 1
    allowed = np.array(sorted({0, *chosen}))
    return allowed[cost[:, allowed].argmin(axis=1)]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 24), st.integers(1, 40), st.sampled_from([0.0, 0.4, 1.0])
)
def test_widths_are_those_of_plain_loops_ties_included(seed, max_tiers, price, n_expert, dead):
    """Values in sixty-fourths add up without rounding in any order, so that what is equal is equal to the bit; there are
    many equal ones, experts without any value, and experts that are alike."""
    rng = np.random.default_rng(seed)
    grid = width_grid(96, 8)
    saliency = np.floor(rng.random((1, n_expert, 96)) ** 3 * 24) / 64
    saliency[:, rng.random(n_expert) < dead] = 0.0
    curves = value_curves(saliency[:, rng.integers(0, n_expert, n_expert)], grid)[0]
    want = by_loops(curves, grid, price / 64, max_tiers)
    assert np.array_equal(best_widths(curves, grid, price / 64, max_tiers), want)


@pytest.mark.parametrize("seed", range(20))
def test_widths_are_those_of_plain_loops(seed):
    rng = np.random.default_rng(seed)
    grid = width_grid(512, 8)
    curves = value_curves(rng.random((1, 64, 512)) ** 4 * rng.random((1, 64, 1)), grid)[0]
    for price in (0.0, 0.003, 0.05, 0.2):
        assert np.array_equal(best_widths(curves, grid, price, 4), by_loops(curves, grid, price, 4))


def test_grid():
    assert width_grid(100, 32).tolist() == [0, 32, 64, 96, 100]
    assert width_grid(64, 64).tolist() == [0, 64]
    wide = width_grid(14336, 32)
    assert len(wide) <= MAX_GRID + 1 and wide[-1] == 14336 and wide[1] % 32 == 0


def test_value_curves_by_hand():
    curves = value_curves(np.array([[[1.0, 5.0, -3.0, 2.0]]]), np.array([0, 1, 2, 4]))
    assert curves.tolist() == [[[0.0, 5.0, 7.0, 8.0]]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_budget_holds_and_is_used(seed, share, max_tiers, dead):
    rng = np.random.default_rng(seed)
    grid = width_grid(64, 8)
    saliency = rng.random((3, 8, 64)) ** 3
    saliency[rng.random((3, 8)) < dead] = 0.0  # experts that no token was routed to
    saliency[:, :, : int(64 * rng.random() * dead)] = 0.0  # neurons that were silent
    curves = value_curves(saliency, grid)
    budget = Budget(int(share * 3 * 8 * 64), grid, max_tiers)
    widths = allocate(curves, budget)
    assert widths.sum() <= budget.neurons
    assert (widths.sum(axis=1) > 0).all()
    assert all(len(set(row[row > 0])) <= max_tiers for row in widths)
    # What is left over is less than the widest step between two tiers of a layer.
    assert budget.neurons - widths.sum() < 64


def test_more_tiers_keep_more_value():
    rng = np.random.default_rng(5)
    grid = width_grid(64, 8)
    curves = value_curves(rng.random((2, 16, 64)) ** 4 * rng.random((2, 16, 1)), grid)
    kept = []
    for max_tiers in (1, 2, 4, 8):
        widths = allocate(curves, Budget(1200, grid, max_tiers))
        at = np.searchsorted(grid, widths)
        kept.append(np.take_along_axis(curves, at[..., None], axis=2).sum())
    assert kept == sorted(kept) and kept[-1] > kept[0]


def test_a_layer_without_value_still_keeps_one_tier():
    grid = width_grid(32, 8)
    saliency = np.ones((2, 4, 32))
    saliency[1] = 0.0
    widths = allocate(value_curves(saliency, grid), Budget(4 * 32, grid, 4))
    assert widths[1].sum() == 8


@pytest.mark.parametrize("max_tiers", [2, 4])
def test_neurons_without_value_are_kept_where_the_ratio_has_room(max_tiers):
    """Half of the experts were never routed: a tenth of the neurons goes, not all that have no value."""
    grid = width_grid(128, 32)
    saliency = np.random.default_rng(0).random((48, 64, 128)) + 0.1
    saliency[:, ::2] = 0.0
    budget = Budget(int(0.9 * saliency.size), grid, max_tiers)
    widths = allocate(value_curves(saliency, grid), budget)
    assert 0 <= budget.neurons - widths.sum() < 32
    assert (widths[:, 1::2] == 128).all()
    kept = widths[:, ::2].sum(axis=1)
    assert kept.max() - kept.min() <= 2 * 128  # no layer pays for the others
    assert all(len(set(row[row > 0])) <= max_tiers for row in widths)


def test_a_budget_below_one_tier_a_layer_is_refused():
    grid = width_grid(32, 8)
    with pytest.raises(GgufToolError, match="lower --ratio"):
        allocate(value_curves(np.ones((4, 2, 32)), grid), Budget(31, grid, 4))
