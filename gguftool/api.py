"""gguftool as a library: what the commands do, as functions of the same names with options of the same names.

    import gguftool
    stats = gguftool.calibrate("MODEL_DIR", data=["code.txt"], out="stats.safetensors")
    plan = gguftool.plan(stats, method="auto", ratio=0.4, target="Q4_K_M")

Texts are named as --data names them; what a command reads from a file may be the value itself. Every function takes
`progress`, called with (done, total, what), and raises GgufToolError for what its command would refuse. `import gguftool`
itself loads nothing: torch and the rest are loaded when a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from .errors import GgufToolError
from .sources import Source, parse_source

if TYPE_CHECKING:
    from .doctor import Finding
    from .evaluate import Comparison
    from .inspection import Inspection
    from .overrides import Overrides
    from .plan import PrunePlan
    from .quantize import Quantized
    from .recipe_file import RunRecipe
    from .report import Report
    from .stats import CalibrationStats
    from .writer import PruneReport

Place: TypeAlias = str | Path
Progress: TypeAlias = Callable[[int, int, str], None]
Say: TypeAlias = Callable[[str], None]


class PruneOptions(TypedDict, total=False):
    """The options of `plan` beside method and ratio; see `recipe.Recipe` for what they mean."""

    criterion: str | None
    align: int | None
    max_tiers: int
    layout: str
    whole: float | None
    schedule: str
    depth: tuple[float, float]
    mix: tuple[float, ...] | None
    layer_weights: tuple[float, ...] | None
    calibration: str
    relative: bool
    cut_router: bool
    guard: bool
    seed: int


class CompressOptions(TypedDict, total=False):
    """The options of `compress`: the keys of a recipe file, see `recipe_file.RunRecipe`."""

    data: Sequence[Place | Source]
    eval: Sequence[Place]
    ratio: float
    quant: str | None
    fit: str | None
    fit_ctx: int | None
    refit: str | None
    method: str
    criterion: str | None
    align: int | None
    max_tiers: int
    layout: str
    whole: float | None
    schedule: str
    depth: tuple[float, float]
    mix: tuple[float, ...] | None
    calibration: str
    relative: bool
    cut_router: bool
    guard: bool
    seed: int
    ctx: int
    windows: int | None
    eval_windows: int | None
    pre_tokenizer: str | None
    device: str
    dtype: str
    memory: str | None
    backend: str


def compress(
    model: Place | None = None, *, out: Place, recipe: Place | RunRecipe | None = None, prompts: Sequence[str] = (),
    no_extras: bool = False, progress: Progress | None = None, say: Say | None = None, **options: Unpack[CompressOptions],
) -> Report:  # fmt: skip
    """All of it, in the folder `out`; goes on where it was stopped. `recipe` is a file, the name of a shipped one, or a value;
    options override it.

    The report shows how both models go on from the `prompts` (by default how the texts of `eval` begin), their speed, memory
    and routing; with `no_extras` it does not, which takes about a minute less.

    Returns:
        The report. The files lie in `out`, with report.json, recipe.toml and verified.json.

    Raises:
        GgufToolError: as the command; also where something that was measured cannot be right. The files are kept then.
    """
    from .extras import Extras
    from .recipe_file import RunRecipe, find, load
    from .runs import Ears, carry_out

    if isinstance(prompts, str):
        raise GgufToolError(f"prompts is a list of texts; write prompts=[{prompts!r}]")
    extras = Extras(not no_extras, tuple(prompts))
    base = recipe if isinstance(recipe, RunRecipe) else load(find(str(recipe))) if recipe is not None else RunRecipe()
    given: dict[str, Any] = dict(options)
    if model is not None:
        given["model"] = Path(model)
    if "data" in given:
        given["data"] = tuple(_sources(given["data"]))
    if "eval" in given:
        given["eval"] = tuple(Path(path) for path in given["eval"])
    report = carry_out(base.changed(given), Path(out), Ears(progress or _silent, say or _unsaid), extras)
    if report.failures:
        raise GgufToolError(f"{out}: not done, the files are kept: {'; '.join(report.failures)}")
    return report


def verify(
    folder: Place, *, fast: bool = False, scratch: Place | None = None, progress: Progress | None = None
) -> list[str]:
    """What is no longer as `compress` made it in `folder`, a line each with both hashes, and why that run is not done, where
    it is not; [] where all is the same.

    Without `fast` its recipe is carried out again, in `scratch` (which stays, and must hold no run of its own) or in a temporary
    folder.
    """
    from tempfile import TemporaryDirectory

    from .runs import Ears, replay
    from .verification import Verified, not_done, recheck

    place = Path(folder)
    was = Verified.load(place)
    if fast:
        return [*recheck(place, was, progress), *not_done(place, was)]
    if scratch is not None:
        return [*replay(place, Path(scratch), Ears(progress or _silent)), *not_done(place, was)]
    with TemporaryDirectory(dir=place.resolve().parent, prefix=f"{place.resolve().name}.") as temporary:
        return [*replay(place, Path(temporary), Ears(progress or _silent)), *not_done(place, was)]


def convert(
    model: Place, *, out: Place, outtype: str = "auto", pre_tokenizer: str | None = None, force: bool = False,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """A checkpoint as GGUF, by llama.cpp's converter. Returns `out`."""
    from .convert import convert as run
    from .runtime import require

    place = Path(out)
    run(Path(model), place, require(), pre_tokenizer=pre_tokenizer, outtype=outtype, force=force, progress=progress)
    return place


