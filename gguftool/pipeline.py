"""compress: checkpoint -> base GGUF -> stats -> plan -> pruned GGUF -> quantized GGUF -> report, resumable.

Every step leaves a file and a fingerprint of what it was made from. A step whose file is there and whose fingerprint is
the same is skipped, so a run that was stopped goes on where it stopped, and a changed recipe repeats only what it must.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import encoding
from .calibrate import calibrate
from .checkpoint import Checkpoint, open_checkpoint
from .convert import convert
from .corpus import load_domain
from .down_weights import DownWeights
from .errors import GgufToolError
from .evaluate import Comparison, compare_many
from .forward import Windows
from .gguf_file import Progress
from .plan import PrunePlan
from .planner import fingerprint, make_plan
from .quantize import QuantizeTool, quantize
from .recipe import Recipe
from .refit import refit as refit_weights
from .report import Report, Row
from .runtime import Runtime
from .stats import CalibrationStats, Domain
from .writer import prune

Say = Callable[[str], None]


@dataclass
class Workspace:
    """An output folder that remembers what each of its files was made from (`state.json`)."""

    folder: Path
    say: Say
    state: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {}

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The file `name`, made by `make(path)` unless it was made from the same inputs before."""
        path = self.folder / name
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        if path.exists() and self.state.get(name) == key:
            self.say(f"{name}: already there")
            return path
        path.unlink(missing_ok=True)
        make(path)
        self.state[name] = key
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / "state.json")
        return path


@dataclass(frozen=True)
class Job:
    """What `compress` and `demo` share: a model, its texts, a place to work.

    Attributes:
        calibration, evaluation: texts; the name of an evaluation text is its file's stem.
        windows: at most so many windows of a calibration text; None takes all.
        eval_windows: the same of an evaluation text.
    """

    model: Path
    calibration: Sequence[Path]
    evaluation: Sequence[Path]
    runtime: Runtime
    llama: ModuleType
    progress: Progress
    n_ctx: int = 512
    windows: int | None = None
    eval_windows: int | None = None
    pre_tokenizer: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Prepared:
    """The dear part: the checkpoint, its GGUF, its stats, and the windows they were taken on."""

    checkpoint: Checkpoint
    base: Path
    stats: CalibrationStats
    domains: Sequence[tuple[Domain, Windows]]


def prepare(job: Job, work: Workspace) -> Prepared:
    """Checkpoint, base GGUF and stats: the dear part. All inputs are opened and checked before the first step."""
    checkpoint = open_checkpoint(job.model)
    tokenizer = checkpoint.tokenizer()
    domains = [load_domain(path, tokenizer, job.n_ctx, job.windows) for path in job.calibration]
    for path in job.evaluation:
        load_domain(path, tokenizer, job.n_ctx, 1)
    inputs: dict[str, Any] = {"model": checkpoint.fingerprint}
    base = work.step(
        "base.gguf",
        inputs | {"runtime": job.runtime.path.name, "pre": job.pre_tokenizer},
        lambda path: convert(job.model, path, job.runtime, pre_tokenizer=job.pre_tokenizer),
    )
    texts = [asdict(domain) for domain, _ in domains]

    def measure(path: Path) -> None:
        scratch = work.folder / "calibrate.partial"
        calibrate(checkpoint, domains, scratch, device=job.device, progress=job.progress).save(path)

    path = work.step("stats.safetensors", inputs | {"texts": texts, "n_ctx": job.n_ctx}, measure)
    return Prepared(checkpoint, base, CalibrationStats.load(path), domains)


@dataclass(frozen=True)
class Built:
    """One pruned (and perhaps quantized) model."""

    label: str
    plan: PrunePlan | None
    encoding: str
    path: Path


