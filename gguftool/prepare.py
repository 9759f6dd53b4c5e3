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

from . import encoding
from .asked import refuse_options
from .calibration import Calibration, GgufCalibration, of_checkpoint, of_gguf
from .checkpoint import Checkpoint, open_checkpoint
from .convert import convert
from .corpus import Tokenizer, load_domain, load_domains
from .errors import GgufToolError
from .forward import Windows
from .gguf_file import Progress
from .gguf_model import GgufModel, is_gguf, open_gguf
from .gguf_refit import moments_bytes
from .gguf_tokenizer import GgufTokenizer
from .loader import usable_device
from .memory import parse_bytes, parse_dtype
from .methods import method
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


def opened(job: Job, recipes: Sequence[Recipe], refit: str = "") -> Calibration:
    """Opens the model and reads the texts. Everything that can be refused is refused here, and nothing is written.

    Args:
        recipes: what is planned later. refit: how all of these are refitted, as `pipeline.build` takes it.
    """
    check_methods(job, [recipe.method for recipe in recipes], refit)
    found = _opened_gguf(job) if is_gguf(job.model) else _opened_checkpoint(job)
    stats = blank(found)
    check_refits(job, found, [make_plan(stats, recipe) for recipe in recipes], refit)
    return found


def blank(calibration: Calibration) -> CalibrationStats:
    """Stats of nothing in place of those that it will give; made anew each time, they are as large."""
    return CalibrationStats.blank(calibration.facts, len(calibration.domains), obs=calibration.obs)


def check_methods(job: Job, methods: Sequence[str], refit: str = "") -> None:
    """Raises GgufToolError for a method that is none, or is not for the model or the device, and for such a device."""
    solves = any([method(name).refitted for name in methods]) or bool(refit)
    if not is_gguf(job.model):
        usable_device(job.device, solves=solves)
        return
    refuse_options(job.device, job.dtype)
    if "dern" in methods:
        raise GgufToolError(f"dern needs the checkpoint, and {job.model} is a GGUF; take another method")


def check_refits(job: Job, calibration: Calibration, plans: Sequence[PrunePlan], refit: str) -> None:
    """Raises GgufToolError for a refit that the model, the device or the limit of memory does not take."""
    model = calibration.model if isinstance(calibration, GgufCalibration) else calibration.checkpoint
    for plan in plans:
        kind, _ = kind_of(model, plan, refit)
        if not kind or not can_refit(model, plan):
            continue
        if isinstance(calibration, GgufCalibration):
            moments_bytes(plan, job.limit)
            continue
        usable_device(job.device, solves=True)
        refit_memory(
            calibration.checkpoint, plan, calibration.domains, parse_dtype(job.dtype), job.limit, device=job.device,
            sequential=kind == "sequential",
        )  # fmt: skip


def _opened_checkpoint(job: Job) -> Calibration:
    checkpoint = open_checkpoint(job.model)
    domains = _read(job, checkpoint.tokenizer())
    return of_checkpoint(checkpoint, domains, device=job.device, dtype=parse_dtype(job.dtype), limit=job.limit)


def _opened_gguf(job: Job) -> Calibration:
    model = open_gguf(job.model)
    domains = _read(job, GgufTokenizer(job.llama, job.model))
    return of_gguf(model, domains, llama=job.llama, limit=job.limit)


def _read(job: Job, tokenizer: Tokenizer) -> Sequence[tuple[Domain, Windows]]:
    """The calibration texts as windows; those of evaluation are looked at."""
    domains = load_domains(job.calibration, tokenizer, job.n_ctx, job.windows, job.seed)
    _check_evaluation(job, tokenizer)
    return domains


def prepare(job: Job, work: Workspace, recipes: Sequence[Recipe], known: Calibration | None = None) -> Prepared:
    """Checkpoint, base GGUF and stats; `known` is what `opened` gave, where that was asked before.

    Raises GgufToolError as `opened` does, before the first dear step. A GGUF is its own base.
    """
    calibration = known or opened(job, recipes)
    if job.limit is not None:
        work.say(calibration.how)
    key: dict[str, Any]
    if isinstance(calibration, GgufCalibration):
        base, key = job.model, {"model": calibration.model.fingerprint, "runtime": job.runtime.path.name}
    else:
        base = base_gguf(job, work, calibration.checkpoint)
        key = _model_key(calibration.checkpoint) | {"dtype": str(calibration.memory.dtype)}

    def measure(path: Path) -> None:
        calibration.run(work.folder / SCRATCH, path, job.progress)

    path = work.step(_stats_name(job), key | _texts_key(job, calibration.domains), measure)
    stats = work.read(path, CalibrationStats.load) or blank(calibration)
    if not isinstance(calibration, GgufCalibration):
        return Prepared(calibration.checkpoint, base, stats, calibration.domains)
    model = calibration.model
    work.state["base.gguf"] = model.fingerprint
    return Prepared(replace(model, norm_topk=stats.model.norm_topk), base, stats, calibration.domains)


def rehearse(job: Job, work: Workspace, calibration: Calibration) -> None:
    """After a dry `prepare`: what a run finds out next of a checkpoint, whether the converter takes it. Nothing is written."""
    out = work.folder / "base.gguf"
    if isinstance(calibration, GgufCalibration):
        return
    if out.name in work.missing:
        convert(calibration.checkpoint.path, out, job.runtime, pre_tokenizer=job.pre_tokenizer, dry_run=True)


def convert_soundly(job: Job, checkpoint: Checkpoint, path: Path) -> None:
    """Converts, then reads what was written."""
    convert(checkpoint.path, path, job.runtime, pre_tokenizer=job.pre_tokenizer, progress=job.progress)
    check_sound(path)


def base_gguf(job: Job, work: Workspace, checkpoint: Checkpoint) -> Path:
    """The checkpoint as llama.cpp's converter writes it."""
    return work.step(
        "base.gguf",
        _model_key(checkpoint) | {"runtime": job.runtime.path.name, "pre": job.pre_tokenizer},
        lambda path: convert_soundly(job, checkpoint, path),
    )


def _model_key(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"model": checkpoint.fingerprint, "tokenizer": _tokenizer_hash(checkpoint.path)}


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
