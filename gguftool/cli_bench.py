"""The benchmarks. Their figures are ratios of interleaved runs; they are no tests and nothing waits for them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .cli_options import AT_LEAST_ONE, make_terminal, output_options
from .errors import GgufToolError


@click.group()
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command("runtime")
@click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    default=("qwen3-30b-a3b",),
    show_default=True,
    help="Layer sizes: qwen3-30b-a3b, gpt-oss-20b, deepseek-v2-lite, mixtral-8x7b; may be repeated.",
)
@click.option(
    "--type",
    "types",
    metavar="TYPE",
    multiple=True,
    default=("Q4_K", "Q8_0"),
    show_default=True,
    help="Type of the weights; may be repeated.",
)
@click.option(
    "--starts",
    default=4,
    show_default=True,
    type=AT_LEAST_ONE,
    help="How often all processes are started anew; twice that on a noisy machine.",
)
@click.option(
    "--rounds",
    default=4,
    show_default=True,
    type=AT_LEAST_ONE,
    help="How often each of them is asked, in turns, for a prompt and three generations; medians count.",
)
@click.option(
    "--layers",
    "n_layer",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Layers of the files; 0 picks by size.",
)
@click.option("--threads", default=2, show_default=True, type=AT_LEAST_ONE, help="Threads of llama.cpp.")
@click.option("--mmap/--no-mmap", default=False, show_default=True, help="Map the file, or read it.")
@click.option("--repack/--no-repack", default=True, show_default=True, help="Let the CPU repack weights.")
@click.option("--unpatched/--no-unpatched", default=True, show_default=True, help="Compare with llama.cpp as it is.")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Where the files of some GB go.  [default: temporary]"
)
@output_options
def bench_runtime(
    models: tuple[str, ...], types: tuple[str, ...], starts: int, rounds: int, n_layer: int, threads: int, mmap: bool,
    repack: bool, unpatched: bool, folder: Path | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Speed of tiered files against stock ones of the same weights, at the layer sizes of real models.

    Random weights, few layers, a small vocabulary. Exits with 1 where a bar is missed. Nothing else should run meanwhile.
    """
    from .bench import Options, check_names, measure
    from .runtime import build
    from .runtime_report import bench_table

    terminal = make_terminal(as_json, quiet)
    check_names(models, types)
    options = Options(threads=threads, mmap=mmap, repack=repack)
    results = []
    with terminal.progress() as progress, tempfile.TemporaryDirectory(prefix="gguftool-bench-", dir=folder) as scratch:
        plain = build("cpu", patched=False, progress=progress) if unpatched else None
        patched = build("cpu", progress=progress)
        for model in models:
            for type_name in types:
                results.append(
                    measure(
                        model, type_name, Path(scratch), patched, plain, options,
                        starts=starts, rounds=rounds, n_layer=n_layer, progress=progress,
                    )
                )  # fmt: skip
    missed = [line for result in results for line in result.missed()]
    facts = [result.as_dict() for result in results]
    terminal.show(
        {"options": vars(options) | {"starts": starts, "rounds": rounds}, "results": facts, "missed": missed},
        bench_table(facts),
    )
    if missed:
        raise GgufToolError("a bar is missed: " + "; ".join(missed))


@bench.command("calibrate")
@click.option("--model", default="qwen3-30b-a3b", show_default=True, help="Layer sizes: qwen3-30b-a3b or mixtral-8x7b.")
@click.option("--layers", default="4,12", show_default=True, help="Two depths whose memory is compared.")
@click.option("--windows", default=8, show_default=True, type=AT_LEAST_ONE, help="Windows of the memory runs.")
@click.option(
    "--ctx", "n_ctx", default=512, show_default=True, type=click.IntRange(2, 32768), help="Tokens in a window."
)
@click.option("--speed-windows", default=48, show_default=True, type=AT_LEAST_ONE, help="Windows of the timed runs.")
@click.option(
    "--observer-windows",
    default=4,
    show_default=True,
    type=click.IntRange(0),
    help="Windows that an observer of all experts sees; 0: none.",
)
@click.option(
    "--rounds", default=3, show_default=True, type=AT_LEAST_ONE, help="How often everything is timed, in turns."
)
@click.option("--batch", default=4, show_default=True, type=AT_LEAST_ONE, help="Windows that run at once.")
@click.option("--threads", default=2, show_default=True, type=AT_LEAST_ONE, help="Threads of torch.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Type of the computation.",
)
@click.option("--memory", metavar="SIZE", help="The limit that calibrate is given.")
@click.option("--obs/--no-obs", default=True, show_default=True, help="Solve OBS costs in the memory runs.")
@click.option(
    "--tokens",
    default=131072,
    show_default=True,
    type=AT_LEAST_ONE,
    help="For how many the figures of the whole model are.",
)
@click.option(
    "--quick", is_flag=True, help="Tiny sizes where no others are given, to see that it runs; nothing is judged."
)
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Where the files of some GB go.  [default: temporary]"
)
@output_options
@click.pass_context
def bench_calibrate(
    context: click.Context, model: str, layers: str, quick: bool, folder: Path | None, tokens: int, as_json: bool,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Memory and speed of calibration at the layer sizes of real models, against a plain forward pass.

    Random weights, a small vocabulary. Exits with 1 where a bar is missed. Nothing else should run meanwhile.
    """
    from .bench_calibrate import QUICK, Options, measure
    from .runtime_report import calibrate_bench_tables

    terminal = make_terminal(as_json, quiet)
    try:
        depths = tuple(int(depth) for depth in layers.split(","))
    except ValueError:
        raise click.UsageError(f"--layers {layers!r} is not two numbers, as 4,12") from None
    given: dict[str, Any] = {"layers": depths, **options}
    if quick:
        default = ParameterSource.DEFAULT
        given = {name: one for name, one in given.items() if context.get_parameter_source(name) != default}
    chosen = replace(QUICK if quick else Options(), **given)
    with terminal.progress() as progress:
        result = measure(
            model, chosen, folder or Path(tempfile.gettempdir()), quick=quick, tokens=tokens, progress=progress
        )
    facts = result.as_dict()
    terminal.show({"results": [facts], "missed": facts["missed"]}, *calibrate_bench_tables([facts]))
    if facts["missed"]:
        raise GgufToolError("a bar is missed: " + "; ".join(facts["missed"]))
