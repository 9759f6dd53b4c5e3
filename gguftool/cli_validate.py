"""The command that compares two GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_options import AT_LEAST_ONE, BACKEND_NAMES, make_terminal, output_options, scored_ctx_option
from .cli_types import FILE, TEXT
from .errors import GgufToolError

if TYPE_CHECKING:
    from .terminal import Terminal


def _backend_list(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    names = value.split(",")
    if wrong := [name for name in names if name not in BACKEND_NAMES]:
        raise click.BadParameter(f"{wrong[0]!r} is none of {', '.join(BACKEND_NAMES)}")
    if len(set(names)) < len(names) or ("auto" in names and len(names) > 1):
        raise click.BadParameter(f"{value!r}: name each backend once, and auto alone")
    return names


@click.command()
@click.argument("base", type=FILE)
@click.argument("pruned", type=FILE)
@click.option("--data", type=TEXT, required=True, help="Text to measure on; .jsonl: documents.")
@click.option("--windows", type=AT_LEAST_ONE, help="Use at most so many windows.")
@scored_ctx_option
@click.option(
    "--backend", "backends", default="auto", show_default=True, callback=_backend_list, metavar="NAME[,NAME]...",
    help="Which build of the runtime: auto, cpu, cuda, metal, vulkan. Several are compared with each other.",
)  # fmt: skip
@output_options
def validate(
    base: Path,
    pruned: Path,
    data: Path,
    windows: int | None,
    n_ctx: int,
    backends: list[str],
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare perplexity and KL divergence, original against pruned, as llama-perplexity does.

    With several backends it fails where their perplexities differ by more than rounding explains.
    """
    terminal = make_terminal(as_json, quiet)
    if len(backends) > 1:
        _validate_on(backends, base, pruned, data, windows, n_ctx, terminal)
        return
    from .chat import template_of_gguf
    from .corpus import read_scored
    from .evaluate import compare
    from .report import comparison_table
    from .runtime import load_for

    text, special = read_scored(data, lambda: template_of_gguf(base))
    llama, layers, name = load_for(backends[0], base, pruned)
    with terminal.progress() as progress:
        found = compare(
            base, pruned, text, llama=llama, n_ctx=n_ctx, max_windows=windows, n_gpu_layers=layers, backend=name,
            progress=progress, parse_special=special,
        ).as_dict()  # fmt: skip
    terminal.show(found, comparison_table(found))


def _validate_on(
    backends: list[str], base: Path, pruned: Path, data: Path, windows: int | None, n_ctx: int, terminal: Terminal
) -> None:
    from .crosscheck import crosscheck
    from .runtime_report import crosscheck_table

    with terminal.progress() as progress:
        found = crosscheck(backends, base, pruned, data, n_ctx=n_ctx, max_windows=windows, progress=progress)
    facts = found.as_dict()
    terminal.show(facts, crosscheck_table(facts))
    if not found.ok:
        raise GgufToolError(
            f"the backends differ by {found.difference:.5f} in ln(perplexity), more than {found.tolerance:.5f}; "
            "`gguftool runtime selftest` looks for the reason"
        )
