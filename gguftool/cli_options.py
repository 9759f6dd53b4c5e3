"""What the commands share: options that several of them take, and where they talk to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_types import METHOD, SOURCE
from .recipe import SCHEDULE_NAMES

if TYPE_CHECKING:
    from types import ModuleType

    from .recipe import Recipe
    from .runtime import Runtime
    from .terminal import Terminal

AT_LEAST_ONE = click.IntRange(1)
BACKEND_NAMES = ("auto", "cpu", "cuda", "metal", "vulkan")
Command = Callable[..., None]


def combined(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in this order."""

    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


output_options = combined(
    click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
    click.option("--quiet", is_flag=True, help="No progress and no log."),
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything and print what would be written.")
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
backend_option = click.option(
    "--backend", default="auto", show_default=True, type=click.Choice(BACKEND_NAMES),
    help="Which build of the runtime.",
)  # fmt: skip
pre_tokenizer_option = click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="llama.cpp's name of the pre-tokenizer, for a vocabulary that it does not know.",
)
SOURCE_GRAMMAR = "SOURCE[:FIELD][:LIMIT][@WEIGHT]"
SOURCE_HELP = (
    "SOURCE is a text, a .jsonl or a .json array of documents (all of them also .gz), or hf:OWNER/NAME[/CONFIG][:SPLIT], a "
    "dataset of the Hugging Face hub. FIELD is what is read of a document: a string, or a conversation (messages with role "
    "and content, or from and value), which the model's chat template renders; by default text, messages or conversations, "
    "the first that is there. LIMIT is the most documents, from the start. Where a file's own name has a : or @, the longest "
    "name that exists wins."
)


def _ctx_option(least: int) -> Callable[[Command], Command]:
    return click.option(
        "--ctx", "n_ctx", default=512, show_default=True, type=click.IntRange(least), help="Tokens in a window."
    )  # fmt: skip


n_ctx_option = _ctx_option(2)
# Where the second half of a window is scored.
scored_ctx_option = _ctx_option(4)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1 or mps."
)
memory_options = combined(
    click.option(
        "--dtype", default="auto", show_default=True, type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="Type of the computation; auto: float32 on the CPU, or bfloat16 where --memory allows no more.",
    ),
    click.option(
        "--memory", metavar="SIZE",
        help="Stay below so much memory, as 12GiB or 800MiB; picks how many windows run at once and what lies on disk. Of a GGUF "
        "only the second moments stay below it, beside the model.",
    ),
)  # fmt: skip
windows_option = click.option(
    "--windows", type=AT_LEAST_ONE, help="Use at most so many windows of each calibration text, times its weight."
)


def _data_option(required: bool) -> Callable[[Command], Command]:
    return click.option(
        "--data", "data", type=SOURCE, multiple=True, required=required, metavar=SOURCE_GRAMMAR,
        help=f"Calibration text, once for each domain. {SOURCE_HELP} WEIGHT takes so many times --windows of it.",
    )  # fmt: skip


data_option = _data_option(True)
# Where a recipe may name them.
data_option_or_recipe = _data_option(False)

open_option = click.option("--open", "open_page", is_flag=True, help="Open report.html in the browser.")
report_options = combined(
    open_option,
    click.option(
        "--no-extras", is_flag=True,
        help="Report quality only: measure no speed, memory, routing and completions, leave hashes of inputs out.",
    ),
)  # fmt: skip


# By the command's default: what the others do that have another one.
METHOD_HELP = {
    "auto": "`gguftool methods` lists them. Where none is named, `plan` and `sweep` take global.",
    "global": "`gguftool methods` lists them. Where none is named, `compress` and `fit` take auto, which is refitted.",
}


def recipe_options(method: str) -> Callable[[Command], Command]:
    """What a recipe is made of; `method` is the default."""
    return combined(
        click.option("--method", type=METHOD, default=method, show_default=True, help=METHOD_HELP[method]),
        click.option("--ratio", type=float, help="Share of routed-expert parameters that goes."),
        click.option("--keep", type=float, help="Share that stays: 1 - ratio."),
        click.option("--criterion", help="Another criterion than the method's own."),
        click.option("--align", type=AT_LEAST_ONE, help="Widths are multiples of this.  [default: by the target type]"),
        click.option(
            "--max-tiers", default=4, show_default=True, type=AT_LEAST_ONE, help="Most different widths in a layer."
        ),
        click.option(
            "--layout", default="auto", show_default=True, type=click.Choice(["auto", "stock"]),
            help="stock: only plans that any llama.cpp can run.",
        ),
        click.option("--whole", type=float, help="TENP: share of experts kept whole."),
        click.option(
            "--schedule", default="trapezoid", show_default=True,
            type=click.Choice(SCHEDULE_NAMES),
            help="TENP: whole experts over depth; measured is by `plan --layers`.",
        ),
        click.option(
            "--depth", default="1:2", show_default=True,
            help="TENP: weight of the first and of the last layer in a trapezoid, of the last and the first in reverse.",
        ),
        click.option("--mix", metavar="W,W...", help="TENP: weight of each calibration text.  [default: all alike]"),
        click.option(
            "--calibration", default="task", show_default=True, type=click.Choice(["task", "general"]),
            help="family: what the calibration texts are; it picks the criterion.",
        ),
        click.option("--relative", is_flag=True, help="Slices: errors relative to the residual stream; more stays early."),
        click.option("--cut-router", is_flag=True, help="Slices: experts that keep no neuron leave the router too."),
        click.option("--guard/--no-guard", default=True, show_default=True, help="Protect super experts from being dropped."),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the random controls."),
    )  # fmt: skip


def make_terminal(as_json: bool = False, quiet: bool = False) -> Terminal:
    """Where a command talks to; rich is imported here, and not by --help."""
    from .terminal import Terminal

    return Terminal(as_json=as_json, quiet=quiet)


def point_to_report(terminal: Terminal, folder: Path, open_page: bool) -> None:
    """Opens the page of a report, or says where it is."""
    from .report_files import PAGE, show

    terminal.say(show(folder) if open_page else f"report: {folder / PAGE}")


def make_recipe(options: dict[str, Any], target: str | None) -> Recipe:
    """The recipe that the options of `recipe_options` state. Takes those out of `options` that it has to parse."""
    from .recipe import Recipe

    ratio, keep = options.pop("ratio"), options.pop("keep")
    if (ratio is None) == (keep is None):
        raise click.UsageError("give either --ratio or --keep")
    mix = options["mix"]
    options |= {"depth": parse_depth(options["depth"]), "mix": parse_mix(mix) if mix is not None else None}
    return Recipe(ratio=1 - keep if ratio is None else ratio, target=target, **options)


def parse_depth(text: str) -> tuple[float, float]:
    """FIRST:LAST."""
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        raise click.UsageError(f"--depth {text!r} is not FIRST:LAST") from None
    return first, last


def parse_mix(text: str) -> tuple[float, ...]:
    """W,W,..."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--mix {text!r} is not a number for each text, as 2,1") from None


def load_runtime(backend: str) -> tuple[Runtime, ModuleType]:
    """The built runtime for a backend, and llama-cpp-python on top of it."""
    from . import runtime

    found = runtime.require(backend)
    return found, runtime.load(found)
