"""What `fit` says: the candidates that it weighed, what each takes and costs, and why one was chosen. Values, no work."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .budget import RUN_OPTIONS, Memory
from .durable import write_text
from .memory import gib
from .report import Candidate

CHOSEN, MEASURED, LEFT_OUT, TOO_LARGE, FITS = "chosen", "measured", "left out", "too large", "fits"
RUN = "to run it within the budget"


@dataclass(frozen=True)
class Weighed:
    """One candidate.

    Attributes:
        label: as `auto 31 % Q4_K_M` or `unpruned Q3_K_M`.
        ratio: share of routed-expert parameters that goes; 0 for the unpruned model.
        predicted: bytes of its file before it was written. need: memory that a skeleton of it took; None where none was run.
        bytes: of the file that was written. texts: by name, {"kld", "kld_err", "ppl", "ppl_err", "same_top"}.
        status: chosen, measured, fits (dry run), left out or too large; why: in words.
    """

    label: str
    target: str
    ratio: float
    predicted: int
    need: int | None = None
    bytes: int | None = None
    texts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    status: str = FITS
    why: str = ""

    @property
    def kl(self) -> float | None:
        """Mean over the texts of the KL divergence to the original, in nats; None where it was not measured."""
        return sum(text["kld"] for text in self.texts.values()) / len(self.texts) if self.texts else None

    @property
    def error(self) -> float:
        """Standard error of `kl`."""
        return sqrt(sum(text["kld_err"] ** 2 for text in self.texts.values())) / max(len(self.texts), 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"kl": self.kl, "kl_err": self.error if self.texts else None}


def goal_here(goal: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A report's goal (`FitReport.goal`) for this machine's terminal: its command names the file at `path`, and can be pasted."""
    name = shlex.quote(Path(path).name)
    return {key: str(said).replace(name, shlex.quote(path), 1) if key == RUN else said for key, said in goal.items()}


@dataclass(frozen=True)
class FitReport:
    """What a budget holds.

    Attributes:
        budget: bytes. ctx: tokens of the context that fits too.
        rows: the candidates, the chosen one first, then by KL; those that were not measured last.
        memory: what the chosen file took, measured; of a dry run None. path: the chosen file.
        verdict: why it was chosen. notes: what a person should know. protocol: how KL was measured.
    """

    model: str
    base_bytes: int
    budget: int
    ctx: int
    rows: Sequence[Weighed]
    memory: Memory | None
    path: Path | None
    verdict: str
    protocol: str
    notes: Sequence[str] = ()

    @property
    def command(self) -> str:
        """What runs the file within the budget; it can be pasted."""
        return self._command(str(self.path)) if self.path else ""

    def _command(self, file: str) -> str:
        return f"gguftool run {shlex.quote(file)} -c {self.ctx} {RUN_OPTIONS}"

    def as_dict(self) -> dict[str, Any]:
        """For fit.json and --json."""
        return {
            "format": "gguftool.fit", "version": 1, "model": self.model, "base_bytes": self.base_bytes,
            "budget": self.budget, "ctx": self.ctx, "memory": self.memory.as_dict() if self.memory else None,
            "path": str(self.path) if self.path else None, "command": self.command, "verdict": self.verdict,
            "candidates": [row.as_dict() for row in self.rows], "protocol": self.protocol, "notes": list(self.notes),
        }  # fmt: skip

    def candidates(self) -> list[Candidate]:
        """The rows as a report shows them, in the same order."""
        return [
            Candidate(
                row.label, row.predicted if row.bytes is None else row.bytes,
                {name: {"mean": text["kld"], "err": text["kld_err"]} for name, text in row.texts.items()},
                row.status == CHOSEN, f"{row.status}: {row.why}" if row.why else row.status, row.need,
            )
            for row in self.rows
        ]  # fmt: skip

    def goal(self) -> dict[str, str]:
        """What was asked for and what it came to, for a report: where the file lay on this machine is nobody's matter there."""
        goal = {"budget": f"{gib(self.budget)} of memory ({self.budget:,} bytes), with a context of {self.ctx} tokens"}
        if self.memory:
            goal["measured"] = f"{self.memory}; {self.memory.peak:,} bytes"
        if self.path:
            goal[RUN] = self._command(self.path.name)
        return goal | {"choice": self.verdict, "how it was weighed": self.protocol}

    def save(self, folder: Path) -> None:
        """Writes fit.json into `folder`."""
        write_text(folder / "fit.json", json.dumps(self.as_dict(), indent=1) + "\n")

    def table(self) -> Table:
        """The candidates."""
        title = f"{self.model} in {gib(self.budget)} with a context of {self.ctx} tokens"
        table = Table(title=Text(title), caption=self.protocol, title_justify="left", box=box.SIMPLE)
        names = list(dict.fromkeys(name for row in self.rows for name in row.texts))
        for name in ("candidate", "goes", "file", "needs", *(f"KL, {name}" for name in names), "KL, mean", ""):
            left = name in ("candidate", "")
            table.add_column(Text(name.replace(", ", "\n")), justify="left" if left else "right", no_wrap=bool(name))
        for row in self.rows:
            size = row.predicted if row.bytes is None else row.bytes
            kls = [f"{row.texts[name]['kld']:.5f}" if name in row.texts else "" for name in names]
            mean = "" if row.kl is None else f"{row.kl:.5f} ± {row.error:.5f}"
            need = "" if row.need is None else f"{row.need:,}"
            why = f"{row.status}: {row.why}" if row.why else row.status
            cells = (row.label, f"{100 * row.ratio:.1f} %", f"{size:,}", need, *kls, mean, why)
            table.add_row(*(Text(cell) for cell in cells), style="bold" if row.status == CHOSEN else None)
        return table

    def lines(self) -> list[str]:
        """What stands below the table."""
        parts = [self.verdict]
        if self.memory:
            parts += [f"measured: {self.memory}", self.command]
        return parts + [f"note: {note}" for note in self.notes]
