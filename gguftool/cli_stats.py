"""The commands on stats files."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import FILE, force_option, make_terminal, output_options


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
