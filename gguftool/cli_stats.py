"""The commands on stats files."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import force_option, make_terminal, output_options
from .cli_types import FILE


@click.group()
def stats() -> None:
    """Work with stats files."""


@stats.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("-o", "out", type=FILE, required=True, help="Stats to write.")
@force_option
@output_options
def merge(files: tuple[Path, ...], out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Add up stats of separate runs: other texts, or other parts of a text (calibrate --part).

    OBS costs do not add up and are left out.
    """
    from .gguf_file import check_output
    from .parts import merge as run
    from .stats import CalibrationStats

    check_output(out, force, *files)
    terminal = make_terminal(as_json, quiet)
    merged, notes = run([CalibrationStats.load(path) for path in files])
    merged.save(out)
    facts = {"path": str(out), "files": len(files), "tokens": merged.tokens, "notes": notes}
    facts |= {"domains": [{"name": domain.name, "tokens": domain.tokens} for domain in merged.domains]}
    texts = ", ".join(f"{domain.name} {domain.tokens}" for domain in merged.domains)
    terminal.show(
        facts, f"{out}: {len(files)} files, {merged.tokens} tokens ({texts})", *(f"note: {note}" for note in notes)
    )


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
