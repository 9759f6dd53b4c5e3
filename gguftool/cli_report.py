"""The command that renders a report again."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import make_terminal, open_option, output_options, point_to_report
from .cli_types import FILE


@click.command()
@click.argument("folder", type=FILE)
@open_option
@click.option("--base-model", metavar="OWNER/NAME", help="The original's name on the hub, for the model card.")
@click.option("--quantized-by", metavar="NAME", help="Who made the file, for the model card.")
@click.option("--license", "license_id", metavar="ID", help="License for the model card, as apache-2.0.")
@output_options
def report(
    folder: Path, open_page: bool, base_model: str | None, quantized_by: str | None, license_id: str | None,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Render the report in FOLDER again from its report.json, and show it: `gguftool report out --open`.

    Writes report.html, report.md and the model card, README.md, to which the options add what no file says. Measures nothing.
    """
    from .report_files import load, publish, with_card

    terminal = make_terminal(as_json, quiet)
    found = with_card(load(folder), base_model=base_model, quantized_by=quantized_by, license=license_id)
    for note in publish(found, folder):
        terminal.say(f"note: {note}")
    point_to_report(terminal, folder, open_page)
    lines = [f"note: {note}" for note in found.notes]
    tables = [found.table()] if found.rows else []
    terminal.show(found.as_dict(), *([] if found.status.done else [str(found.status)]), *tables, *lines)
