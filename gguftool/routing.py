"""How the router shared out the tokens, read from the counts of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .stats import Array, CalibrationStats


@dataclass(frozen=True)
class LayerRouting:
    """One layer, all texts together.

    Attributes:
        layer: decoder index.
        most, least: experts that saw the most and the fewest tokens; most_share, least_share: of all tokens, so that the
            shares of a layer add up to the number of experts used per token. least_tokens: how many those are.
        entropy: -sum of p ln p in nats, p an expert's share of the routed tokens. effective: exp of it, the number of
            experts that would have this entropy if all were used alike (perplexity, Hill number of order 1).
        unrouted: experts that no token was routed to.
    """

    layer: int
    most: int
    most_share: float
    least: int
    least_share: float
    least_tokens: int
    entropy: float
    effective: float
    unrouted: tuple[int, ...]


@dataclass(frozen=True)
class ExpertRouting:
    """One expert: tokens, their share of all tokens and of each text's, and means over those tokens (None without any)."""

    expert: int
    tokens: int
    share: float
    shares: tuple[float, ...]
    gate: float | None
    norm: float | None


def routing(stats: CalibrationStats) -> list[LayerRouting]:
    """Every layer with experts, by rising depth."""
    counts = stats.expert("count")
    return [_layer(index, row, stats.tokens) for index, row in zip(stats.model.moe_layers, counts, strict=True)]


def _layer(index: int, counts: Array, tokens: int) -> LayerRouting:
    share = counts / counts.sum()
    routed = share[share > 0]
    entropy = max(0.0, float(-(routed * np.log(routed)).sum()))
    most, least = int(counts.argmax()), int(counts.argmin())
    return LayerRouting(
        index, most, float(counts[most] / tokens), least, float(counts[least] / tokens), int(counts[least]), entropy,
        float(np.exp(entropy)), tuple(np.flatnonzero(counts == 0).tolist()),
    )  # fmt: skip


def experts_of(stats: CalibrationStats, row: int) -> list[ExpertRouting]:
    """Every expert of the `row`-th layer with experts; mean router weight and mean length of the output, ungated."""
    counts = stats.experts["count"][:, row]
    each = np.array([domain.tokens for domain in stats.domains], dtype=np.float64)
    total, shares = counts.sum(axis=0), counts / each[:, None]
    gate, norm = stats.expert("gate")[row], stats.expert("norm")[row]
    return [
        ExpertRouting(
            expert, int(count), float(count / stats.tokens), tuple(shares[:, expert].tolist()),
            float(gate[expert] / count) if count else None, float(norm[expert] / count) if count else None,
        )
        for expert, count in enumerate(total)
    ]  # fmt: skip
