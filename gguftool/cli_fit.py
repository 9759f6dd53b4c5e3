"""The best file for a budget of memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import (
    METHOD_HELP,
    backend_option,
    data_option,
    device_option,
    make_terminal,
    output_options,
    pre_tokenizer_option,
    windows_option,
)
from .cli_types import ENCODING, FILE, METHOD, MODEL, TEXT
from .errors import GgufToolError
from .recipe_file import FIT_CTX, RunRecipe, WrongValue
from .sources import Source

if TYPE_CHECKING:
    from .terminal import Terminal

# What the recipe's keys are called here, where that is not their own name.
_OPTIONS = {"ctx": "--window", "fit_ctx": "--ctx", "memory": "--calibration-memory"}


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--memory", "budget", metavar="SIZE", required=True,
    help="Weights, KV cache, compute buffers and the process stay below this, as 12GiB or 800MiB.",
)  # fmt: skip
@click.option("--ctx", default=FIT_CTX, show_default=True, help="Tokens of the context that has to fit too.")
@data_option
@click.option(
    "--eval", "evaluation", type=TEXT, multiple=True, required=True,
    help="Text to choose by, held out; the mean over all of them counts. May be repeated.",
)  # fmt: skip
@click.option(
    "--quant", "targets", type=ENCODING, multiple=True, metavar="TYPE",
    help="Type to choose from. May be repeated.  [default: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K]",
)  # fmt: skip
@click.option("--method", type=METHOD, default="auto", show_default=True, help=METHOD_HELP["auto"])
@click.option(
    "--refit",
    default=None,
    type=click.Choice(["plain", "sequential"]),
    help="Refit what stays.  [default: by the method]",
)
@click.option("-o", "out", type=FILE, required=True, help="Folder for everything.")
@click.option("--all", "every", is_flag=True, help="Measure every candidate that fits.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say which files fit and how much would go: converts the checkpoint into -o, runs skeletons, and calibrates, prunes "
    "and measures nothing.",
)
@click.option(
    "--window", "n_ctx", default=512, show_default=True, help="Tokens in a window of calibration and evaluation."
)
@windows_option
@click.option("--eval-windows", type=int, help="Use at most so many windows of each evaluation text.")
@click.option(
    "--calibration-memory",
    metavar="SIZE",
    help="Stay below so much while calibrating and refitting; of a GGUF with its second moments only.",
)
@pre_tokenizer_option
@device_option
@backend_option
@output_options
def fit(
    model: Path, budget: str, ctx: int, data: tuple[Source, ...], evaluation: tuple[Path, ...], targets: tuple[str, ...],
    method: str, refit: str | None, out: Path, every: bool, dry_run: bool, n_ctx: int, windows: int | None,
    eval_windows: int | None, calibration_memory: str | None, pre_tokenizer: str | None, device: str, backend: str,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Find the best file for a budget of memory: how much to prune and how to quantize, together.

    MODEL is a checkpoint directory or a GGUF. For each type the unpruned file is a candidate where it fits, else the one
    of which the least goes; what they cost is measured, and the best one is made and checked against the budget in a
    process that fills the context. Resumable.
    """
    own: dict[str, Any] = {"every": every, "budget_option": "--memory", "ctx_option": "--ctx"}
    own |= {"targets": targets, "named": True} if targets else {}
    try:
        recipe = RunRecipe(
            model=model, data=data, eval=evaluation, fit=budget, fit_ctx=ctx, method=method, refit=refit, ctx=n_ctx,
            windows=windows, eval_windows=eval_windows, memory=calibration_memory, pre_tokenizer=pre_tokenizer,
            device=device, backend=backend,
        )  # fmt: skip
        show_fit(make_terminal(as_json, quiet), recipe, out, dry_run, **own)
    except WrongValue as error:
        option = _OPTIONS.get(error.key, f"--{error.key.replace('_', '-')}")
        raise GgufToolError(f"{option}{error.why}") from error


def show_fit(terminal: Terminal, recipe: RunRecipe, out: Path, dry_run: bool, **own: Any) -> None:
    """Searches for the best file for the recipe's budget and shows what came of it.

    `own` are attributes of `fit.Ask` for what a recipe does not ask.
    """
    from dataclasses import replace

    from .fit import run
    from .runs import Ears, ask_of, job_of

    ask = ask_of(recipe)
    assert ask is not None
    ask = replace(ask, **own)
    with terminal.progress() as progress:
        job = job_of(recipe, Ears(progress, terminal.say))
        report = run(job, out, ask, terminal.say, dry_run=dry_run)
    terminal.show(report.as_dict(), report.table(), *report.lines())
