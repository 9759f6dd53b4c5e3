"""The commands on stats files."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import FILE, make_terminal, output_options


@click.group()
def stats() -> None:
    """Work with stats files."""


@stats.command()
@click.argument("path", type=FILE)
@click.option("--layer", type=int, help="The experts of this decoder layer, one by one.")
@output_options
def show(path: Path, layer: int | None, as_json: bool, quiet: bool) -> None:
    """Show what a stats file was made from, and how the router shared out the tokens in each layer.

    Effective experts: how many would give the entropy seen if all of them were used alike.
    """
    from .coverage import coverage
    from .stats import CalibrationStats
    from .stats_report import stats_facts, stats_tables

    terminal = make_terminal(as_json, quiet)
    found = CalibrationStats.load(path)
    facts = stats_facts(found, layer)
    notes = coverage(found).notes() if layer is None else []
    terminal.show({"path": str(path), **facts}, *stats_tables(facts), *(f"note: {note}" for note in notes))
