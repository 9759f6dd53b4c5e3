"""Tiers: the few widths that the experts of one layer may have, chosen so that rounding to them costs least.

An expert's value as a function of its width is concave, because its neurons are sorted by saliency. So at a price per
neuron the best of a set of widths is one of the two that enclose the unconstrained optimum, and the best set is found
exactly by dynamic programming over the widths of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .stats import Array

Ints = NDArray[np.int64]


MAX_GRID = 64


def width_grid(n_ff: int, align: int) -> Ints:
    """The widths that an expert may keep: 0, every multiple of `align` below `n_ff`, and `n_ff`.

    Wide experts (Mixtral: 14336 neurons) take a coarser multiple, so that the grid has at most MAX_GRID steps: finer
    steps there bring nothing that can be measured and the search over widths is quadratic in them.
    """
    align *= -(-n_ff // (align * MAX_GRID))
    return np.unique(np.append(np.arange(0, n_ff, align), n_ff)).astype(np.int64)


def value_curves(saliency: Array, grid: Ints) -> Array:
    """Value kept by the best `grid[i]` neurons of every expert: [L, E, K] -> [L, E, len(grid)].

    A negative saliency (ENP's projection may be one) counts as zero here: a neuron that is kept cannot cost.
    """
    ordered = -np.sort(-np.maximum(saliency, 0.0), axis=2)
    total = np.concatenate([np.zeros((*ordered.shape[:2], 1)), np.cumsum(ordered, axis=2)], axis=2)
    return total[:, :, grid]


def best_widths(curves: Array, grid: Ints, price: float, max_tiers: int) -> Ints:
    """Widths of one layer's experts that maximise sum(value - price * width) with at most `max_tiers` widths above 0.

    Args:
        curves: value of each expert at each width of the grid, [E, G], concave along the grid.
        grid: widths, rising, grid[0] == 0: [G].
        price: value that one neuron has to bring.

    Returns:
        Index into the grid for every expert, [E].
    """
    n_grid = len(grid)
    cost = price * grid[None, :] - curves
    between, above, at_zero = _segments(cost)
    best = np.full((max_tiers + 1, n_grid), np.inf)
    came = np.zeros((max_tiers + 1, n_grid), dtype=np.int64)
    best[0, 0] = at_zero
    for used in range(1, max_tiers + 1):
        step = best[used - 1][:, None] + between
        came[used] = step.argmin(axis=0)
        best[used] = step.min(axis=0)
    used, last = (int(i) for i in np.unravel_index(np.argmin(best + above[None, :]), best.shape))
    chosen = [last]
    while used > 0:
        last = int(came[used, last])
        used -= 1
        chosen.append(last)
    allowed = np.array(sorted(set(chosen) | {0}))
    return allowed[cost[:, allowed].argmin(axis=1)].astype(np.int64)


def _segments(cost: Array) -> tuple[Array, Array, float]:
    """What experts cost by where the width that they wish for lies, the cheapest of their `cost` [E, G].

    Returns:
        between [G, G]: of those that wish for more than grid[i] and at most grid[j], when i and j are neighbours in the
        chosen set; infinite where j <= i. above [G]: of those that wish for more than grid[i], when they get i. And of
        those that wish for nothing.
    """
    n_expert, n_grid = cost.shape
    wish = cost.argmin(axis=1)
    # In the order of their wishes those of a segment are neighbours, and running sums give every segment's at once.
    order = np.argsort(wish, kind="stable")
    ordered = cost[order]
    first = np.searchsorted(wish[order], np.arange(n_grid), side="right")  # of those that wish for more than i
    between = np.full((n_grid, n_grid), np.inf)
    for i in range(n_grid - 1):
        rest = ordered[first[i] :]
        sums = np.cumsum(np.minimum(rest[:, i : i + 1], rest[:, i + 1 :]), axis=0)
        between[i, i + 1 :] = _up_to(sums, first[i + 1 :] - first[i])
    above = _up_to(np.cumsum(ordered[::-1], axis=0), n_expert - first)
    return between, above, float(ordered[: first[0], 0].sum())


def _up_to(sums: Array, counts: Ints) -> Array:
    """Of running sums [E, G] those over the first counts[g] rows of column g: [G]."""
    if not len(sums):
        return np.zeros(len(counts))
    return np.where(counts > 0, sums[counts - 1, np.arange(len(counts))], 0.0)


@dataclass(frozen=True)
class Budget:
    """What a model may keep: `neurons` over all experts and layers, at widths of `grid`, in at most `max_tiers` a layer."""

    neurons: int
    grid: Ints
    max_tiers: int


def allocate(curves: Array, budget: Budget) -> Ints:
    """Widths for every expert of every layer that keep the most value within one global budget.

    A bisection over the price of a neuron; each layer then has its best set of tiers at that price. What the last step
    leaves over goes to whole layers, then to single experts that fit into the next tier of their layer.

    Args:
        curves: [L, E, G] from `value_curves`.

    Returns:
        Widths, [L, E].
    """
    grid, n_layers = budget.grid, len(curves)
    if budget.neurons < n_layers * int(grid[1]):
        raise GgufToolError(
            f"{budget.neurons} neurons would remain for {n_layers} layers, less than one tier of {grid[1]} in each; "
            "lower --ratio"
        )

    def solve(price: float) -> Ints:
        return np.stack([_never_empty(best_widths(layer, grid, price, budget.max_tiers), layer) for layer in curves])

    def kept(choice: Ints) -> int:
        return int(grid[choice].sum())

    # Free neurons first: what has no value at all is not kept unless everything is.
    low, high = 0.0, float((curves[:, :, 1] / grid[1]).max()) * 2 + 1e-300
    full = np.full(curves.shape[:2], len(grid) - 1, dtype=np.int64)
    if kept(full) <= budget.neurons:
        return grid[full]
    rich, poor = full, solve(high)
    for _ in range(60):
        price = (low * high) ** 0.5 if low > 0 else high / 2**8
        middle = solve(price)
        if kept(middle) <= budget.neurons:
            poor, high = middle, price
        else:
            rich, low = middle, price
        if high - low <= 1e-12 * high or high < 1e-290:
            break
    if low == 0.0:  # everything of value fits: what is left has none, and no layer deserves it more than another
        rich = poor
    return grid[_spend_rest(_layers_from_rich(poor, rich, budget), curves, budget)]


def _never_empty(choice: Ints, curves: Array) -> Ints:
    """A layer in which nothing is kept cannot be written: its best expert keeps the narrowest width."""
    if not choice.any():
        choice = choice.copy()
        choice[int(curves[:, 1].argmax())] = 1
    return choice


def _layers_from_rich(poor: Ints, rich: Ints, budget: Budget) -> Ints:
    chosen = poor.copy()
    left = budget.neurons - int(budget.grid[chosen].sum())
    for layer in range(len(chosen)):
        more = int(budget.grid[rich[layer]].sum() - budget.grid[chosen[layer]].sum())
        if 0 < more <= left:
            chosen[layer] = rich[layer]
            left -= more
    return chosen


def _spend_rest(choice: Ints, curves: Array, budget: Budget) -> Ints:
    """Spends what is left of the budget: first where it brings value, then on neurons without any, until nothing fits.

    Neurons that the calibration saw silent are worth more than none, and a ratio that was asked for is kept.
    """
    chosen = _widen_by_value(choice, curves, budget)
    while True:
        before = int(budget.grid[chosen].sum())
        for new_widths in (False, True):
            chosen = _fill(chosen, budget, new_widths)
        chosen = _raise_tiers(chosen, budget)
        if int(budget.grid[chosen].sum()) == before:
            return chosen


def _widen_by_value(choice: Ints, curves: Array, budget: Budget) -> Ints:
    """Widens single experts to the next width that their layer uses, best value per neuron first, while it fits."""
    grid, chosen = budget.grid, choice.copy()
    left = budget.neurons - int(grid[chosen].sum())
    steps = [_best_step(row, curves[layer], budget, left) for layer, row in enumerate(chosen)]
    while True:
        layer = max(range(len(steps)), key=lambda i: steps[i][0])
        density, expert, target = steps[layer]
        if density <= 0:
            return chosen
        cost = int(grid[target] - grid[chosen[layer, expert]])
        if cost <= left:
            chosen[layer, expert] = target
            left -= cost
        steps[layer] = _best_step(chosen[layer], curves[layer], budget, left)


def _best_step(row: Ints, curves: Array, budget: Budget, left: int) -> tuple[float, int, int]:
    """(value per neuron, expert, new width) of the best widening in a layer that costs at most `left`."""
    grid = budget.grid
    used = _used(row)
    if len(used) < budget.max_tiers:
        used = np.arange(1, len(grid))
    target = used[np.minimum(np.searchsorted(used, row, side="right"), len(used) - 1)]
    cost = grid[target] - grid[row]
    experts = np.arange(len(row))
    gain = curves[experts, target] - curves[experts, row]
    density = np.where((cost > 0) & (cost <= left), gain / np.maximum(cost, 1), -np.inf)
    best = int(density.argmax())
    return float(density[best]), best, int(target[best])


def _fill(choice: Ints, budget: Budget, new_widths: bool) -> Ints:
    """Widens experts as far as it fits, the narrowest of every layer first, to widths that their layer uses.

    With `new_widths` to any width, where the layer has fewer than it may.
    """
    grid, chosen = budget.grid, choice.copy()
    left = budget.neurons - int(grid[chosen].sum())
    order = np.argsort(chosen, axis=1, kind="stable")
    for rank in range(order.shape[1]):
        for layer, expert in enumerate(order[:, rank]):
            if left < int(np.diff(grid).min()):
                return chosen
            row = chosen[layer]
            allowed = _used(row)
            if new_widths and len(allowed) < budget.max_tiers:
                allowed = np.arange(1, len(grid))
            fits = allowed[(allowed > row[expert]) & (grid[allowed] - grid[row[expert]] <= left)]
            if len(fits):
                left -= int(grid[fits[-1]] - grid[row[expert]])
                row[expert] = fits[-1]
    return chosen


def _raise_tiers(choice: Ints, budget: Budget) -> Ints:
    """Widens whole tiers as far as it fits, those of few experts first: no layer gets more widths by that."""
    grid, chosen = budget.grid, choice.copy()
    left = budget.neurons - int(grid[chosen].sum())
    tiers = [(int((row == width).sum()), layer, int(width)) for layer, row in enumerate(chosen) for width in set(row)]
    for count, layer, width in sorted(tier for tier in tiers if tier[2] > 0):
        reach = int(np.searchsorted(grid, grid[width] + left // count, side="right")) - 1
        if reach > width:
            members = chosen[layer] == width
            left -= int(members.sum() * (grid[reach] - grid[width]))
            chosen[layer, members] = reach
    return chosen


def _used(row: Ints) -> Ints:
    """The widths above zero of a layer, as indices into the grid."""
    return np.unique(row[row > 0])
