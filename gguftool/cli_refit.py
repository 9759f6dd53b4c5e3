"""The commands that make new weights for the experts that stay."""

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
    from .refitting import Refit
    from .terminal import Terminal


@click.command()
@click.argument("model", type=MODEL)
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
@memory_options
@dry_run_option
@force_option
@output_options
def refit(
    model: Path, plan_path: Path, data: tuple[Source, ...], out: Path, how: str | None, n_ctx: int, windows: int | None,
    device: str, dtype: str, memory: str | None, dry_run: bool, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Let what stays take over from what goes: one more pass, least squares on the down projection.

    MODEL is the checkpoint directory or the GGUF that was calibrated. After a drop of whole experts it takes back how much
    the weights of a router without renormalisation grow.
    """
    from .asked import Asked
    from .refitting import checked

    terminal = make_terminal(as_json, quiet)
    asked = Asked(model, data, out, n_ctx, windows, None, device, dtype, memory, force)
    with checked(asked, plan_path, how=how, dry_run=dry_run) as refitting:
        for note in refitting.notes:
            terminal.say(f"note: {note}")
        if dry_run:
            _show_dry(terminal, out, refitting)
            return
        if memory is not None:
            terminal.say(refitting.how)
        with terminal.progress() as progress:
            made = refitting.run(asked.work_dir, out, progress)
    terminal.show({"path": str(out), "experts": len(made)}, f"{out}: {len(made)} experts refitted")


def _show_dry(terminal: Terminal, out: Path, refitting: Refit) -> None:
    """What would be fitted, how, and about how large it would be: F32, a column for every neuron that stays."""
    widths, how = refitting.widths, refitting.how
    size = 4 * refitting.n_embd * sum(widths)
    facts = {"path": str(out), "written": False, "experts": len(widths), "bytes": size, "how": how}
    terminal.show(facts, how, f"{out} would be new weights of {len(widths)} experts, about {size / 1e6:.2f} MB")


@click.command()
@click.argument("model", type=MODEL)
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

    check_output(out, force, model, plan_path)
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
