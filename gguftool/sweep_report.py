"""What a sweep found: rows with their errors, the Pareto front, and whether pruning beats quantizing alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .durable import write_text
from .report import megabytes, with_error
from .tradeoff import Point, Verdict, at_each_size, curve, front, judge, winning_sizes

PRUNED, CONTROL, UNPRUNED = "pruned", "control", "unpruned"


@dataclass(frozen=True)
class Name:
    """What a row is of.

    Attributes:
        label: for people; no two rows of a sweep have the same.
        method: the variant's name, "none" for the unpruned model.
        kind: PRUNED, CONTROL or UNPRUNED.
        ratio: the share of routed-expert parameters that was to go.
        encoding: the file's type.
        quantized: whether it was quantized after pruning.
    """

    label: str
    method: str
    kind: str
    ratio: float
    encoding: str
    quantized: bool


@dataclass(frozen=True)
class Score:
    """A row on one group of texts, the mean over its seeds.

    Attributes:
        kl: mean KL divergence to the original, in nats, over all scored tokens of the group.
        ppl_err, kl_err: standard errors from the choice of evaluation text. They are averaged over the seeds and not
            made smaller by their number: all seeds are scored on the same tokens.
        same_top: share of tokens where both hold the same one for the likeliest.
        p99: 99th percentile of the divergence.
        ppl_spread, kl_spread: sample standard deviation over the seeds; None for one seed.
        n_seeds: how many seeds.
    """

    ppl: float
    ppl_err: float
    kl: float
    kl_err: float
    same_top: float
    p99: float
    ppl_spread: float | None
    kl_spread: float | None
    n_seeds: int

    @property
    def kl_uncertainty(self) -> float:
        """Standard error of `kl` from the text and, over several seeds, from the calibration text as well."""
        return hypot(self.kl_err, (self.kl_spread or 0.0) / sqrt(self.n_seeds))

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, Any]]) -> Score:
        """From what was measured, a mapping for each seed (`measurements.measured_facts`)."""

        def over(*path: str) -> list[float]:
            values: list[Any] = list(measured)
            for key in path:
                values = [value[key] for value in values]
            return values

        def spread(values: list[float]) -> float | None:
            return stdev(values) if len(values) > 1 else None

        ppl, kl = over("ppl"), over("kld", "mean")
        return cls(
            ppl=fmean(ppl), ppl_err=fmean(over("ppl_err")), kl=fmean(kl), kl_err=fmean(over("kld", "err")),
            same_top=fmean(over("same_top")), p99=fmean(over("kld", "p99")),
            ppl_spread=spread(ppl), kl_spread=spread(kl), n_seeds=len(measured),
        )  # fmt: skip


@dataclass(frozen=True)
class SweepRow:
    """One row.

    Attributes:
        runs: for each seed {"seed", "bytes", "kept", "formula", "notes", "groups": group -> what was measured}.
    """

    name: Name
    runs: Sequence[Mapping[str, Any]]

    @cached_property
    def bytes(self) -> float:
        """Size of the file; the mean over the seeds, whose plans may differ by some tiers."""
        return fmean(run["bytes"] for run in self.runs)

    @cached_property
    def kept(self) -> float:
        """Share of routed-expert parameters that stay."""
        return fmean(run["kept"] for run in self.runs)

    @cached_property
    def scores(self) -> dict[str, Score]:
        """By group."""
        return {group: Score.of([run["groups"][group] for run in self.runs]) for group in self.runs[0]["groups"]}

    def point(self, group: str) -> Point:
        """Size and divergence on one group."""
        score = self.scores[group]
        return Point(self.name.label, self.bytes, score.kl, score.kl_uncertainty)


@dataclass(frozen=True)
class SweepReport:
    """Everything that a sweep found.

    Attributes:
        model, base_bytes: name and size of the original's GGUF.
        base: by group {"ppl", "ppl_err", "tokens", "windows", "texts"} of the original.
        rows: in the order in which they were asked for.
        protocol: how it was measured, in words.
        notes: what a reader must know.
    """

    model: str
    base_bytes: int
    base: Mapping[str, Mapping[str, Any]]
    rows: Sequence[SweepRow]
    protocol: str
    notes: Sequence[str] = ()

    def front(self, group: str) -> list[bool]:
        """Which rows are on the Pareto front of a group."""
        return front([row.point(group) for row in self.rows])

    def verdicts(self, group: str) -> list[Verdict]:
        """Every pruned and quantized row against quantizing alone; controls are left out."""
        return [judge(point, self._line(group)) for point in self._contenders(group)]

    def at_each_size(self, group: str) -> list[Verdict]:
        """The best of them at each of their sizes."""
        return at_each_size(self._contenders(group), self._line(group))

    def _contenders(self, group: str) -> list[Point]:
        return [row.point(group) for row in self.rows if row.name.kind == PRUNED and row.name.quantized]

    def _line(self, group: str) -> list[Point]:
        return curve([row.point(group) for row in self.rows if row.name.kind == UNPRUNED])

    def as_dict(self) -> dict[str, Any]:
        """For sweep.json and --json."""
        marks = {group: self.front(group) for group in self.base}
        return {
            "format": "gguftool.sweep",
            "version": 1,
            "model": self.model,
            "base": {"bytes": self.base_bytes, "groups": {group: dict(facts) for group, facts in self.base.items()}},
            "rows": [
                {
                    **asdict(row.name),
                    "bytes": round(row.bytes),
                    "kept": row.kept,
                    "groups": {
                        group: asdict(score) | {"front": marks[group][index]} for group, score in row.scores.items()
                    },
                    "runs": [dict(run) for run in row.runs],
                }
                for index, row in enumerate(self.rows)
            ],
            "against_quantizing_alone": {
                group: {
                    "conclusion": self.conclusion(group),
                    "winning_bytes": [
                        [round(low), round(high)] for low, high in winning_sizes(self.at_each_size(group))
                    ],
                    "rows": [_verdict_facts(verdict) for verdict in self.verdicts(group)],
                }
                for group in self.base
            },
            "protocol": self.protocol,
            "notes": list(self.notes),
        }

    def save(self, folder: Path) -> None:
        """Writes sweep.json and sweep.md into `folder`."""
        for name, text in (
            ("sweep.json", json.dumps(self.as_dict(), indent=1) + "\n"),
            ("sweep.md", self.markdown()),
        ):
            write_text(folder / name, text)

    def conclusion(self, group: str) -> str:
        """From which size on prune + quantize beats quantize alone, or that it does not."""
        verdicts = self.verdicts(group)
        outcomes = [verdict.outcome for verdict in verdicts]
        best = self.at_each_size(group)
        if not verdicts:
            return f"{group}: nothing was pruned and quantized, so there is nothing to compare with quantizing alone"
        if not best:
            return f"{group}: open, as no pruned and quantized file is of a size that unpruned ones were measured at"
        ranges = winning_sizes(best)
        sizes = (best[0].point.bytes, best[-1].point.bytes)
        if not ranges:
            said = f"prune + quantize does not beat quantize alone at any size measured ({_range(sizes)})"
        elif ranges == [sizes]:
            said = f"prune + quantize beats quantize alone at every size measured ({_range(sizes)})"
        elif len(ranges) == 1 and ranges[0][0] == sizes[0]:
            low, high = (megabytes(round(size)) for size in ranges[0])
            where = f"from {high} down to {low}" if low != high else f"at {low}, the smallest size compared"
            said = f"prune + quantize beats quantize alone {where}, not above"
        else:
            said = f"prune + quantize beats quantize alone at {' and at '.join(map(_range, ranges))}, not elsewhere"
        counts = (f"{outcomes.count(name)} {name}" for name in ("win", "tie", "loss", "open") if name in outcomes)
        return f"{group}: {said} [{', '.join(counts)}]"

    def _head(self) -> list[str]:
        seeds = ["ppl, seeds", "KL, seeds"] if self._has_spread else []
        return ["model", "front", "size", "of base", "kept", "perplexity", "KL", "same top", "p99 KL", *seeds]

    @property
    def _has_spread(self) -> bool:
        return any(len(row.runs) > 1 for row in self.rows)

    def _cells(self, group: str) -> list[list[str]]:
        base = self.base[group]
        rows = [
            ["original", "", megabytes(self.base_bytes), "100 %", "100 %", with_error(base["ppl"], base["ppl_err"])]
        ]
        for row, on_front in zip(self.rows, self.front(group), strict=True):
            score = row.scores[group]
            cells = [row.name.label, "*" if on_front else "", megabytes(round(row.bytes))]
            cells += [f"{100 * row.bytes / self.base_bytes:.1f} %", f"{100 * row.kept:.1f} %"]
            cells += [with_error(score.ppl, score.ppl_err), f"{score.kl:.5f} ± {score.kl_err:.5f}"]
            cells += [f"{100 * score.same_top:.1f} %", f"{score.p99:.4f}"]
            if score.ppl_spread is not None and score.kl_spread is not None:
                cells += [f"{score.ppl_spread:.3f}", f"{score.kl_spread:.5f}"]
            rows.append(cells)
        width = len(self._head())
        return [cells + [""] * (width - len(cells)) for cells in rows]

    def tables(self) -> list[Table | str]:
        """For the terminal: a table and a conclusion for each group."""
        found: list[Table | str] = []
        for group in self.base:
            table = Table(title=Text(f"{self.model}: {group}"), title_justify="left", box=box.SIMPLE)
            for index, name in enumerate(self._head()):
                table.add_column(Text(name), justify="left" if index == 0 else "right", no_wrap=True)
            for cells in self._cells(group):
                table.add_row(*(Text(cell) for cell in cells))
            found += [table, self.conclusion(group)]
        return [*found, self.protocol, *(f"note: {note}" for note in self.notes)]

    def markdown(self) -> str:
        """The report as a Markdown page."""
        lines = [f"# {self.model}: size against divergence", "", "![size against KL divergence](sweep.svg)", ""]
        lines += [f"- {self.conclusion(group)}" for group in self.base]
        head = self._head()
        for group in self.base:
            texts = ", ".join(text["name"] for text in self.base[group]["texts"])
            lines += ["", f"## {group}", "", f"Texts: {texts}. A star marks the Pareto front.", ""]
            lines += [f"| {' | '.join(head)} |", "|---|:-:|" + "--:|" * (len(head) - 2)]
            lines += [f"| {' | '.join(cells)} |" for cells in self._cells(group)]
            if verdicts := self.verdicts(group):
                lines += ["", "Against quantizing alone at the same size:", ""]
                lines += ["| model | KL | unpruned | |", "|---|--:|--:|---|"]
                lines += [f"| {' | '.join(_verdict_cells(verdict))} |" for verdict in verdicts]
        lines += ["", self.protocol, "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _range(sizes: tuple[float, float]) -> str:
    low, high = (megabytes(round(size)) for size in sizes)
    return low if low == high else f"{low} to {high}"


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    rival = verdict.rival
    return {
        "label": verdict.point.label, "bytes": verdict.point.bytes, "kl": verdict.point.kl, "err": verdict.point.error,
        "rival_kl": rival.value if rival else None, "rival_err": rival.error if rival else None,
        "outcome": verdict.outcome,
    }  # fmt: skip


def _verdict_cells(verdict: Verdict) -> list[str]:
    point, rival = verdict.point, verdict.rival
    other = f"{rival.value:.5f} ± {rival.error:.5f}" if rival else ""
    return [point.label, f"{point.kl:.5f} ± {point.error:.5f}", other, verdict.outcome]
