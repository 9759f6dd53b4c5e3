"""What a report shows of stats and plan: what each expert was worth, what it kept, and how the router used it. Pure.

Sections of `Report.facts`:
    model     name, arch, fingerprint, layers, n_expert, n_expert_used, n_ff_exp, texts (name, sha256, tokens), n_ctx
    experts   criterion (words), layers: [{layer, saliency [E], width [E]}], a width of null for an expert that left the
              router; kept_share, kept_hash, layout, method
    calibrated  tokens, layers: [{layer, share [E]}]: an expert's share of the calibration tokens
"""

from __future__ import annotations

from typing import Any

from .methods import PRINCIPLE, describe, slice_criterion
from .plan import PrunePlan
from .recipe import Recipe
from .saliency import EXPERT_CRITERIA, NEURON_CRITERIA, expert_criterion, neuron_criterion, tenp_importance
from .stats import Array, CalibrationStats

# Digits that a picture needs; the exact numbers are in the stats.
DIGITS = 6


def model_facts(stats: CalibrationStats) -> dict[str, Any]:
    """The section `model`."""
    model = stats.model
    return {
        "name": model.name, "arch": model.gguf_arch, "fingerprint": model.fingerprint, "layers": model.block_count,
        "moe_layers": len(model.moe_layers), "n_expert": model.n_expert, "n_expert_used": model.n_expert_used,
        "n_ff_exp": model.n_ff_exp, "n_ctx": stats.n_ctx,
        "texts": [{"name": d.name, "sha256": d.sha256, "tokens": d.tokens} for d in stats.domains],
    }  # fmt: skip


def calibrated_facts(stats: CalibrationStats) -> dict[str, Any]:
    """The section `calibrated`. The shares of a layer add up to the number of experts used per token."""
    share = stats.expert("count") / max(1, stats.tokens)
    return {
        "tokens": stats.tokens,
        "layers": [
            {"layer": index, "share": rounded(row)} for index, row in zip(stats.model.moe_layers, share, strict=True)
        ],
    }


def expert_facts(stats: CalibrationStats, plan: PrunePlan) -> dict[str, Any]:
    """The section `experts`: saliency by the plan's own criterion and kept width, of every expert of every layer."""
    words, saliency = expert_saliency(stats, plan.recipe)
    rows = dict(zip(stats.model.moe_layers, saliency, strict=True))
    return {
        "criterion": words,
        "method": plan.recipe.method,
        "n_ff_exp": plan.n_ff_exp,
        "kept_share": plan.kept_share,
        "kept_hash": plan.kept_hash,
        "layout": plan.layout,
        "layers": [
            {
                "layer": layer.index,
                "saliency": rounded(rows[layer.index]),
                "width": _widths(dict(zip(layer.router, layer.widths, strict=True)), plan.n_expert),
            }
            for layer in plan.layers
        ],
    }  # fmt: skip


def _widths(kept: dict[int, int], n_expert: int) -> list[int | None]:
    return [kept.get(expert) for expert in range(n_expert)]


def expert_saliency(stats: CalibrationStats, recipe: Recipe) -> tuple[str, Array]:
    """What the recipe's method goes by, in words, and what it says of each expert, [L, E].

    A criterion of neurons is added up over an expert's neurons. Controls go by nothing that was measured; of them it is
    `gated-sum`, which says what they threw away.
    """
    if recipe.method == "tenp":
        return describe(EXPERT_CRITERIA["tenp-importance"]), tenp_importance(stats, recipe.mix)
    if recipe.method in ("auto", "global", "enp"):
        name = recipe.criterion or "enp" if recipe.method == "enp" else slice_criterion(stats, recipe)
        neuron = neuron_criterion(name)
        return f"{describe(neuron)}, added up over an expert's neurons", neuron.measure(stats).sum(axis=2)
    if recipe.method == "family":
        name = PRINCIPLE[recipe.calibration]
    else:
        own = {"dern": "seer", "inverted": "gated-sum", "random": "gated-sum", "random-slices": "gated-sum"}
        name = recipe.criterion or own.get(recipe.method, recipe.method)
    if name in NEURON_CRITERIA and name not in EXPERT_CRITERIA:
        neuron = neuron_criterion(name)
        return f"{describe(neuron)}, added up over an expert's neurons", neuron.measure(stats).sum(axis=2)
    expert = expert_criterion(name)
    return describe(expert), expert.measure(stats)


def rounded(values: Array) -> list[float]:
    """Plain numbers of DIGITS significant digits."""
    return [float(f"{float(value):.{DIGITS}g}") for value in values]
