"""compress: checkpoint -> base GGUF -> stats -> plan -> pruned GGUF -> quantized GGUF -> report, resumable.

A GGUF in place of the checkpoint is its own base.

Every step leaves a file and a fingerprint of what it was made from. A step whose file is there and whose fingerprint is
the same is skipped, so a run that was stopped goes on where it stopped, and a changed recipe repeats only what it must.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import __version__, encoding
from .calibrate import calibrate
from .chat import template_of_gguf
from .checkpoint import Checkpoint, open_checkpoint
from .convert import convert
from .corpus import Tokenizer, load_domain, load_domains, read_scored
from .coverage import coverage
from .dern import dern, drops_experts
from .durable import flush, settle
from .errors import GgufToolError
from .evaluate import Comparison, compare_many
from .forward import Windows
from .gguf_calibrate import OBS_BYTES, calibrate_gguf
from .gguf_calibrate import obs_bytes as gguf_obs_bytes
from .gguf_file import Progress
from .gguf_model import GgufModel, is_gguf, open_gguf
from .gguf_refit import NO_SEQUENTIAL, refit_gguf
from .gguf_tokenizer import GgufTokenizer
from .inventory import model_facts
from .loader import usable_device
from .memory import parse_bytes, parse_dtype, plan_memory
from .methods import method
from .overrides import Overrides
from .plan import PrunePlan
from .planner import DEFAULT_ALIGN, fingerprint, make_plan
from .quantize import QuantizeTool, quantize
from .recipe import Recipe
from .refit import can_refit, refit_memory
from .refit import refit as refit_weights
from .report import Report, Row
from .runtime import Runtime
from .sequential import refit_sequentially
from .sources import Source
from .stats import CalibrationStats, Domain
from .writer import prune

Say = Callable[[str], None]
BEING_MADE = "being made"


@dataclass
class Workspace:
    """An output folder that remembers what each of its files was made from (`state.json`)."""

    folder: Path
    say: Say
    state: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.state = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def step(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The file `name`, made by `make(path)` unless it was made from the same inputs before.

        Raises GgufToolError for a file of that name which this folder's runs did not make.
        """
        path = self.folder / name
        key = hashlib.sha256(json.dumps({"gguftool": __version__, **inputs}, sort_keys=True).encode()).hexdigest()
        if path.exists() and self.state.get(name) == key:
            self.say(f"{name}: already there")
            return path
        if path.exists() and name not in self.state:
            raise GgufToolError(f"{path} exists and was not made by this command; choose another folder or move it")
        if path.exists() and self.state[name] != BEING_MADE:
            self.say(f"{name}: was made from other inputs or by another recipe; replacing it")
        # A run that is killed in between must leave no file under another run's key.
        self._remember(name, BEING_MADE)
        path.unlink(missing_ok=True)
        make(path)
        flush(path)
        self._remember(name, key)
        return path

    def _remember(self, name: str, key: str) -> None:
        self.state[name] = key
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        settle(partial, self.folder / "state.json")


@dataclass(frozen=True)
class Job:
    """What `compress` and `demo` share: a model, its texts, a place to work.

    Attributes:
        calibration, evaluation: texts; the name of an evaluation text is its file's stem.
        windows: at most so many windows of a calibration text, times its weight; None takes all.
        eval_windows: the same of an evaluation text.
        seed: above 0, draw the windows of a calibration text instead of taking the first ones.
        dtype, memory: type of the computation and limit of memory, as `memory.parse_dtype` and `parse_bytes` read them; of a GGUF
            only `memory`, which its second moments may take.
    """

    model: Path
    calibration: Sequence[Source | Path]
    evaluation: Sequence[Path]
    runtime: Runtime
    llama: ModuleType
    progress: Progress
    n_ctx: int = 512
    windows: int | None = None
    eval_windows: int | None = None
    pre_tokenizer: str | None = None
    device: str = "cpu"
    seed: int = 0
    dtype: str = "auto"
    memory: str | None = None

    @property
    def limit(self) -> int | None:
        """Bytes that calibration and refit may take."""
        return None if self.memory is None else parse_bytes(self.memory)


@dataclass(frozen=True)
class Prepared:
    """The dear part: the model, its GGUF, its stats, and the windows they were taken on."""

    model: Checkpoint | GgufModel
    base: Path
    stats: CalibrationStats
    domains: Sequence[tuple[Domain, Windows]]

    @property
    def encoding(self) -> str:
        """That of the base, as file names have it."""
        return self.model.encoding if isinstance(self.model, GgufModel) else _base_encoding(self.stats)

    def has_encoding(self, target: str) -> bool:
        """Whether the base is quantized to `target` already, so that what is cut from it is so too."""
        return isinstance(self.model, GgufModel) and self.model.encoding == encoding.parse_target(target).name

    def again(self, target: str) -> tuple[str, ...]:
        """A note where `target` quantizes what was quantized before."""
        if not isinstance(self.model, GgufModel) or not self.model.is_quantized or self.has_encoding(target):
            return ()
        return (
            f"{target} was made from {self.encoding}, so its weights were quantized twice; from the unquantized model the "
            "same size is nearer to the original",
        )


