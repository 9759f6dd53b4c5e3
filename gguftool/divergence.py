"""Perplexity and KL divergence: arrays in, numbers out. No model and no file.

The statistics are those of llama.cpp's tools/perplexity/perplexity.cpp (`perplexity`, `kl_divergence`), so that our
numbers can stand beside other people's; only, it stores the base's log-probabilities in 16 bits, which gives its
divergence a floor of about 1e-5, and we keep the logits as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]
Tokens = NDArray[np.int32]

# Logits that one thread turns into float64 at a time: bounds the memory at any vocabulary.
_CHUNK = 1 << 18
# Edges of the histogram of divergences, in nats: four to a decade from 1e-6 to 10. They never change, so that any two
# histograms can be added or laid over each other.
HISTOGRAM_EDGES: Floats = 10.0 ** (np.arange(-24, 5) / 4)


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class TokenScores:
    """What one model said about n positions.

    Attributes:
        nll: -ln p(target), in nats: [n].
        log_z: ln sum exp of the position's logits: [n].
        top: the likeliest token, the first one where several are: [n].
    """

    nll: Floats
    log_z: Floats
    top: NDArray[np.int64]


def score(logits: Logits, targets: Tokens) -> TokenScores:
    """Scores n positions: `logits` [n, vocabulary] at them, `targets` [n] the tokens that really follow."""
    log_z = np.empty(len(logits))
    top = np.empty(len(logits), dtype=np.int64)

    def work(rows: slice) -> None:
        top[rows] = logits[rows].argmax(axis=1)
        values = logits[rows].astype(np.float64)
        highest = values.max(axis=1)
        values -= highest[:, None]
        log_z[rows] = highest + np.log(np.exp(values, out=values).sum(axis=1))

    _by_chunks(work, logits)
    chosen = logits[np.arange(len(logits)), targets].astype(np.float64)
    return TokenScores(log_z - chosen, log_z, top)


def divergence(base_logits: Logits, base: TokenScores, logits: Logits, other: TokenScores) -> Floats:
    """KL(base || other) in nats at each of n positions: sum over tokens of p_base (ln p_base - ln p_other), [n].

    `base` and `other` are the scores of the two arrays of logits, [n, vocabulary].
    """
    out = np.empty(len(logits))

    def work(rows: slice) -> None:
        values = base_logits[rows].astype(np.float64)
        difference = values - logits[rows]
        values -= base.log_z[rows, None]
        out[rows] = np.einsum("ij,ij->i", np.exp(values, out=values), difference)

    _by_chunks(work, logits)
    # Never negative but by rounding.
    return np.maximum(out - base.log_z + other.log_z, 0.0)


def _by_chunks(work: Callable[[slice], None], logits: Logits) -> None:
    """Calls `work` for slices of the positions, on all cores: numpy lets go of the interpreter meanwhile."""
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    slices = [slice(start, start + step) for start in range(0, len(logits), step)]
    with ThreadPoolExecutor(min(len(slices), os.cpu_count() or 1)) as pool:
        for _ in pool.map(work, slices):
            pass


def mean(values: Floats) -> Estimate:
    """Mean and its standard error sqrt(variance / (n - 1)), the variance divided by n; error 0 for one value."""
    n = len(values)
    return Estimate(float(values.mean()), float(np.sqrt(values.var() / (n - 1))) if n > 1 else 0.0)


def perplexity(nll: Floats) -> Estimate:
    """exp(mean nll); the error by the derivative of exp."""
    average = mean(nll)
    value = float(np.exp(average.value))
    return Estimate(value, value * average.error)


def ln_ratio(nll: Floats, base_nll: Floats) -> Estimate:
    """ln(PPL / PPL(base)) over the same n tokens; the error counts their covariance, so it is far below either's own.

    var(a) + var(b) - 2 cov(a, b) of the means is the variance of the mean of a - b.
    """
    return mean(nll - base_nll)


def share(hits: NDArray[np.bool_]) -> Estimate:
    """Share of true values, with the binomial error sqrt(p (1 - p) / (n - 1))."""
    p, n = float(hits.mean()), len(hits)
    return Estimate(p, float(np.sqrt(p * (1 - p) / (n - 1))) if n > 1 else 0.0)


def root_mean_square(values: Floats) -> Estimate:
    """sqrt(mean of squares); the error by the derivative of sqrt."""
    squares = mean(values**2)
    root = float(np.sqrt(squares.value))
    return Estimate(root, 0.5 / root * squares.error if root else 0.0)


def histogram(values: Floats) -> tuple[int, ...]:
    """How many values lie below the first of HISTOGRAM_EDGES, from each edge up to the next, and from the last one on: [30]."""
    places = np.searchsorted(HISTOGRAM_EDGES, values, side="right")
    return tuple(np.bincount(places, minlength=len(HISTOGRAM_EDGES) + 1).tolist())


@dataclass(frozen=True)
class KlStatistics:
    """KL divergence over all scored tokens, in nats: mean with its error, quantiles, largest, and `histogram`."""

    mean: float
    err: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    histogram: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Floats) -> KlStatistics:
        """From the divergence at each token, [n]. Quantiles are interpolated linearly."""
        average = mean(values)
        median, p90, p95, p99, p999 = (float(q) for q in np.quantile(values, (0.5, 0.9, 0.95, 0.99, 0.999)))
        most = float(values.max())
        return cls(average.value, average.error, median, p90, p95, p99, p999, most, histogram(values))


@dataclass(frozen=True)
class Divergence:
    """One model against its base over the same n tokens.

    Attributes:
        ppl, base_ppl: perplexities.
        ln_ppl_ratio: ln(PPL / PPL(base)).
        kld: KL(base || model).
        same_top: share of positions where both hold the same token for the likeliest.
        mean_dp, rms_dp: mean and root mean square of p(target) - p_base(target).
    """

    ppl: Estimate
    base_ppl: Estimate
    ln_ppl_ratio: Estimate
    kld: KlStatistics
    same_top: Estimate
    mean_dp: Estimate
    rms_dp: Estimate
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; an estimate x becomes `x` and `x_err`."""
        out: dict[str, Any] = {"kld": asdict(self.kld), "tokens": self.tokens}
        for name in ("ln_ppl_ratio", "same_top", "mean_dp", "rms_dp"):
            value, error = getattr(self, name)
            out |= {name: value, f"{name}_err": error}
        return out


