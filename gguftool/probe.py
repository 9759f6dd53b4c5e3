"""Probing: prunes one layer at a time, measures what that costs, and removes the file again. `sensitivity` says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .durable import held, scratch, settle
from .errors import GgufToolError
from .evaluate import compare_many
from .gguf_file import Progress, check_space
from .plan import PrunePlan
from .planner import make_plan
from .sensitivity import Conditions, LayerCost, Sensitivity, layer_plan
from .stats import CalibrationStats
from .writer import prune

# Decoder index -> the plan that prunes this layer alone, and the value that it loses.
LayerPlans = Callable[[int], tuple[PrunePlan, float]]


@dataclass(frozen=True)
class Probe:
    """How layers are measured.

    Attributes:
        base: the unpruned GGUF. text: what to measure on; `conditions` has its sha256.
        llama: the llama_cpp module of a patched runtime. n_gpu_layers: layers that go to a GPU.
        ggml: its library of ggml, for a base of quantized tensors.
        parse_special: as `perplexity.open_session` has it.
        at_once: most pruned files that exist at a time. The base runs once for each such group, or more often where
            memory is short.
    """

    base: Path
    text: str
    llama: Any
    n_gpu_layers: int = 0
    ggml: Path | None = None
    at_once: int = 4
    parse_special: bool = False


def measure_layers(
    how: Probe,
    stats: CalibrationStats,
    conditions: Conditions,
    out: Path,
    *,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> Sensitivity:
    """Measures every layer and saves the costs to `out`.

    What was measured is kept in `out`.partial after each group of files, so that a run that was stopped goes on from there
    under the same conditions. The pruned files stand in a temporary folder beside `out`, at most `at_once` of them.

    Raises:
        GgufToolError: the base is of another model or damaged, the disk is too small, a file cannot be loaded.
    """
    if how.at_once < 1:
        raise GgufToolError(f"--at-once {how.at_once} is less than 1")
    with held(out):
        return _measure(how, stats, conditions, out, say, progress)


def _measure(
    how: Probe, stats: CalibrationStats, conditions: Conditions, out: Path, say: Callable[[str], None],
    progress: Progress | None,
) -> Sensitivity:  # fmt: skip
    partial = out.with_name(out.name + ".partial")
    found = _resume(partial, conditions, say)
    recipe = conditions.recipe
    whole = make_plan(stats, replace(recipe, ratio=0.0))
    plan_of: LayerPlans = functools.partial(layer_plan, stats, whole, recipe)
    todo = found.missing
    groups = [todo[start : start + how.at_once] for start in range(0, len(todo), how.at_once)]
    if groups:
        peak = _peak(how, plan_of, groups, out)
        check_space(out, peak)
        say(f"{len(todo)} layers, at most {len(groups[0])} files at a time: {peak / 1e9:.3f} GB of disk beside {out}")
    for group in groups:
        found = found.with_costs(_measure_group(how, plan_of, conditions, group, out, progress))
        found.check()
        found.save(partial)
    if partial.exists():  # it has everything by now
        settle(partial, out)
    else:
        found.save(out)
    return found


def _resume(partial: Path, conditions: Conditions, say: Callable[[str], None]) -> Sensitivity:
    if partial.exists():
        try:
            found = Sensitivity.load(partial)
        except GgufToolError as error:
            say(f"{error}; starting anew")
        else:
            if found.conditions == conditions:
                say(f"{partial}: {len(found.costs)} layers are measured already")
                return found
            say(f"{partial}: measured under other conditions; starting anew")
    return Sensitivity(conditions)


def _peak(how: Probe, plan_of: LayerPlans, groups: list[tuple[int, ...]], out: Path) -> int:
    """Most bytes that the files of one group take."""

    def size(layer: int) -> int:
        plan, _ = plan_of(layer)
        return prune(how.base, plan, out, ggml=how.ggml, dry_run=True).file_bytes

    return max(sum(size(layer) for layer in group) for group in groups)


def _measure_group(
    how: Probe,
    plan_of: LayerPlans,
    conditions: Conditions,
    group: tuple[int, ...],
    out: Path,
    progress: Progress | None,
) -> tuple[LayerCost, ...]:
    """The costs of some layers, measured side by side."""
    with scratch(out.with_name(f".{out.name}.files")) as folder:
        paths, lost = [], []
        for layer in group:
            plan, value = plan_of(layer)
            paths.append(folder / f"layer-{layer}.gguf")
            lost.append(value)
            prune(how.base, plan, paths[-1], ggml=how.ggml, progress=_named(progress, f"layer {layer}"))
        results = compare_many(
            how.base, paths, how.text, llama=how.llama, max_windows=conditions.windows, n_ctx=conditions.n_ctx,
            n_gpu_layers=how.n_gpu_layers, backend=conditions.backend, parse_special=how.parse_special,
            progress=_named(progress, f"layers {', '.join(map(str, group))}"),
        )  # fmt: skip
    return tuple(
        LayerCost(layer, result.divergence.kld.mean, result.divergence.kld.err, value)
        for layer, result, value in zip(group, results, lost, strict=True)
    )


def _named(progress: Progress | None, where: str) -> Progress | None:
    """Progress that says which layers it is about."""
    return None if progress is None else lambda done, total, text: progress(done, total, f"{where}: {text}")