def prepare(job: Job, work: Workspace, recipes: Sequence[Recipe]) -> Prepared:
    """Checkpoint, base GGUF and stats. Everything that can be refused is refused before the first dear step."""
    if is_gguf(job.model):
        return _prepare_gguf(job, work, recipes)
    checkpoint = open_checkpoint(job.model)
    tokenizer = checkpoint.tokenizer()
    domains = load_domains(job.calibration, tokenizer, job.n_ctx, job.windows, job.seed)
    _check_evaluation(job, tokenizer)
    usable_device(job.device, solves=any(method(recipe.method).refitted for recipe in recipes))
    count = sum(len(tokens) for _, tokens in domains)
    how = plan_memory(
        checkpoint, count, job.n_ctx, parse_dtype(job.dtype), job.limit, n_domains=len(domains), device=job.device
    )
    if job.limit is not None:
        work.say(str(how))
    blank = CalibrationStats.blank(model_facts(checkpoint), len(domains))
    for recipe in recipes:
        make_plan(blank, recipe)
    inputs: dict[str, Any] = {"model": checkpoint.fingerprint, "tokenizer": _tokenizer_hash(checkpoint.path)}
    base = work.step(
        "base.gguf",
        inputs | {"runtime": job.runtime.path.name, "pre": job.pre_tokenizer},
        lambda path: convert(
            checkpoint.path, path, job.runtime, pre_tokenizer=job.pre_tokenizer, progress=job.progress
        ),
    )

    def measure(path: Path) -> None:
        scratch = work.folder / "calibrate.work"
        calibrate(checkpoint, domains, scratch, device=job.device, how=how, progress=job.progress, out=path)

    path = work.step(_stats_name(job), inputs | _texts_key(job, domains) | {"dtype": str(how.dtype)}, measure)
    stats = CalibrationStats.load(path)
    return Prepared(checkpoint, base, stats, domains)


def _prepare_gguf(job: Job, work: Workspace, recipes: Sequence[Recipe]) -> Prepared:
    """The same from a GGUF, which is its own base."""
    if job.device != "cpu":
        raise GgufToolError(f"--device {job.device}: a GGUF is calibrated by llama.cpp on the CPU; leave it out")
    model, tokenizer = open_gguf(job.model), GgufTokenizer(job.llama, job.model)
    for recipe in recipes:
        if recipe.method == "dern":
            raise GgufToolError(f"dern needs the checkpoint, and {job.model} is a GGUF; take another method")
    domains = load_domains(job.calibration, tokenizer, job.n_ctx, job.windows, job.seed)
    _check_evaluation(job, tokenizer)
    blank = CalibrationStats.blank(model.facts(), len(domains), obs=gguf_obs_bytes(model) <= OBS_BYTES)
    for recipe in recipes:
        make_plan(blank, recipe)
    key = {"model": model.fingerprint, "runtime": job.runtime.path.name}

    def measure(path: Path) -> None:
        scratch = work.folder / "calibrate.work"
        calibrate_gguf(
            model, domains, scratch, llama=job.llama, memory=job.limit, progress=job.progress, out=path
        )  # fmt: skip

    path = work.step(_stats_name(job), key | _texts_key(job, domains), measure)
    stats = CalibrationStats.load(path)
    work.state["base.gguf"] = model.fingerprint
    return Prepared(replace(model, norm_topk=stats.model.norm_topk), job.model, stats, domains)


def _stats_name(job: Job) -> str:
    return f"stats{f'-seed{job.seed}' if job.seed else ''}.safetensors"


def _texts_key(job: Job, domains: Sequence[tuple[Domain, Windows]]) -> dict[str, Any]:
    windows = [hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest() for _, tokens in domains]
    return {"texts": [domain.as_dict() for domain, _ in domains], "windows": windows, "n_ctx": job.n_ctx}


def _check_evaluation(job: Job, tokenizer: Tokenizer) -> None:
    stems = [path.stem for path in job.evaluation]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise GgufToolError(f"two evaluation texts are called {twice[0]!r}; the report needs different names")
    if job.n_ctx < 4 or (job.eval_windows is not None and job.eval_windows < 1):
        raise GgufToolError(
            f"--ctx {job.n_ctx}, --eval-windows {job.eval_windows}: at least 4 and 1 are needed to score"
        )
    for path in job.evaluation:
        load_domain(path, tokenizer, job.n_ctx, 1)


def _tokenizer_hash(folder: Path) -> str:
    """sha256 over everything small beside the weights: tokenizer, vocabulary, generation config."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".model", ".txt", ".jinja") and path.stat().st_size < 1 << 27:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


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
    _check_refit(job, recipe, refit)
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


def _check_refit(job: Job, recipe: Recipe, refit: str) -> None:
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


def _base_encoding(stats: CalibrationStats) -> str:
    kinds = [spec.type for spec in stats.model.tensors if len(spec.ne) > 1]
    return max(set(kinds), key=kinds.count)


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
    _check_refit(job, recipe, refit)
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
