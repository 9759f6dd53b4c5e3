"""The report: what pruning cost, as rows of numbers that carry their errors. Values and their rendering, no work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .errors import GgufToolError
from .plan import PrunePlan
from .tensors import TensorSpec

FORMAT = "gguftool.report"
VERSION = 2
# "cut off" is found out later: a run that says it is running, and whose process is gone.
STATES = ("running", "done", "failed", "interrupted", "cut off")


@dataclass(frozen=True)
class Row:
    """One model of a report. `texts` maps a text's name to what `evaluate` measured there (`Comparison.as_dict()`)."""

    label: str
    method: str
    ratio: float
    encoding: str
    bytes: int
    texts: Mapping[str, Mapping[str, Any]]
    path: str = ""


@dataclass(frozen=True)
class Candidate:
    """One way to reach a goal that was weighed against others, whether or not it was taken.

    Attributes:
        bytes: size of its file. need: memory that running it takes; None where that was not measured.
        texts: KL divergence by text as far as it was measured: {"mean", "err"}.
        chosen: whether it is the one that was made. why: the reason, in words.
    """

    label: str
    bytes: int
    texts: Mapping[str, Mapping[str, float]]
    chosen: bool = False
    why: str = ""
    need: int | None = None


@dataclass(frozen=True)
class Status:
    """Where a run stands. Times are ISO 8601 in UTC.

    Attributes:
        state: one of STATES.
        stage: what it does, or did last.
        message: why it failed.
        pid, host: its process, while it is running.
    """

    state: str = "done"
    stage: str = ""
    message: str = ""
    started: str = ""
    updated: str = ""
    pid: int = 0
    host: str = ""

    @property
    def done(self) -> bool:
        """Whether the numbers are those of a run that came to its end."""
        return self.state == "done"

    def __str__(self) -> str:
        """In a sentence; empty for a finished run."""
        at = f" at {self.stage!r}" if self.stage else ""
        if self.state == "running":
            return (
                f"Running: {self.stage or 'started'} (started {self.started}, last change {self.updated}, process {self.pid} "
                f"on {self.host}). If that process is gone, the run was cut off; the same command goes on from there."
            )
        if self.state == "failed":
            return f"Failed{at}: {self.message}"
        if self.state in ("interrupted", "cut off"):
            word = "Interrupted" if self.state == "interrupted" else "Cut off (the process is gone)"
            return f"{word}{at}; the same command goes on from there."
        return ""


