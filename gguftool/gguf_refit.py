"""The plain refit of `refit` for whoever has a GGUF only: second moments by llama.cpp, down columns from the file.

In a quantized file the columns are fitted as the file has them, and quantized again when the pruned file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import GgufToolError
from .ggml_nodes import ggml_path
from .gguf_file import Progress
from .gguf_model import GgufModel
from .gguf_pass import SAVE_SECONDS, Arrays, Corpus, GgufPasses, Stage, StageDir, check_memory, groups, norm_topk
from .llama_observer import Routed
from .obs import RIDGE
from .overrides import Key, Origin, Overrides
from .plan import PrunePlan
from .recorders import GramSums, routed
from .refit import NOTHING, can_refit, grown_layers, most_narrowed, narrowed_experts, solve, whole_experts
from .router_fix import RouterFix
from .stats import Domain
from .windows import Windows

NO_SEQUENTIAL = (
    "a sequential refit needs the checkpoint: llama.cpp runs the whole model, and not a layer on another input"
)


def refit_gguf(
    model: GgufModel,
    plan: PrunePlan,
    domains: Sequence[tuple[Domain, Windows]],
    work_dir: Path,
    *,
    llama: Any,
    batch: int = 4,
    memory: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Overrides:
    """The refitted down columns of every expert that `plan` narrows, or whose weights it lets grow; see `refit.refit`.

    Arguments as in `gguf_calibrate.calibrate_gguf`. Resumable; the columns lie in `work_dir` until they are saved, and
    `Overrides.save` removes it.

    Raises:
        GgufToolError: the plan is for another model, or there is nothing in it to refit.
    """
    model = refittable(model, plan, llama)
    corpus = Corpus.of(model, domains, batch)
    grown = {layer.index for layer in grown_layers(model, plan)}
    layers = [layer.index for layer in plan.layers if narrowed_experts(plan, layer.index) or layer.index in grown]
    parts = groups(layers, moments_bytes(plan, memory), memory)
    key = {"refit": plan.kept_hash, "ridge": RIDGE, "grown": sorted(grown), "parts": [list(part) for part in parts]}
    work = StageDir(work_dir, corpus.identity(model) | key)
    ggml = ggml_path(llama)
    stages: list[Callable[[], Stage]] = [partial(_Fit, model, plan, ggml, part, grown) for part in parts]
    GgufPasses(llama, model, corpus, work, threads=threads, progress=progress, save_seconds=save_seconds).run(stages)
    places: dict[Key, tuple[Path, str]] = {}
    for stage in range(len(stages)):
        for name in work.names(stage):
            layer, expert, _ = name.split(".")
            places[int(layer), int(expert), "down"] = (work.stage_path(stage), name)
    origin = Origin("refit", plan.kept_hash, tuple(domain.as_dict() for domain in corpus.domains), _notes(model))
    return Overrides(origin, places, work.remove)


def refittable(model: GgufModel, plan: PrunePlan, llama: Any) -> GgufModel:
    """The model; where the plan drops experts, with what its router does to the weights of those that stay.

    Raises GgufToolError for a plan of another model, and for one with nothing to refit.
    """
    if plan.model_fingerprint != model.fingerprint:
        raise GgufToolError(
            f"the plan was made for {plan.model_name} ({plan.model_fingerprint[:12]}), not for {model.path}"
            f" ({model.fingerprint[:12]}): refit the model that was calibrated"
        )
    if model.norm_topk is None and plan.drops_experts:
        model = replace(model, norm_topk=norm_topk(llama, model))
    if not can_refit(model, plan):
        raise GgufToolError(NOTHING)
    return model


def moments_bytes(plan: PrunePlan, memory: int | None) -> int:
    """Bytes of the second moments of one layer, of which most experts are narrowed.

    Raises GgufToolError where `memory` does not hold them.
    """
    each = 4 * plan.n_ff_exp**2 * most_narrowed(plan)
    check_memory(each, memory)
    return each


def _notes(model: GgufModel) -> tuple[str, ...]:
    return (f"refitted on {model.path.name}, {model.encoding}",) if model.is_quantized else ()


class _Fit:
    """One pass: the second moments of some layers, solved at its end."""

    whole = False

    def __init__(self, model: GgufModel, plan: PrunePlan, ggml: Path, layers: Sequence[int], grown: set[int]) -> None:
        self.layers, self.domain, self._n_expert = tuple(layers), 0, plan.n_expert
        self._fits: dict[int, GramSums] = {}
        for layer in (layer for layer in plan.layers if layer.index in layers):
            index = layer.index
            down = partial(model.down, index, ggml=ggml)
            narrowed = narrowed_experts(plan, index)
            if index not in grown:
                self._fits[index] = GramSums(down, narrowed, solve)
                continue
            fix = RouterFix(model.router(index, ggml), layer.router, index)
            self._fits[index] = GramSums(down, narrowed, solve, fix, whole_experts(plan, layer))

    @torch.no_grad()
    def experts(self, layer: int, seen: Routed) -> None:
        """Adds the tokens of one batch."""
        fit = self._fits[layer]
        if fit.fix is not None:
            fit.fix.add(seen.x[:, 0], seen.chosen, seen.weights)
        for expert, slots in routed(seen.chosen, self._n_expert):
            _, h, weights = seen.of(slots)
            fit.add(expert, h, weights)

    def matrix(self, name: str, x: Tensor) -> None:
        """Not wanted."""

    def residual(self, layer: int, out: Tensor) -> None:
        """Not wanted."""

    def sums(self) -> dict[str, Tensor]:
        """Everything so far."""
        found: dict[str, Tensor] = {}
        for layer, fit in self._fits.items():
            found |= {f"{layer}.gram.{expert}": value for expert, value in fit.grams.items()}
            found |= {f"{layer}.count.{expert}": torch.tensor(count) for expert, count in fit.counts.items()}
            if fit.fix is not None:
                found |= {f"{layer}.products": fit.fix.products, f"{layer}.squares": fit.fix.squares}
        return found

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Takes up what `sums` gave."""
        for name, value in self.sums().items():
            value.copy_(sums[name])
        for layer, fit in self._fits.items():
            fit.counts = {expert: int(sums[f"{layer}.count.{expert}"]) for expert in fit.counts}

    def arrays(self) -> Arrays:
        """`<layer>.<expert>.down` -> the new down columns, float32 [d, w]."""
        return {f"{layer}.{name}": values for layer, fit in self._fits.items() for name, values in fit.arrays().items()}