class DivergenceSum:
    """Collects windows of one model against its base. Keeps a few numbers a token, never logits."""

    def __init__(self) -> None:
        self._columns: dict[str, list[NDArray[Any]]] = {"nll": [], "base": [], "kld": [], "same": []}

    def add(self, base_logits: Logits, base: TokenScores, logits: Logits, other: TokenScores) -> None:
        """Adds n positions: both models' logits [n, vocabulary] and what `score` made of them."""
        self._columns["nll"].append(other.nll)
        self._columns["base"].append(base.nll)
        self._columns["kld"].append(divergence(base_logits, base, logits, other))
        self._columns["same"].append(base.top == other.top)

    @classmethod
    def pooled(cls, parts: Iterable[DivergenceSum]) -> DivergenceSum:
        """The positions of several texts, as if they had been added to one sum: all its statistics are exact."""
        total = cls()
        for part in parts:
            for name, column in part._columns.items():
                total._columns[name] += column
        return total

    def result(self) -> Divergence:
        """The statistics of all positions added so far; at least one."""
        nll, base, kld, same = (_joined(self._columns[name]) for name in ("nll", "base", "kld", "same"))
        change = np.exp(-nll) - np.exp(-base)
        return Divergence(
            ppl=perplexity(nll),
            base_ppl=perplexity(base),
            ln_ppl_ratio=ln_ratio(nll, base),
            kld=KlStatistics.of(kld),
            same_top=share(same),
            mean_dp=mean(change),
            rms_dp=root_mean_square(change),
            tokens=len(nll),
        )


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts)
