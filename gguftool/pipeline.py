"""compress: checkpoint -> base GGUF -> stats -> plan -> pruned GGUF -> quantized GGUF -> report, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import encoding
from .chat import template_of_gguf
from .checkpoint import Checkpoint
from .corpus import read_scored
from .coverage import coverage
from .dern import dern, drops_experts
from .errors import GgufToolError
from .evaluate import Comparison, compare_many
from .gguf_model import GgufModel, is_gguf
from .gguf_refit import NO_SEQUENTIAL, refit_gguf
from .memory import parse_dtype
from .methods import method
from .overrides import Overrides
from .plan import PrunePlan
from .planner import DEFAULT_ALIGN, fingerprint, make_plan
from .prepare import Job, Prepared, prepare
from .quantize import QuantizeTool, quantize
from .recipe import Recipe
from .refit import can_refit, refit_memory
from .refit import refit as refit_weights
from .report import Report, Row
from .sequential import refit_sequentially
from .workspace import Say, Workspace
from .writer import prune


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
        refit: "plain", "sequential", or "" for what the method asks for.
    """
    check_refit(job, recipe, refit)
    stats, base, target = source.stats, source.base, recipe.target
    plan = make_plan(stats, recipe)
    notes: tuple[str, ...] = ()
    if not refit and method(recipe.method).refitted == "sequential" and isinstance(source.model, GgufModel):
        refit, notes = "plain", (f"refitted plainly: {NO_SEQUENTIAL}",)
    refit = refit or method(recipe.method).refitted
    if refit == "sequential" and any(len(layer.router) < plan.n_expert for layer in plan.layers):
        refit = "plain"  # the sequential one needs the original's routes
    percent = round(100 * recipe.ratio)
    stem = f"{stats.model.name}-{recipe.method.upper().replace(',', '_')}{percent}"
    if plan.recipe.align != DEFAULT_ALIGN:
        stem += f"-align{plan.recipe.align}"
    label = f"{recipe.method} {percent} %"
    inputs = {"stats": fingerprint(stats), "recipe": asdict(plan.recipe), "base": work.state.get("base.gguf")}
    work.step(f"{stem}{f'-{target}' if target else ''}.plan.json", inputs, plan.save)
    kept: dict[str, Any] = {"kept": plan.kept_hash, "stats": inputs["stats"], "base": inputs["base"], "refit": refit}
    weights = None
    if refit and can_refit(source.model, plan):
        name = f"{stem}.refit{'-sequential' if refit == 'sequential' else ''}.safetensors"
        path = work.step(name, kept, lambda path: _refit(job, work, source, plan, refit, path))
        weights = Overrides.load(path)
        sequential = refit == "sequential"
        stem, label = f"{stem}{'RS' if sequential else 'R'}", f"{label} + {'sequential ' if sequential else ''}refit"
    elif recipe.method == "dern" and drops_experts(plan):
        assert isinstance(source.model, Checkpoint)
        checkpoint = source.model
        path = work.step(
            f"{stem}.dern.safetensors",
            kept,
            lambda path: dern(checkpoint, plan, path, device=job.device, progress=job.progress),
        )
        weights = Overrides.load(path)
    notes += weights.origin.notes if weights is not None else ()
    if refit and weights is None and plan.kept_share < 1:
        notes = (
            *notes,
            "nothing was refitted: whole experts went, and the weights of the others add up to 1 as before",
        )
    pruned = work.step(
        f"{stem}-{source.encoding}.gguf",
        kept,
        lambda path: prune(base, plan, path, ggml=job.runtime.ggml, overrides=weights, progress=job.progress),
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
    """Raises GgufToolError for a refit that the model or the method does not take."""
    if refit == "sequential" and is_gguf(job.model):
        raise GgufToolError(f"--refit sequential: {NO_SEQUENTIAL}; take --refit plain")
    if refit and recipe.method == "dern":
        raise GgufToolError(
            "--refit: dern makes new weights of its own, and a model takes one set of them; leave it out"
        )


def _refit(job: Job, work: Workspace, source: Prepared, plan: PrunePlan, how: str, path: Path) -> None:
    scratch = work.folder / "refit.work"
    if isinstance(source.model, GgufModel):
        refit_gguf(
            source.model, plan, source.domains, scratch, llama=job.llama, memory=job.limit, progress=job.progress
        ).save(path)
        return
    fit = refit_sequentially if how == "sequential" else refit_weights
    needs = refit_memory(
        source.model, plan, source.domains, parse_dtype(job.dtype), job.limit, device=job.device,
        sequential=how == "sequential",
    )  # fmt: skip
    fitted = fit(source.model, plan, source.domains, scratch, device=job.device, how=needs, progress=job.progress)
    fitted.save(path)


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
    return Built(f"unpruned {target}", None, target, path)


def _quantize(job: Job, source: Prepared, pruned: Path, target: str, out: Path) -> None:
    tools = QuantizeTool(job.runtime.tool("llama-quantize"), progress=job.progress)
    again = isinstance(source.model, GgufModel) and source.model.is_quantized
    quantize(pruned, target, out, imatrix=source.stats, tools=tools, allow_requantize=again)


def judge(job: Job, base: Path, built: Sequence[Built], model: str, notes: Sequence[str] = ()) -> Report:
    """Perplexity and KL divergence of every model against the base, on every evaluation text."""
    found: dict[str, list[Comparison]] = {}
    for path in job.evaluation:
        text, special = read_scored(path, lambda: template_of_gguf(base))
        job.progress(0, 1, f"evaluating {len(built)} models on {path.name}")
        found[path.stem] = compare_many(
            base, [item.path for item in built], text, llama=job.llama, n_ctx=job.n_ctx,
            max_windows=job.eval_windows, backend=job.runtime.backend, progress=job.progress, parse_special=special,
            n_gpu_layers=0 if job.runtime.backend == "cpu" else 999,
        )  # fmt: skip
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


def compress(job: Job, out: Path, recipe: Recipe, say: Say, *, refit: str = "") -> Report:
    """The whole line for one recipe; the report stands beside the files in `out`."""
    target = recipe.target
    if not job.evaluation:
        raise GgufToolError("compress needs a text to judge the result by: --eval FILE")
    check_refit(job, recipe, refit)
    work = Workspace(out, say)
    source = prepare(job, work, [recipe])
    built = build(job, work, source, recipe, refit=refit)
    quantized = target is not None and target not in encoding.FLOATS and not source.has_encoding(target)
    rivals = [quantize_base(job, work, source, target)] if target and quantized else []
    assert built.plan is not None
    notes = [built.plan.formula, *built.plan.notes, *built.notes, *coverage(source.stats).notes()]
    if isinstance(source.model, GgufModel) and source.model.is_quantized:
        notes.append(f"the original here is {source.encoding} itself: what that had cost before is in no number")
    report = judge(job, source.base, [built, *rivals], source.stats.model.name, notes)
    report.save(out)
    return report
