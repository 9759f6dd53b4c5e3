"""demo: the built-in model, ten methods, one table. What a newcomer runs first and what the README shows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from . import builtin
from .errors import GgufToolError
from .extras import ALL, Extras, add_extras
from .gguf_file import Progress, replacing
from .journal import Journal
from .pipeline import Built, build, judge, quantize_base
from .prepare import Job, prepare
from .recipe import Recipe
from .report import Report
from .report_facts import calibrated_facts, expert_facts, model_facts
from .runtime import Runtime
from .trial import Tried
from .workspace import Say, Workspace

RATIOS = (0.25, 0.4, 0.5)
METHODS = ("frequency", "man", "msan", "reap", "gated-sum", "dern", "tenp", "global", "random")
PRUNE_THEN_QUANTIZE = ("Q8_0", "Q4_K_M")
QUANTIZE_ONLY = ("Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K")


# The one that the report goes into: its experts, its routing, its speed.
SHOWN = ("auto", 0.4, "Q4_K_M")
MODEL = "Builtin-7M"


def unpack(out: Path) -> list[Path]:
    """Writes the built-in model and its texts into the folder `out` and returns what was written, the model first.

    Raises GgufToolError where a text of that name is there already and is another.
    """
    written = [builtin.unpack(out / MODEL)]
    for source in builtin.texts().values():
        text, path = source.read_bytes(), out / source.name
        if path.exists() and path.read_bytes() != text:
            raise GgufToolError(f"{path} exists and is not the built-in text; choose another folder or move it")
        with replacing(path) as partial:
            partial.write_bytes(text)
        written.append(path)
    return written


def run(
    out: Path, runtime: Runtime, llama: ModuleType, eval_windows: int, progress: Progress, say: Say,
    extras: Extras = ALL,
) -> Report:  # fmt: skip
    """Calibrates on code, judges on code and on prose, and puts quantization alone beside it."""
    with Journal(out, "Builtin 7M", say) as journal:
        _run(out, runtime, llama, eval_windows, progress, say, extras, journal)
        return journal.finish()


def _run(
    out: Path, runtime: Runtime, llama: ModuleType, eval_windows: int, progress: Progress, say: Say, extras: Extras,
    journal: Journal,
) -> None:  # fmt: skip
    texts = builtin.texts()
    job = Job(
        model=builtin.unpack(out / MODEL),
        calibration=[texts["calib_code"]],
        evaluation=[texts["eval_code"], texts["eval_prose"]],
        runtime=runtime,
        llama=llama,
        progress=progress,
        eval_windows=eval_windows,
        pre_tokenizer="qwen2",
    )
    work = Workspace(out, say, watch=journal.hearing(job.watch))
    journal.begin()
    source = prepare(job, work, [Recipe(method, ratio) for method in (*METHODS, "auto") for ratio in RATIOS])
    journal.learn(model=model_facts(source.stats), calibrated=calibrated_facts(source.stats))
    built: list[Built] = []
    for ratio in RATIOS:
        built += [build(job, work, source, Recipe(method, ratio)) for method in METHODS]
        built.append(build(job, work, source, Recipe("global", ratio), refit="plain"))
        built.append(build(job, work, source, Recipe("auto", ratio)))
    built += [
        build(job, work, source, Recipe("auto", ratio, target=target))
        for target in PRUNE_THEN_QUANTIZE
        for ratio in (0.25, 0.4)
    ]
    built += [quantize_base(job, work, source, target) for target in QUANTIZE_ONLY]
    notes = [
        "calibrated on code: eval_code is text of the calibration domain, eval_prose is not",
        "whole-expert methods round the ratio to whole experts of each layer",
        "unpruned rows are what you would pick instead: compare at equal size",
    ]
    recipes = [(item, item.plan.recipe) for item in built if item.plan is not None]
    shown = next(item for item, recipe in recipes if (recipe.method, recipe.ratio, recipe.target) == SHOWN)
    rival = next(item for item in built if item.label == f"unpruned {SHOWN[2]}")
    assert shown.plan is not None
    journal.learn(experts={**expert_facts(source.stats, shown.plan), "label": shown.label})
    journal.stage("perplexity and KL divergence")
    journal.measured(judge(job, source.base, built, source.stats.model.name, notes))
    tried = [Tried(item.label, item.path, item.plan) for item in (shown, rival)]
    add_extras(journal, job, source, tried, extras, {})
