"""Which candidate is worth more measuring, and why one was chosen. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, inf, isfinite

from .fit_report import CHOSEN, MEASURED, Weighed
from .tradeoff import SURE


def mean_kl(row: Weighed) -> float:
    """The mean KL of a row that was measured; one that is not finite is worse than any other."""
    assert row.kl is not None
    return row.kl if isfinite(row.kl) else inf


def is_past(walked: Sequence[Weighed]) -> bool:
    """Whether damage grew for sure since the best of these, which are ordered by rising ratio."""
    if len(walked) < 2:
        return False
    best, last = min(walked, key=mean_kl), walked[-1]
    return mean_kl(last) - mean_kl(best) > SURE * hypot(last.error, best.error)


def verdict(rows: Sequence[Weighed]) -> str:
    """Why the chosen one was chosen; rows as a report has them."""
    if not rows or rows[0].status != CHOSEN:
        return ""
    chosen, others = rows[0], [row for row in rows[1:] if row.status == MEASURED]
    lines = [f"{chosen.label} has the least mean KL of what fits, {mean_kl(chosen):.5f} ± {chosen.error:.5f}"]
    for kind, is_cut in (("unpruned", False), ("pruned", True)):
        rivals = [row for row in others if (row.ratio > 0) == is_cut]
        if not rivals:
            continue
        rival = min(rivals, key=mean_kl)
        error = hypot(rival.error, chosen.error)
        sure = "" if mean_kl(rival) - mean_kl(chosen) > SURE * error else ", which is within two standard errors"
        which = "next" if is_cut == (chosen.ratio > 0) else "best"
        lines.append(f"the {which} {kind} one, {rival.label}, has {mean_kl(rival):.5f} ± {rival.error:.5f}{sure}")
    return "; ".join(lines)
