"""The dear part that `compress`, `demo` and `sweep` share: a model, its base GGUF, its stats.

A GGUF in place of the checkpoint is its own base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import calibration, encoding
from .asked import refuse_options
from .checkpoint import Checkpoint, open_checkpoint
from .convert import convert
from .corpus import Tokenizer, load_domain, load_domains
from .errors import GgufToolError
from .forward import Windows
from .gguf_file import Progress
from .gguf_model import GgufModel, is_gguf, open_gguf
from .gguf_refit import moments_bytes
from .gguf_tokenizer import GgufTokenizer
from .inventory import model_facts
from .loader import usable_device
from .memory import parse_bytes, parse_dtype
from .plan import PrunePlan
from .planner import make_plan
from .recipe import Recipe
from .refit import can_refit, refit_memory
from .refitting import kind_of
from .runtime import Runtime
from .sources import Source
from .stats import CalibrationStats, Domain
from .verification import check_sound
from .workspace import Watch, Workspace

# In the output folder: the state of a calibration.
SCRATCH = "calibrate.work"


@dataclass(frozen=True)
class Job:
    """What `compress` and `demo` share: a model, its texts, a place to work.

    Attributes:
        calibration, evaluation: texts; the name of an evaluation text is its file's stem.
        windows: at most so many windows of a calibration text, times its weight; None takes all.
        eval_windows: the same of an evaluation text.
        seed: above 0, draw the windows of a calibration text instead of taking the first ones.
        dtype, memory: type of the computation and limit of memory, as `memory.parse_dtype` and `parse_bytes` read them; a GGUF
            takes "auto" only, and `memory` is what its second moments may take.
        watch: told of every step and measurement.
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
    watch: Watch = lambda _what, _facts: None

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
        """Whether the base has the types of `target` already, so that what is cut from it has them too."""
        name = encoding.parse_target(target).name
        if isinstance(self.model, GgufModel):
            return self.model.encoding == name
        if name not in encoding.FLOATS:
            return False
        facts = self.stats.model
        return encoding.assign(facts.tensors, name, encoding.MixFacts.of_model(facts)) == tuple(facts.tensors)

    @property
    def quantized_types(self) -> frozenset[str]:
        """Types of the base's tensors that are in blocks: those of a quantized GGUF, MXFP4 of a checkpoint's own experts."""
        of = self.model.file if isinstance(self.model, GgufModel) else self.stats.model
        return frozenset(spec.type for spec in of.tensors if spec.type not in (*encoding.FLOATS, "I32"))

    def again(self, *targets: str) -> tuple[str, ...]:
        """A note where some of `targets` quantize what was quantized before."""
        names = [target for target in targets if self._is_again(target)]
        if not names:
            return ()
        made = f"{', '.join(names)} {'were' if len(names) > 1 else 'was'} made from"
        if isinstance(self.model, GgufModel):
            return (
                f"{made} {self.encoding}, so weights were quantized twice; from the unquantized model the same size is "
                "nearer to the original",
            )
        return (
            f"{made} a checkpoint with {' and '.join(sorted(self.quantized_types))} experts, so these were quantized twice; "
            "MXFP4_MOE keeps them as they are",
        )

    def _is_again(self, target: str) -> bool:
        kind = encoding.parse_target(target).default
        return not self.has_encoding(target) and kind not in encoding.FLOATS and bool(self.quantized_types - {kind})


def prepare(job: Job, work: Workspace, recipes: Sequence[Recipe], refit: str = "") -> Prepared:
    """Checkpoint, base GGUF and stats. Everything that can be refused is refused before the first dear step.

    Args:
        recipes: what is planned later. refit: how all of these are refitted, as `pipeline.build` takes it.
    """
    if is_gguf(job.model):
        return _prepare_gguf(job, work, recipes, refit)
    checkpoint = open_checkpoint(job.model)
    tokenizer = checkpoint.tokenizer()
    domains = load_domains(job.calibration, tokenizer, job.n_ctx, job.windows, job.seed)
    _check_evaluation(job, tokenizer)
    blank = CalibrationStats.blank(model_facts(checkpoint), len(domains))
    refits = _refits(checkpoint, [make_plan(blank, recipe) for recipe in recipes], refit)
    usable_device(job.device, solves=bool(refits))
    dtype = parse_dtype(job.dtype)
    checked = calibration.of_checkpoint(checkpoint, domains, device=job.device, dtype=dtype, limit=job.limit)
    for plan, kind in refits:
        refit_memory(checkpoint, plan, domains, dtype, job.limit, device=job.device, sequential=kind == "sequential")
    if job.limit is not None:
        work.say(checked.how)
    inputs = _model_key(checkpoint)
    base = base_gguf(job, work, checkpoint)

    def measure(path: Path) -> None:
        checked.run(work.folder / SCRATCH, path, job.progress)

    key = inputs | _texts_key(job, domains) | {"dtype": str(checked.memory.dtype)}
    path = work.step(_stats_name(job), key, measure)
    stats = work.read(path, CalibrationStats.load) or blank
    return Prepared(checkpoint, base, stats, domains)


