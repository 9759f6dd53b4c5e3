"""The plot of a sweep: file size against KL divergence, a panel for each group of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .durable import replacing
from .sweep_report import CONTROL, UNPRUNED, SweepReport, SweepRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by colour-blind people (Okabe and Ito, then Tol's muted set), dark enough for a line on white.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
    "#332288", "#882255", "#44AA99", "#999933", "#AA4499", "#117733",
)  # fmt: skip
MARKERS = ("o", "^", "D", "v", "P", "<", "X", ">", "*")
CONTROL_COLOUR, CONTROL_MARKERS = "#8a8a8a", ("x", "+", "1")
LINES = ("-", "--", ":", "-.")
GREY = "#9a9a9a"
STYLE = {
    "svg.hashsalt": "gguftool", "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "path.simplify": False,
    "lines.markeredgewidth": 0.6,
}  # fmt: skip


def save(report: SweepReport, paths: Sequence[Path]) -> None:
    """Draws the report into every path, by its suffix (.png, .svg). The same report gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE):
        figure = draw(report)
        FigureCanvasAgg(figure)
        for path in paths:
            kind = path.suffix.removeprefix(".")
            metadata = {"Date": None} if kind == "svg" else None
            with replacing(path) as partial:
                figure.savefig(partial, format=kind, dpi=150, metadata=metadata)


def draw(report: SweepReport) -> Figure:
    """The figure: panels from left to right, two in a row, and one legend outside of them."""
    from matplotlib.figure import Figure

    groups = list(report.base)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    styles = _styles(report)
    entries = len(styles) + len(_encodings(report)) + 2
    height = max(5.4 * lines, 0.24 * entries + 1.0)
    figure = Figure(figsize=(6.0 * columns + 2.4, height), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    unit, name = (1e9, "GB") if report.base_bytes >= 2e9 else (1e6, "MB")
    for axes, group in zip(panels.flat, groups, strict=False):
        _draw_group(axes, report, group, styles, unit)
        axes.set_title(group)
        axes.set_xlabel(f"file size, {name}")
    for axes in panels[:, 0]:
        axes.set_ylabel("mean KL divergence to the original, nats")
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_visible(False)
    figure.suptitle(f"{report.model}: size against divergence")
    figure.legend(handles=_legend(report, styles), loc="outside right upper", frameon=False)
    return figure


def _draw_group(axes: Axes, report: SweepReport, group: str, styles: dict[str, dict[str, Any]], unit: float) -> None:
    encodings = _encodings(report)
    for method, style in styles.items():
        for encoding, line in encodings.items():
            rows = _on_axis([r for r in report.rows if (r.name.method, r.name.encoding) == (method, encoding)], group)
            if not rows:
                continue
            points = [row.point(group) for row in rows]
            spread = [row.scores[group].kl_spread or 0.0 for row in rows]
            sizes, values = [point.bytes / unit for point in points], [point.kl for point in points]
            axes.plot(sizes, values, linestyle=line, linewidth=1.3, markersize=7.5, **style)
            if any(spread):
                low = [min(s, 0.9 * v) for s, v in zip(spread, values, strict=True)]
                axes.errorbar(
                    sizes, values, yerr=[low, spread], fmt="none", ecolor=style["color"], capsize=3, linewidth=1
                )
    unpruned = _on_axis([row for row in report.rows if row.name.kind == UNPRUNED], group)
    if unpruned:
        points = [row.point(group) for row in unpruned]
        axes.plot([p.bytes / unit for p in points], [p.kl for p in points], color="black", marker="s", linewidth=0.8)
        for row, point in zip(unpruned, points, strict=True):
            axes.annotate(
                row.name.encoding, (point.bytes / unit, point.kl), xytext=(-6, -4), textcoords="offset points",
                fontsize=9, ha="right", va="top", zorder=6,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
            )  # fmt: skip
    best = [row for row, stays in zip(report.rows, report.front(group), strict=True) if stays]
    best = _on_axis([row for row in best if row.name.kind != CONTROL], group)
    if best:
        points = [row.point(group) for row in best]
        axes.step(
            [p.bytes / unit for p in points], [p.kl for p in points], where="post", color=GREY, linewidth=1, zorder=1
        )
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.06)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)


def _on_axis(rows: Sequence[SweepRow], group: str) -> list[SweepRow]:
    """The rows that a logarithmic axis can show, by size."""
    return sorted((row for row in rows if row.scores[group].kl > 0), key=lambda row: row.bytes)


def _encodings(report: SweepReport) -> dict[str, str]:
    """The encodings of the pruned rows, with the dashes of their lines."""
    found = dict.fromkeys(row.name.encoding for row in report.rows if row.name.kind != UNPRUNED)
    return {encoding: LINES[index % len(LINES)] for index, encoding in enumerate(found)}


def _styles(report: SweepReport) -> dict[str, dict[str, Any]]:
    """Colour and marker by variant. Controls are grey; a variant differs from all others in one or the other."""
    kinds = {row.name.method: row.name.kind for row in report.rows if row.name.kind != UNPRUNED}
    methods = [method for method, kind in kinds.items() if kind != CONTROL]
    controls = [method for method, kind in kinds.items() if kind == CONTROL]
    styles: dict[str, dict[str, Any]] = {}
    for index, method in enumerate(methods):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        styles[method] = {"color": colour, "marker": marker, "zorder": 4, "markeredgecolor": "white"}
    for index, method in enumerate(controls):
        marker = CONTROL_MARKERS[index % len(CONTROL_MARKERS)]
        styles[method] = {"color": CONTROL_COLOUR, "marker": marker, "zorder": 2, "markeredgewidth": 1.2}
    return styles


def _legend(report: SweepReport, styles: dict[str, dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", markersize=7.5, label=method, **{k: v for k, v in style.items() if k != "zorder"})
        for method, style in styles.items()
    ]
    handles += [
        Line2D([], [], color="#444444", linestyle=line, label=f"as {encoding}")
        for encoding, line in _encodings(report).items()
    ]
    if any(row.name.kind == UNPRUNED for row in report.rows):
        handles.append(Line2D([], [], color="black", marker="s", linewidth=0.8, label="unpruned"))
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="Pareto front"))
    return handles
