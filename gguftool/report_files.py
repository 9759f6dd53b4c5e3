"""The files of a report: report.json, which has everything, and what is rendered from it."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import webbrowser
from dataclasses import replace
from pathlib import Path

from .durable import write_text
from .errors import GgufToolError
from .model_card import CARD, MARK, model_card
from .report import Report
from .report_html import render

JSON, PAGE, MARKDOWN = "report.json", "report.html", "report.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBERS = re.compile(r"\[\n[\s\d.eE+,nul-]*?\]")


def publish(report: Report, folder: Path) -> list[str]:
    """Writes the report's files into `folder`, each whole or not at all.

    report.json goes first: it says how the run stands even where what is rendered from it cannot be. The model card is written
    where there is a finished model to describe, or one of an earlier run to take back; a README.md that gguftool did not make
    is left alone. Returns notes for a person.
    """
    _write(folder / JSON, dumps(report))
    _write(folder / PAGE, render(report))
    _write(folder / MARKDOWN, report.markdown())
    notes = []
    card = folder / CARD
    described = report.status.done and "card" in report.facts and report.main is not None
    if described or card.is_file():
        if not card.exists() or _is_ours(card):
            _write(card, model_card(report))
        elif described:
            notes.append(f"{card} was not made by gguftool and stays as it is; move it to have the model card")
    return notes


def _write(path: Path, text: str) -> None:
    """Names of files in the text may hold bytes that are none."""
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def _is_ours(card: Path) -> bool:
    try:
        return MARK in card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def dumps(report: Report) -> str:
    """The report as JSON text, lists of numbers on one line."""
    text = json.dumps(report.as_dict(), indent=1) + "\n"
    # A line break inside of brackets that hold nothing but numbers cannot be part of a string.
    return _NUMBERS.sub(lambda match: re.sub(r"\s+", "", match[0]).replace(",", ", "), text)


def load(folder: Path) -> Report:
    """The report that lies in `folder`. Raises GgufToolError where there is none or it is damaged.

    One that says its run goes on, while its process on this machine is gone, is given back as cut off.
    """
    path = folder / JSON
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GgufToolError(f"{path}: no such report; `gguftool compress` and `gguftool demo` write one") from None
    except (OSError, ValueError) as error:
        raise GgufToolError(f"{path}: cannot be read ({error})") from error
    try:
        report = Report.from_dict(raw)
    except GgufToolError as error:
        raise GgufToolError(f"{path}: {error}") from error
    status = report.status
    if status.state == "running" and status.host == socket.gethostname() and not _lives(status.pid):
        return replace(report, status=replace(status, state="cut off"))
    return report


def with_card(report: Report, **facts: str | None) -> Report:
    """The report with some facts of its model card replaced; None leaves one as it is.

    Raises GgufToolError where there is no model card for them, or a name is none of the hub's.
    """
    given = {name: value for name, value in facts.items() if value is not None}
    if not given:
        return report
    if "card" not in report.facts:
        raise GgufToolError("this report has no model card to add that to: it is of no finished `gguftool compress`")
    name = given.get("base_model")
    if name is not None and not _HUB_NAME.fullmatch(name):
        raise GgufToolError(f"--base-model {name!r} is not OWNER/NAME, as the hub has it")
    return replace(report, facts={**report.facts, "card": {**report.facts["card"], **given}})


def _lives(pid: int) -> bool:
    if sys.platform == "win32":  # there os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def show(folder: Path) -> str:
    """Opens report.html in the user's browser; returns what to tell them."""
    page = (folder / PAGE).resolve()
    return f"opened {page}" if webbrowser.open(page.as_uri()) else f"no browser could be started; open {page}"
