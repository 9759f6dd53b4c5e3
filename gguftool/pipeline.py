"""checkpoint -> base GGUF -> stats -> plan -> pruned GGUF -> quantized GGUF -> report, resumable; `runs` puts it in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import encoding, refitting
from .calibration import Calibration
from .chat import template_of_gguf
from .checkpoint import Checkpoint
from .corpus import read_scored
from .coverage import coverage
from .crosscheck import crosscheck
from .dern import dern
from .errors import GgufToolError
from .evaluate import Comparison, compare_many
from .extras import Extras, add_extras
from .gguf_file import check_space
from .gguf_model import GgufModel, is_gguf
from .gguf_refit import NO_SEQUENTIAL
from .journal import Journal
from .memory import parse_dtype
from .overrides import Overrides
from .plan import PrunePlan
from .planner import DEFAULT_ALIGN, fingerprint, make_plan
from .prediction import noise
from .prepare import Job, Prepared, check_names, opened, prepare, rehearse
from .quantize import QuantizeTool, quantize
from .recipe import Recipe
from .refit import NO_ROUTES, can_refit
from .report import Report, Row
from .report_facts import calibrated_facts, expert_facts, model_facts
from .runtime_base import BACKENDS
from .runtime_base import built as built_runtime
from .sources import as_source
from .trial import Tried
from .verification import Expected, Verified, check_sound, failures, hashes
from .workspace import Say, Workspace
from .writer import prune

# Windows of each calibration text, and of a text on every other backend, that a finished model is checked on: enough to see
# a broken file or a wrong kernel, a small part of what calibration took.
CHECKED_WINDOWS = 4
# Characters that a token of a text spells at most, taken over some thousand of them: how far an endless dataset is read.
SPELLED = 64


@dataclass(frozen=True)
class Built:
    """One pruned (and perhaps quantized) model; `notes` are those of its new weights."""

    label: str
    plan: PrunePlan | None
    encoding: str
    path: Path
    notes: tuple[str, ...] = ()


def build(job: Job, work: Workspace, source: Prepared, recipe: Recipe, *, refit: str = "") -> Built:
    """Plans, perhaps refits (or recombines, for dern), prunes and (with a target) quantizes one recipe.

    Files are named by the ecosystem's convention, <model>-<METHOD><percent>-<encoding>.gguf.

    Args:
        refit: "plain", "sequential", or "" for what the method has and the plan and the model allow.
    """
    check_refit(job, recipe, refit)
    stats, base, target = source.stats, source.base, recipe.target
    plan = make_plan(stats, recipe)
    refit, notes = refitting.kind_of(source.model, plan, refit)
    fits = bool(refit) and can_refit(source.model, plan)
    percent = round(100 * recipe.ratio)
    stem = f"{stats.model.name}-{recipe.method.upper().replace(',', '_')}{percent}"
    if plan.recipe.align != DEFAULT_ALIGN:
        stem += f"-align{plan.recipe.align}"
    label = f"{recipe.method} {percent} %"
    inputs = {"stats": fingerprint(stats), "recipe": asdict(plan.recipe), "base": work.state.get("base.gguf")}
    work.step(f"{stem}{f'-{target}' if target else ''}.plan.json", inputs, plan.save)
    kept: dict[str, Any] = {"kept": plan.kept_hash, "stats": inputs["stats"], "base": inputs["base"], "refit": refit}
    weights = None
    if fits:
        name = f"{stem}.refit{'-sequential' if refit == 'sequential' else ''}.safetensors"
        path = work.step(name, kept, lambda path: _refit(job, work, source, plan, refit, path))
        weights = work.read(path, Overrides.load)
        sequential = refit == "sequential"
        stem, label = f"{stem}{'RS' if sequential else 'R'}", f"{label} + {'sequential ' if sequential else ''}refit"
    elif recipe.method == "dern" and plan.drops_experts:
        assert isinstance(source.model, Checkpoint)
        checkpoint = source.model
        path = work.step(
            f"{stem}.dern.safetensors",
            kept,
            lambda path: dern(checkpoint, plan, path, device=job.device, progress=job.progress),
        )
        weights = work.read(path, Overrides.load)
    if refit and not fits:
        nothing = "nothing was refitted: whole experts went, and the weights of the others add up to 1 as before"
        notes = (nothing,) if plan.kept_share < 1 else ()
    elif weights is not None:
        notes += weights.origin.notes
    # A checkpoint of several types (gpt-oss) is called by the commonest; that name is the quantized file's then.
    mixed = target == source.encoding and not source.has_encoding(target)
    pruned = work.step(
        f"{stem}-{source.encoding}{'-mixed' if mixed else ''}.gguf",
        kept,
        lambda path: _prune(job, base, plan, weights, path),
    )
    if target is None or source.has_encoding(target):
        return Built(f"{label} {target}" if target else label, plan, source.encoding, pruned, notes)
    final = work.step(
        f"{stem}-{target}.gguf",
        kept | {"target": target, "runtime": job.runtime.path.name},
        lambda path: _quantize(job, source, pruned, target, path),
    )
    return Built(f"{label} {target}", plan, target, final, (*notes, *source.again(target)))


def check_refit(job: Job, recipe: Recipe, refit: str) -> None:
    """Raises GgufToolError for a refit that the model or the recipe does not take, as far as that is known without a plan.

    `refitting.kind_of` decides it for a plan; what --cut-router does to the router only the plan made from stats says.
    """
    if refit == "sequential" and is_gguf(job.model):
        raise GgufToolError(f"{NO_SEQUENTIAL}; refit it plainly")
    if refit == "sequential" and recipe.cut_router:
        raise GgufToolError(f"with --cut-router {NO_ROUTES}; refit it plainly")
    if refit and recipe.method == "dern":
        raise GgufToolError("dern makes new weights of its own, and a model takes one set of them; leave the refit out")


def _refit(job: Job, work: Workspace, source: Prepared, plan: PrunePlan, how: str, path: Path) -> None:
    scratch = work.folder / "refit.work"
    checked: refitting.Refit
    if isinstance(source.model, GgufModel):
        checked = refitting.of_gguf(source.model, plan, source.domains, llama=job.llama, limit=job.limit)
    else:
        checked = refitting.of_checkpoint(
            source.model, plan, source.domains, kind=how, device=job.device, dtype=parse_dtype(job.dtype), limit=job.limit
        )  # fmt: skip
    checked.run(scratch, path, job.progress)


def quantize_base(job: Job, work: Workspace, source: Prepared, target: str) -> Built:
    """The unpruned model at `target`: what a user would pick instead."""
    base, stats = source.base, source.stats
    path = work.step(
        f"{stats.model.name}-{target}.gguf",
        {
            "base": work.state.get("base.gguf"),
            "stats": fingerprint(stats),
            "target": target,
            "runtime": job.runtime.path.name,
        },
        lambda path: _quantize(job, source, base, target, path),
    )
    return Built(f"unpruned {target}", None, target, path, source.again(target))


def _prune(job: Job, base: Path, plan: PrunePlan, weights: Overrides | None, out: Path) -> None:
    prune(base, plan, out, ggml=job.runtime.ggml, overrides=weights, progress=job.progress)
    check_sound(out)


def _quantize(job: Job, source: Prepared, pruned: Path, target: str, out: Path) -> None:
    tools = QuantizeTool(job.runtime.tool("llama-quantize"), progress=job.progress)
    again = bool(source.quantized_types)
    quantize(pruned, target, out, imatrix=source.stats, tools=tools, allow_requantize=again)
    check_sound(out)


def judge(job: Job, base: Path, built: Sequence[Built], model: str, notes: Sequence[str] = ()) -> Report:
    """Perplexity and KL divergence of every model against the base, on every evaluation text."""
    found: dict[str, list[Comparison]] = {}
    for path in job.evaluation:
        text, special = read_scored(path, lambda: template_of_gguf(base))
        job.progress(0, 1, f"evaluating {len(built)} models on {path.name}")
        found[path.stem] = _compared(job, base, built, text, special, job.eval_windows)
        measured = [(item.label, one.as_dict()) for item, one in zip(built, found[path.stem], strict=True)]
        job.watch("measured", {"text": path.stem, "models": measured})
    first = {name: results[0].as_dict() for name, results in found.items()}
    rows = [
        Row(
            label=item.label,
            method=item.plan.recipe.method if item.plan else "none",
            ratio=1 - item.plan.kept_share if item.plan else 0.0,
            encoding=item.encoding,
            bytes=item.path.stat().st_size,
            texts={name: results[index].as_dict() for name, results in found.items()},
            path=str(item.path),
        )
        for index, item in enumerate(built)
    ]
    windows = ", ".join(f"{name}: {v['windows']} windows" for name, v in first.items())
    protocol = (
        f"llama-perplexity's protocol: windows of {job.n_ctx} tokens, second half scored ({windows}); KL divergence to "
        f"the original in nats; ± is one standard error; backend {next(iter(first.values()))['backend']}"
    )
    base_values = {name: {**v["base"], "tokens": v["tokens"], "n_ctx": v["n_ctx"]} for name, v in first.items()}
    return Report(model, base.stat().st_size, base_values, rows, protocol, tuple(notes))


def _compared(
    job: Job, base: Path, built: Sequence[Built], text: str, special: bool, windows: int | None
) -> list[Comparison]:
    return compare_many(
        base, [item.path for item in built], text, llama=job.llama, n_ctx=job.n_ctx, max_windows=windows,
        backend=job.runtime.backend, progress=job.progress, parse_special=special,
        n_gpu_layers=job.runtime.n_gpu_layers,
    )  # fmt: skip


@dataclass(frozen=True)
class Produced:
    """What a recipe led to, before it is measured: `built`, which is unpruned or the original itself where that was the best
    for a budget, and the unpruned `rivals` that it is compared with; `files` are the names of all that was made, `notes` what a
    reader of the report must know."""

    work: Workspace
    source: Prepared
    built: Built
    rivals: Sequence[Built]
    notes: Sequence[str]

    @property
    def files(self) -> list[str]:
        """Names of all files of this run, the dear ones first."""
        return list(dict.fromkeys(self.work.used))


def produce(
    job: Job, out: Path, recipe: Recipe, say: Say, *, refit: str = "", dry: bool = False, journal: Journal | None = None
) -> Produced:  # fmt: skip
    """Every file of one recipe, in `out`; what is there already stays. A `dry` run only finds what that is.

    Raises GgufToolError before the first dear step for all that can be known by then, the room on the disk among it.
    """
    check_names(job)
    watch = job.watch if journal is None else journal.hearing(job.watch)
    work = Workspace(out, say, watch=watch, dry=dry)
    if journal is not None:
        journal.begin()  # the folder is this run's now
    check_refit(job, recipe, refit)
    known = opened(job, [recipe], refit)
    if dry:
        found = _produced(job, work, recipe, refit, known, None)
        rehearse(job, work, known)
        return found
    ahead = Workspace(out, lambda _text: None, dry=True)
    check_space(out, room(_produced(job, ahead, recipe, refit, known, None)))
    return _produced(job, work, recipe, refit, known, journal)


def _produced(
    job: Job, work: Workspace, recipe: Recipe, refit: str, known: Calibration, journal: Journal | None
) -> Produced:  # fmt: skip
    source, target = prepare(job, work, [recipe], known), recipe.target
    if journal is not None:
        journal.learn(model=model_facts(source.stats), calibrated=calibrated_facts(source.stats))
    built = build(job, work, source, recipe, refit=refit)
    rivals = [quantize_base(job, work, source, target)] if target and is_quantized(source, target) else []
    assert built.plan is not None
    notes = [*what_to_know(source, built), *([] if work.dry else coverage(source.stats).notes())]
    if journal is not None:
        journal.learn(experts=expert_facts(source.stats, built.plan))
    return Produced(work, source, built, rivals, notes)


def sizes(made: Produced) -> dict[str, int]:
    """Bytes by name of the large files that a run makes, without their headers."""
    facts, plan, target = made.source.stats.model, made.built.plan, made.built.encoding
    assert plan is not None
    found = {"base.gguf": sum(spec.padded_bytes for spec in facts.tensors)}
    whole = make_plan(made.source.stats, Recipe("global", 0.0, target=plan.recipe.target))
    for name in made.files:
        if name.startswith("stats"):
            found[name] = made.source.stats.array_bytes
        elif name.endswith(".safetensors"):
            found[name] = sum(4 * facts.n_embd * sum(layer.widths) for layer in plan.layers)
        elif name in {rival.path.name for rival in made.rivals}:
            found[name] = whole.encoded_bytes or 0
        elif name.endswith(".gguf") and name != "base.gguf":
            final = name == made.built.path.name and plan.encoded and target == plan.recipe.target
            found[name] = (plan.encoded_bytes or 0) if final else plan.tensor_bytes
    return found


def room(made: Produced) -> int:
    """Bytes of disk that the missing files of a dry run take at most, on the way too; those that they replace go first."""
    known, taken, most = sizes(made), 0, 0
    for name in (name for name in made.files if name in made.work.missing):
        path, size = made.work.folder / name, known.get(name, 0)
        taken += size - (path.stat().st_size if path.is_file() else 0)
        # What is computed layer by layer is there twice until the file is saved.
        most = max(most, taken + (size if name.endswith(".safetensors") else 0))
    return most


def is_quantized(source: Prepared, target: str) -> bool:
    """Whether a file of that type is quantized, and not cut from the original as it is."""
    return target not in encoding.FLOATS and not source.has_encoding(target)


def what_to_know(source: Prepared, built: Built) -> list[str]:
    """What a reader of a report on `built` must know of it."""
    notes = [*([built.plan.formula, *built.plan.notes] if built.plan else []), *built.notes]
    if isinstance(source.model, GgufModel) and source.model.is_quantized:
        notes.append(f"the original here is {source.encoding} itself: what that had cost before is in no number")
    return notes


def assess(job: Job, made: Produced, journal: Journal, extras: Extras) -> Report:
    """Measures what was made, holds it against what can be right, and leaves the report beside the files.

    A report with failures is one of a run that is not done.
    """
    models = [made.built, *made.rivals]
    watch = journal.hearing(job.watch)
    watch("stage", {"name": "measure"})
    report = judge(job, made.source.base, models, made.source.stats.model.name, made.notes)
    expected = [Expected(model.label, None) for model in models]
    texts = {text: [row.texts[text] for row in report.rows] for text in report.base}
    faults = list(failures(texts, expected, made.source.stats.model.n_vocab))
    journal.measured(replace(report, failures=tuple(faults)))
    watch("stage", {"name": "check"})
    faults += [*far_from_plan(job, made), *backends_apart(job, made)]
    journal.measured(replace(report, failures=tuple(faults)))
    verified = Verified(hashes(made.work.folder, made.files, job.progress), faults)
    verified.save(made.work.folder)
    tried = [Tried(item.label, item.path, item.plan) for item in models if item.path != made.source.base]
    add_extras(journal, job, made.source, tried, extras, verified.files)
    return journal.finish()


def far_from_plan(job: Job, made: Produced) -> list[str]:
    """Calibration texts on which the model that was made is farther from the original than its plan explains.

    The evaluation texts may be far from calibration, of which a plan knows nothing; these are what it was made for. Without a
    plan there is nothing to explain.
    """
    plan, stats, base = made.built.plan, made.source.stats, made.source.base
    if plan is None:
        return []
    models, texts = [made.built, *made.rivals], {}
    for source, (_, windows) in zip(map(as_source, job.calibration), made.source.domains, strict=True):
        if len(windows) < 2:
            continue  # read as one text, and not document by document, a single window may come out too short
        enough = CHECKED_WINDOWS * job.n_ctx * SPELLED
        text, special = read_scored(source, lambda: template_of_gguf(base), enough)
        texts[f"{source.name} (calibration)"] = [
            one.as_dict() for one in _compared(job, base, models, text, special, CHECKED_WINDOWS)
        ]
    alike = [index for index, item in enumerate(models) if index and item.encoding == made.built.encoding]
    quantized = {name: float(rows[index]["kld"]["mean"]) for name, rows in texts.items() for index in alike}
    expected = [Expected(made.built.label, noise(stats, plan), quantized)]
    expected += [Expected(item.label, None) for item in made.rivals]
    return list(failures(texts, expected, stats.model.n_vocab))


def backends_apart(job: Job, made: Produced) -> list[str]:
    """Where more than one backend has been built: whether they compute the same of the pruned file."""
    backends = [name for name in BACKENDS if built_runtime(name)]
    if len(backends) < 2:
        return []
    found = crosscheck(
        backends, made.source.base, made.built.path, job.evaluation[0], n_ctx=job.n_ctx, max_windows=CHECKED_WINDOWS,
        progress=job.progress,
    )  # fmt: skip
    if found.ok:
        return []
    return [
        f"{made.built.label}: {' and '.join(backends)} differ by {found.difference:.5f} in ln(perplexity), more than "
        f"{found.tolerance:.5f}; `gguftool runtime selftest` looks for the reason"
    ]
