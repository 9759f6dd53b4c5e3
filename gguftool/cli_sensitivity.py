"""The command that measures what pruning each layer costs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from .cli_options import (
    AT_LEAST_ONE,
    SOURCE_HELP,
    backend_option,
    force_option,
    make_terminal,
    output_options,
    scored_ctx_option,
)
from .cli_types import FILE, SOURCE
from .errors import GgufToolError
from .sources import Source


@click.command()
@click.argument("base", type=FILE)
@click.option("--stats", "stats_path", type=FILE, required=True, help="Stats of the model.")
@click.option(
    "--data", type=SOURCE, required=True, metavar="SOURCE[:FIELD][:LIMIT]", help=f"Text to measure on. {SOURCE_HELP}"
)
@click.option("--ratio", default=0.4, show_default=True, help="Share that goes of the one layer's experts.")
@click.option(
    "--criterion", default="gated-second-moment", show_default=True, help="Neuron criterion that the plans will go by."
)
@click.option("--align", type=AT_LEAST_ONE, help="Widths are multiples of this.  [default: as `plan` without a target]")
@click.option(
    "--max-tiers", default=4, show_default=True, type=AT_LEAST_ONE, help="Most different widths in the layer."
)
@click.option("--windows", type=AT_LEAST_ONE, help="Use at most so many windows.")
@click.option(
    "--at-once", default=4, show_default=True, type=AT_LEAST_ONE, help="Most pruned files that exist at a time."
)
@click.option("-o", "out", type=FILE, required=True, help="Layers to write, for `plan --layers`.")
@scored_ctx_option
@backend_option
@force_option
@output_options
def sensitivity(
    base: Path, stats_path: Path, data: Source, ratio: float, criterion: str, align: int | None, max_tiers: int,
    windows: int | None, at_once: int, out: Path, n_ctx: int, backend: str, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure what pruning each layer alone costs, for plans that weigh layers by it.

    Writes a file in which one layer is pruned, measures its KL divergence from the base, removes it, layer by layer.
    Stopped, it goes on where it was when it is started again with the same arguments.
    """
    from . import runtime
    from .chat import template_of_gguf
    from .corpus import read_scored
    from .gguf_file import GgufFile, check_output
    from .probe import Probe, measure_layers
    from .recipe import Recipe
    from .report import layers_table
    from .sensitivity import conditions
    from .stats import CalibrationStats

    check_output(out, force, base, stats_path, Path(data.place))
    if data.weight != 1:
        raise GgufToolError(
            f"--data {data}: there is one text to measure on, and a weight (@{data.weight:g}) means nothing"
        )
    terminal = make_terminal(as_json, quiet)
    stats = CalibrationStats.load(stats_path)
    text, special = read_scored(data, lambda: template_of_gguf(base))
    size = GgufFile(base).path.stat().st_size
    found = runtime.require(backend)
    where = conditions(
        stats, Recipe("global", ratio, criterion=criterion, align=align, max_tiers=max_tiers), base_bytes=size,
        text=data.name, text_sha256=hashlib.sha256(text.encode()).hexdigest(), n_ctx=n_ctx, windows=windows,
        backend=found.backend,
    )  # fmt: skip
    how = Probe(base, text, runtime.load(found), found.n_gpu_layers, found.ggml, at_once, special)
    with terminal.progress() as progress:
        made = measure_layers(how, stats, where, out, say=terminal.say, progress=progress)
    rows = [
        vars(cost) | {"weight": weight, "share": share}
        for cost, weight, share in zip(made.costs, made.weights(), made.shares(), strict=True)
    ]
    terminal.show({"path": str(out), "layers": rows}, layers_table(rows), f"{out}: {len(rows)} layers measured")
