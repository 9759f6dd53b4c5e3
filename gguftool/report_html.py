"""report.html: one file that holds all it needs, without a script and without anything that is fetched.

Names, texts and what models write are hostile until they are escaped; `svg.escape` is the only way into the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import report_maps as maps
from . import report_sections as sections
from .report import Report
from .svg import escape

# What a browser may load and run for this page: its own style sheet and nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
REFRESH_SECONDS = 10


def render(report: Report) -> str:
    """The page. That of a run that goes on asks to be read again every REFRESH_SECONDS."""
    parts = [(name, title, body) for name, title, body in _sections(report) if body]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in parts)
    running = report.status.state == "running"
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="generator" content="gguftool">\n<meta name="color-scheme" content="light dark">\n',
            f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if running else "",
            f"<title>{escape(_title(report))}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n",
            sections.header(report),
            f'<nav aria-label="Sections">{links}</nav>\n' if len(parts) > 1 else "",
            sections.tiles(report),
            *(
                f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>\n'
                f"{body}</section>\n"
                for name, title, body in parts
            ),
            "</main>\n</body>\n</html>\n",
        )
    )


def _sections(report: Report) -> Sequence[tuple[str, str, str]]:
    return (
        ("size", "Size against quality", sections.size_against_quality(report)),
        ("quality", "Quality by text", sections.quality(report)),
        ("spread", "Divergence at single tokens", sections.spread(report)),
        ("experts", "What each expert was worth, and what it kept", maps.experts(report)),
        ("routing", "Routing before and after", maps.routing(report)),
        ("speed", "Speed and memory", sections.speed(report)),
        ("completions", "What they write", sections.completions(report)),
        ("candidates", "What was weighed", sections.candidates(report)),
        ("notes", "Notes", sections.notes(report)),
        ("reproduce", "To reproduce it", sections.reproduce(report)),
    )


def _title(report: Report) -> str:
    state = "" if report.status.done else f" ({report.status.state})"
    return f"{report.model}: what it cost{state}"


def _style() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")
