"""The report of a run while it goes on: at which stage it is, and in the end what came of it, whatever that is.

It begins when the run has locked its folder: one that another run holds, or that is refused before, keeps its report.
A run that ends by an error or by Ctrl-C leaves a report that says so, with all that was known by then; one that is killed
leaves a report that says it is running, and since when. No report of an earlier run outlives the start of a new one, nor
does its record: `verified.json` is there only beside the files of the run that wrote it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .report import Candidate, Report, Status
from .report_files import publish
from .verification import forget
from .workspace import Say, Watch

# What a run does that makes no file, in words.
STAGES = {
    "budget": "what fits into the budget",
    "weigh": "weighing the candidates",
    "measure": "perplexity and KL divergence",
    "check": "checks of what was measured",
}


class Journal:
    """A context manager around a run that writes into `folder`; `say` hears what a person should know of the report's files.

    Attributes:
        report: what is known so far.
        stages: the stages so far; those of a `Workspace` have the names of files.
    """

    def __init__(self, folder: Path, model: str, say: Say = lambda _text: None) -> None:
        self.folder = folder
        self._say = say
        self._begun = False
        self.stages: list[str] = []
        start = _now()
        status = Status("running", "checking what was asked", "", start, start, os.getpid(), socket.gethostname())
        self.report = Report(model, 0, {}, [], "", status=status)

    def __enter__(self) -> Self:
        return self

    def begin(self) -> None:
        """The folder belongs to this run: its report is this run's from here on, and what an earlier one recorded is gone.
        Before that nothing is written."""
        self._begun = True
        forget(self.folder)
        self._write()

    def hearing(self, watch: Watch) -> Watch:
        """A `Workspace.watch` that tells the journal the stages, and then `watch` everything."""

        def both(what: str, facts: Mapping[str, Any]) -> None:
            if what == "step" and facts["state"] != "made":
                self.stage(facts["name"])
            elif what == "stage":
                self.stage(STAGES.get(facts["name"], facts["name"]))
            watch(what, facts)

        return both

    def stage(self, name: str) -> None:
        """The run is at `name` now."""
        self.stages.append(name)
        self._write(stage=name)

    def learn(self, **sections: Any) -> None:
        """Sections for `Report.facts`; they are in the report from the next stage on."""
        self.report = replace(self.report, facts={**self.report.facts, **sections})

    def weighed(self, candidates: Sequence[Candidate], budget: Mapping[str, Any]) -> None:
        """What was weighed by which budget; in the report from the next stage on."""
        self.report = replace(self.report, candidates=candidates, budget=budget)

    def measured(self, report: Report) -> None:
        """The numbers are there. What else the journal knows is kept."""
        own = self.report
        self.report = replace(
            report, status=own.status, facts={**own.facts, **report.facts},
            candidates=report.candidates or own.candidates, budget=report.budget or own.budget,
        )  # fmt: skip

    def finish(self) -> Report:
        """The run has come to its end, and is done if nothing is in it that cannot be right. Returns its report."""
        faults = "; ".join(self.report.failures)
        state, stage = ("failed", STAGES["check"]) if faults else ("done", "")
        message = f"this cannot be right: {faults}" if faults else ""
        self._write(state=state, stage=stage, message=message, pid=0, host="")
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None or not self._begun:
            return
        stopped = not isinstance(error, Exception)
        # What was measured and cannot be right is why the run failed, whatever else went wrong behind that.
        faults = [f"this cannot be right: {'; '.join(self.report.failures)}"] if self.report.failures else []
        why = "; then: ".join([*faults, str(error) or type(error).__name__])
        state, message = ("interrupted", "") if stopped else ("failed", why)
        # What went wrong is raised on; that its report cannot be written either (a full disk, a fault of ours) must not hide it.
        with suppress(Exception):
            self._write(state=state, message=message, pid=0, host="")

    def _write(self, **changes: Any) -> None:
        status = replace(self.report.status, updated=_now(), **changes)
        self.report = replace(self.report, status=status)
        for note in publish(self.report, self.folder):
            self._say(f"note: {note}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
