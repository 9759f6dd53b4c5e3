"""The command that takes the statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_options import (
    FILE,
    data_option,
    device_option,
    force_option,
    make_terminal,
    n_ctx_option,
    open_gguf_model,
    output_options,
    windows_option,
)

if TYPE_CHECKING:
    from .stats import CalibrationStats
    from .terminal import Terminal


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
    model: Path, data: tuple[Path, ...], out: Path, obs: bool | None, n_ctx: int, windows: int | None, device: str,
    force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure which experts and neurons the texts need: one pass, one layer in memory at a time.

    MODEL is a checkpoint directory, or a GGUF, which llama.cpp runs; that takes several passes where the second moments of
    its layers do not fit into memory together.

    Stopped, it goes on where it was when it is started again with the same arguments.
    """
    from .calibrate import calibrate as run
    from .checkpoint import open_checkpoint
    from .corpus import load_domain
    from .gguf_file import check_output
    from .gguf_model import is_gguf

    check_output(out, force, *data)
    terminal = make_terminal(as_json, quiet)
    scratch = out.with_name(out.name + ".work")
    if is_gguf(model):
        from .gguf_calibrate import calibrate_gguf

        opened, tokenizer, llama = open_gguf_model(model, device)
        domains = [load_domain(path, tokenizer, n_ctx, windows) for path in data]
        with terminal.progress() as progress:
            stats = calibrate_gguf(opened, domains, scratch, llama=llama, obs=obs, progress=progress, out=out)
        _show(terminal, stats, out)
        return
    checkpoint = open_checkpoint(model)
    domains = [load_domain(path, checkpoint.tokenizer(), n_ctx, windows) for path in data]
    with terminal.progress() as progress:
        stats = run(checkpoint, domains, scratch, device=device, obs=obs, progress=progress, out=out)
    _show(terminal, stats, out)


def _show(terminal: Terminal, stats: CalibrationStats, out: Path) -> None:
    facts = {"path": str(out), "tokens": stats.tokens, "layers": len(stats.model.moe_layers)}
    unrouted = int((stats.expert("count") == 0).sum())
    terminal.show(
        facts | {"unrouted_experts": unrouted},
        f"{out}: {stats.tokens} tokens, {len(stats.model.moe_layers)} layers, {unrouted} experts never routed",
    )