def calibrate(
    model: Place, *, data: Sequence[Place | Source], out: Place, obs: bool = True, ctx: int = 512, windows: int | None = None,
    part: str | None = None, device: str = "cpu", dtype: str = "auto", memory: str | None = None, force: bool = False,
    progress: Progress | None = None,
) -> CalibrationStats:  # fmt: skip
    """The sums that plans are made from, of a checkpoint or a GGUF; also saved as `out`. Stopped, it goes on where it was.

    Raises GgufToolError as the command does, also where another process makes the same `out`.
    """
    from .asked import Asked
    from .calibration import checked

    place = Path(out)
    asked = Asked(Path(model), _sources(data), place, ctx, windows, part, device, dtype, memory, force)
    with checked(asked, obs=obs) as calibration:
        return calibration.run(asked.work_dir, place, progress)


def plan(
    stats: Place | CalibrationStats, *, ratio: float, method: str = "global", target: str | None = None,
    out: Place | None = None, force: bool = False, **options: Unpack[PruneOptions],
) -> PrunePlan:  # fmt: skip
    """What stays; also saved as `out` where it is named. Free: try ten."""
    from .gguf_file import check_output
    from .planner import make_plan
    from .recipe import Recipe

    if out is not None:
        check_output(Path(out), force, *_paths(stats))
    made = make_plan(_stats(stats), Recipe(method, ratio, target=target, **options))
    if out is not None:
        made.save(Path(out))
    return made


def refit(
    model: Place, *, plan: Place | PrunePlan, data: Sequence[Place | Source], out: Place, how: str | None = None,
    ctx: int = 512, windows: int | None = None, device: str = "cpu", dtype: str = "auto", memory: str | None = None,
    force: bool = False, progress: Progress | None = None,
) -> Overrides:  # fmt: skip
    """New weights for the experts that stay, saved as `out`; `how` is "plain", "sequential", or None for the method's own.

    Raises GgufToolError as the command does, also where another process makes the same `out`.
    """
    from .asked import Asked
    from .refitting import checked

    place = Path(out)
    asked = Asked(Path(model), _sources(data), place, ctx, windows, None, device, dtype, memory, force)
    with checked(asked, Path(plan) if isinstance(plan, str) else plan, how=how) as refitting:
        return refitting.run(asked.work_dir, place, progress)


