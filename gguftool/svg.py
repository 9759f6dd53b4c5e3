"""Drawing as text: scales, axes and shapes of inline SVG. Pure; whatever comes from outside is escaped here.

Charts are drawn 340 units wide, about a phone's width, so that their letters stay readable there; colours are classes, which
the page's style sheet gives for light and for dark. A value that is not finite stretches no scale and has no place on one: who
draws leaves its mark out.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

WIDTH = 340
# Control characters and halves of pairs have no place in a page.
_BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(text: object) -> str:
    """Text as it may stand in an element or a quoted attribute."""
    return html.escape(_BAD.sub("\ufffd", str(text)), quote=True)


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Scale:
    """Maps values of low...high to start...stop, by their logarithms where `log`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; beyond the ends that of the end, of nan that of the start."""
        low, high, value = (log10(v) for v in (self.low, self.high, max(value, 1e-300))) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside, about `most` of them; of a logarithmic scale powers of ten, with 2 and 5 where there is room.
        None of a scale without finite ends."""
        if not (isfinite(self.low) and isfinite(self.high)):
            return []
        if not self.log:
            return _round_ticks(self.low, self.high, most)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
            if len(found) <= most:
                return found
        return found[:: ceil(len(found) / most)]


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** floor(log10(raw))
    step = next(power * s for s in (1, 2, 2.5, 5, 10) if power * s >= raw * (1 - 1e-9))
    first = ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(floor(high / step + 1e-9) - first + 1)]


def padded(values: Sequence[float], share: float = 0.08, *, log: bool = False) -> tuple[float, float]:
    """The range of the values with some room at both ends. Finite ones count, of a logarithmic scale those above 0."""
    # With the room beside it a larger one might not be finite any more.
    values = [value for value in values if abs(value) < 1e300 and (value > 0 or not log)]
    if not values:
        return (1e-6, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** share, 1.3)
        return low / room, high * room
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - room, high + room


def short(value: float) -> str:
    """A value at an axis: four digits at most, powers of ten as such where they are far from 1; nan and inf by these names."""
    if not isfinite(value):
        return str(float(value))
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}" if mantissa != "1" else f"1e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text(x: float, y: float, content: object, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return (
        f'<text x="{number(x)}" y="{number(y)}"{_kind(kind)}'
        + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        + f">{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """A straight line."""
    return f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"{_kind(kind)}/>'


def rect(x: float, y: float, width: float, height: float, kind: str = "", title: str = "") -> str:
    """A rectangle; `title` is shown where a pointer rests on it."""
    shape = f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"{_kind(kind)}'
    return f"{shape}>{_title(title)}</rect>" if title else f"{shape}/>"


def path(data: str, kind: str = "", title: str = "") -> str:
    """A path."""
    return f'<path d="{data}"{_kind(kind)}>{_title(title)}</path>' if title else f'<path d="{data}"{_kind(kind)}/>'


def mark(x: float, y: float, shape: str, kind: str, title: str = "", size: float = 5) -> str:
    """A point: a circle, a square, a diamond or a star."""
    if shape == "circle":
        body = f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(size)}"{_kind(kind)}'
        return f"{body}>{_title(title)}</circle>" if title else f"{body}/>"
    if shape == "square":
        return rect(x - size * 0.9, y - size * 0.9, size * 1.8, size * 1.8, kind, title)
    s = size * 1.3
    return path(
        f"M{number(x)} {number(y - s)}L{number(x + s)} {number(y)}L{number(x)} {number(y + s)}L{number(x - s)} {number(y)}Z",
        kind, title,
    )  # fmt: skip


def polyline(points: Sequence[tuple[float, float]], kind: str, closed: bool = False) -> str:
    """A line through points."""
    data = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return path(f"M{data}{'Z' if closed else ''}", kind)


def figure(height: float, label: str, *parts: str, width: float = WIDTH) -> str:
    """A drawing. `label` says what it shows to who cannot see it."""
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def axis_x(scale: Scale, y: float, top: float, name: str, most: int = 5) -> str:
    """An axis along the bottom at `y`, its grid up to `top`, its name below."""
    parts = []
    for value in scale.ticks(most):
        x = scale(value)
        parts += [line(x, top, x, y, "grid"), text(x, y + 14, short(value), "tick", "middle")]
    middle = (scale.start + scale.stop) / 2
    return "".join([*parts, line(scale.start, y, scale.stop, y, "axis"), text(middle, y + 30, name, "name", "middle")])


def axis_y(scale: Scale, x: float, right: float, name: str, most: int = 6) -> str:
    """An axis along the left at `x`, its grid up to `right`, its name above."""
    parts = []
    for value in scale.ticks(most):
        y = scale(value)
        parts += [line(x, y, right, y, "grid"), text(x - 5, y + 3.5, short(value), "tick", "end")]
    return "".join([*parts, text(4, min(scale.start, scale.stop) - 10, name, "name")])


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _title(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""
