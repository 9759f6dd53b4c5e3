"""Whether the texts were enough: experts that saw too few tokens, by layer, and how much more text they would need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np

from .stats import Array, CalibrationStats

# Below so many tokens the rank of an expert, and of its neurons, is noise: the count N alone has a relative standard
# error of 1 / sqrt(N) (Poisson), a tenth at 100, and every sum over N tokens at least that.
RANKED = 100
WORST = 3


@dataclass(frozen=True)
class LayerCoverage:
    """What the experts of one layer saw.

    Attributes:
        layer: decoder index. least: tokens of the expert that saw fewest.
        noisy: experts with fewer than RANKED tokens. damped: with fewer than 2K, K their neurons; of the correction of a
            refit they get the share N / 2K (see `refit.solve`). unrouted: with none; they are among both.
        windows_to_rank, windows_to_refit: further windows, at the rates seen, until every expert that was routed at all
            has RANKED and 2K tokens.
    """

    layer: int
    least: int
    noisy: int
    damped: int
    unrouted: int
    windows_to_rank: int
    windows_to_refit: int


@dataclass(frozen=True)
class Coverage:
    """All layers with experts, by rising depth. `full` is 2K."""

    full: int
    n_expert: int
    layers: Sequence[LayerCoverage]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"ranked": RANKED, "full": self.full, "layers": [asdict(layer) for layer in self.layers]}

    def notes(self) -> list[str]:
        """Two lines where experts saw too few tokens, none where all saw enough."""
        poor = [layer for layer in self.layers if layer.noisy or layer.damped]
        if not poor:
            return []
        damped, noisy, unrouted = (sum(getattr(x, name) for x in poor) for name in ("damped", "noisy", "unrouted"))
        worst = sorted(poor, key=lambda layer: (-layer.noisy, -layer.damped, layer.layer))[:WORST]
        named = ", ".join(f"layer {layer.layer} ({layer.damped}, {layer.noisy})" for layer in worst)
        first = (
            f"few tokens: in {len(poor)} of {len(self.layers)} layers {damped} of {len(self.layers) * self.n_expert} experts "
            f"saw fewer than {self.full} (2 x their neurons: a refit corrects them only in part), {noisy} fewer than {RANKED} "
            f"(their rank is noise); worst: {named}"
        )
        needs = [
            f"{max(getattr(layer, name) for layer in poor)} for {tokens} tokens each"
            for name, tokens in (("windows_to_rank", RANKED), ("windows_to_refit", self.full))
            if any(getattr(layer, name) for layer in poor)
        ]
        more = [f"about {' and '.join(needs)} at the rates seen"] if needs else []
        more += [f"{unrouted} never routed, which has no rate"] if unrouted else []
        return [first, f"more windows that they need: {'; '.join(more)}"]


def coverage(stats: CalibrationStats) -> Coverage:
    """Counts, over all texts together, as criteria and refits do."""
    full = 2 * stats.model.n_ff_exp
    counts = stats.expert("count")
    layers = [
        LayerCoverage(
            index, int(row.min()), int((row < RANKED).sum()), int((row < full).sum()), int((row == 0).sum()),
            _missing(row, RANKED, stats), _missing(row, full, stats),
        )
        for index, row in zip(stats.model.moe_layers, counts, strict=True)
    ]  # fmt: skip
    return Coverage(full, stats.model.n_expert, layers)


def _missing(counts: Array, wanted: int, stats: CalibrationStats) -> int:
    """Windows until the rarest expert that was routed has `wanted` tokens: (wanted / N - 1) of those that were run."""
    routed = counts[counts > 0]
    least = float(np.min(routed)) if len(routed) else float(wanted)
    return max(0, ceil((wanted - least) / least * stats.tokens / stats.n_ctx))