def _refits(model: Checkpoint | GgufModel, plans: Sequence[PrunePlan], refit: str) -> list[tuple[PrunePlan, str]]:
    """The plans that are refitted, and how. Raises as `refitting.kind_of` does."""
    kinds = [(plan, kind_of(model, plan, refit)[0]) for plan in plans]
    return [(plan, kind) for plan, kind in kinds if kind and can_refit(model, plan)]


def convert_soundly(job: Job, checkpoint: Checkpoint, path: Path) -> None:
    """Converts, then reads what was written."""
    convert(checkpoint.path, path, job.runtime, pre_tokenizer=job.pre_tokenizer, progress=job.progress)
    check_sound(path)


def base_gguf(job: Job, work: Workspace, checkpoint: Checkpoint) -> Path:
    """The checkpoint as llama.cpp's converter writes it. In a dry workspace the converter only says whether it would."""
    path = work.step(
        "base.gguf",
        _model_key(checkpoint) | {"runtime": job.runtime.path.name, "pre": job.pre_tokenizer},
        lambda path: convert_soundly(job, checkpoint, path),
    )
    if path.name in work.missing:
        convert(checkpoint.path, path, job.runtime, pre_tokenizer=job.pre_tokenizer, dry_run=True)
    return path


def _model_key(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"model": checkpoint.fingerprint, "tokenizer": _tokenizer_hash(checkpoint.path)}


def _prepare_gguf(job: Job, work: Workspace, recipes: Sequence[Recipe], refit: str) -> Prepared:
    """The same from a GGUF, which is its own base."""
    refuse_options(job.device, job.dtype)
    model, tokenizer = open_gguf(job.model), GgufTokenizer(job.llama, job.model)
    for recipe in recipes:
        if recipe.method == "dern":
            raise GgufToolError(f"dern needs the checkpoint, and {job.model} is a GGUF; take another method")
    domains = load_domains(job.calibration, tokenizer, job.n_ctx, job.windows, job.seed)
    _check_evaluation(job, tokenizer)
    checked = calibration.of_gguf(model, domains, llama=job.llama, limit=job.limit)
    blank = CalibrationStats.blank(model.facts(), len(domains), obs=checked.obs)
    for plan, _ in _refits(model, [make_plan(blank, recipe) for recipe in recipes], refit):
        moments_bytes(plan, job.limit)
    key = {"model": model.fingerprint, "runtime": job.runtime.path.name}

    def measure(path: Path) -> None:
        checked.run(work.folder / SCRATCH, path, job.progress)

    path = work.step(_stats_name(job), key | _texts_key(job, domains), measure)
    stats = work.read(path, CalibrationStats.load) or blank
    work.state["base.gguf"] = model.fingerprint
    return Prepared(replace(model, norm_topk=stats.model.norm_topk), job.model, stats, domains)


def _stats_name(job: Job) -> str:
    return f"stats{f'-seed{job.seed}' if job.seed else ''}.safetensors"


def _texts_key(job: Job, domains: Sequence[tuple[Domain, Windows]]) -> dict[str, Any]:
    windows = [hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest() for _, tokens in domains]
    return {"texts": [domain.as_dict() for domain, _ in domains], "windows": windows, "n_ctx": job.n_ctx}


def check_names(job: Job) -> None:
    """Raises GgufToolError where two evaluation texts have one name: for whoever goes by it, as reports do."""
    stems = [path.stem for path in job.evaluation]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise GgufToolError(f"two evaluation texts are called {twice[0]!r}; the report needs different names")


def _check_evaluation(job: Job, tokenizer: Tokenizer) -> None:
    if job.n_ctx < 4 or (job.eval_windows is not None and job.eval_windows < 1):
        taken = "all" if job.eval_windows is None else job.eval_windows
        raise GgufToolError(
            f"windows of {job.n_ctx} tokens, {taken} of each evaluation text: at least 4 tokens and 1 window are needed to score"
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


def _base_encoding(stats: CalibrationStats) -> str:
    kinds = [spec.type for spec in stats.model.tensors if len(spec.ne) > 1]
    return max(set(kinds), key=kinds.count)
