"""The commands that do all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .cli_fit import show_fit
from .cli_options import (
    backend_option,
    data_option_or_recipe,
    device_option,
    load_runtime,
    make_terminal,
    memory_options,
    n_ctx_option,
    output_options,
    parse_depth,
    parse_mix,
    point_to_report,
    pre_tokenizer_option,
    recipe_options,
    report_options,
    windows_option,
)
from .cli_types import ENCODING, FILE, MODEL, RECIPE, TEXT
from .errors import GgufToolError
from .recipe_file import FIT_CTX, RunRecipe, find, load
from .sources import check_model, check_texts

if TYPE_CHECKING:
    from .runs import Step

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
# Where the option's variable is not called as the recipe's key.
_KEYS = {"n_ctx": "ctx", "budget": "fit"}


def _one_type(_context: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The only one: click itself would take the last without a word."""
    if len(given) > 1:
        raise click.UsageError(f"--quant takes one type here, not {' and '.join(given)}; `fit` chooses among several")
    return given[0] if given else None


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option(
    "--recipe",
    "name",
    type=RECIPE,
    metavar="FILE|NAME",
    help="Take everything from a recipe file, or from a shipped one (`gguftool recipes`). Options given here override it.",
)
@data_option_or_recipe
@click.option("--eval", "eval", type=TEXT, multiple=True, metavar="FILE", help="Text to judge by; may be repeated.")
@click.option(
    "--quant",
    "quant",
    type=ENCODING,
    metavar="TYPE",
    multiple=True,
    callback=_one_type,
    help="Quantize to this type after pruning, such as Q4_K_M.",
)
@click.option(
    "--refit",
    default=None,
    type=click.Choice(["plain", "sequential"]),
    help="Refit what stays.  [default: by the method]",
)
@click.option("-o", "out", type=FILE, required=True, help="Folder for everything.")
@click.option(
    "--fit",
    "budget",
    metavar="SIZE",
    help="Instead of --ratio: the best file whose run stays below this, see `fit`. In a recipe it takes the place of the "
    "ratio and of the type beside it.",
)
@click.option("--fit-ctx", default=FIT_CTX, show_default=True, help="Tokens of the context that --fit counts.")
@recipe_options("auto")
@n_ctx_option
@windows_option
@click.option("--eval-windows", type=int, help="Use at most so many windows of each evaluation text.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and print what would be written. With --fit: say which files fit and how much would go; that "
    "converts the checkpoint into -o and runs skeletons.",
)
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
@click.pass_context
def compress(
    context: click.Context, name: str | None, out: Path, dry_run: bool, open_page: bool, no_extras: bool,
    prompts: tuple[str, ...], as_json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Do all of it: convert, calibrate, plan, prune, quantize, validate. Resumable; one report, as a page, at the end.

    MODEL is a checkpoint directory, or a GGUF, which is then not converted. The folder gets the files, the report, and
    recipe.toml, from which `compress --recipe` makes the same again and `verify` sees whether it is the same. Every file is
    read again and hashed; a perplexity or a KL divergence that cannot be right, or backends that disagree, are a failure.

    With --fit it finds ratio and type itself (those of `fit`, or only --quant) and makes the best file that stays below the
    budget, which may be an unpruned one; the report shows what was weighed.
    """
    # First, because what carries it out takes seconds to load.
    recipe = overridden(load(find(name)) if name is not None else None, context, options)
    from .extras import Extras
    from .fit_report import goal_here
    from .provenance import command_line
    from .runs import Ears, carry_out, outlook

    terminal = make_terminal(as_json, quiet)
    extras = Extras(not no_extras, prompts, command_line(sys.argv[1:]))
    if dry_run and recipe.fit is not None:
        show_fit(terminal, recipe, out, dry_run=True)
        return
    if dry_run:
        with terminal.progress() as progress:
            steps = outlook(recipe, out, Ears(progress, terminal.say))
        lines = [f"{'is there' if s.there else 'to make ':<9} {_size(s):>12}  {s.name}" for s in steps]
        terminal.show({"path": str(out), "written": False, "steps": [vars(step) for step in steps]}, *lines)
        return
    with terminal.live(f"{recipe.model} -> {out}", recipe.quant, recipe.fit is not None) as (progress, watch):
        report = carry_out(recipe, out, Ears(progress, terminal.say, watch), extras)
    point_to_report(terminal, out, open_page)
    goal = goal_here(report.budget, report.rows[0].path) if report.budget else {}
    lines = [f"{name}: {value}" for name, value in goal.items()] + [f"note: {note}" for note in report.notes]
    terminal.show(report.as_dict(), report.table(), *lines)
    if report.failures:
        raise GgufToolError(f"{out}: not done, the files are kept: {'; '.join(report.failures)}")


def _size(step: Step) -> str:
    from .report import megabytes

    return "" if step.bytes is None else f"{'' if step.there else 'about '}{megabytes(step.bytes)}"


def overridden(recipe: RunRecipe | None, context: click.Context, options: dict[str, Any]) -> RunRecipe:
    """The recipe (or none) with the options that the user has given; each by the name of its key."""
    given = {key: value for key, value in options.items() if context.get_parameter_source(key) in _GIVEN}
    ratio, keep = given.pop("ratio", None), given.pop("keep", None)
    if ratio is not None and keep is not None:
        raise click.UsageError("give either --ratio or --keep")
    if "budget" in given and (ratio is not None or keep is not None):
        raise click.UsageError("--fit finds the ratio; leave --ratio and --keep out")
    if ratio is not None or keep is not None:
        given["ratio"] = 1 - keep if ratio is None else ratio
    for key, parse in (("depth", parse_depth), ("mix", parse_mix)):
        if key in given:
            given[key] = parse(given[key])
    given = {_KEYS.get(key, key): value for key, value in given.items()}
    recipe = (recipe or RunRecipe()).changed(given)
    for key, option in (("model", "MODEL"), ("data", "--data"), ("eval", "--eval"), ("ratio", "--ratio or --keep")):
        if key == "ratio" and recipe.fit is not None:
            continue  # it is what is to be found
        if not getattr(recipe, key) and getattr(recipe, key) != 0:
            raise click.UsageError(f"give {option}, or a --recipe that has it")
    check_model(str(recipe.model))
    check_texts([*recipe.data, *recipe.eval])
    return recipe


@click.command()
@click.option("-o", "out", type=FILE, default=Path("demo-out"), show_default=True, help="Folder for everything.")
@click.option(
    "--eval-windows", default=24, show_default=True, type=click.IntRange(1), help="Windows of each evaluation text."
)
@click.option("--unpack", is_flag=True, help="Only write the built-in model and its texts, to try the commands on.")
@backend_option
@report_options
@output_options
def demo(
    out: Path, eval_windows: int, unpack: bool, backend: str, open_page: bool, no_extras: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Compress the built-in model by ten methods and show what each cost, in and outside of the calibration domain.

    `gguftool demo --unpack -o .` only writes the model and its texts into this folder.
    """
    from .demo import run
    from .demo import unpack as run_unpack
    from .extras import Extras
    from .provenance import command_line

    terminal = make_terminal(as_json, quiet)
    if unpack:
        written = [str(path) for path in run_unpack(out)]
        terminal.show({"written": written}, *written)
        return
    found, llama = load_runtime(backend)
    with terminal.progress() as progress:
        extras = Extras(not no_extras, (), command_line(sys.argv[1:]))
        report = run(out, found, llama, eval_windows, progress, terminal.say, extras)
    point_to_report(terminal, out, open_page)
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))