def prune(
    base: Place, *, plan: Place | PrunePlan, out: Place, weights: Place | Overrides | None = None, force: bool = False,
    dry_run: bool = False, progress: Progress | None = None,
) -> PruneReport:  # fmt: skip
    """Writes the plan's GGUF as `out`, with the refitted `weights` where there are some."""
    from .gguf_file import check_output
    from .overrides import Overrides
    from .runtime import find
    from .writer import prune as run

    check_output(Path(out), force or dry_run, *_paths(base, plan, weights))
    own = Overrides.load(Path(weights)) if isinstance(weights, str | Path) else weights
    found = find()
    return run(
        Path(base), _plan(plan), Path(out), ggml=found.ggml if found else None, overrides=own, force=force,
        dry_run=dry_run, progress=progress,
    )  # fmt: skip


def quantize(
    source: Place, target: str, *, out: Place, imatrix: Place | CalibrationStats | None = None, force: bool = False,
    allow_requantize: bool = False, progress: Progress | None = None,
) -> Quantized:  # fmt: skip
    """Writes `source` in the type `target` as `out`; the stats are the importance matrix."""
    from .gguf_file import check_output
    from .quantize import QuantizeTool
    from .quantize import quantize as run
    from .runtime import require

    check_output(Path(out), force, *_paths(source, imatrix))
    tools = QuantizeTool(require().tool("llama-quantize"), progress=progress)
    sums = _stats(imatrix) if imatrix is not None else None
    return run(
        Path(source), target, Path(out), imatrix=sums, tools=tools, force=force, allow_requantize=allow_requantize
    )  # fmt: skip


def expand(source: Place, *, out: Place, force: bool = False, progress: Progress | None = None) -> list[str]:
    """A tiered file, padded for any llama.cpp, as `out`. Returns notes."""
    from .expand import expand as run

    return run(Path(source), Path(out), force=force, progress=progress)


def inspect(path: Place, *, check: bool = False) -> Inspection:
    """What a GGUF holds, expert by expert. With `check` all of it is read; raises GgufToolError with every fault."""
    from .gguf_file import GgufFile
    from .inspection import check as find_faults
    from .inspection import inspect as run

    view = run(GgufFile(Path(path)))
    if check and (faults := find_faults(view)):
        raise GgufToolError(f"{path}: {len(faults)} faults: {'; '.join(faults)}")
    return view


def validate(
    base: Place, pruned: Place, *, data: Place, windows: int | None = None, ctx: int = 512, backend: str = "auto",
    progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Perplexity of both and KL divergence between them on a text, as llama-perplexity has them."""
    from .chat import template_of_gguf
    from .corpus import read_scored
    from .evaluate import compare
    from .runtime import load_for

    text, special = read_scored(Path(data), lambda: template_of_gguf(Path(base)))
    llama, layers, name = load_for(backend, Path(base), Path(pruned))
    return compare(
        Path(base), Path(pruned), text, llama=llama, n_ctx=ctx, max_windows=windows, n_gpu_layers=layers, backend=name,
        progress=progress, parse_special=special,
    )  # fmt: skip


def doctor(folder: Place | None = None) -> list[Finding]:
    """What this machine has of what gguftool needs, and what mends the rest."""
    from .doctor import examine

    return examine(Path(folder) if folder is not None else None)


def _silent(_done: int, _total: int, _text: str) -> None:
    pass


def _unsaid(_text: str) -> None:
    pass


def _sources(data: Sequence[Place | Source]) -> list[Source]:
    if isinstance(data, str | Path):
        raise GgufToolError(f"data is a list of texts; write data=[{str(data)!r}]")
    return [one if isinstance(one, Source) else parse_source(str(one)) for one in data]


def _paths(*given: object) -> list[Path]:
    """Those that were given as a path, and not as the value itself."""
    return [Path(one) for one in given if isinstance(one, str | Path)]


def _stats(given: Place | CalibrationStats) -> CalibrationStats:
    from .stats import CalibrationStats

    return CalibrationStats.load(Path(given)) if isinstance(given, str | Path) else given


def _plan(given: Place | PrunePlan) -> PrunePlan:
    from .plan import PrunePlan

    return PrunePlan.load(Path(given)) if isinstance(given, str | Path) else given