@dataclass(frozen=True)
class Report:
    """The rows of one comparison, all against the same base.

    Attributes:
        model: name of the base.
        base_bytes: size of the base GGUF; 0 where it is not known yet.
        base: perplexity of the base by text: {"ppl", "ppl_err", "tokens", "n_ctx", "sha256"}.
        rows: the pruned or quantized models.
        protocol: how it was measured, in words.
        notes: what a reader must know.
        status: where the run stands; of one that is not done, everything above may be missing.
        candidates: what was weighed, where something was; budget: the goal that it was weighed by, as names and values.
        facts: further sections by name, as `report_facts`, `trial` and `provenance` describe them.
        failures: what cannot be right; the run is not done.
    """

    model: str
    base_bytes: int
    base: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Row]
    protocol: str
    notes: Sequence[str] = field(default_factory=tuple)
    status: Status = Status()
    candidates: Sequence[Candidate] = ()
    budget: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Row | None:
        """The row that all of the report is about: the only pruned one, if it stands first, or the only one at all;
        None of a comparison of many."""
        found = [row for row in self.rows if row.method != "none"] or list(self.rows)
        return found[0] if len(found) == 1 and found[0] is self.rows[0] else None

    failures: Sequence[str] = ()

    @property
    def untried(self) -> list[str]:
        """Models that were not run for their speed and for what they write, a line each with the reason."""
        alone = "; what the others write is compared with nothing"
        return [
            f"{one['label']} was not run: {one['why']}" + (alone if one["label"] == "original" else "")
            for one in self.facts.get("speed", {}).get("skipped", ())
        ]

    def as_dict(self) -> dict[str, Any]:
        """For report.json and --json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "status": {**vars(self.status)},
            "model": self.model,
            "base": {"bytes": self.base_bytes, "texts": {name: dict(values) for name, values in self.base.items()}},
            "rows": [
                {**vars(row), "texts": {name: dict(value) for name, value in row.texts.items()}} for row in self.rows
            ],
            "candidates": [{**vars(item), "texts": dict(item.texts)} for item in self.candidates],
            "budget": None if self.budget is None else dict(self.budget),
            "protocol": self.protocol,
            "notes": list(self.notes),
            "failures": list(self.failures),
            "facts": dict(self.facts),
        }

    @classmethod
    def from_dict(cls, raw: Any) -> Report:
        """The inverse of `as_dict`. Raises GgufToolError for anything else."""
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise GgufToolError("not a gguftool report")
        if raw.get("version") != VERSION:
            raise GgufToolError(
                f"report version {raw.get('version')}, this gguftool reads {VERSION}; the command that wrote it writes it anew"
            )
        try:
            return cls(
                str(raw["model"]), int(raw["base"]["bytes"]), dict(raw["base"]["texts"]),
                [Row(**row) for row in raw["rows"]], str(raw["protocol"]), [str(note) for note in raw["notes"]],
                Status(**raw["status"]), [Candidate(**item) for item in raw["candidates"]], raw["budget"],
                dict(raw["facts"]), [str(failure) for failure in raw["failures"]],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GgufToolError(f"the report lacks or garbles {error}") from error

    def cells(self, short: bool) -> tuple[list[str], list[list[str]]]:
        """Head and rows; `short` leaves out what a terminal has no room for."""
        head = ["model", "size"] + ([] if short else ["of base"])
        first = ["original", megabytes(self.base_bytes)] + ([] if short else ["100 %"])
        for text, values in self.base.items():
            head += [f"perplexity, {text}", f"KL, {text}"] + ([] if short else ["same top"])
            first += [with_error(values["ppl"], values["ppl_err"]), ""] + ([] if short else [""])
        return head, [first, *(self._row_cells(row, short) for row in self.rows)]

    def _row_cells(self, row: Row, short: bool) -> list[str]:
        cells = [row.label, megabytes(row.bytes)] + ([] if short else [f"{100 * row.bytes / self.base_bytes:.1f} %"])
        for text in self.base:
            value = row.texts[text]
            cells += [
                with_error(value["pruned"]["ppl"], value["pruned"]["ppl_err"]),
                f"{value['kld']['mean']:.5f} ± {value['kld']['err']:.5f}",
            ]
            cells += [] if short else [f"{100 * value['same_top']:.1f} %"]
        return cells

    def weighed(self) -> tuple[list[str], list[list[str]]]:
        """The candidates: head and rows, in their order; the last column says why."""
        measured = [name for item in self.candidates for name in item.texts]
        names = [name for name in dict.fromkeys([*self.base, *measured]) if name in measured]
        needs = any(item.need is not None for item in self.candidates)
        head = ["candidate", "size", *(["needs"] if needs else []), *(f"KL, {name}" for name in names), "", "why"]
        rows = []
        for item in self.candidates:
            need = [] if not needs else ["" if item.need is None else megabytes(item.need)]
            kls = [item.texts.get(name) for name in names]
            cells = ["" if kl is None else f"{kl['mean']:.5f} ± {kl.get('err', 0.0):.5f}" for kl in kls]
            rows.append([item.label, megabytes(item.bytes), *need, *cells, "taken" if item.chosen else "", item.why])
        return head, rows

    def table(self) -> Table:
        """The report as a table for the terminal."""
        head, rows = self.cells(short=True)
        table = Table(
            title=Text(f"{self.model}: what it cost"), caption=self.protocol, title_justify="left", box=box.SIMPLE
        )
        for index, name in enumerate(head):
            table.add_column(Text(name.replace(", ", "\n")), justify="left" if index == 0 else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*(Text(cell) for cell in cells))
        return table

    def markdown(self) -> str:
        """The report as a Markdown page."""
        lines = [f"# {self.model}: what it cost", ""]
        lines += [] if self.status.done else [f"**{self.status}**", ""]
        if self.base:
            head, rows = self.cells(short=False)
            lines += [*markdown_table(head, rows), "", self.protocol, ""]
        lines += [f"**Not done, this cannot be right:** {failure}" for failure in self.failures]
        lines += [f"- {note}" for note in (*self.notes, *self.untried)]
        if self.candidates or self.budget:
            budget = (self.budget or {}).items()
            lines += ["", "## What was weighed", "", *(f"- {name}: {value}" for name, value in budget)]
            lines += ["", *markdown_table(*self.weighed())] if self.candidates else []
        return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; what a name holds of Markdown's and HTML's own signs is escaped."""
    lines = [[re.sub(r"[|<>&`*\\\[\]\r\n]", _escaped, cell) for cell in cells] for cells in (head, *rows)]
    first, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return [first, "|" + "---|" * len(head), *rest]


