"""The charts of a report, each a function of its values to inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10
from typing import Any

from .divergence import HISTOGRAM_EDGES
from .report import Report, megabytes
from .svg import WIDTH, Scale, axis_x, axis_y, figure, line, mark, number, padded, path, polyline, rect, short, text
from .tradeoff import Point, front

LEVELS = 9
# So many cells have names of their own that a pointer shows; beyond it a page would weigh megabytes.
NAMED_CELLS = 2048
# More points than that are not all numbered, and more rows not all drawn one by one.
FEW = 12


@dataclass(frozen=True)
class Dot:
    """A model in a chart: number, label, bytes, divergence on one text with its error, kind."""

    number: str
    label: str
    bytes: int
    kl: float
    error: float
    kind: str


def dots(report: Report, name: str) -> list[Dot]:
    """The rows of a report and its candidates, as points of the text `name`; those whose divergence is not finite have none."""
    found = [
        Dot(str(i), row.label, row.bytes, float(row.texts[name]["kld"]["mean"]), float(row.texts[name]["kld"]["err"]),
            "quantized" if row.method == "none" else "pruned")
        for i, row in enumerate(report.rows, 1) if name in row.texts
    ]  # fmt: skip
    done = {(dot.label, dot.bytes) for dot in found}
    for item in report.candidates:
        if name in item.texts and (item.label, item.bytes) not in done:
            value = item.texts[name]
            kind = "chosen" if item.chosen else "candidate"
            found.append(
                Dot("", item.label, item.bytes, float(value["mean"]), float(value.get("err", 0.0)), kind)
            )  # fmt: skip
    return [dot for dot in found if isfinite(dot.kl)]


SHAPES = {"pruned": "circle", "quantized": "square", "candidate": "diamond", "chosen": "diamond"}


def size_quality(report: Report, name: str) -> str:
    """File size against KL divergence on one text; the dashed line is the original's size."""
    found = dots(report, name)
    unit, word = (1e9, "GB") if report.base_bytes >= 2e9 else (1e6, "MB")
    x = Scale(*padded([dot.bytes / unit for dot in found] + [report.base_bytes / unit]), 44, WIDTH - 12)
    ends = [v for dot in found for v in (dot.kl - dot.error, dot.kl + dot.error, dot.kl)]
    y = Scale(*padded(ends, log=True), 206, 26, log=True)
    best = front([Point(dot.label, dot.bytes, dot.kl, dot.error) for dot in found])
    edge = sorted((dot.bytes / unit, dot.kl) for dot, on in zip(found, best, strict=True) if on)
    parts = [axis_x(x, 206, 26, f"file size, {word}"), axis_y(y, 44, WIDTH - 12, "KL divergence, nats")]
    base = x(report.base_bytes / unit)
    parts += [line(base, 26, base, 206, "whole"), text(base - 4, 36, "original", "tick", "end")]
    if len(edge) > 1:
        parts.append(polyline([(x(size), y(kl)) for size, kl in edge], "front"))
    taken: list[tuple[float, float]] = []
    points = [(x(dot.bytes / unit), y(dot.kl)) for dot in found]
    numbers = []
    for dot, on in zip(found, best, strict=True):
        cx, cy = x(dot.bytes / unit), y(dot.kl)
        title = f"{dot.label}: {megabytes(dot.bytes)}, KL {dot.kl:.5f} ± {dot.error:.5f}"
        if isfinite(dot.error):
            parts.append(line(cx, y(max(dot.kl - dot.error, 1e-300)), cx, y(dot.kl + dot.error), f"err {dot.kind}"))
        parts.append(mark(cx, cy, SHAPES[dot.kind], f"mark {dot.kind}", title, 4 if len(found) > FEW else 5.5))
        if dot.number and (on or len(found) <= FEW):
            place = _free_place(cx, cy, taken, points)
            taken.append(place)
            numbers.append(text(*place, dot.number, "point", "middle"))
    label = f"File size against KL divergence on {name}: " + "; ".join(
        f"{dot.label} {megabytes(dot.bytes)} {dot.kl:.4f}" for dot in found[:FEW]
    )
    return figure(244, label, *parts, *numbers)


Place = tuple[float, float]


def _free_place(x: float, y: float, taken: Sequence[Place], points: Sequence[Place]) -> Place:
    """Where a number stands beside its point: the first of some places with no other number, and if possible no point."""
    places = [
        (x + dx, y + dy) for dx, dy in ((12, 4), (-12, 4), (0, -10), (0, 19), (13, -8), (-13, -8), (13, 16), (-13, 16))
    ]
    inside = [p for p in places if 50 < p[0] < WIDTH - 8 and 30 < p[1] < 204] or places[:1]
    free = [p for p in inside if all(abs(p[0] - a) > 13 or abs(p[1] - b) > 11 for a, b in taken)] or inside[:1]
    clear = (p for p in free if all(abs(p[0] - a) > 9 or abs(p[1] - 4 - b) > 8 for a, b in points))
    return next(clear, free[0])


