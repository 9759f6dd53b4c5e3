"""A run of `compress` that was given a budget: what `fit` chooses is made, and made again, as any other recipe's files are.

The run keeps what was found (`recipe_file.Found`), so that the same files can be made again without weighing anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .fit import Ask, check, decide, start
from .fit_choose import mean_kl
from .fit_measure import Bench
from .fit_report import MEASURED, Weighed
from .fit_solve import Choice, Solver
from .journal import Journal
from .pipeline import Built, Produced, is_quantized, quantize_base, what_to_know
from .prepare import Job, Prepared, opened, prepare
from .recipe_file import Found
from .report_facts import calibrated_facts, expert_facts, model_facts
from .workspace import Say, Workspace


def produce_fitting(job: Job, out: Path, ask: Ask, say: Say, journal: Journal) -> tuple[Produced, Found]:
    """Finds the best file for a budget and makes everything that its report needs, in `out`; fit.json has the search.

    Raises GgufToolError as `fit.run` does.
    """
    known = check(job, ask)
    work = Workspace(out, say, watch=journal.hearing(job.watch))
    journal.begin()  # the folder is this run's now
    search = start(job, work, ask, known)
    source = search.solver.source
    journal.learn(model=model_facts(source.stats), calibrated=calibrated_facts(source.stats))
    decided = decide(search, say)
    built = decided.bench.keep(decided.choice)
    report = replace(decided.report, path=built.path)
    journal.weighed(report.candidates(), report.goal())
    if built.plan is not None:
        journal.learn(experts=expert_facts(source.stats, built.plan))
    journal.stage("fit.json")
    report.save(out)
    choice = decided.choice
    ratio = None if choice.recipe is None else choice.recipe.ratio
    found = Found(choice.target, ratio, _beside(source, choice, report.rows))
    made = Produced(work, source, built, _rivals(job, work, source, found), _notes(source, built, report.notes))
    return made, found


def produce_found(job: Job, out: Path, ask: Ask, found: Found, say: Say) -> Produced:
    """The files that `produce_fitting` made, from what it found, in `out`; nothing is weighed."""
    work = Workspace(out, say)
    pruned = [] if found.ratio is None else [replace(ask.recipe, ratio=found.ratio, target=found.quant)]
    source = prepare(job, work, pruned, opened(job, pruned, ask.refit))
    solver = Solver(job, work, source, ask.budget, ask.ctx, ask.recipe, ask.refit)
    choice = solver.whole(found.quant) if found.ratio is None else solver.cut(found.quant, found.ratio)
    built = Bench(job, work, source, ask.refit).keep(choice)
    return Produced(work, source, built, _rivals(job, work, source, found), _notes(source, built, ()))


def _beside(source: Prepared, choice: Choice, rows: Sequence[Weighed]) -> tuple[str, ...]:
    """Types of the unpruned files that a pruned one is compared with: its own, and that of the best one that fits too.

    The first says what pruning cost beside quantizing, the second is what a user would take instead. An unpruned choice is
    that itself.
    """
    if choice.plan is None:
        return ()
    whole = [row for row in rows if row.status == MEASURED and row.ratio == 0]
    best = [min(whole, key=mean_kl).target] if whole else []
    return tuple(dict.fromkeys(target for target in (choice.target, *best) if is_quantized(source, target)))


def _rivals(job: Job, work: Workspace, source: Prepared, found: Found) -> list[Built]:
    return [quantize_base(job, work, source, target) for target in found.beside]


def _notes(source: Prepared, built: Built, further: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*what_to_know(source, built), *further]))
