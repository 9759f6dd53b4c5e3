"""The commands that do all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_fit import make_ask, no_ratio, show_fit
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
    pre_tokenizer_option,
    recipe_options,
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
@click.option(
    "--fit", "budget", metavar="SIZE", help="Instead of --ratio: the best file whose run stays below this, see `fit`."
)
@click.option("--fit-ctx", default=8192, show_default=True, help="Tokens of the context that --fit counts.")
@recipe_options("auto")
@n_ctx_option
@windows_option
@click.option("--eval-windows", type=int, help="Use at most so many windows of each evaluation text.")
@pre_tokenizer_option
@device_option
@memory_options
@backend_option
@output_options
def compress(
    model: Path, data: tuple[Source, ...], evaluation: tuple[Path, ...], target: str | None, refit: str | None, out: Path,
    n_ctx: int, windows: int | None, eval_windows: int | None, pre_tokenizer: str | None, device: str, dtype: str,
    memory: str | None, backend: str, as_json: bool, quiet: bool, budget: str | None, fit_ctx: int, **options: Any,
) -> None:  # fmt: skip
    """Do all of it: convert, calibrate, plan, prune, quantize, validate. Resumable; one report at the end.

    MODEL is a checkpoint directory, or a GGUF, which is then not converted.
    """
    from .pipeline import compress as run
    from .prepare import Job

    terminal = make_terminal(as_json, quiet)
    if budget is not None:
        options["ratio"] = no_ratio(options)
    recipe = make_recipe(options, target)
    found, llama = load_runtime(backend)
    with terminal.progress() as progress:
        job = Job(
            model=model, calibration=data, evaluation=evaluation, runtime=found, llama=llama, progress=progress,
            n_ctx=n_ctx, windows=windows, eval_windows=eval_windows, pre_tokenizer=pre_tokenizer, device=device,
            dtype=dtype, memory=memory,
        )  # fmt: skip
        if budget is not None:
            show_fit(terminal, job, out, make_ask(budget, fit_ctx, recipe, [target] if target else [], refit))
            return
        report = run(job, out, recipe, terminal.say, refit=refit or "")
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))


@click.command()
@click.option("-o", "out", type=FILE, default=Path("demo-out"), show_default=True, help="Folder for everything.")
@click.option("--eval-windows", default=24, show_default=True, help="Windows of each evaluation text.")
@backend_option
@output_options
def demo(out: Path, eval_windows: int, backend: str, as_json: bool, quiet: bool) -> None:
    """Compress the built-in model by every method and show what each cost, in and outside of the calibration domain."""
    from .demo import run

    terminal = make_terminal(as_json, quiet)
    found, llama = load_runtime(backend)
    with terminal.progress() as progress:
        report = run(out, found, llama, eval_windows, progress, terminal.say)
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))