@dataclass(frozen=True)
class Bar:
    """A value with its reach, under a label."""

    label: str
    value: float
    low: float
    high: float
    words: str
    kind: str


def intervals(bars: Sequence[Bar], name: str, *, log: bool = False) -> str:
    """Values with their errors, one below the other; of one that is not finite there are only the words."""
    top, step = 6, 40
    bottom = top + step * len(bars)
    x = Scale(*padded([v for bar in bars for v in (bar.low, bar.high)], log=log), 8, WIDTH - 10, log=log)
    parts = [axis_x(x, bottom, top, name, 4 if log else 5)]
    for index, bar in enumerate(bars):
        y = top + step * index + 24
        parts += [text(8, y - 11, clipped(bar.label), "rowname"), text(WIDTH - 10, y - 11, bar.words, "value", "end")]
        if isfinite(bar.low) and isfinite(bar.high):
            parts.append(line(x(bar.low), y, x(bar.high), y, f"err wide {bar.kind}"))
        if isfinite(bar.value):
            shape = "square" if bar.kind == "quantized" else "circle"
            parts.append(mark(x(bar.value), y, shape, f"mark {bar.kind}", bar.words, 4))
    label = f"{name}: " + "; ".join(f"{bar.label} {bar.words}" for bar in bars)
    return figure(bottom + 38, label, *parts)


def lengths(bars: Sequence[Bar], name: str) -> str:
    """Values as bars from zero, one below the other; a thin line is their reach."""
    top, step = 6, 36
    x = Scale(0, max([bar.high for bar in bars] + [1e-9]) * 1.02, 8, WIDTH - 10)
    parts = []
    for index, bar in enumerate(bars):
        y = top + step * index
        parts += [
            text(8, y + 11, clipped(bar.label), "rowname"), text(WIDTH - 10, y + 11, bar.words, "value", "end"),
            rect(8, y + 16, max(1.0, x(bar.value) - 8), 11, f"bar {bar.kind}", f"{bar.label}: {bar.words}"),
        ]  # fmt: skip
        if bar.high > bar.low:
            parts.append(line(x(bar.low), y + 21.5, x(bar.high), y + 21.5, "reach"))
    label = f"{name}: " + "; ".join(f"{bar.label} {bar.words}" for bar in bars)
    return figure(top + step * len(bars), label, *parts)


def token_histogram(series: Sequence[tuple[str, Mapping[str, Any], str]], name: str) -> str:
    """How KL divergence is spread over the tokens: (label, statistics with `histogram`, kind), the first one filled."""
    edges = [float(edge) for edge in HISTOGRAM_EDGES]
    edges = [edges[0] / 10**0.25, *edges, edges[-1] * 10**0.25]
    x = Scale(edges[0], edges[-1], 34, WIDTH - 10, log=True)
    shares = [[100 * count / max(1, sum(kld["histogram"])) for count in kld["histogram"]] for _, kld, _ in series]
    y = Scale(0, max(max(row) for row in shares) * 1.08, 186, 26)
    parts = [axis_y(y, 34, WIDTH - 10, "share of the tokens, %")]
    for power in range(-6, 2):
        parts += [
            line(x(10.0**power), 26, x(10.0**power), 186, "grid"),
            text(x(10.0**power), 200, short(10.0**power), "tick", "middle"),
        ]  # fmt: skip
    for (_label, _kld, kind), row in zip(series, shares, strict=True):
        steps: list[tuple[float, float]] = [(x(edges[0]), y(0))]
        for index, share in enumerate(row):
            steps += [(x(edges[index]), y(share)), (x(edges[index + 1]), y(share))]
        steps.append((x(edges[-1]), y(0)))
        parts.append(polyline(steps, f"spread {kind}"))
    for label, kld, kind in series:
        if isfinite(kld["mean"]):
            parts += [
                line(x(kld["mean"]), 26, x(kld["mean"]), 186, f"meanline {kind}"),
                mark(x(kld["mean"]), 26, "diamond", f"mark {kind}", f"{label}: mean {kld['mean']:.5f}", 3),
            ]  # fmt: skip
    parts += [
        line(34, 186, WIDTH - 10, 186, "axis"),
        text(187, 216, "KL divergence at a token, nats", "name", "middle"),
    ]
    return figure(222, f"{name}: " + "; ".join(f"{label} mean {k['mean']:.4f}, 99 % below {k['p99']:.3f}"
                                              for label, k, _ in series), *parts)  # fmt: skip


