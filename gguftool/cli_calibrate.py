"""The command that takes the statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_options import (
    data_option,
    device_option,
    dry_run_option,
    force_option,
    make_terminal,
    memory_options,
    n_ctx_option,
    output_options,
    windows_option,
)
from .cli_types import FILE, MODEL
from .sources import Source

if TYPE_CHECKING:
    from .calibration import Calibration
    from .stats import CalibrationStats
    from .terminal import Terminal


@click.command()
@click.argument("model", type=MODEL)
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
    from .asked import Asked
    from .calibration import checked
    from .processes import process_rank

    silent = process_rank() > 0  # the first of several processes speaks for all
    terminal = make_terminal(as_json, quiet or silent)
    asked = Asked(model, data, out, n_ctx, windows, part, device, dtype, memory, force)
    with checked(asked, obs=obs, dry_run=dry_run) as calibration:
        if dry_run:
            if not silent:
                _show_dry(terminal, out, calibration)
            return
        if memory is not None:
            terminal.say(calibration.how)
        with terminal.progress() as progress:
            stats = calibration.run(asked.work_dir, out, progress)
    if not silent:
        _show(terminal, stats, out)


def _show_dry(terminal: Terminal, out: Path, calibration: Calibration) -> None:
    """What would be measured, on what, how, and about how large the stats would be."""
    from .stats import CalibrationStats

    facts, domains, how = calibration.facts, calibration.domains, calibration.how
    size = CalibrationStats.blank(facts, len(domains), obs=calibration.obs).array_bytes
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
