"""The commands that write GGUF files and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_options import dry_run_option, force_option, make_terminal, output_options, pre_tokenizer_option
from .cli_types import ENCODING, FILE, MODEL
from .errors import GgufToolError

if TYPE_CHECKING:
    from .tensors import TensorSpec
    from .terminal import Terminal


@click.command()
@click.argument("model", type=MODEL)
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@click.option("--outtype", default="auto", show_default=True, help="As llama.cpp's converter has it.")
@pre_tokenizer_option
@dry_run_option
@force_option
@output_options
def convert(
    model: Path, out: Path, outtype: str, pre_tokenizer: str | None, dry_run: bool, force: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Convert a Hugging Face checkpoint with llama.cpp's own converter."""
    from .convert import convert as run
    from .runtime import require

    terminal = make_terminal(as_json, quiet)
    if dry_run and outtype != "auto":
        raise GgufToolError(
            f"--dry-run: the tensors of --outtype {outtype} are not known beforehand, those of auto are"
        )
    with terminal.progress() as progress:
        run(
            model, out, require(), pre_tokenizer=pre_tokenizer, outtype=outtype, force=force, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
    if dry_run:
        _show_dry_conversion(terminal, model, out)
        return
    size = out.stat().st_size
    terminal.show({"path": str(out), "bytes": size}, f"{out}: {size:,} bytes")


def _show_dry_conversion(terminal: Terminal, model: Path, out: Path) -> None:
    """What would be written; of a model that only the converter knows, that it would be."""
    from .checkpoint import open_checkpoint
    from .inventory import gguf_tensors

    try:
        tensors = list(gguf_tensors(open_checkpoint(model)))
    except GgufToolError as error:
        facts = {"path": str(out), "written": False, "tensor_bytes": None, "tensors": None, "why": str(error)}
        terminal.show(facts, f"{out} would be a GGUF; its tensors are known to llama.cpp's converter only: {error}")
        return
    _show_dry(terminal, out, tensors, "a GGUF")


@click.command()
@click.argument("base", type=FILE)
@click.option("--plan", "plan_path", type=FILE, required=True, help="Plan to carry out.")
@click.option("--weights", type=FILE, help="New weights of the experts that stay, by `refit` or `dern`.")
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@dry_run_option
@force_option
@output_options
def prune(
    base: Path, plan_path: Path, weights: Path | None, out: Path, dry_run: bool, force: bool, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Write a plan's GGUF, a tensor at a time."""
    from .gguf_file import check_output
    from .methods import METHODS
    from .overrides import Overrides
    from .plan import PrunePlan
    from .report import types_table
    from .runtime import find
    from .writer import prune as run

    terminal = make_terminal(as_json, quiet)
    check_output(out, force or dry_run, base, plan_path, *([weights] if weights else []))
    found, plan = find(), PrunePlan.load(plan_path)
    made_by = METHODS.get(plan.recipe.method)
    if weights is None and made_by is not None and made_by.refitted and plan.kept_share < 1:
        terminal.say("note: the plan counts on refitted weights and none were given: `gguftool refit`, then --weights")
    with terminal.progress() as progress:
        report = run(
            base, plan, out, ggml=found.ggml if found else None,
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


@click.command()
@click.argument("source", type=FILE)
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@dry_run_option
@force_option
@output_options
def expand(source: Path, out: Path, dry_run: bool, force: bool, as_json: bool, quiet: bool) -> None:
    """Turn a tiered file into one for any llama.cpp, padded with zero neurons: the same function, more bytes."""
    from .expand import expand as run
    from .expand import plan_expansion
    from .gguf_file import check_output

    terminal = make_terminal(as_json, quiet)
    if dry_run:
        check_output(out, True, source)  # one that is there stays as it is
        found = plan_expansion(source)
        for note in found.notes:
            terminal.say(f"note: {note}")
        _show_dry(terminal, out, found.tensors, "stock")
        return
    with terminal.progress() as progress:
        notes = run(source, out, force=force, progress=progress)
    for note in notes:
        terminal.say(f"note: {note}")
    size = out.stat().st_size
    terminal.show({"path": str(out), "bytes": size, "notes": notes}, f"{out} is stock, {size:,} bytes")


@click.command()
@click.argument("source", type=FILE)
@click.argument("target", type=ENCODING)
@click.option("-o", "out", type=FILE, required=True, help="GGUF to write.")
@click.option("--imatrix", type=FILE, help="Stats to take the importance matrix from.")
@click.option(
    "--allow-requantize", is_flag=True, help="Quantize again what is quantized already, as gpt-oss's experts are."
)
@dry_run_option
@force_option
@output_options
def quantize(
    source: Path, target: str, out: Path, imatrix: Path | None, allow_requantize: bool, dry_run: bool, force: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Quantize with llama.cpp's quantizer, every tensor to the type that the plan counted."""
    from .encoding import parse_target
    from .gguf_file import check_output
    from .quantize import QuantizeTool
    from .quantize import quantize as run
    from .runtime import require
    from .stats import CalibrationStats

    check_output(out, force or dry_run, source, *([imatrix] if imatrix else []))
    terminal, target = make_terminal(as_json, quiet), parse_target(target).name
    stats = CalibrationStats.load(imatrix) if imatrix else None
    with terminal.progress() as progress:
        tool = QuantizeTool(require().tool("llama-quantize"), progress=progress)
        made = run(
            source,
            target,
            out,
            imatrix=stats,
            tools=tool,
            force=force,
            allow_requantize=allow_requantize,
            dry_run=dry_run,
        )
    if dry_run:
        _show_dry(terminal, out, list(made.tensors), target)
        return
    size = out.stat().st_size
    terminal.show({"path": str(out), "target": target, "bytes": size}, f"{out} is {target}, {size:,} bytes")


def _show_dry(terminal: Terminal, out: Path, tensors: list[TensorSpec], what: str) -> None:
    """What would be written: every tensor, and the bytes of all of them."""
    from .report import types_table

    size = sum(spec.padded_bytes for spec in tensors)
    facts = {"path": str(out), "written": False, "tensor_bytes": size}
    facts |= {"tensors": [vars(spec) | {"bytes": spec.nbytes} for spec in tensors]}
    terminal.show(facts, types_table(tensors), f"{out} would be {what}, {size:,} bytes of tensors")


@click.command()
@click.argument("path", type=FILE)
@click.option("--experts", is_flag=True, help="Print the width of every expert.")
@click.option("--check", is_flag=True, help="Read everything, let llama.cpp load it, and refuse what is wrong.")
@output_options
def inspect(path: Path, experts: bool, check: bool, as_json: bool, quiet: bool) -> None:
    """Show what a GGUF holds, expert by expert."""
    from .gguf_file import GgufFile
    from .inspection import check as find_faults
    from .inspection import inspect as run
    from .loading import refusals
    from .report import inspection_tables
    from .runtime import find

    terminal = make_terminal(as_json, quiet)
    view = run(GgufFile(path))
    faults = find_faults(view) if check else []
    runtime = find() if check else None
    if runtime is not None and not faults:
        faults = [f"llama.cpp does not load it: {why}" for why in refusals(runtime, [path]) if why is not None]
    view.file.check_unchanged()
    facts = view.as_dict() | ({"faults": faults} if check else {})
    terminal.show(facts, *inspection_tables(facts, experts))
    if faults:
        lines = [] if as_json else [f"fault: {fault}" for fault in faults]
        terminal.show({}, *lines) if lines else None
        raise GgufToolError(f"{path}: {len(faults)} faults, the first: {faults[0]}")
    if check and not as_json:
        terminal.show({}, "checked: no fault found")
        if runtime is None:
            terminal.say("note: llama.cpp was not asked to load it; `gguftool runtime build` builds it")
