"""The commands that do all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .cli_options import (
    FILE,
    backend_option,
    data_option,
    device_option,
    load_runtime,
    make_recipe,
    make_terminal,
    memory_options,
    n_ctx_option,
    output_options,
    point_to_report,
    pre_tokenizer_option,
    recipe_options,
    report_options,
    windows_option,
)
from .sources import Source


@click.command()
@click.argument("model", type=FILE)
@data_option
@click.option(
    "--eval", "evaluation", type=FILE, multiple=True, required=True, help="Text to judge by; may be repeated."
)
@click.option("--quant", "target", metavar="TYPE", help="Quantize to this type after pruning, such as Q4_K_M.")
@click.option(
    "--refit",
    default=None,
    type=click.Choice(["plain", "sequential"]),
    help="Refit what stays.  [default: by the method]",
)
@click.option("-o", "out", type=FILE, required=True, help="Folder for everything.")
@recipe_options("auto")
@n_ctx_option
@windows_option
@click.option("--eval-windows", type=int, help="Use at most so many windows of each evaluation text.")
@pre_tokenizer_option
@device_option
@memory_options
@backend_option
@report_options
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="The report shows how both models go on from it; may be repeated.  [default: how the --eval texts begin]",
)
@output_options
def compress(
    model: Path, data: tuple[Source, ...], evaluation: tuple[Path, ...], target: str | None, refit: str | None, out: Path,
    n_ctx: int, windows: int | None, eval_windows: int | None, pre_tokenizer: str | None, device: str, dtype: str,
    memory: str | None, backend: str, open_page: bool, no_extras: bool, prompts: tuple[str, ...], as_json: bool, quiet: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Do all of it: convert, calibrate, plan, prune, quantize, validate. Resumable; one report, as a page, at the end.

    MODEL is a checkpoint directory, or a GGUF, which is then not converted.
    """
    from .extras import Extras
    from .pipeline import compress as run
    from .prepare import Job
    from .provenance import command_line

    terminal = make_terminal(as_json, quiet)
    recipe = make_recipe(options, target)
    found, llama = load_runtime(backend)
    with terminal.progress() as progress:
        job = Job(
            model=model, calibration=data, evaluation=evaluation, runtime=found, llama=llama, progress=progress,
            n_ctx=n_ctx, windows=windows, eval_windows=eval_windows, pre_tokenizer=pre_tokenizer, device=device,
            dtype=dtype, memory=memory,
        )  # fmt: skip
        extras = Extras(not no_extras, prompts, command_line(sys.argv[1:]))
        report = run(job, out, recipe, terminal.say, refit=refit or "", extras=extras)
    point_to_report(terminal, out, open_page)
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))


@click.command()
@click.option("-o", "out", type=FILE, default=Path("demo-out"), show_default=True, help="Folder for everything.")
@click.option("--eval-windows", default=24, show_default=True, help="Windows of each evaluation text.")
@backend_option
@report_options
@output_options
def demo(
    out: Path, eval_windows: int, backend: str, open_page: bool, no_extras: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Compress the built-in model by every method and show what each cost, in and outside of the calibration domain."""
    from .demo import run
    from .extras import Extras
    from .provenance import command_line

    terminal = make_terminal(as_json, quiet)
    found, llama = load_runtime(backend)
    with terminal.progress() as progress:
        extras = Extras(not no_extras, (), command_line(sys.argv[1:]))
        report = run(out, found, llama, eval_windows, progress, terminal.say, extras)
    point_to_report(terminal, out, open_page)
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))
