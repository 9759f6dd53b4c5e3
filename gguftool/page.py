"""Building blocks of report.html. What comes as a body is HTML already; everything else is escaped here."""

from __future__ import annotations

from collections.abc import Sequence

from .svg import escape


def figure(title: str, body: str, below: str = "") -> str:
    """A panel: a heading, a drawing, and a caption or a list below it."""
    words = below if below.startswith("<") else f"<figcaption>{escape(below)}</figcaption>" if below else ""
    return f"<figure><h3>{escape(title)}</h3>{body}{words}</figure>"


def panels(figures: Sequence[str], kind: str = "") -> str:
    """Panels side by side, or below each other on a narrow screen; of the kind "two" two in a row."""
    return f'<div class="{f"panels {kind}".strip()}">{"".join(figures)}</div>\n' if figures else ""


def details(summary: str, body: str) -> str:
    """What is folded away until somebody asks for it."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (), wrap: Sequence[int] = (),
    mono: Sequence[int] = (), main: int | None = None,
) -> str:  # fmt: skip
    """A table that scrolls where it is wider than the page. Columns: `left` aligned, `wrap`ped, `mono`spaced; `main` is a row."""

    def kind(index: int) -> str:
        names = [
            *(["l"] if index in left else []),
            *(["wrap"] if index in wrap else []),
            *(["mono"] if index in mono else []),
        ]
        return f' class="{" ".join(names)}"' if names else ""

    top = "".join(f'<th scope="col"{kind(i)}>{escape(name)}</th>' for i, name in enumerate(head))
    body = "".join(
        f"<tr{' class=' + chr(34) + 'main' + chr(34) if number == main else ''}>"
        + "".join(f"<td{kind(i)}>{escape(cell)}</td>" for i, cell in enumerate(cells))
        + "</tr>"
        for number, cells in enumerate(rows)
    )
    label = ", ".join(name for name in head if name)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {escape(label)}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )
