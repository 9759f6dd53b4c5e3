"""Experts that saw too few tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gguftool.coverage import RANKED, coverage
from gguftool.stats import Domain
from synthetic import make_stats

K = 80  # neurons, so that the refit wants 160 tokens


def counted(rows, n_ctx=100):
    """Stats whose experts saw these tokens, [layers][experts], two each of them routed to a token, in two domains."""
    stats = make_stats(n_layer=len(rows), n_expert=len(rows[0]), n_ff=K)
    count = np.array(rows, dtype=float)
    tokens = count.sum(axis=1)[0] / 2
    halves = np.stack([count // 2, count - count // 2])
    domains = (Domain("a", "a", int(tokens // 2)), Domain("b", "b", int(tokens - tokens // 2)))
    return replace(stats, domains=domains, n_ctx=n_ctx, experts={**stats.experts, "count": halves})


def test_nothing_is_said_where_all_is_well():
    found = coverage(counted([[160, 240, 400], [300, 300, 200]]))
    assert found.notes() == [] and found.full == 160
    assert all((x.noisy, x.damped, x.windows_to_rank, x.windows_to_refit) == (0, 0, 0, 0) for x in found.layers)


def test_what_each_layer_lacks():
    """400 tokens in windows of 100. Layer 1: 40 tokens want 160, four times as much text, so 12 windows more (6 for 100);
    layer 2: 159 want one token more, 400 / 159 of one, so 1 window; its expert without any token has no rate."""
    found = coverage(counted([[160, 240, 400], [40, 100, 660], [0, 159, 641]]))
    rows = [
        (x.layer, x.least, x.noisy, x.damped, x.unrouted, x.windows_to_rank, x.windows_to_refit) for x in found.layers
    ]
    assert rows == [(0, 160, 0, 0, 0, 0, 0), (1, 40, 1, 2, 0, 6, 12), (2, 0, 1, 2, 1, 0, 1)]
    assert found.as_dict()["layers"][1] == {
        "layer": 1, "least": 40, "noisy": 1, "damped": 2, "unrouted": 0, "windows_to_rank": 6, "windows_to_refit": 12,
    }  # fmt: skip
    first, second = found.notes()
    assert "in 2 of 3 layers 4 of 9 experts saw fewer than 160" in first and f"2 fewer than {RANKED}" in first
    assert first.endswith("worst: layer 1 (2, 1), layer 2 (2, 1)")
    assert "about 6 for 100 tokens each and 12 for 160 tokens each" in second and "1 never routed" in second


def test_the_worst_three_layers_are_named_and_no_rate_is_made_up():
    rows = [[0, 400, 400], [150, 250, 400], [0, 0, 800], [90, 310, 400], [0, 110, 690]]
    assert coverage(counted(rows)).notes()[0].endswith("worst: layer 2 (2, 2), layer 4 (2, 1), layer 0 (1, 1)")
    (_, second) = coverage(counted([[0, 400, 400]])).notes()
    assert second == "more windows that they need: 1 never routed, which has no rate"
