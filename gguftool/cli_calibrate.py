"""The command that takes the statistics."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import (
    FILE,
    data_option,
    device_option,
    force_option,
    make_terminal,
    n_ctx_option,
    output_options,
    windows_option,
)
from .sources import Source, files


@click.command()
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
    model: Path, data: tuple[Source, ...], out: Path, obs: bool | None, n_ctx: int, windows: int | None, device: str,
    force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure which experts and neurons the texts need: one pass, one layer in memory at a time.

    Stopped, it goes on where it was when it is started again with the same arguments.
    """
    from .calibrate import calibrate as run
    from .checkpoint import open_checkpoint
    from .corpus import load_domains
    from .coverage import coverage
    from .gguf_file import check_output

    check_output(out, force, *files(data))
    terminal = make_terminal(as_json, quiet)
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    domains = load_domains(data, tokenizer, n_ctx, windows)
    with terminal.progress() as progress:
        scratch = out.with_name(out.name + ".work")
        stats = run(checkpoint, domains, scratch, device=device, obs=obs, progress=progress, out=out)
    facts = {"path": str(out), "tokens": stats.tokens, "layers": len(stats.model.moe_layers)}
    seen = coverage(stats)
    unrouted = int((stats.expert("count") == 0).sum())
    terminal.show(
        facts | {"unrouted_experts": unrouted, "coverage": seen.as_dict()},
        f"{out}: {stats.tokens} tokens, {len(stats.model.moe_layers)} layers, {unrouted} experts never routed",
        *(f"note: {note}" for note in seen.notes()),
    )