def _escaped(match: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\r": " ", "\n": " "}.get(match[0], "\\" + match[0])


def megabytes(n_bytes: int) -> str:
    """A size for people: GB from a gigabyte on, else MB (powers of ten)."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"


def with_error(value: float, error: float) -> str:
    """A number and its standard error."""
    return f"{value:.3f} ± {error:.3f}"


def plan_table(plan: PrunePlan) -> Table:
    """A plan as a table: a line a layer, its tiers as count × width, what stays and the bytes of its experts."""
    specs = plan.encoded or plan.tensors
    table = Table(title=f"{plan.recipe.method}: {100 * (1 - plan.kept_share):.1f} % of routed-expert parameters go")
    for name, justify in (("layer", "right"), ("experts", "right"), ("tiers (count × width)", "left"),
                          ("kept", "right"), ("types gate/up/down", "left"), ("expert bytes", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for layer in plan.layers:
        tiers = layer.tiers()
        empty = len(layer.router) - sum(len(tier.rows) for tier in tiers)
        shape = " + ".join(f"{len(tier.rows)} × {tier.width}" for tier in tiers) + (f" + {empty} × 0" if empty else "")
        kept = sum(layer.widths) / (plan.n_expert * plan.n_ff_exp)
        mine = [spec for spec in specs if spec.name.startswith(f"blk.{layer.index}.ffn_") and "_exps" in spec.name]
        table.add_row(
            str(layer.index), f"{len(layer.router)}/{plan.n_expert}", shape, f"{100 * kept:.1f} %",
            _types(mine), f"{sum(spec.nbytes for spec in mine):,}",
        )  # fmt: skip
    return table


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What pruning each layer alone cost; rows as `gguftool sensitivity --json` has them."""
    table = Table(title="each layer pruned alone")
    for name in ("layer", "KL divergence", "lost value", "weight (KL / lost)", "share (KL)"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["layer"]), f"{row['kld']:.5f} ± {row['kld_err']:.5f}", f"{row['lost']:.5g}",
            f"{row['weight']:.3f}", f"{row['share']:.3f}",
        )  # fmt: skip
    return table


def _types(specs: Sequence[TensorSpec]) -> str:
    found: dict[str, list[str]] = {}
    for role in ("gate_exps", "up_exps", "gate_up_exps", "down_exps"):
        kinds = [spec.type for spec in specs if f"ffn_{role}" in spec.name]
        if kinds:
            found[role] = sorted(set(kinds), key=kinds.index)
    return " / ".join("+".join(kinds) for kinds in found.values())


def other_types(specs: Sequence[TensorSpec]) -> str:
    """The types of everything that is no expert, in a line: how many tensors have which."""
    kinds = [spec.type for spec in specs if "_exps" not in spec.name]
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))


def types_table(specs: Sequence[TensorSpec]) -> Table:
    """Every tensor: name, shape, type, bytes."""
    table = Table(title="tensors")
    for name, justify in (("tensor", "left"), ("shape", "left"), ("type", "left"), ("bytes", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for spec in specs:
        table.add_row(spec.name, " × ".join(map(str, spec.ne)), spec.type, f"{spec.nbytes:,}")
    return table


def inspection_tables(facts: Mapping[str, Any], experts: bool) -> list[Table | str]:
    """What `inspect` prints: a line of facts, a line a layer, and with `experts` the width of every expert."""
    head = (
        f"{facts['name']} · {facts['arch']} · {facts['file_type']} · {facts['layout']} layout · "
        f"{facts['bytes']:,} bytes, {facts['expert_bytes']:,} of them experts"
    ) + (f" · weights by {facts['weights']}" if facts["weights"] else "")
    table = Table(title=None)
    for name in ("layer", "experts", "tiers (count × width)", "type of down"):
        table.add_column(name)
    for layer in facts["layers"]:
        shape = " + ".join(f"{tier['count']} × {tier['width']}" for tier in layer["tiers"])
        types = " + ".join(dict.fromkeys(tier["type"] for tier in layer["tiers"]))
        table.add_row(str(layer["layer"]), str(len(layer["experts"])), shape, types)
    found: list[Table | str] = [head, table]
    for layer in facts["layers"] if experts else ():
        widths = "  ".join(f"{e['expert']}:{e['width']}" for e in layer["experts"])
        found.append(f"layer {layer['layer']}  expert:width  {widths}")
    return found


def comparison_table(found: Mapping[str, Any]) -> Table:
    """What `validate` prints."""
    table = Table(
        title=f"{found['tokens']} tokens scored, windows of {found['n_ctx']}, backend {found['backend']}",
        title_justify="left",
    )
    for name in ("", "original", "pruned"):
        table.add_column(name, justify="left" if not name else "right")
    base, pruned, kld = found["base"], found["pruned"], found["kld"]
    table.add_row("size", megabytes(base["bytes"]), megabytes(pruned["bytes"]))
    table.add_row("perplexity", with_error(base["ppl"], base["ppl_err"]), with_error(pruned["ppl"], pruned["ppl_err"]))
    table.add_row("ln(ratio)", "", f"{found['ln_ppl_ratio']:.5f} ± {found['ln_ppl_ratio_err']:.5f}")
    table.add_row("KL divergence", "", f"{kld['mean']:.5f} ± {kld['err']:.5f}")
    table.add_row("  99th percentile, max", "", f"{kld['p99']:.4f}, {kld['max']:.4f}")
    table.add_row("same top token", "", f"{100 * found['same_top']:.2f} %")
    return table
