"""What the pages take from the code itself: between `<!-- generated: KIND [NAME] -->` and `<!-- end -->`.

Methods and criteria come from their registries, figures from the tables of docs/results.md, so none of it is written twice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from docpages import ROOT
from gguftool import architectures, inventory
from gguftool.errors import GgufToolError
from gguftool.method_options import check_options
from gguftool.methods import METHODS, Method
from gguftool.recipe import Recipe
from gguftool.saliency import EXPERT_CRITERIA, NEURON_CRITERIA, Criterion

_REGION = re.compile(r"(<!-- generated: (\w+)(?: ([^\n>]+?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RATIOS = ("25 %", "40 %", "50 %")
# Options that some methods refuse, each with a value that it can have.
OPTIONS: dict[str, dict[str, object]] = {
    "--criterion": {"criterion": "reap"},
    "--relative": {"relative": True},
    "--cut-router": {"cut_router": True},
    "--layers": {"layer_weights": (1.0, 2.0)},
    "--whole": {"whole": 0.2},
    "--schedule": {"schedule": "uniform"},
    "--depth": {"depth": (1.0, 3.0)},
    "--mix": {"mix": (1.0, 2.0)},
    "--calibration": {"calibration": "general"},
}


def renewed(text: str) -> str:
    """A page's text with everything that is generated as the code has it now."""

    def renew(match: re.Match[str]) -> str:
        lines = KINDS[match[2]](match[3] or "")
        return match[1] + "\n" + "\n".join(lines) + "\n\n" + match[5]

    return _REGION.sub(renew, text)


def takes(method: Method) -> list[str]:
    """The options that `method` takes and others refuse, found by trying them."""
    found = []
    for option, values in OPTIONS.items():
        more = {"schedule": "measured"} if option == "--layers" and method.name == "tenp" else {}
        try:
            check_options(Recipe(method.name, 0.5, **values, **more))  # type: ignore[arg-type]
        except GgufToolError:
            continue
        found.append(option)
    return found


def _method(name: str) -> list[str]:
    method = METHODS[name]
    criterion = EXPERT_CRITERIA.get(name)
    rows = [("what it does", method.summary)]
    if criterion:
        rows += [("formula", f"`{criterion.formula}`")]
    source = criterion.source if criterion else method.source
    stock = "stock, where the family allows: runs on any llama.cpp"
    rows += [
        ("source", linked(source)),
        ("layout", stock if method.stock else "tiered: runs on the patched llama.cpp"),
        ("refit", f"{method.refitted}, by default" if method.refitted else "none by default"),
        ("options of its own", ", ".join(f"`{option}`" for option in takes(method)) or "none"),
    ]
    return ["| | |", "|---|---|", *(f"| {what} | {cell(text)} |" for what, text in rows)]


def _figures(name: str) -> list[str]:
    """Tables of what the method cost, from docs/results.md."""
    built_in, larger = results()
    labels = [name, f"{name}+refit"]
    lines: list[str] = []
    kinds = ("", " + refit", " + sequential refit")
    small = [(r, built_in[label]) for r in RATIOS for kind in kinds if (label := f"{name} {r}{kind}") in built_in]
    if small:
        lines += ["| built-in model | size | KL, code | KL, prose |", "|---|--:|--:|--:|"]
        lines += [
            f"| {r} gone{', refitted' if row[0].endswith('refit') else ''} | {row[1]} | {row[3]} | {row[5]} |"
            for r, row in small
        ]
    wide = [(label, larger[label]) for label in labels if label in larger]
    if wide:
        lines += [""] if lines else []
        head = " | ".join(f"KL {where}, {r}" for r in RATIOS for where in ("in", "out"))
        lines += [f"| 27 M model | {head} |", "|---|" + "--:|" * 6]
        lines += [f"| `{label}` | {' | '.join(row[1:])} |" for label, row in wide]
    return lines or ["It was not measured by itself."]


def results() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Rows of docs/results.md by label: of the built-in model ("tenp 25 %"), and of the 27 M model ("tenp")."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    built_in = {row[0]: row for row in rows if len(row) == 6 and re.search(r" \d+ %", row[0])}
    larger = {row[0].strip("`"): row for row in rows if len(row) == 7 and row[0].startswith("`")}
    return built_in, larger


def _methods(_: str) -> list[str]:
    lines = ["| method | what it does | source | layout |", "|---|---|---|---|"]
    for method in METHODS.values():
        layout = "stock" if method.stock else "tiered"
        lines.append(
            f"| [`{method.name}`]({method.name}.md) | {cell(method.summary)} | {linked(method.source)} | {layout} |"
        )
    return lines


def _criteria(which: str) -> list[str]:
    rows: dict[str, Criterion] = {"experts": EXPERT_CRITERIA, "neurons": NEURON_CRITERIA}[which]
    lines = ["| criterion | formula | source |", "|---|---|---|"]
    return lines + [f"| `{c.name}` | `{cell(c.formula)}` | {linked(c.source)} |" for c in rows.values()]


def _fields(_: str) -> list[str]:
    """The columns of `architectures.Architecture` with their defaults; what they mean stands in its docstring."""
    lines = ["| column | where a row leaves it out |", "|---|---|"]
    for column in dataclasses.fields(architectures.Architecture):
        default = "has to be given" if column.default is dataclasses.MISSING else f"`{column.default!r}`"
        lines.append(f"| `{column.name}` | {default} |")
    return lines


def _rules(_: str) -> list[str]:
    used: dict[str, list[str]] = {name: [] for name in inventory.RULES}
    for row in architectures.ARCHITECTURES:
        for converted in row.converted:
            used[converted.rule].append(f"`{row.model_type}`: `{converted.suffix}`")
    lines = ["| rule | where it is used |", "|---|---|"]
    return lines + [f"| `{name}` | {'; '.join(places)} |" for name, places in used.items()]


def _layouts(_: str) -> list[str]:
    """Where a uniform plan has no stock file: what else `layout.bystanders` finds, by the columns that say it."""
    families = architectures.ARCHITECTURES
    kept = [row.model_type for row in families if row.predictors == "kept"]
    shared = [row.model_type for row in families if row.shared_tied]
    rows = [
        ("experts of layers that predict further tokens (MTP), which stay whole", "every method", kept),
        ("shared experts, which llama.cpp makes as wide as the others", "`enp`", shared),
    ]
    lines = ["| what would change too | by | families |", "|---|---|---|"]
    return lines + [f"| {what} | {by} | {', '.join(f'`{name}`' for name in names)} |" for what, by, names in rows]


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def linked(source: str) -> str:
    """A source with arXiv numbers as links."""
    return cell(re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source))


KINDS: dict[str, Callable[[str], Sequence[str]]] = {
    "method": _method, "figures": _figures, "methods": _methods, "criteria": _criteria, "fields": _fields, "rules": _rules,
    "layouts": _layouts,
}  # fmt: skip


def stale(page: Path) -> bool:
    """Whether what is generated in a page is not what the code has."""
    text = page.read_text(encoding="utf-8")
    return renewed(text) != text
