"""Size against divergence: which files are worth having, and whether pruning beats quantizing alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import exp, hypot, log

from .divergence import Estimate

# A difference counts from so many standard errors on.
SURE = 2.0


@dataclass(frozen=True)
class Point:
    """One file: its size in bytes, its mean KL divergence to the original in nats, and the standard error of that."""

    label: str
    bytes: float
    kl: float
    error: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """A pruned and quantized file against quantizing alone.

    Attributes:
        rival: what quantizing alone gives at the same size; where the file is smaller (larger) than all of the curve,
            its smallest (largest) point; None without a curve.
        outcome: "win" or "loss" by more than two standard errors of the difference, "tie" below that, "open" where the
            curve does not reach so far and its end does not decide it either.
    """

    point: Point
    rival: Estimate | None
    outcome: str


def front(points: Sequence[Point]) -> list[bool]:
    """Which points are on the Pareto front: no other one is at most as large and diverges less."""

    def beats(other: Point, point: Point) -> bool:
        no_worse = other.bytes <= point.bytes and other.kl <= point.kl
        return no_worse and (other.kl < point.kl or other.bytes < point.bytes)

    return [not any(beats(other, point) for other in points) for point in points]


def curve(points: Sequence[Point]) -> list[Point]:
    """The points that a line of log KL over bytes goes through, the smallest file first.

    Left out is what nobody would pick, a file that a smaller or equal one beats, and what has no logarithm: KL 0.
    """
    efficient = [point for point, stays in zip(points, front(points), strict=True) if stays and point.kl > 0]
    one_each = {point.bytes: point for point in efficient}
    return [one_each[size] for size in sorted(one_each)]


def interpolate(line: Sequence[Point], n_bytes: float) -> Estimate | None:
    """KL on the line at a size: ln KL is linear between neighbours. None outside of the line.

    The error is the neighbours' relative errors, weighed as their logarithms are: both were measured on one text, so
    their errors do not cancel as independent ones would.
    """
    for point in line:
        if point.bytes == n_bytes:
            return Estimate(point.kl, point.error)
    for left, right in pairwise(line):
        if left.bytes < n_bytes < right.bytes:
            t = (n_bytes - left.bytes) / (right.bytes - left.bytes)
            kl = exp((1 - t) * log(left.kl) + t * log(right.kl))
            return Estimate(kl, kl * ((1 - t) * left.error / left.kl + t * right.error / right.kl))
    return None


def judge(point: Point, line: Sequence[Point]) -> Verdict:
    """A pruned and quantized file against the line of the unpruned ones.

    The errors of the two are taken for independent, which is on the careful side: they share their text. Beyond an end
    of the line nothing is extrapolated; but a file that is smaller than all of it and better than its smallest point
    has won, and one that is larger than all of it and worse than its largest has lost.
    """
    if not line:
        return Verdict(point, None, "open")
    between = interpolate(line, point.bytes)
    end = line[0] if point.bytes < line[0].bytes else line[-1]
    rival = between or Estimate(end.kl, end.error)
    outcome = _outcome(point, rival)
    if between is None and outcome != ("win" if end is line[0] and point.bytes < end.bytes else "loss"):
        outcome = "open"
    return Verdict(point, rival, outcome)


def _outcome(point: Point, rival: Estimate) -> str:
    difference, error = point.kl - rival.value, hypot(point.error, rival.error)
    if abs(difference) <= SURE * error:
        return "tie"
    return "win" if difference < 0 else "loss"


def at_each_size(points: Sequence[Point], line: Sequence[Point]) -> list[Verdict]:
    """What the best pruned and quantized file can do at each size at which there is one, the smallest first.

    The best at a size is the least divergent file that is at most as large; it is judged as if it were of that size.
    Sizes that are open are left out.
    """
    found = []
    for size in sorted({point.bytes for point in points}):
        best = min((point for point in points if point.bytes <= size), key=lambda point: point.kl)
        found.append(judge(replace(best, bytes=size), line))
    return [verdict for verdict in found if verdict.outcome != "open"]


def winning_sizes(verdicts: Sequence[Verdict]) -> list[tuple[float, float]]:
    """The ranges of measured sizes, from and to, in which every verdict of `at_each_size` is a win."""
    runs = [(won, [v.point.bytes for v in run]) for won, run in groupby(verdicts, key=lambda v: v.outcome == "win")]
    return [(sizes[0], sizes[-1]) for won, sizes in runs if won]
