"""The commands that decide: model families, methods and plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_options import force_option, make_recipe, make_terminal, output_options, recipe_options
from .cli_types import ENCODING, FILE


@click.command()
@output_options
def methods(as_json: bool, quiet: bool) -> None:
    """List the methods, with formula and source."""
    from rich.table import Table

    from .methods import METHODS

    table = Table("method", "what it does", "source", "layout")
    for method in METHODS.values():
        table.add_row(method.name, method.summary, method.source, "stock" if method.stock else "tiered")
    line = "stock: runs on any llama.cpp, where the family allows; tiered: on the patched one (docs/architectures.md says where)"
    facts = [{"name": m.name, "summary": m.summary, "source": m.source, "stock": m.stock} for m in METHODS.values()]
    make_terminal(as_json, quiet).show({"methods": facts}, table, line)


@click.command()
@output_options
def architectures(as_json: bool, quiet: bool) -> None:
    """List the model families that can be calibrated and pruned, with a public checkpoint of each."""
    from rich.table import Table

    from .architectures import ARCHITECTURES, LEFT_OUT

    table = Table("family", "model_type", "GGUF", "for example", "what is special")
    for row in ARCHITECTURES:
        types = ", ".join((row.model_type, *row.also))
        table.add_row(row.title, types, row.gguf_arch, row.reference, row.special)
    facts = [
        {
            "name": row.title, "model_type": [row.model_type, *row.also], "gguf_arch": row.gguf_arch,
            "reference": row.reference, "special": row.special,
        }
        for row in ARCHITECTURES
    ]  # fmt: skip
    lines = [f"left out: {name}: {why}" for name, why in LEFT_OUT.items()]
    make_terminal(as_json, quiet).show({"architectures": facts, "left_out": LEFT_OUT}, table, *lines)


@click.command()
@click.argument("stats", type=FILE)
@click.option("-o", "out", type=FILE, required=True, help="Plan to write.")
@recipe_options("global")
@click.option(
    "--target", type=ENCODING, metavar="TYPE", help="Type that it will be quantized to (with --imatrix), as Q4_K_M."
)
@click.option("--layers", type=FILE, help="Weigh the layers by what `sensitivity` measured.")
@click.option("--tensors", is_flag=True, help="Print every tensor too.")
@force_option
@output_options
def plan(
    stats: Path, out: Path, target: str | None, layers: Path | None, tensors: bool, force: bool, as_json: bool,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Decide what stays: free, from stats, as often as you like. Writes a plan that a person can read."""
    from .gguf_file import check_output
    from .methods import method
    from .plan import dumps
    from .planner import make_plan
    from .report import other_types, plan_table, types_table
    from .sensitivity import Sensitivity, weighted
    from .stats import CalibrationStats

    check_output(out, force, stats, *([layers] if layers else []))
    terminal = make_terminal(as_json, quiet)
    loaded, recipe = CalibrationStats.load(stats), make_recipe(options, target)
    if layers is not None:
        recipe = weighted(Sensitivity.load(layers), loaded, recipe)
    made = make_plan(loaded, recipe)
    made.save(out)
    for note in made.notes:
        terminal.say(f"note: {note}")
    if method(recipe.method).refitted and made.kept_share < 1:
        terminal.say("note: this plan counts on refitted weights: `gguftool refit`, then `gguftool prune --weights`")
    if as_json:
        click.echo(dumps(made), nl=False)
        return
    lines = [f"other tensors: {other_types(made.encoded or made.tensors)}"]
    lines.append(f"{made.layout} layout, {made.tensor_bytes:,} bytes of tensors")
    if made.encoded_bytes is not None:
        lines.append(f"as {target}: {made.encoded_bytes:,} bytes of tensors")
    listing = [types_table(made.encoded or made.tensors)] if tensors else []
    terminal.show({}, plan_table(made), *listing, *lines)
