"""Criteria: how much an expert, or a neuron inside one, is worth. Pure functions of CalibrationStats.

Notation as in `stats`. One expert family covers the published criteria (arXiv 2606.15716):

    S_e(b, alpha, beta) = N_e^-b * sum over the tokens routed to e of g_e^alpha * ||f_e||^beta
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

import numpy as np

from .errors import GgufToolError
from .stats import Array, CalibrationStats

# (alpha, beta) -> the accumulator that holds the sum.
_SUMS = {
    (0, 0): "count", (1, 0): "gate", (2, 0): "gate_sq", (0, 1): "norm", (0, 2): "norm_sq",
    (1, 1): "gate_norm", (2, 2): "gate_sq_norm_sq",
}  # fmt: skip

FAMILY_PAPER = "arXiv 2606.15716"


@dataclass(frozen=True)
class Criterion:
    """A named criterion: `measure(stats)` gives [L, E] for experts or [L, E, K] for neurons; larger is worth more."""

    name: str
    formula: str
    source: str
    measure: Callable[[CalibrationStats], Array]


def family(b: int, alpha: int, beta: int) -> Callable[[CalibrationStats], Array]:
    """The expert criterion S_e(b, alpha, beta), [L, E]. An expert that was never routed has no mean: it gets 0.

    Raises GgufToolError for exponents whose sum calibration does not take.
    """
    if b not in (0, 1) or (alpha, beta) not in _SUMS:
        known = ", ".join(f"({b},{a},{c})" for b in (0, 1) for a, c in sorted(_SUMS))
        raise GgufToolError(f"family ({b},{alpha},{beta}) is not measured by calibration; measured are {known}")

    def measure(stats: CalibrationStats) -> Array:
        total, count = stats.expert(_SUMS[alpha, beta]), stats.expert("count")
        return total if b == 0 else np.divide(total, count, out=np.zeros_like(total), where=count > 0)

    return measure


def tenp_importance(stats: CalibrationStats, mix: Sequence[float] | None = None) -> Array:
    """I_e = sum of g ||f|| (1 - cos(x, f)), normalised in each layer and domain by its L2 norm, then added: [L, E].

    `mix` holds a weight for each of the D domains, by which they are added; None adds them alike.
    """
    turn = stats.experts["turn"]
    length = np.linalg.norm(turn, axis=2, keepdims=True)
    normalised = np.divide(turn, length, out=np.zeros_like(turn), where=length > 0)
    return np.tensordot(np.ones(len(turn)) if mix is None else np.array(mix, dtype=np.float64), normalised, axes=1)


def _enp(stats: CalibrationStats) -> Array:
    count = stats.expert("count")[:, :, None]
    proj = stats.neurons["proj"]
    return np.divide(proj, count, out=np.zeros_like(proj), where=count > 0)


def _gated_second_moment(stats: CalibrationStats) -> Array:
    return stats.neurons["gate_sq_h_sq"] * stats.neurons["down_norm_sq"]


def _second_moment(stats: CalibrationStats) -> Array:
    return stats.neurons["h_sq"] * stats.neurons["down_norm_sq"]


def _obs(stats: CalibrationStats) -> Array:
    if "obs" not in stats.neurons:
        raise GgufToolError("the stats hold no OBS costs: `gguftool calibrate --obs` solves them")
    return stats.neurons["obs"]


EXPERT_CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("frequency", "N_e", FAMILY_PAPER, family(0, 0, 0)),
        Criterion("seer", "sum g", FAMILY_PAPER, family(0, 1, 0)),
        Criterion("ean", "sum ||f||", FAMILY_PAPER, family(0, 0, 1)),
        Criterion("reap", "mean g ||f||", "arXiv 2510.13999", family(1, 1, 1)),
        Criterion("man", "mean ||f||", FAMILY_PAPER, family(1, 0, 1)),
        Criterion("msan", "mean ||f||^2", FAMILY_PAPER, family(1, 0, 2)),
        Criterion("gated-sum", "sum g ||f||", FAMILY_PAPER, family(0, 1, 1)),
        Criterion("gated-sum-sq", "sum g^2 ||f||^2", FAMILY_PAPER, family(0, 2, 2)),
        Criterion(
            "tenp-importance",
            "sum g ||f|| (1 - cos(x, f)), L2-normalised by layer and domain",
            "arXiv 2606.09885 (reconstructed from public summaries)",
            tenp_importance,
        ),
    )
}

NEURON_CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("gated-second-moment", "sum g^2 h_k^2 ||W_:k||^2", "gguftool", _gated_second_moment),
        Criterion(
            "obs",
            "||W'_:k||^2 / [C^-1]_kk when k goes, cheapest first, W' refitted to C = sum g^2 h h^T",
            "Optimal Brain Surgeon (Hassibi and Stork 1993), for the neurons of an expert: gguftool",
            _obs,
        ),
        Criterion("second-moment", "sum h_k^2 ||W_:k||^2", "gguftool", _second_moment),
        Criterion("projection", "sum |h_k <W_:k, f>| / ||f||", "gguftool", lambda stats: stats.neurons["proj_abs"]),
        Criterion("enp", "mean h_k <W_:k, f> / ||f||", "arXiv 2606.09885", _enp),
    )
}


def expert_criterion(name: str) -> Criterion:
    """The expert criterion `name`, or the free triple `b,alpha,beta` such as `1,0,2`."""
    if name.count(",") == 2:
        try:
            b, alpha, beta = (int(part) for part in name.split(","))
        except ValueError:
            raise GgufToolError(f"{name!r} is no triple b,alpha,beta of whole numbers") from None
        return Criterion(name, f"N^-{b} sum g^{alpha} ||f||^{beta}", FAMILY_PAPER, family(b, alpha, beta))
    return lookup(EXPERT_CRITERIA, name, "expert criterion")


def neuron_criterion(name: str) -> Criterion:
    """The neuron criterion `name`."""
    return lookup(NEURON_CRITERIA, name, "neuron criterion")


_Row = TypeVar("_Row")


def lookup(rows: dict[str, _Row], name: str, what: str) -> _Row:
    """The row called `name`. Raises GgufToolError that lists near names."""
    if name in rows:
        return rows[name]
    near = get_close_matches(name, rows, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise GgufToolError(f"no {what} {name!r}; {hint}known are {', '.join(sorted(rows))}")


def super_experts(stats: CalibrationStats) -> list[tuple[int, int]]:
    """(layer row, expert) of every super expert (arXiv 2507.23279): its largest |down output| is above the 99.5th
    percentile over all experts and above a tenth of the largest of all. Dropping one is known to ruin a model.

    In a model with fewer than 200 experts there is always one above that percentile. There it has to be an outlier as well:
    above ten times the median, which is our addition."""
    peak = stats.expert("max_out")
    bar = max(float(np.percentile(peak, 99.5)), 0.1 * float(peak.max()))
    if peak.size < 200:
        bar = max(bar, 10 * float(np.median(peak)))
    return [(int(row), int(expert)) for row, expert in zip(*np.nonzero(peak > bar), strict=True)]