@dataclass(frozen=True)
class Heat:
    """A map: for each layer a name and cells, each a level of 0 ... LEVELS - 1 (None: gone) and its words; the words at
    both ends of the ramp."""

    layers: Sequence[int]
    cells: Sequence[Sequence[tuple[int | None, str]]]
    low: str
    high: str
    columns: str
    gone: str = ""


def heat_map(heat: Heat, name: str) -> str:
    """A row for each layer, a column for each expert."""
    columns = max(len(row) for row in heat.cells)
    left, top = 34, 6
    width = (WIDTH - left - 6) / columns
    height = max(3.0, min(22.0, 264 / len(heat.cells)))
    bottom = top + height * len(heat.cells)
    parts = [_cells(heat, left, top, width, height)]
    every = -(-len(heat.layers) // 12)
    for index, layer in enumerate(heat.layers):
        if index % every == 0:
            parts.append(text(left - 5, top + height * (index + 0.5) + 3.5, layer, "tick", "end"))
    parts += [text(left, bottom + 15, heat.columns, "name"), text(left - 5, bottom + 15, "layer", "tick", "end")]
    ramp = 150 / LEVELS
    y = bottom + 26
    parts += [rect(left + i * ramp, y, ramp + 0.3, 9, f"s{i}") for i in range(LEVELS)]
    parts += [text(left, y + 21, heat.low, "tick"), text(left + 150, y + 21, heat.high, "tick", "end")]
    if heat.gone:
        parts += [rect(left + 170, y, 12, 9, "gone"), text(left + 188, y + 8, heat.gone, "tick")]
    return figure(y + 28, name, *parts)


def _cells(heat: Heat, left: float, top: float, width: float, height: float) -> str:
    named = sum(len(row) for row in heat.cells) <= NAMED_CELLS
    # Of many cells the gaps would be all there is to see; a hair more than the cell closes them.
    w, h = (width - min(1.0, width * 0.12), height - min(1.0, height * 0.12)) if named else (width + 0.1, height + 0.1)
    groups: dict[str, list[str]] = {}
    for r, row in enumerate(heat.cells):
        for c, (level, words) in enumerate(row):
            kind, x, y = "gone" if level is None else f"s{level}", left + c * width, top + r * height
            cell = (
                rect(x, y, w, h, "", words) if named
                else f"M{number(x)} {number(y)}h{number(w)}v{number(h)}h-{number(w)}z"
            )  # fmt: skip
            groups.setdefault(kind, []).append(cell)
    if named:
        return "".join(f'<g class="{kind}">{"".join(cells)}</g>' for kind, cells in sorted(groups.items()))
    return "".join(path("".join(cells), kind) for kind, cells in sorted(groups.items()))


def depth(values: Sequence[tuple[int, float]], name: str, axis: str, kind: str = "pruned") -> str:
    """A bar for each layer, from the first to the last; values in per cent."""
    top, bottom, left = 26, 176, 34
    finite = [value for _, value in values if isfinite(value)]
    y = Scale(0, max([100.0 if axis == "kept, %" else 0.0, *finite, 1e-9]), bottom, top)
    step = (WIDTH - left - 8) / len(values)
    parts = [axis_y(y, left, WIDTH - 8, axis)]
    every = -(-len(values) // 12)
    for index, (layer, value) in enumerate(values):
        x = left + step * index
        parts.append(
            rect(
                x + step * 0.08,
                y(value),
                step * 0.84,
                bottom - y(value),
                f"bar {kind}",
                f"layer {layer}: {value:.1f} %",
            )
        )
        if index % every == 0:
            parts.append(text(x + step / 2, bottom + 14, layer, "tick", "middle"))
    parts += [
        line(left, bottom, WIDTH - 8, bottom, "axis"),
        text((left + WIDTH) / 2, bottom + 30, "layer", "name", "middle"),
    ]
    return figure(bottom + 36, name, *parts)


def log_levels(rows: Sequence[Sequence[float]]) -> tuple[list[list[int]], float, float]:
    """Levels of values by their logarithm over all rows, and the smallest and the largest finite value above 0. The level of
    inf is the highest, that of nan the lowest."""
    positive = [value for row in rows for value in row if value > 0 and isfinite(value)]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    span = log10(high) - log10(low) or 1.0

    def level(value: float) -> int:
        return int(LEVELS * (log10(min(value, high)) - log10(low)) / span) if value > 0 else 0

    return [[min(LEVELS - 1, level(value)) for value in row] for row in rows], low, high


def clipped(label: str, most: int = 36) -> str:
    """A label that leaves room for a number behind it; the table has all of it."""
    return label if len(label) <= most else label[: most - 1] + "…"


def linear_level(value: float, high: float) -> int:
    """The level of a value between 0 and `high`; 0 and what is no number have the lowest."""
    return max(1, round((LEVELS - 1) * min(1.0, value / high))) if value > 0 and high > 0 else 0
