"""The sweep: what each method, ratio and encoding costs, side by side."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import (
    AT_LEAST_ONE,
    METHOD_HELP,
    backend_option,
    data_option,
    device_option,
    make_terminal,
    n_ctx_option,
    output_options,
    pre_tokenizer_option,
    windows_option,
)
from .cli_types import ENCODING, FILE, METHOD, MODEL
from .sources import Source


@click.command()
@click.argument("model", type=MODEL)
@click.option("-o", "out", type=FILE, required=True, help="Folder for everything.")
@data_option
@click.option(
    "--eval",
    "evaluation",
    multiple=True,
    required=True,
    metavar="[GROUP:]FILE",
    help="Text to measure on; those of one group count as one text, as in:code.txt, out:news.txt. May be repeated.",
)
@click.option(
    "--method",
    "methods",
    type=METHOD,
    multiple=True,
    default=("global",),
    show_default=True,
    metavar="NAME[+refit]",
    help=f"{METHOD_HELP['global']} May be repeated.",
)
@click.option(
    "--ratio",
    "ratios",
    type=float,
    multiple=True,
    required=True,
    help="Share of routed-expert parameters that goes. May be repeated.",
)
@click.option(
    "--quant",
    "quants",
    type=ENCODING,
    multiple=True,
    default=("none",),
    show_default=True,
    metavar="TYPE",
    help="Type of the pruned files, as Q4_K_M; none keeps the original's. May be repeated.",
)
@click.option(
    "--unpruned",
    type=ENCODING,
    multiple=True,
    default=("Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K"),
    show_default=True,
    metavar="TYPE",
    help="Type of the unpruned model beside them; none leaves it out. May be repeated.",
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    help="Calibrate so often: on the first --windows windows of each text, then on samples of as many.",
)
@n_ctx_option
@windows_option
@click.option("--eval-windows", type=AT_LEAST_ONE, help="Use at most so many windows of each evaluation text.")
@click.option("--keep-files", is_flag=True, help="Keep the model files, in models/.")
@pre_tokenizer_option
@device_option
@backend_option
@output_options
def sweep(
    model: Path, out: Path, data: tuple[Source, ...], evaluation: tuple[str, ...], methods: tuple[str, ...],
    ratios: tuple[float, ...], quants: tuple[str, ...], unpruned: tuple[str, ...], seeds: int, n_ctx: int,
    windows: int | None, eval_windows: int | None, keep_files: bool, pre_tokenizer: str | None, device: str, backend: str,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Compare methods, ratios and encodings on one model: a table and a plot of size against KL divergence.

    One calibration for all of them. Each model file is made, measured and removed; what was measured is kept, so a
    sweep that was stopped, or is asked for more, goes on from there. Quantizing alone stands beside it: the report
    says where pruning beats it.
    """
    from . import runtime
    from .plot import save as save_plot
    from .prepare import Job
    from .sweep import Grid, parse_groups, parse_targets, run
    from .variants import parse_variant

    terminal = make_terminal(as_json, quiet)
    grid = Grid(
        variants=list(dict.fromkeys(parse_variant(name) for name in methods)),
        ratios=list(dict.fromkeys(ratios)),
        targets=parse_targets(quants),
        unpruned=[target for target in parse_targets(unpruned) if target is not None],
        groups=parse_groups(evaluation),
        seeds=seeds,
        keep_files=keep_files,
    )
    found = runtime.require(backend)
    llama = runtime.load(found)
    with terminal.progress() as progress:
        job = Job(
            model=model, calibration=data, evaluation=(), runtime=found, llama=llama, progress=progress, n_ctx=n_ctx,
            windows=windows, eval_windows=eval_windows, pre_tokenizer=pre_tokenizer, device=device,
        )  # fmt: skip
        report = run(job, out, grid, terminal.say)
    save_plot(report, [out / "sweep.png", out / "sweep.svg"])
    terminal.show(report.as_dict(), *report.tables(), f"{out / 'sweep.md'}, {out / 'sweep.svg'}")
