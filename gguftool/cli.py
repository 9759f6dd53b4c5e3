"""The commands. Each parses, calls, prints; what it calls is imported inside it, so that --help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__, cli_bench, cli_runtime, cli_sensitivity, cli_sweep
from .cli_options import (
    BACKEND_NAMES,
    FILE,
    backend_option,
    data_option,
    device_option,
    force_option,
    make_terminal,
    n_ctx_option,
    output_options,
    pre_tokenizer_option,
    recipe_options,
    windows_option,
)
from .errors import GgufToolError

if TYPE_CHECKING:
    from types import ModuleType

    from .recipe import Recipe
    from .runtime import Runtime
    from .terminal import Terminal


def main() -> None:
    """Runs the command line. A stated failure is one line on stderr and exit code 1; wrong usage is exit code 2."""
    sys.exit(run())


def run() -> int:
    """The exit code of the command line: 0 done, 1 a stated failure, 2 wrong usage, 130 stopped with Ctrl-C."""
    try:
        cli.main(prog_name="gguftool", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\nstopped; calibrate, refit, compress, sensitivity, sweep and demo go on from here when they are started again",
            err=True,
        )
        return 130
    except GgufToolError as error:
        return _fail(str(error))
    except (OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except Exception as error:
        if os.environ.get("GGUFTOOL_TRACEBACK"):
            raise
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())} (GGUFTOOL_TRACEBACK=1 shows where)")
    return 0


def _fail(text: str) -> int:
    click.echo(f"error: {text}", err=True)
    return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gguftool")
def cli() -> None:
    """Makes Mixture-of-Experts models fit: stats -> plan -> gguf, then the report of what it cost.

    `gguftool demo` does all of it on the built-in model; `gguftool compress` on yours.
    """


for _command in (
    cli_runtime.runtime, cli_runtime.run, cli_runtime.serve, cli_bench.bench, cli_sensitivity.sensitivity, cli_sweep.sweep,
):  # fmt: skip
    cli.add_command(_command)


def _make_recipe(options: dict[str, Any], target: str | None) -> Recipe:
    from .recipe import Recipe

    ratio, keep = options.pop("ratio"), options.pop("keep")
    if (ratio is None) == (keep is None):
        raise click.UsageError("give either --ratio or --keep")
    depth = options.pop("depth")
    try:
        first, last = (float(part) for part in depth.split(":"))
    except ValueError:
        raise click.UsageError(f"--depth {depth!r} is not FIRST:LAST") from None
    try:
        mix = tuple(float(part) for part in options["mix"].split(",")) if options["mix"] is not None else None
    except ValueError:
        raise click.UsageError(f"--mix {options['mix']!r} is not a number for each text, as 2,1") from None
    options |= {"depth": (first, last), "mix": mix}
    return Recipe(ratio=1 - keep if ratio is None else ratio, target=target, **options)


def _load(backend: str) -> tuple[Runtime, ModuleType]:
    from . import runtime

    found = runtime.require(backend)
    return found, runtime.load(found)


@cli.command()
@click.argument("model", type=FILE)
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@click.option("--outtype", default="auto", show_default=True, help="As llama.cpp's converter has it.")
@pre_tokenizer_option
@force_option
@output_options
def convert(
    model: Path, out: Path, outtype: str, pre_tokenizer: str | None, force: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Convert a Hugging Face checkpoint with llama.cpp's own converter."""
    from .convert import convert as run
    from .runtime import require

    terminal = make_terminal(as_json, quiet)
    with terminal.progress() as progress:
        run(model, out, require(), pre_tokenizer=pre_tokenizer, outtype=outtype, force=force, progress=progress)
    size = out.stat().st_size
    terminal.show({"path": str(out), "bytes": size}, f"{out}: {size:,} bytes")


