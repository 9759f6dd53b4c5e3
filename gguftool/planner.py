"""From stats and a recipe to a plan: run the method, say what it did, count the bytes. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np

from . import encoding, layout
from .architectures import tied_in
from .errors import GgufToolError
from .method_options import check_lengths, check_options
from .methods import method
from .plan import PrunePlan
from .recipe import Recipe
from .stats import CalibrationStats, ModelFacts
from .tensors import TensorSpec

DEFAULT_ALIGN = 32


def make_plan(stats: CalibrationStats, recipe: Recipe) -> PrunePlan:
    """The plan that `recipe` leads to. Raises GgufToolError where it is impossible, with the layer and the numbers."""
    facts = stats.model
    how = method(recipe.method)
    check_options(recipe)
    _check_router(stats, recipe)
    check_lengths(stats, recipe)
    if recipe.layout == "stock" and not how.stock:
        raise GgufToolError(
            f"--layout stock: {recipe.method} gives experts different widths, which only the tiered layout can hold; "
            "take a whole-expert method or enp, or leave --layout out"
        )
    mix = encoding.MixFacts.of_model(facts, has_imatrix=recipe.imatrix)
    align = recipe.align or _alignment(stats, recipe, mix)
    if align > facts.n_ff_exp:
        raise GgufToolError(f"--align {align}: experts have only {facts.n_ff_exp} neurons")
    decision = how.decide(stats, recipe, align)
    plan = PrunePlan(
        recipe=replace(recipe, align=align),
        formula=decision.formula,
        model_name=facts.name,
        model_fingerprint=facts.fingerprint,
        gguf_arch=facts.gguf_arch,
        stats_fingerprint=fingerprint(stats),
        dataset=tuple((domain.name, domain.tokens) for domain in stats.domains),
        n_expert=facts.n_expert,
        n_expert_used=facts.n_expert_used,
        n_ff_exp=facts.n_ff_exp,
        layers=decision.layers,
        notes=(*decision.notes, *_unrouted(stats)),
    )
    plan.check()
    layout.check_routers(plan, facts.tensors, facts.n_group)
    plan = _laid_out(replace(plan, notes=(*plan.notes, *_rounding(plan))), facts)
    # A plan that keeps everything gives the file that was measured: unless that was cut before, llama.cpp's own fallbacks.
    mix = replace(mix, twins=mix.twins or plan.kept_share < 1)
    encoded = encoding.assign(plan.tensors, recipe.target, mix) if recipe.target else ()
    _check_imatrix(recipe, encoded)
    return replace(plan, encoded=encoded)


def _laid_out(plan: PrunePlan, facts: ModelFacts) -> PrunePlan:
    """The plan with its layout and the tensors of its file."""
    predictors = range(facts.block_count - facts.n_predict, facts.block_count)
    tied = tied_in(facts.gguf_arch) if facts.tied is None else facts.tied
    kind = layout.decide(plan, facts.tensors, tied, predictors)
    pieces = layout.pieces(plan, facts.tensors, encoding.TWINS, layout=kind, whole=predictors)
    return replace(plan, layout=kind, tensors=tuple(piece.spec for piece in pieces))


def _check_router(stats: CalibrationStats, recipe: Recipe) -> None:
    """Raises GgufToolError where --cut-router may let experts go that cannot: with stats of nothing none would yet."""
    if recipe.cut_router and (table := layout.hash_table(stats.model.tensors)):
        raise GgufToolError(
            f"--cut-router: {table} routes tokens by a table of expert ids, so all have to stay; leave it out"
        )


def _check_imatrix(recipe: Recipe, encoded: tuple[TensorSpec, ...]) -> None:
    if recipe.imatrix or recipe.target is None:
        return
    if blind := encoding.needs_imatrix(encoded, recipe.target):
        raise GgufToolError(
            f"{recipe.target} needs an importance matrix for {len(blind)} tensors, {blind[0]} the first; "
            "plan with one, or take a larger encoding"
        )


def _alignment(stats: CalibrationStats, recipe: Recipe, mix: encoding.MixFacts) -> int:
    """The multiple of neurons that the target's blocks want, as far as experts are that wide."""
    if recipe.target is None:
        return min(DEFAULT_ALIGN, stats.model.n_ff_exp)
    types = encoding.expert_types(stats.model.tensors, recipe.target, mix)
    multiple = encoding.alignment(recipe.target, types)
    # Experts no wider than two blocks of 256 would only be kept or dropped: finer widths are worth more than the bits.
    return multiple if multiple * 2 <= stats.model.n_ff_exp else min(DEFAULT_ALIGN, stats.model.n_ff_exp)


def _rounding(plan: PrunePlan) -> list[str]:
    gone = 1 - plan.kept_share
    if abs(gone - plan.recipe.ratio) < 0.005:
        return []
    return [
        f"{100 * gone:.1f} % of routed-expert parameters go, not {100 * plan.recipe.ratio:.1f} %: the method cuts in steps "
        f"of whole experts or of {plan.recipe.align} neurons"
    ]


def _unrouted(stats: CalibrationStats) -> list[str]:
    unrouted = stats.expert("count") == 0
    if not unrouted.any():
        return []
    layers = ", ".join(
        f"{index} ({int(row.sum())})" for index, row in zip(stats.model.moe_layers, unrouted, strict=True) if row.any()
    )
    return [
        f"{int(unrouted.sum())} experts were never routed in {stats.tokens} calibration tokens, by layer: {layers}; "
        "they have no mean and rank last: calibrate on more text if that surprises you"
    ]


def fingerprint(stats: CalibrationStats) -> str:
    """sha256 over the model, the texts and every accumulator of the stats."""
    digest = hashlib.sha256(json.dumps([domain.as_dict() for domain in stats.domains]).encode())
    digest.update(json.dumps([stats.model.fingerprint, stats.n_ctx, stats.linear_tokens]).encode())
    # By name: a file gives its arrays back in another order than they were measured in.
    others = {"expert_inputs": stats.expert_inputs}
    if stats.residual_inverse is not None:
        others["residual_inverse"] = stats.residual_inverse
    for values in (stats.experts, stats.neurons, stats.linears, others):
        for name in sorted(values):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values[name]).tobytes())
    return digest.hexdigest()
