"""The sections of report.html that go expert by expert: saliency, kept width, routing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import report_charts as charts
from .page import details, figure, panels, table
from .report import Report
from .svg import escape, short


def experts(report: Report) -> str:
    """Saliency and kept width as maps, and the kept share over depth."""
    facts = report.facts.get("experts")
    if not facts:
        return ""
    layers, whole = facts["layers"], facts["n_ff_exp"]
    order = {row["layer"]: np.argsort(-np.array(row["saliency"]), kind="stable").tolist() for row in layers}
    levels, low, high = charts.log_levels([row["saliency"] for row in layers])
    saliency = [
        [(level[e], f"layer {row['layer']}, expert {e}: {short(row['saliency'][e])}") for e in order[row["layer"]]]
        for row, level in zip(layers, levels, strict=True)
    ]
    width = [
        [_width_cell(row["layer"], e, row["width"][e], whole) for e in order[row["layer"]]] for row in layers
    ]  # fmt: skip
    indices = [row["layer"] for row in layers]
    gone = any(w is None for row in layers for w in row["width"])
    columns = "experts, each layer's most worth first"
    kept = [
        (row["layer"], 100 * sum(w or 0 for w in row["width"]) / (whole * len(row["width"]))) for row in layers
    ]  # fmt: skip
    one = charts.Heat(indices, saliency, f"{short(low)} or less", short(high), columns)
    two = charts.Heat(indices, width, "0", f"all {whole}", columns, "left the router" if gone else "")
    drawn = [
        figure("Saliency", charts.heat_map(one, "Saliency of every expert by layer"), "logarithmic, over all layers"),
        figure("Kept width", charts.heat_map(two, "Kept width of every expert by layer"), "neurons, experts in the same order"),
        figure("Kept by layer", charts.depth(kept, "Share of the experts' neurons kept in each layer", "kept, %")),
    ]  # fmt: skip
    rows = [
        [str(row["layer"]), f"{share:.1f} %", _counted(row["width"])]
        for row, (_, share) in zip(layers, kept, strict=True)
    ]
    listed = details("Kept widths as a table", table(["layer", "kept", "experts × width"], rows, left=(2,), wrap=(2,)))
    title = f" These are those of {facts['label']}." if facts.get("label") else ""
    return f'<p class="note">Saliency: {escape(facts["criterion"])}.{escape(title)}</p>{panels(drawn)}{listed}'


def _width_cell(layer: int, expert: int, width: int | None, whole: int) -> tuple[int | None, str]:
    if width is None:
        return None, f"layer {layer}, expert {expert}: left the router"
    return charts.linear_level(width, whole), f"layer {layer}, expert {expert}: {width} of {whole}"


def _counted(widths: Sequence[int | None]) -> str:
    found = [(w, widths.count(w)) for w in sorted({w for w in widths if w is not None}, reverse=True)]
    gone = widths.count(None)
    return " + ".join(f"{count} × {width}" for width, count in found) + (f", {gone} gone" if gone else "")


def routing(report: Report) -> str:
    """Each expert's share of the tokens in the original and in the pruned model; before that was measured, in calibration."""
    facts = report.facts.get("routing")
    if not facts or not facts["layers"]:
        return _calibrated(report)
    layers = facts["layers"]
    order = [np.argsort(-np.array(row["original"]), kind="stable").tolist() for row in layers]
    most = _most([value for row in layers for key in ("original", "pruned") for value in row[key]])
    drawn = []
    for key, title in (("original", "Original"), ("pruned", "Pruned")):
        cells = [
            [
                (charts.linear_level(row[key][e], most), f"layer {row['layer']}, expert {e}: {100 * row[key][e]:.2f} %")
                for e in own
            ]
            for row, own in zip(layers, order, strict=True)
        ]
        heat = charts.Heat(
            [row["layer"] for row in layers], cells, "never", f"≥ {100 * most:.0f} % of tokens",
            "experts, the original's most used first",
        )  # fmt: skip
        drawn.append(figure(title, charts.heat_map(heat, f"{title}: share of the tokens by expert and layer")))
    moved = [(row["layer"], 100 * _moved(row["original"], row["pruned"])) for row in layers]
    drawn.append(
        figure("Choices that moved", charts.depth(moved, "Share of the choices that moved", "of all choices, %"))
    )
    widths = {row["layer"]: row["width"] for row in report.facts.get("experts", {}).get("layers", ())}
    rows = [
        [
            str(row["layer"]), f"{_effective(row['original']):.1f}", f"{_effective(row['pruned']):.1f}", f"{share:.1f} %",
            str(sum(v == 0 for v in row["pruned"])), f"{100 * _into_empty(row['pruned'], widths.get(row['layer'], ())):.1f} %",
        ]
        for row, (_, share) in zip(layers, moved, strict=True)
    ]  # fmt: skip
    head = ["layer", "effective experts, original", "pruned", "choices moved", "never chosen", "into empty experts"]
    texts = ", ".join(facts["texts"])
    words = (
        f"Measured in both models on the same {facts['tokens']:,} tokens of {texts}. Effective experts: how many would be as "
        "evenly used if all were used alike (exp of the entropy). Moved: half the difference of the two distributions."
    )
    return f'<p class="note">{escape(words)}</p>{panels(drawn)}{details("Routing as a table", table(head, rows))}'


def _calibrated(report: Report) -> str:
    facts = report.facts.get("calibrated")
    if not facts:
        return ""
    layers = facts["layers"]
    most = _most([value for row in layers for value in row["share"]])
    cells = [
        [
            (charts.linear_level(share, most), f"layer {row['layer']}, {100 * share:.2f} %")
            for share in sorted(row["share"], reverse=True)
        ]
        for row in layers
    ]
    heat = charts.Heat(
        [row["layer"] for row in layers], cells, "never", f"≥ {100 * most:.0f} % of tokens", "experts, most used first"
    )  # fmt: skip
    words = f"In calibration, over {facts['tokens']:,} tokens. The pruned model's routing was not measured."
    picture = charts.heat_map(heat, "Original: share of the calibration tokens by expert and layer")
    return f'<p class="note">{escape(words)}</p>{panels([figure("Original, in calibration", picture)])}'


def _most(shares: Sequence[float]) -> float:
    """The share that has the strongest colour: one of fifty has more, so that a few experts do not pale all others."""
    return max(float(np.quantile(np.array(shares), 0.98)), 1e-9)


def _moved(one: Sequence[float], other: Sequence[float]) -> float:
    a, b = np.array(one), np.array(other)
    return float(0.5 * np.abs(a / max(a.sum(), 1e-300) - b / max(b.sum(), 1e-300)).sum())


def _effective(share: Sequence[float]) -> float:
    p = np.array([value for value in share if value > 0])
    p = p / max(p.sum(), 1e-300)
    return float(np.exp(-(p * np.log(p)).sum()))


def _into_empty(share: Sequence[float], widths: Sequence[int | None]) -> float:
    return sum(s for s, w in zip(share, widths, strict=False) if w == 0) / max(sum(share), 1e-300)