@cli.command()
@click.argument("model", type=FILE)
@data_option
@click.option("-o", "out", type=FILE, required=True, help="Stats to write.")
@click.option(
    "--obs/--no-obs",
    default=None,
    help="Solve OBS costs, for the method auto.  [default: where a layer's take 2 GiB at most]",
)
@n_ctx_option
@windows_option
@device_option
@force_option
@output_options
def calibrate(
    model: Path, data: tuple[Path, ...], out: Path, obs: bool | None, n_ctx: int, windows: int | None, device: str,
    force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure which experts and neurons the texts need: one pass, one layer in memory at a time.

    Stopped, it goes on where it was when it is started again with the same arguments.
    """
    from .calibrate import calibrate as run
    from .checkpoint import open_checkpoint
    from .corpus import load_domain
    from .gguf_file import check_output

    check_output(out, force, *data)
    terminal = make_terminal(as_json, quiet)
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    domains = [load_domain(path, tokenizer, n_ctx, windows) for path in data]
    with terminal.progress() as progress:
        scratch = out.with_name(out.name + ".work")
        stats = run(checkpoint, domains, scratch, device=device, obs=obs, progress=progress, out=out)
    facts = {"path": str(out), "tokens": stats.tokens, "layers": len(stats.model.moe_layers)}
    unrouted = int((stats.expert("count") == 0).sum())
    terminal.show(
        facts | {"unrouted_experts": unrouted},
        f"{out}: {stats.tokens} tokens, {len(stats.model.moe_layers)} layers, {unrouted} experts never routed",
    )


@cli.command()
@output_options
def methods(as_json: bool, quiet: bool) -> None:
    """List the methods, with formula and source."""
    from rich.table import Table

    from .methods import METHODS

    table = Table("method", "what it does", "source", "layout")
    for method in METHODS.values():
        table.add_row(method.name, method.summary, method.source, "stock" if method.stock else "tiered")
    facts = [{"name": m.name, "summary": m.summary, "source": m.source, "stock": m.stock} for m in METHODS.values()]
    make_terminal(as_json, quiet).show({"methods": facts}, table)


@cli.command()
@click.argument("stats", type=FILE)
@click.option("-o", "out", type=FILE, required=True, help="Plan to write.")
@recipe_options("global")
@click.option("--target", metavar="TYPE", help="Type that it will be quantized to (with --imatrix), as Q4_K_M.")
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
    loaded, recipe = CalibrationStats.load(stats), _make_recipe(options, target)
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
    layout = "stock" if made.uniform else "tiered"
    lines = [f"other tensors: {other_types(made.encoded or made.tensors)}"]
    lines.append(f"{layout} layout, {made.tensor_bytes:,} bytes of tensors")
    if made.encoded_bytes is not None:
        lines.append(f"as {target}: {made.encoded_bytes:,} bytes of tensors")
    listing = [types_table(made.encoded or made.tensors)] if tensors else []
    terminal.show({}, plan_table(made), *listing, *lines)


@cli.command()
@click.argument("base", type=FILE)
@click.option("--plan", "plan_path", type=FILE, required=True, help="Plan to carry out.")
@click.option("--weights", type=FILE, help="New weights of the experts that stay, by `refit` or `dern`.")
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@click.option("--dry-run", is_flag=True, help="Check everything and print what would be written.")
@force_option
@output_options
def prune(
    base: Path, plan_path: Path, weights: Path | None, out: Path, dry_run: bool, force: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Write a plan's GGUF, a tensor at a time."""
    from .overrides import Overrides
    from .plan import PrunePlan
    from .report import types_table
    from .runtime import find
    from .writer import prune as run

    terminal = make_terminal(as_json, quiet)
    found = find()
    with terminal.progress() as progress:
        report = run(
            base, PrunePlan.load(plan_path), out, ggml=found.ggml if found else None,
            overrides=Overrides.load(weights) if weights else None, force=force, dry_run=dry_run, progress=progress,
        )  # fmt: skip
    for note in report.notes:
        terminal.say(f"note: {note}")
    if report.requantized:
        terminal.say(f"note: something in {len(report.requantized)} quantized tensors was quantized anew")
    facts = {
        "path": str(out), "written": not dry_run, "layout": report.layout, "bytes": report.file_bytes,
        "tensors": [vars(spec) | {"bytes": spec.nbytes} for spec in report.tensors], "requantized": report.requantized,
    }  # fmt: skip
    listing = [types_table(report.tensors)] if dry_run else []
    verb = "would be" if dry_run else "is"
    terminal.show(facts, *listing, f"{out} {verb} {report.layout}, {report.file_bytes:,} bytes")


@cli.command()
@click.argument("model", type=FILE)
@click.option("--plan", "plan_path", type=FILE, required=True, help="Plan whose experts to refit.")
@data_option
@click.option("-o", "out", type=FILE, required=True, help="Refitted weights to write, for `prune --weights`.")
@click.option(
    "--how",
    default=None,
    type=click.Choice(["plain", "sequential"]),
    help="Every layer for itself, or one after the other.  [default: by the plan's method]",
)
@n_ctx_option
@windows_option
@device_option
@force_option
@output_options
def refit(
    model: Path, plan_path: Path, data: tuple[Path, ...], out: Path, how: str | None, n_ctx: int, windows: int | None,
    device: str, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Let what stays take over from what goes: one more pass, least squares on the down projection.

    After a drop of whole experts it takes back how much the weights of a router without renormalisation grow.
    """
    from .checkpoint import open_checkpoint
    from .corpus import load_domain
    from .gguf_file import check_output
    from .methods import method
    from .plan import PrunePlan
    from .refit import refit as plainly
    from .sequential import refit_sequentially

    check_output(out, force, plan_path, *data)
    terminal = make_terminal(as_json, quiet)
    checkpoint, plan = open_checkpoint(model), PrunePlan.load(plan_path)
    routed = all(len(layer.router) == plan.n_expert for layer in plan.layers)
    how = how or (method(plan.recipe.method).refitted if routed else "plain")
    run = refit_sequentially if how == "sequential" else plainly
    tokenizer = checkpoint.tokenizer()
    domains = [load_domain(path, tokenizer, n_ctx, windows) for path in data]
    with terminal.progress() as progress:
        made = run(checkpoint, plan, domains, out.with_name(out.name + ".work"), device=device, progress=progress)
    count = len(made)
    made.save(out)
    terminal.show({"path": str(out), "experts": count}, f"{out}: {count} experts refitted")


@cli.command()
@click.argument("model", type=FILE)
@click.option("--plan", "plan_path", type=FILE, required=True, help="Plan of the method dern.")
@click.option("-o", "out", type=FILE, required=True, help="Weights to write, for `prune --weights`.")
@click.option(
    "--threshold", default=0.5, show_default=True, help="Cosine above which a neuron of a dropped expert is taken in."
)
@click.option(
    "--match", default="gate-up-down", show_default=True, type=click.Choice(["gate-up-down", "up-down"]),
    help="What of a neuron is compared.",
)  # fmt: skip
@device_option
@force_option
@output_options
def dern(
    model: Path, plan_path: Path, out: Path, threshold: float, match: str, device: str, force: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Merge the neurons of dropped experts into the experts that stay, from the weights alone (arXiv 2509.10377)."""
    from .checkpoint import open_checkpoint
    from .dern import dern as run
    from .gguf_file import check_output
    from .plan import PrunePlan

    check_output(out, force, plan_path)
    terminal = make_terminal(as_json, quiet)
    checkpoint, plan = open_checkpoint(model), PrunePlan.load(plan_path)
    with terminal.progress() as progress:
        made = run(checkpoint, plan, out, threshold=threshold, match=match, device=device, progress=progress)
    facts = {"path": str(out), "threshold": threshold, "match": match, "layers": [vars(moved) for moved in made.layers]}
    lines = [
        f"layer {moved.layer}: {moved.found} of {moved.dropped} neurons of dropped experts found a home, in "
        f"{moved.experts} experts"
        for moved in made.layers
    ]
    terminal.show(facts, *lines, f"{out}: {len(made.weights.experts)} experts recombined")


@cli.command()
@click.argument("source", type=FILE)
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@force_option
@output_options
def expand(source: Path, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Turn a tiered file into one for any llama.cpp, padded with zero neurons: the same function, more bytes."""
    from .expand import expand as run

    terminal = make_terminal(as_json, quiet)
    with terminal.progress() as progress:
        notes = run(source, out, force=force, progress=progress)
    for note in notes:
        terminal.say(f"note: {note}")
    size = out.stat().st_size
    terminal.show({"path": str(out), "bytes": size, "notes": notes}, f"{out} is stock, {size:,} bytes")


@cli.command()
@click.argument("source", type=FILE)
@click.argument("target")
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@click.option("--imatrix", type=FILE, help="Stats to take the importance matrix from.")
@force_option
@output_options
def quantize(
    source: Path, target: str, out: Path, imatrix: Path | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Quantize with llama.cpp's quantizer, every tensor to the type that the plan counted."""
    from .quantize import QuantizeTool
    from .quantize import quantize as run
    from .runtime import require
    from .stats import CalibrationStats

    terminal = make_terminal(as_json, quiet)
    stats = CalibrationStats.load(imatrix) if imatrix else None
    with terminal.progress() as progress:
        tool = QuantizeTool(require().tool("llama-quantize"), progress=progress)
        run(source, target, out, imatrix=stats, tools=tool, force=force)
    size = out.stat().st_size
    terminal.show({"path": str(out), "target": target, "bytes": size}, f"{out} is {target}, {size:,} bytes")


@cli.command()
@click.argument("path", type=FILE)
@click.option("--experts", is_flag=True, help="Print the width of every expert.")
@click.option("--check", is_flag=True, help="Read everything and refuse what is wrong.")
@output_options
def inspect(path: Path, experts: bool, check: bool, as_json: bool, quiet: bool) -> None:
    """Show what a GGUF holds, expert by expert."""
    from .gguf_file import GgufFile
    from .inspection import check as find_faults
    from .inspection import inspect as run
    from .report import inspection_tables

    terminal = make_terminal(as_json, quiet)
    view = run(GgufFile(path))
    faults = find_faults(view) if check else []
    facts = view.as_dict() | ({"faults": faults} if check else {})
    terminal.show(facts, *inspection_tables(facts, experts))
    if faults:
        raise GgufToolError(f"{path}: {len(faults)} faults:\n" + "\n".join(f"  {fault}" for fault in faults))
    if check and not as_json:
        terminal.show({}, "checked: no fault found")


def _backend_list(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    names = value.split(",")
    if wrong := [name for name in names if name not in BACKEND_NAMES]:
        raise click.BadParameter(f"{wrong[0]!r} is none of {', '.join(BACKEND_NAMES)}")
    if len(set(names)) < len(names) or ("auto" in names and len(names) > 1):
        raise click.BadParameter(f"{value!r}: name each backend once, and auto alone")
    return names


@cli.command()
@click.argument("base", type=FILE)
@click.argument("pruned", type=FILE)
@click.option("--data", type=FILE, required=True, help="Text to measure on.")
@click.option("--windows", type=int, help="Use at most so many windows.")
@n_ctx_option
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
    from .corpus import read_text
    from .evaluate import compare
    from .report import comparison_table
    from .runtime import load_for

    text = read_text(data)
    llama, layers, name = load_for(backends[0], base, pruned)
    with terminal.progress() as progress:
        found = compare(
            base, pruned, text, llama=llama, n_ctx=n_ctx, max_windows=windows, n_gpu_layers=layers, backend=name,
            progress=progress,
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


@cli.command()
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
@backend_option
@output_options
def compress(
    model: Path, data: tuple[Path, ...], evaluation: tuple[Path, ...], target: str | None, refit: str | None, out: Path,
    n_ctx: int, windows: int | None, eval_windows: int | None, pre_tokenizer: str | None, device: str, backend: str,
    as_json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Do all of it: convert, calibrate, plan, prune, quantize, validate. Resumable; one report at the end."""
    from .pipeline import Job
    from .pipeline import compress as run

    terminal = make_terminal(as_json, quiet)
    recipe = _make_recipe(options, target)
    found, llama = _load(backend)
    with terminal.progress() as progress:
        job = Job(
            model=model, calibration=data, evaluation=evaluation, runtime=found, llama=llama, progress=progress,
            n_ctx=n_ctx, windows=windows, eval_windows=eval_windows, pre_tokenizer=pre_tokenizer, device=device,
        )  # fmt: skip
        report = run(job, out, recipe, terminal.say, refit=refit or "")
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))


@cli.command()
@click.option("-o", "out", type=FILE, default=Path("demo-out"), show_default=True, help="Folder for everything.")
@click.option("--eval-windows", default=24, show_default=True, help="Windows of each evaluation text.")
@backend_option
@output_options
def demo(out: Path, eval_windows: int, backend: str, as_json: bool, quiet: bool) -> None:
    """Compress the built-in model by every method and show what each cost, in and outside of the calibration domain."""
    from .demo import run

    terminal = make_terminal(as_json, quiet)
    found, llama = _load(backend)
    with terminal.progress() as progress:
        report = run(out, found, llama, eval_windows, progress, terminal.say)
    terminal.show(report.as_dict(), report.table(), *(f"note: {note}" for note in report.notes))