def build(job: Job, work: Workspace, source: Prepared, recipe: Recipe, *, refit: bool = False) -> Built:
    """Plans, perhaps refits, prunes and (with a target) quantizes one recipe.

    Files are named by the ecosystem's convention, <model>-<METHOD><percent>-<encoding>.gguf.
    """
    stats, base, target = source.stats, source.base, recipe.target
    plan = make_plan(stats, recipe)
    percent = round(100 * recipe.ratio)
    stem = f"{stats.model.name}-{recipe.method.upper().replace(',', '_')}{percent}"
    label = f"{recipe.method} {percent} %"
    inputs = {"stats": fingerprint(stats), "recipe": asdict(plan.recipe), "base": work.state.get("base.gguf")}
    work.step(f"{stem}{f'-{target}' if target else ''}.plan.json", inputs, plan.save)
    kept: dict[str, Any] = {"kept": plan.kept_hash, "stats": inputs["stats"], "base": inputs["base"], "refit": refit}
    weights = None
    if refit and any(0 < width < plan.n_ff_exp for layer in plan.layers for width in layer.widths):
        path = work.step(f"{stem}.refit.safetensors", kept, lambda path: _refit(job, work, source, plan).save(path))
        weights = DownWeights.load(path)
        stem, label = f"{stem}R", f"{label} + refit"
    pruned = work.step(
        f"{stem}-{_base_encoding(stats)}.gguf",
        kept,
        lambda path: prune(base, plan, path, ggml=job.runtime.ggml, refit=weights, progress=job.progress),
    )
    if target is None:
        return Built(label, plan, _base_encoding(stats), pruned)
    final = work.step(
        f"{stem}-{target}.gguf",
        kept | {"target": target, "runtime": job.runtime.path.name},
        lambda path: quantize(pruned, target, path, imatrix=stats, tools=_quantizer(job)),
    )
    return Built(f"{label} {target}", plan, target, final)


def _refit(job: Job, work: Workspace, source: Prepared, plan: PrunePlan) -> DownWeights:
    scratch = work.folder / "refit.partial"
    return refit_weights(source.checkpoint, plan, source.domains, scratch, device=job.device, progress=job.progress)


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
        lambda path: quantize(base, target, path, imatrix=stats, tools=_quantizer(job)),
    )
    return Built(f"unpruned {target}", None, target, path)


def _quantizer(job: Job) -> QuantizeTool:
    return QuantizeTool(job.runtime.tool("llama-quantize"), progress=job.progress)


def _base_encoding(stats: CalibrationStats) -> str:
    kinds = [spec.type for spec in stats.model.tensors if len(spec.ne) > 1]
    return max(set(kinds), key=kinds.count)


def judge(job: Job, base: Path, built: Sequence[Built], model: str, notes: Sequence[str] = ()) -> Report:
    """Perplexity and KL divergence of every model against the base, on every evaluation text."""
    found: dict[str, list[Comparison]] = {}
    for path in job.evaluation:
        text = path.read_text(encoding="utf-8")
        job.progress(0, 1, f"evaluating {len(built)} models on {path.name}")
        found[path.stem] = compare_many(
            base, [item.path for item in built], text, llama=job.llama, n_ctx=job.n_ctx,
            max_windows=job.eval_windows, backend=job.runtime.backend, progress=job.progress,
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


def compress(job: Job, out: Path, recipe: Recipe, say: Say, *, refit: bool = False) -> Report:
    """The whole line for one recipe; the report stands beside the files in `out`."""
    target = recipe.target
    if target is not None:
        encoding.parse_target(target)
    if not job.evaluation:
        raise GgufToolError("compress needs a text to judge the result by: --eval FILE")
    work = Workspace(out, say)
    source = prepare(job, work)
    built = build(job, work, source, recipe, refit=refit)
    rivals = [quantize_base(job, work, source, target)] if target and target not in encoding.FLOATS else []
    assert built.plan is not None
    notes = [built.plan.formula, *built.plan.notes]
    report = judge(job, source.base, [built, *rivals], source.stats.model.name, notes)
    report.save(out)
    return report
