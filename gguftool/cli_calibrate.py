"""The command that takes the statistics."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import (
    FILE,
    data_option,
    device_option,
    dry_run_option,
    force_option,
    make_terminal,
    memory_options,
    n_ctx_option,
    open_gguf_model,
    output_options,
    windows_option,
)
from .errors import GgufToolError
from .sources import Source, files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .stats import CalibrationStats, Domain, ModelFacts
    from .terminal import Terminal


@click.command()
@click.argument("model", type=FILE)
@data_option
@click.option("-o", "out", type=FILE, required=True, help="Stats to write.")
@click.option(
    "--obs/--no-obs",
    default=True,
    show_default=True,
    help="Solve OBS costs, for the method auto.",
)
@n_ctx_option
@windows_option
@click.option("--part", metavar="I/N", help="Only part I of N of each text's windows; `stats merge` adds up the parts.")
@device_option
@memory_options
@dry_run_option
@force_option
@output_options
def calibrate(
    model: Path, data: tuple[Source, ...], out: Path, obs: bool, n_ctx: int, windows: int | None, part: str | None,
    device: str, dtype: str, memory: str | None, dry_run: bool, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure which experts and neurons the texts need: one pass, one layer in memory at a time.

    MODEL is a checkpoint directory, or a GGUF, which llama.cpp runs; that takes several passes where the second moments of
    its layers do not fit into memory together. Stopped or killed, it goes on where it was when it is started again with the
    same arguments. Under torchrun the processes share the windows of a checkpoint.
    """
    from .calibrate import calibrate as run
    from .checkpoint import open_checkpoint
    from .corpus import load_domains
    from .durable import held
    from .gguf_file import check_output
    from .gguf_model import is_gguf
    from .inventory import model_facts
    from .loader import usable_device
    from .memory import parse_bytes, parse_dtype, plan_memory
    from .parts import parse_part, part_of
    from .processes import own_device, process_rank
    from .ranks import joined
    from .workdir import clear_leftovers

    if is_gguf(model):
        _calibrate_gguf(
            model, data, out, obs, n_ctx, windows, part, device, dtype, memory, dry_run, force, as_json, quiet
        )
        return
    silent = process_rank() > 0
    terminal = make_terminal(as_json, quiet or silent)
    scratch = out.with_name(out.name + ".work")
    with joined(device) as ranks, ExitStack() as locks:
        with ranks.together():
            if not silent and not dry_run:
                locks.enter_context(held(scratch))
                clear_leftovers(scratch, out)
            check_output(out, force or dry_run, *files(data))
            chosen = parse_part(part) if part is not None else None
            limit, kind = parse_bytes(memory) if memory is not None else None, parse_dtype(dtype)
            usable_device(own_device(device))
            checkpoint = open_checkpoint(model)
            tokenizer = checkpoint.tokenizer()
            domains = load_domains(data, tokenizer, n_ctx, windows)
            if chosen is not None:
                domains = part_of(domains, *chosen)
            count = sum(-(-len(tokens) // ranks.count) for _, tokens in domains)
            how = plan_memory(
                checkpoint, count, n_ctx, kind, limit, device=device, moments=None if obs else 0, n_domains=len(domains)
            )
        if dry_run:
            if not silent:
                _show_dry(terminal, out, domains, model_facts(checkpoint), obs, str(how))
            return
        if memory is not None and not silent:
            terminal.say(str(how))
        with terminal.progress() as progress:
            stats = run(
                checkpoint,
                domains,
                scratch,
                device=own_device(device),
                how=how,
                obs=obs,
                progress=progress,
                out=out,
                ranks=ranks,
            )
    if silent:
        return
    _show(terminal, stats, out)


def _calibrate_gguf(
    model: Path, data: tuple[Source, ...], out: Path, obs: bool, n_ctx: int, windows: int | None, part: str | None,
    device: str, dtype: str, memory: str | None, dry_run: bool, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    from .corpus import load_domains
    from .durable import held
    from .gguf_calibrate import calibrate_gguf
    from .gguf_file import check_output
    from .memory import parse_bytes
    from .parts import parse_part, part_of
    from .processes import process_count

    if process_count() > 1:
        raise GgufToolError("a GGUF is run by llama.cpp in one process; start it without torchrun, or with --part")
    if dtype != "auto":
        raise GgufToolError(f"--dtype {dtype}: a GGUF is run by llama.cpp in its own types; leave it out")
    check_output(out, force or dry_run, *files(data))
    terminal = make_terminal(as_json, quiet)
    limit = parse_bytes(memory) if memory is not None else None
    chosen = parse_part(part) if part is not None else None
    opened, tokenizer, llama = open_gguf_model(model, device)
    domains = load_domains(data, tokenizer, n_ctx, windows)
    if chosen is not None:
        domains = part_of(domains, *chosen)
    if dry_run:
        _show_dry(terminal, out, domains, opened.facts(), obs, "llama.cpp on the CPU, in the file's own types")
        return
    scratch = out.with_name(out.name + ".work")
    with held(scratch), terminal.progress() as progress:
        stats = calibrate_gguf(
            opened, domains, scratch, llama=llama, obs=None if obs else False, memory=limit, progress=progress, out=out,
        )  # fmt: skip
    _show(terminal, stats, out)


def _show_dry(
    terminal: Terminal, out: Path, domains: Sequence[tuple[Domain, Any]], facts: ModelFacts, obs: bool, how: str
) -> None:
    """What would be measured, on what, how, and about how large the stats would be."""
    from .stats import CalibrationStats

    size = CalibrationStats.blank(facts, len(domains), obs=obs).array_bytes
    texts = [{"name": domain.name, "tokens": domain.tokens, "windows": len(windows)} for domain, windows in domains]
    found = {
        "path": str(out),
        "written": False,
        "bytes": size,
        "layers": len(facts.moe_layers),
        "texts": texts,
        "how": how,
    }
    lines = [f"{text['name']}: {text['windows']} windows, {text['tokens']} tokens" for text in texts]
    terminal.show(
        found, *lines, how, f"{out} would be stats of {len(facts.moe_layers)} layers, about {size / 1e6:.2f} MB"
    )


def _show(terminal: Terminal, stats: CalibrationStats, out: Path) -> None:
    from .coverage import coverage

    facts = {"path": str(out), "tokens": stats.tokens, "layers": len(stats.model.moe_layers)}
    seen = coverage(stats)
    unrouted = int((stats.expert("count") == 0).sum())
    terminal.show(
        facts | {"unrouted_experts": unrouted, "coverage": seen.as_dict()},
        f"{out}: {stats.tokens} tokens, {len(stats.model.moe_layers)} layers, {unrouted} experts never routed",
        *(f"note: {note}" for note in seen.notes()),
    )
