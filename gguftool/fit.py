"""fit: the best file for a budget of memory. Widths and quant types together, in exact bytes, by measured damage.

For every target type there is one file worth looking at: the unpruned model where it fits, else the one of which the least
has to go. What a file takes is found by running a skeleton of it (`budget`), what it costs by building and measuring it.
Types are tried from the one with the least pruning on, towards more bits and more pruning, and no further than the
measured damage grows: from there on each step prunes more to save roundings that matter less.

Measurements stay in `rows/` (`measurements`, the keys of `sweep`), files go as soon as another one is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import encoding
from .budget import JITTER, Memory
from .calibration import Calibration, GgufCalibration
from .coverage import coverage
from .errors import GgufToolError
from .evaluate import physical_memory
from .fit_choose import is_past, mean_kl, verdict
from .fit_measure import Bench
from .fit_report import CHOSEN, FITS, LEFT_OUT, MEASURED, TOO_LARGE, FitReport, Weighed
from .fit_solve import MOST, SCRATCH, Choice, Solver, check_recipe, targets_for
from .gguf_file import GgufFile, check_space
from .layout import parse
from .memory import gib
from .outline import Base
from .pipeline import check_refit
from .prepare import Job, Prepared, base_gguf, blank, check_methods, check_names, check_refits, opened, prepare
from .recipe import Recipe
from .stats import CalibrationStats
from .workspace import Say, Workspace

TARGETS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
# How many of the unpruned files that fit are measured: the largest, and one in case that more bits are not better.
UNPRUNED = 2
# How often a chosen file that takes more than its skeleton did is made anew, smaller.
TRIES = 4


@dataclass(frozen=True)
class Ask:
    """What a file has to fit.

    Attributes:
        budget: bytes of memory for weights, KV cache, compute buffers and the process itself.
        ctx: tokens of the context.
        targets: types to choose from. named: whether somebody named them; else the original's own is one of them too.
        recipe: how to prune; its ratio and target are not looked at. refit: as `pipeline.build` takes it.
        every: measure every candidate that fits.
        budget_option, ctx_option: what whoever asks calls the first two, for remedies that can be typed.
    """

    budget: int
    ctx: int
    recipe: Recipe
    targets: tuple[str, ...] = TARGETS
    refit: str = ""
    every: bool = False
    budget_option: str = "--memory"
    ctx_option: str = "--ctx"
    named: bool = False


@dataclass(frozen=True)
class Search:
    """Where a search begins: `ask` with the types that are tried, `solver` with the model and its stats, notes on both."""

    ask: Ask
    solver: Solver
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Decided:
    """Where it ends: the best candidate that fits, the `bench` that has its file, and what was weighed (without a path yet)."""

    choice: Choice
    bench: Bench
    report: FitReport


def run(job: Job, out: Path, ask: Ask, say: Say, *, dry_run: bool = False) -> FitReport:
    """Finds, makes and checks the best file. `dry_run` stops before anything is calibrated, pruned or measured.

    Raises:
        GgufToolError: nothing fits (with what the smallest file takes), or something that `prepare` refuses.
    """
    known = check(job, ask)
    work = Workspace(out, say)
    if dry_run:
        return _outlook(job, work, ask, known)
    decided = decide(start(job, work, ask, known), say)
    report = replace(decided.report, path=decided.bench.keep(decided.choice).path)
    report.save(out)
    return report


def start(job: Job, work: Workspace, ask: Ask, known: Calibration) -> Search:
    """Converts, finds out whether anything fits, and calibrates; `known` is what `check` gave. Raises as `run` does."""
    found = _fitting(job, work, ask, known)
    ask, solver = found.ask, found.solver
    # What pruning leaves in the base's types with its new weights, and the files that are measured side by side.
    size = solver.source.base.stat().st_size
    check_space(work.folder / SCRATCH, 2 * size + (UNPRUNED + 2) * min(size, ask.budget))
    source = prepare(job, work, [], known)
    notes = (*found.notes, *coverage(source.stats).notes())
    return Search(ask, _solver(job, work, source, ask, solver.beside), notes)


def decide(search: Search, say: Say) -> Decided:
    """Builds and measures candidates until the best one is known and has stayed below the budget. Raises as `run` does."""
    ask, solver = search.ask, search.solver
    solver.work.watch("stage", {"name": "weigh"})
    bench = Bench(solver.job, solver.work, solver.source, ask.refit)
    choices, rows = candidates(ask, solver)
    rows |= weigh(ask, choices, bench)
    chosen, memory = _settle(ask, solver, bench, choices, rows, say)
    return Decided(chosen, bench, _report(ask, solver, rows, search.notes, bench.protocol(), memory))


def _fitting(job: Job, work: Workspace, ask: Ask, known: Calibration) -> Search:
    """With stats of nothing: the types to try, and what the smallest file takes beside itself."""
    source = _uncalibrated(job, work, ask, known)
    work.watch("stage", {"name": "budget"})
    targets, notes = targets_for(source, ask.targets, Base.open(source.base), named=ask.named)
    ask = replace(ask, targets=tuple(targets))
    solver = _solver(job, work, source, ask, 0)
    solver.beside = _smallest(solver, ask).beside
    return Search(ask, solver, (*notes, *_context_notes(solver.base.file, ask.ctx)))


def _outlook(job: Job, work: Workspace, ask: Ask, known: Calibration) -> FitReport:
    """The candidates by their bytes, with the stats that there are."""
    found = _fitting(job, work, ask, known)
    ask, none, notes = found.ask, found.solver.source, found.notes
    source = _known_stats(none, work.folder)
    solver = _solver(job, work, source, ask, found.solver.beside)
    if source is none:
        notes = (*notes, "without stats every neuron counts alike; the bytes of what is really cut differ a little")
    _, rows = candidates(ask, solver)
    return _report(ask, solver, rows, notes)


def check(job: Job, ask: Ask) -> Calibration:
    """Opens the model and reads the texts. Raises GgufToolError for all that can be refused before anything is written."""
    if not job.evaluation:
        raise GgufToolError("fit chooses by what files cost on a text: --eval FILE")
    if not ask.targets:
        raise GgufToolError("there is no type to choose from; name one, or leave the choice to fit")
    check_names(job)
    if ask.ctx < 2:
        raise GgufToolError(f"{ask.ctx_option} {ask.ctx}: a context has at least 2 tokens")
    if ask.budget > (have := physical_memory()):
        raise GgufToolError(
            f"a budget of {gib(ask.budget)} cannot be measured here, this machine has {gib(have)}; give at most that"
        )
    for target in ask.targets:
        encoding.parse_target(target)
    check_refit(job, ask.recipe, ask.refit)
    check_methods(job, [ask.recipe.method], ask.refit)
    known = opened(job, [])
    plan = check_recipe(blank(known), replace(ask.recipe, target=ask.targets[0]))
    check_refits(job, known, [plan], ask.refit)
    return known


def _uncalibrated(job: Job, work: Workspace, ask: Ask, known: Calibration) -> Prepared:
    """The model, its base GGUF and stats of nothing. Refused is what no file of this model can hold."""
    stats = blank(known)
    _check_least(ask, stats)
    if not isinstance(known, GgufCalibration):
        return Prepared(known.checkpoint, base_gguf(job, work, known.checkpoint), stats, ())
    work.state["base.gguf"] = known.model.fingerprint
    return Prepared(known.model, job.model, stats, ())


def _check_least(ask: Ask, stats: CalibrationStats) -> None:
    """Raises GgufToolError where what is not pruned alone is more than the budget: before anything is converted."""
    experts = {spec.name for spec in stats.model.tensors if (name := parse(spec.name)) and name.role != "router"}
    sizes = {}
    for target in ask.targets:
        mix = encoding.MixFacts.of_model(stats.model, has_imatrix=True)
        specs = encoding.assign(stats.model.tensors, target, mix)
        sizes[target] = sum(spec.padded_bytes * (1 - MOST if spec.name in experts else 1) for spec in specs)
    least = min(sizes, key=lambda target: sizes[target])
    if sizes[least] > ask.budget:
        raise GgufToolError(
            f"a budget of {gib(ask.budget)} is too small: with {MOST:.0%} of the experts gone the weights alone are "
            f"{gib(int(sizes[least]), up=True)} as {least}"
        )


def _smallest(solver: Solver, ask: Ask) -> Memory:
    """What the smallest file takes. Raises GgufToolError where that is more than the budget."""
    tried = [solver.smallest(target) for target in ask.targets]
    least = min(tried, key=lambda choice: choice.outline.file_bytes)
    too_small = f"a budget of {gib(ask.budget)} is too small: the smallest file, {least.label}, takes "
    size = least.outline.file_bytes
    if size >= ask.budget:
        raise GgufToolError(
            f"{too_small}{gib(size, up=True)} alone. What helps: a --quant with fewer bits, {ask.budget_option} with more "
            "than that"
        )
    memory = solver.tried(least).memory
    assert memory is not None
    if memory.peak <= solver.limit(least.target):
        return memory
    needs = memory.peak + JITTER
    # A remedy is named where it may be enough: without any context, or with half the bits.
    remedies = [f"a shorter {ask.ctx_option}"] if needs - memory.kv - memory.compute <= ask.budget else []
    remedies += ["a --quant with fewer bits"] if needs - size // 2 <= ask.budget else []
    remedies += [f"{ask.budget_option} {gib(needs, up=True).replace(' ', '')} or more"]
    raise GgufToolError(
        f"{too_small}{gib(needs, up=True)} with a context of {ask.ctx} tokens: {memory}, and {gib(JITTER)} that stay free. "
        f"What helps: {', '.join(remedies)}"
    )


def _solver(job: Job, work: Workspace, source: Prepared, ask: Ask, beside: int) -> Solver:
    return Solver(job, work, source, ask.budget, ask.ctx, ask.recipe, ask.refit, beside)


def _known_stats(none: Prepared, out: Path) -> Prepared:
    """With the stats that an earlier run left in the folder, where they are of this model."""
    try:
        stats = CalibrationStats.load(out / "stats.safetensors")
    except GgufToolError:
        return none
    return replace(none, stats=stats) if stats.model.fingerprint == none.stats.model.fingerprint else none


def _context_notes(file: GgufFile, ctx: int) -> list[str]:
    known = file.arch_integer("context_length", 0)
    if not 0 < known < ctx:
        return []
    return [
        f"the model was trained on contexts of {known} tokens, and {ctx} are counted; fewer leave room for the file"
    ]


Rows = dict[tuple[str, bool], Weighed]


def candidates(ask: Ask, solver: Solver) -> tuple[list[Choice], Rows]:
    """For each target the file worth measuring, and a row for everything that was looked at, by (target, pruned).

    Of the unpruned files that fit, the largest come first; then the pruned ones, the least pruned first.
    """
    rows: Rows = {}
    whole, cut = [], []
    for target in ask.targets:
        choice = solver.unpruned(target)
        if solver.fits(choice):
            whole.append(choice)
            rows[target, False] = _row(choice)
            continue
        rows[target, False] = replace(_row(choice), status=TOO_LARGE, why=_excess(choice, solver))
        if (narrowed := solver.pruned(target)) is not None:
            cut.append(narrowed)
            rows[target, True] = _row(narrowed)
        else:
            least = solver.smallest(target)
            rows[target, True] = replace(_row(least), status=TOO_LARGE, why="even the smallest")
    whole.sort(key=lambda choice: -choice.outline.file_bytes)
    for choice in [] if ask.every else whole[UNPRUNED:]:
        why = f"unpruned {whole[0].target} fits, and has more bits"
        rows[choice.target, False] = replace(_row(choice), status=LEFT_OUT, why=why)
    kept = whole if ask.every else whole[:UNPRUNED]
    return [*kept, *sorted(cut, key=lambda choice: choice.ratio)], rows


def _row(choice: Choice) -> Weighed:
    peak = choice.memory.peak if choice.memory else None
    return Weighed(choice.label, choice.target, choice.ratio, choice.outline.file_bytes, peak)


def _excess(choice: Choice, solver: Solver) -> str:
    taken = choice.memory.peak if choice.memory else choice.outline.file_bytes + solver.beside
    return f"{gib(max(1, taken - solver.limit(choice.target)), up=True)} too much"


def weigh(ask: Ask, choices: Sequence[Choice], bench: Bench) -> Rows:
    """Measures the choices: the unpruned ones with the two least pruned ones, then one at a time until damage grows."""
    whole = [choice for choice in choices if choice.plan is None]
    cut = [choice for choice in choices if choice.plan is not None]
    rows: Rows = {}
    first = len(cut) if ask.every else 2
    batch, rest = [*whole, *cut[:first]], cut[first:]
    while batch:
        rows |= {_key(choice): row for choice, row in zip(batch, bench.measure(batch), strict=True)}
        bench.forget(_best([choice for choice in choices if _key(choice) in rows], rows))
        walked = [rows[_key(choice)] for choice in cut if _key(choice) in rows]
        if rest and is_past(walked):
            best = min(walked, key=mean_kl)
            why = f"{walked[-1].label} is worse than {best.label}: more pruning no longer pays for more bits"
            rows |= {_key(choice): replace(_row(choice), status=LEFT_OUT, why=why) for choice in rest}
            rest = []
        batch, rest = rest[:1], rest[1:]
    return rows


def _key(choice: Choice) -> tuple[str, bool]:
    return choice.target, choice.plan is not None


def _best(choices: Sequence[Choice], rows: Rows) -> Choice:
    return min(choices, key=lambda choice: mean_kl(rows[_key(choice)]))


def _settle(
    ask: Ask, solver: Solver, bench: Bench, choices: list[Choice], rows: Rows, say: Say
) -> tuple[Choice, Memory]:
    """The best candidate whose own file stays below the budget; one that does not is made smaller and measured again."""
    for _ in range(TRIES):
        measured = [choice for choice in choices if rows[_key(choice)].status == MEASURED]
        if not measured:
            break
        chosen = _best(measured, rows)
        memory = bench.took(chosen, ask.ctx)
        key, row = _key(chosen), rows[_key(chosen)]
        if memory.peak <= ask.budget:
            rows[key] = replace(row, status=CHOSEN)
            return chosen, memory
        over = memory.peak - ask.budget
        say(f"{chosen.label} took {over:,} bytes more than the budget; making it smaller")
        rows[key] = replace(row, status=TOO_LARGE, why=f"its own file took {over:,} bytes too many")
        solver.tightened[chosen.target] = solver.tightened.get(chosen.target, 0) + over
        if (smaller := solver.pruned(chosen.target)) is not None:
            choices[:] = [
                smaller,
                *(choice for choice in choices if _key(choice) != _key(smaller)),
            ]
            rows[_key(smaller)] = bench.measure([smaller])[0]
    raise GgufToolError(f"no file was found that stays below {gib(ask.budget)}; give a little more")


def _report(
    ask: Ask, solver: Solver, rows: Rows, notes: Sequence[str], protocol: str = "", memory: Memory | None = None
) -> FitReport:  # fmt: skip
    source = solver.source
    first = {CHOSEN: 0, MEASURED: 1, FITS: 2, LEFT_OUT: 3, TOO_LARGE: 4}
    ordered = sorted(
        rows.values(),
        key=lambda row: (
            first[row.status],
            row.kl or 0.0,
            row.ratio > 0,
            -row.predicted,
        ),
    )
    return FitReport(
        source.stats.model.name, source.base.stat().st_size, ask.budget, ask.ctx, ordered, memory, None, verdict(ordered),
        protocol, tuple(notes),
    )  # fmt: skip
