"""A recipe carried out, with a ratio or for a budget, and carried out again to see whether the same comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import __version__, runtime
from .checkpoint import open_checkpoint
from .errors import GgufToolError
from .extras import ALL, Extras
from .fit import TARGETS, Ask
from .fit_run import produce_fitting, produce_found
from .gguf_file import Progress
from .gguf_model import is_gguf, open_gguf
from .journal import Journal
from .memory import parse_bytes
from .pipeline import Produced, assess, produce, sizes
from .prepare import Job
from .recipe_file import FIT_CTX, NAME, Found, Made, RunRecipe, WrongValue, load, save
from .report import Report
from .report_files import JSON
from .sources import files
from .verification import RECORDS, Verified, differences, hashes, sha256
from .workspace import Say, Watch

HEAD = """What this folder was made by. `gguftool verify FOLDER` makes it again and compares; `gguftool compress --recipe` takes
this file for another run, and options on the command line override it."""


@dataclass(frozen=True)
class Ears:
    """Who hears how a run goes: of progress, of what the user should know, and of every step and measurement."""

    progress: Progress = lambda *_: None
    say: Say = lambda _text: None
    watch: Watch = lambda _what, _facts: None


def carry_out(recipe: RunRecipe, out: Path, ears: Ears = Ears(), extras: Extras = ALL) -> Report:
    """The whole run, in the folder `out`: files, recipe.toml, verified.json, report. Goes on where it was stopped.

    The report has `failures` where something came of it that cannot be right.

    Raises GgufToolError for a recipe that lacks what a run needs, and for all that a step of it refuses or that cannot be
    written.
    """
    if not recipe.eval:
        raise GgufToolError("compress needs a text to judge the result by: --eval FILE")
    ask, job, pruning = ask_of(recipe), job_of(recipe, ears), recipe.pruning
    for line in changed_inputs(recipe):
        ears.say(f"note: {line}")
    with Journal(out, job.model.name, ears.say) as journal:
        found = None
        if ask is None:
            made = produce(job, out, pruning, ears.say, refit=recipe.refit or "", journal=journal)
        else:
            made, found = produce_fitting(job, out, ask, ears.say, journal)
            recipe = replace(recipe, fit_ctx=ask.ctx)
        # Before verified.json, without which `verify` trusts no recipe: what it finds beside that file is this run's.
        save(replace(recipe, made=what_it_met(recipe, job, made, found)), out / NAME, HEAD)
        return assess(job, made, journal, extras)


@dataclass(frozen=True)
class Step:
    """A file of a run: whether it is there already, made from the same; its bytes, about where it is not, None unknown."""

    name: str
    there: bool
    bytes: int | None


def outlook(recipe: RunRecipe, out: Path, ears: Ears = Ears()) -> list[Step]:
    """What `carry_out` would write, in order. Reads the model's headers and tokenises the texts; writes nothing.

    Raises GgufToolError for all that would be refused before the first dear step.
    """
    job = job_of(recipe, ears)
    made = produce(job, out, recipe.pruning, lambda _text: None, refit=recipe.refit or "", dry=True)
    known = sizes(made)
    steps = []
    for name in made.files:
        there = name not in made.work.missing
        steps.append(Step(name, there, (out / name).stat().st_size if there else known.get(name)))
    return steps


def job_of(recipe: RunRecipe, ears: Ears) -> Job:
    """The job that the recipe states, with the runtime loaded. Raises GgufToolError for what it lacks."""
    if recipe.model is None:
        raise GgufToolError("the recipe names no model; give MODEL")
    if not recipe.data:
        raise GgufToolError("the recipe names no calibration texts; give --data")
    if recipe.memory is not None:
        try:
            parse_bytes(recipe.memory)
        except GgufToolError as error:
            raise WrongValue("memory", f": {error}") from error
    found = runtime.require(recipe.backend)
    return Job(
        model=recipe.model, calibration=recipe.data, evaluation=recipe.eval, runtime=found, llama=runtime.load(found),
        progress=ears.progress, n_ctx=recipe.ctx, windows=recipe.windows, eval_windows=recipe.eval_windows,
        pre_tokenizer=recipe.pre_tokenizer, device=recipe.device, dtype=recipe.dtype, memory=recipe.memory,
        watch=ears.watch,
    )  # fmt: skip


def ask_of(recipe: RunRecipe) -> Ask | None:
    """What the recipe asks of `fit`, in the words of `compress`; None where it names a ratio.

    Raises GgufToolError for a budget that is no size.
    """
    if recipe.fit is None:
        return None
    try:
        budget = parse_bytes(recipe.fit)
    except GgufToolError as error:
        raise GgufToolError(f"the budget: {error}") from error
    targets = (recipe.quant,) if recipe.quant else TARGETS
    return Ask(
        budget, recipe.fit_ctx or FIT_CTX, recipe.pruning, targets, recipe.refit or "",
        budget_option="--fit", ctx_option="--fit-ctx", named=recipe.quant is not None,
    )  # fmt: skip


def fingerprint_of(recipe: RunRecipe) -> str:
    """The model's fingerprint, as it is now."""
    if recipe.model is None:
        raise GgufToolError("the recipe names no model; give MODEL")
    return open_gguf(recipe.model).fingerprint if is_gguf(recipe.model) else open_checkpoint(recipe.model).fingerprint


