"""Depth schedules: how many of TENP's whole experts each layer gets. Pure.

TENP (arXiv 2606.09885) gives deep layers more of them, in a trapezoid whose counts are not published; later work disagrees
about depth. So the shape over depth is one plug-in of several: a schedule gives each layer a weight, and
`whole_by_layer` shares the whole experts out by these weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .recipe import Recipe
from .stats import Array
from .tiers import Ints


def _measured(recipe: Recipe, n_layers: int) -> Array:
    """The recipe's own: the KL divergence that narrowing each layer alone cost, see `sensitivity`."""
    return np.ones(n_layers) if recipe.layer_weights is None else np.array(recipe.layer_weights, dtype=np.float64)


# Name -> weights of the layers by rising depth, [L]; only what they are to each other counts.
SCHEDULES: dict[str, Callable[[Recipe, int], Array]] = {
    "trapezoid": lambda recipe, n_layers: np.linspace(*recipe.depth, n_layers),
    "uniform": lambda recipe, n_layers: np.ones(n_layers),
    "reverse": lambda recipe, n_layers: np.linspace(*recipe.depth[::-1], n_layers),
    "measured": _measured,
}


def whole_by_layer(total: int, weights: Array, n_expert: int) -> Ints:
    """`total` whole experts over the layers in proportion to `weights` [L], by largest remainder: [L].

    A layer that its share would overfill is full, and what it cannot take goes to the others in proportion; layers of
    weight 0 get some, all alike, only when the others are full. Of equal remainders the shallower layer's wins.
    """
    share = np.zeros(len(weights))
    wish = np.where(weights > 0, weights, 0.0)
    total = min(total, n_expert * len(weights))
    while (left := total - float(share.sum())) > 1e-9:
        open_ = share < n_expert
        if not wish[open_].any():
            wish = np.where(open_, 1.0, 0.0)
        part = np.where(open_, wish, 0.0)
        more = share + left * part / part.sum()
        # Those that are overfilled are settled first: what they leave changes the share of the others.
        over = open_ & (more >= n_expert)
        share = np.where(over, float(n_expert), share) if over.any() else more
    # A share is a whole number but for rounding where the proportions come out even.
    share = np.where(np.abs(share - np.round(share)) < 1e-9, np.round(share), share)
    counts = np.floor(share).astype(np.int64)
    order = np.argsort(counts - share, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
