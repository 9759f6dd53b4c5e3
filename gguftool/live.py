"""The live view of a run: its stages, how far the one that runs is, and a table of what has come of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from .report import megabytes

STAGES = ("convert", "calibrate", "plan", "refit", "prune", "quantize", "measure", "check")
# Of a run that was given a budget; "make" stands for what lies between calibrating and measuring.
FIT_STAGES = ("convert", "budget", "calibrate", "weigh", "make", "measure", "check")
PENDING, RUNNING, DONE, THERE, LEFT_OUT = "pending", "running", "done", "already there", "left out"
_STYLES = {PENDING: "dim", RUNNING: "bold yellow", DONE: "green", THERE: "green", LEFT_OUT: "dim"}


def stage_of(name: str, quant: str | None) -> str:
    """The stage that makes the file `name` of a run that quantizes to `quant`."""
    if name == "base.gguf":
        return "convert"
    if name.endswith(".plan.json"):
        return "plan"
    if name.startswith("stats"):
        return "calibrate"
    if name.endswith(".safetensors"):
        return "refit"
    return "quantize" if quant is not None and name.endswith(f"-{quant}.gguf") else "prune"


class View:
    """What is on the screen. `progress` and `watch` are told of all that happens; rich draws it.

    Args:
        title: the first line.
        quant: what the run quantizes to. fit: it was given a budget, and finds that out.
        columns: of the bar of the stage that runs.
        clock: seconds, for tests.
    """

    def __init__(
        self, title: str, quant: str | None, columns: Sequence[str | ProgressColumn],
        clock: Callable[[], float] = time.monotonic, fit: bool = False,
    ) -> None:  # fmt: skip
        self._title, self._quant, self._clock = title, quant, clock
        self._order = FIT_STAGES if fit else STAGES
        self._states = dict.fromkeys(self._order, PENDING)
        self._started: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._files: dict[str, int] = {}
        self._measured: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._bar = Progress(*columns, auto_refresh=False)
        self._task = self._bar.add_task("", total=None)
        self._total = -1

    def progress(self, done: int, total: int, text: str) -> None:
        """How far the stage is that runs."""
        if total != self._total:
            self._bar.reset(self._task)
            self._total = total
        self._bar.update(self._task, completed=done, total=total, description=text)

    def watch(self, what: str, facts: Mapping[str, Any]) -> None:
        """What happens, as `workspace.Watch` has it."""
        if what == "measured":
            self._measured[facts["text"]] = dict(facts["models"])
        elif what == "stage":
            self._enter(facts["name"])
        elif what == "step":
            stage = stage_of(facts["name"], self._quant)
            stage = stage if stage in self._states else "make"
            if facts["state"] != "there" or self._states[stage] not in (DONE, THERE):  # a look back opens no stage anew
                self._enter(stage)
            if facts["state"] == "there" and self._states[stage] == RUNNING and stage not in self._took:
                self._states[stage] = THERE
            if facts["state"] in ("made", "there") and facts["name"].endswith(".gguf"):
                self._files[facts["name"]] = Path(facts["path"]).stat().st_size

    def finish(self) -> None:
        """Nothing runs any more."""
        self._leave(self._order)

    def _enter(self, stage: str) -> None:
        if self._states[stage] == RUNNING:
            return
        self._leave(self._order[: self._order.index(stage)])
        self._states[stage] = RUNNING
        self._started.setdefault(stage, self._clock())

    def _leave(self, stages: Sequence[str]) -> None:
        for stage in stages:
            if self._states[stage] == RUNNING:
                self._states[stage] = DONE
                self._took[stage] = self._clock() - self._started[stage]
            elif self._states[stage] == PENDING:
                self._states[stage] = LEFT_OUT

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._title), self._stages()]
        running = RUNNING in self._states.values()
        if running:
            parts.append(self._bar.get_renderable())
        if self._files and running:
            parts.append(self._table())
        return Group(*parts)

    def _stages(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for stage, state in self._states.items():
            since = self._clock() - self._started[stage] if state == RUNNING else self._took.get(stage)
            table.add_row(f"  {stage}", Text(state, style=_STYLES[state]), "" if since is None else _duration(since))
        return table

    def _table(self) -> Table:
        """Files with their sizes, then models with what was measured of them so far."""
        table = Table(box=box.SIMPLE)
        for name in (
            "so far",
            "size",
            *(f"{text}: {what}" for text in self._measured for what in ("perplexity", "KL")),
        ):
            table.add_column(Text(name), justify="left" if name == "so far" else "right")
        labels = dict.fromkeys(label for models in self._measured.values() for label in models)
        for name, size in self._files.items() if not labels else ():
            table.add_row(Text(name), megabytes(size))
        for label in labels:
            found = [models[label] for models in self._measured.values()]
            cells = [cell for one in found for cell in (f"{one['pruned']['ppl']:.3f}", f"{one['kld']['mean']:.5f}")]
            table.add_row(Text(label), megabytes(found[0]["pruned"]["bytes"]), *cells)
        return table


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextmanager
def shown(view: View, console: Console) -> Iterator[None]:
    """Draws the view until the block ends, however it ends; the cursor is then as it was, and the stages stay."""
    with Live(view, console=console, refresh_per_second=4):
        yield
        view.finish()