def texts_of(recipe: RunRecipe) -> list[Path]:
    """The files among the recipe's texts, absolute, each once."""
    return list(dict.fromkeys(path.absolute() for path in (*files(recipe.data), *recipe.eval)))


def what_it_met(recipe: RunRecipe, job: Job, made: Produced, found: Found | None = None) -> Made:
    """Versions and fingerprints of this run."""
    return Made(
        gguftool=__version__,
        llama_cpp=job.runtime.base.version,
        runtime=job.runtime.path.name,
        threads=torch.get_num_threads(),
        model=made.source.model.fingerprint,
        inputs={str(path): sha256(path) for path in texts_of(recipe)},
        found=found,
    )


def changed_inputs(recipe: RunRecipe) -> list[str]:
    """Texts that are no longer what they were when the recipe was left behind, a line each."""
    lines = []
    for path in texts_of(recipe):
        was = recipe.made.inputs.get(str(path)) if recipe.made else None
        if was is not None and (not path.is_file() or sha256(path) != was):
            lines.append(f"{path} is not what it was: " + ("another sha256" if path.is_file() else "it is missing"))
    return lines


def replay(folder: Path, scratch: Path, ears: Ears = Ears()) -> list[str]:
    """Carries out the recipe that lies in `folder` again, in `scratch`, without measuring; compares every file.

    Returns:
        What differs, a line each, with both hashes; an empty list where every byte is the same.

    Raises GgufToolError where the recipe or the record is missing, for a `scratch` of files that no replay made, and where the
    inputs are others: then nothing can be said.
    """
    recipe, was = load(folder / NAME), Verified.load(folder)
    _check_scratch(folder, scratch)
    if recipe.made is None:
        raise GgufToolError(f"{folder / NAME}: has no table [made], so a run did not leave it; run compress again")
    if changed := changed_inputs(recipe):
        raise GgufToolError(f"{folder}: cannot be made again: {'; '.join(changed)}")
    if (model := fingerprint_of(recipe)) != recipe.made.model:
        raise GgufToolError(f"{recipe.model} is not the model that it was: {model[:12]} for {recipe.made.model[:12]}")
    ask, choice = ask_of(recipe), recipe.made.found
    if (ask is None) != (choice is None):
        raise GgufToolError(f"{folder / NAME}: fit and the table [made.found] belong together; run compress again")
    job = job_of(recipe, ears)
    now = torch.get_num_threads()
    torch.set_num_threads(recipe.made.threads)
    try:
        if ask is None or choice is None:
            made = produce(job, scratch, recipe.pruning, ears.say, refit=recipe.refit or "")
        else:
            made = produce_found(job, scratch, ask, choice, ears.say)
    finally:
        torch.set_num_threads(now)
    found = differences(was.files, hashes(scratch, made.files, ears.progress), "made again is")
    return found + differences(
        was.files, hashes(folder, [n for n in was.files if (folder / n).is_file()], ears.progress)
    )


def _check_scratch(folder: Path, scratch: Path) -> None:
    """Raises GgufToolError where the files in `scratch` are those of a run: they would be found there, and not made again."""
    if scratch.exists() and scratch.samefile(folder):
        raise GgufToolError(
            f"{scratch} is {folder} itself, where nothing would be made again; name another with --scratch"
        )
    if found := next((name for name in (NAME, JSON, *RECORDS) if (scratch / name).exists()), None):
        raise GgufToolError(
            f"{scratch} holds a run of its own ({found}), whose files would be taken for those that are made again; name "
            "another with --scratch"
        )


def other_conditions(made: Made) -> Sequence[str]:
    """What is otherwise here than where the recipe was carried out: reasons why bytes may differ."""
    here = runtime.find()
    pairs = [("gguftool", made.gguftool, __version__)]
    pairs += [("llama.cpp's build", made.runtime, here.path.name)] if here else []
    return [f"{what} was {was}, and is {now}" for what, was, now in pairs if was != now]
