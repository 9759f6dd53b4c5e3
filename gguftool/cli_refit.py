"""The commands that make new weights for the experts that stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
from .sources import Source, files

if TYPE_CHECKING:
    from .overrides import Overrides
    from .plan import PrunePlan
    from .terminal import Terminal


@click.command()
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
    from .checkpoint import open_checkpoint
    from .corpus import load_domains
    from .durable import held
    from .gguf_file import check_output
    from .gguf_model import is_gguf, open_gguf
    from .loader import usable_device
    from .memory import parse_bytes, parse_dtype
    from .methods import method
    from .plan import PrunePlan
    from .refit import refit as plainly
    from .refit import refit_memory
    from .sequential import refit_sequentially
    from .workdir import clear_leftovers

    scratch = out.with_name(out.name + ".work")
    if not dry_run:
        click.get_current_context().with_resource(held(scratch))
        clear_leftovers(scratch, out)
    check_output(out, force or dry_run, plan_path, *files(data))
    terminal = make_terminal(as_json, quiet)
    if is_gguf(model):
        if dry_run:
            plan = PrunePlan.load(plan_path)
            _show_dry(terminal, out, plan, open_gguf(model).n_embd, "plain, by llama.cpp on the CPU")
            return
        made = _refit_gguf(model, plan_path, data, out, how, n_ctx, windows, device, dtype, memory, terminal)
        _save(terminal, made, out)
        return
    limit, kind = parse_bytes(memory) if memory is not None else None, parse_dtype(dtype)
    usable_device(device, solves=True)
    checkpoint, plan = open_checkpoint(model), PrunePlan.load(plan_path)
    routed = all(len(layer.router) == plan.n_expert for layer in plan.layers)
    kind_of_refit = how or (method(plan.recipe.method).refitted if routed else "plain")
    run = refit_sequentially if kind_of_refit == "sequential" else plainly
    tokenizer = checkpoint.tokenizer()
    domains = load_domains(data, tokenizer, n_ctx, windows)
    needs = refit_memory(checkpoint, plan, domains, kind, limit, device=device, sequential=run is refit_sequentially)
    if dry_run:
        _show_dry(terminal, out, plan, checkpoint.n_embd, f"{kind_of_refit or 'plain'}: {needs}")
        return
    if memory is not None:
        terminal.say(str(needs))
    with terminal.progress() as progress:
        made = run(checkpoint, plan, domains, scratch, device=device, how=needs, progress=progress)
    _save(terminal, made, out)


def _refit_gguf(
    model: Path, plan_path: Path, data: tuple[Source, ...], out: Path, how: str | None, n_ctx: int, windows: int | None,
    device: str, dtype: str, memory: str | None, terminal: Terminal,
) -> Overrides:  # fmt: skip
    from .corpus import load_domains
    from .errors import GgufToolError
    from .gguf_refit import NO_SEQUENTIAL, refit_gguf
    from .memory import parse_bytes
    from .methods import method
    from .plan import PrunePlan

    if how == "sequential":
        raise GgufToolError(f"--how sequential: {NO_SEQUENTIAL}; take --how plain")
    if dtype != "auto":
        raise GgufToolError(f"--dtype {dtype}: a GGUF is run by llama.cpp in its own types; leave it out")
    limit = parse_bytes(memory) if memory is not None else None
    plan = PrunePlan.load(plan_path)
    if how is None and method(plan.recipe.method).refitted == "sequential":
        terminal.say(f"refitting plainly: {NO_SEQUENTIAL}")
    opened, tokenizer, llama = open_gguf_model(model, device)
    domains = load_domains(data, tokenizer, n_ctx, windows)
    with terminal.progress() as progress:
        return refit_gguf(
            opened, plan, domains, out.with_name(out.name + ".work"), llama=llama, memory=limit, progress=progress
        )


def _show_dry(terminal: Terminal, out: Path, plan: PrunePlan, n_embd: int, how: str) -> None:
    """What would be fitted, how, and about how large it would be: F32, a column for every neuron that stays."""
    narrowed = [width for layer in plan.layers for width in layer.widths if 0 < width < plan.n_ff_exp]
    size = 4 * n_embd * sum(narrowed)
    facts = {"path": str(out), "written": False, "experts": len(narrowed), "bytes": size, "how": how}
    terminal.show(facts, how, f"{out} would be new weights of {len(narrowed)} experts, about {size / 1e6:.2f} MB")


def _save(terminal: Terminal, made: Overrides, out: Path) -> None:
    count = len(made)
    made.save(out)
    terminal.show({"path": str(out), "experts": count}, f"{out}: {count} experts refitted")


@click.command()
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
