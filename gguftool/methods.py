"""Methods: how a criterion and a budget become retained experts and neurons. One pure function each.

A method takes the stats and a recipe and returns what stays; `planner.make_plan` adds types, bytes and checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .errors import GgufToolError
from .plan import LayerPlan, Neurons
from .recipe import Recipe
from .saliency import (
    EXPERT_CRITERIA,
    FAMILY_PAPER,
    Criterion,
    expert_criterion,
    lookup,
    neuron_criterion,
    super_experts,
    tenp_importance,
)
from .schedules import SCHEDULES, whole_by_layer
from .stats import Array, CalibrationStats, ModelFacts
from .tiers import Budget, Ints, allocate, value_curves, width_grid


@dataclass(frozen=True)
class Decision:
    """What a method decided: the layers, the formula that it used, and notes for a person."""

    layers: tuple[LayerPlan, ...]
    formula: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        stock: its plans are uniform, so that a stock file holds them wherever it can (see `layout.decide`).
        refitted: how the weights of its plans are refitted, "plain" or "sequential"; "" where a plan stands without.
    """

    name: str
    summary: str
    source: str
    stock: bool
    decide: Callable[[CalibrationStats, Recipe, int], Decision]
    refitted: str = ""


def drop_experts(
    stats: CalibrationStats, saliency: Array, recipe: Recipe
) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    """Drops the same number of experts in every layer, those of least saliency; the router loses their rows.

    Where the router picks from groups of experts, every group loses the same number: it tells them by their size.

    Args:
        saliency: [L, E], larger stays.

    Returns:
        The layers and notes. The share that goes is rounded to whole experts (of every group).

    Raises:
        GgufToolError: fewer experts than the router's top-k would remain.
    """
    facts = stats.model
    size = facts.n_expert // facts.n_group
    keep = _experts_to_keep(facts, recipe.ratio)
    notes = []
    protected = set(super_experts(stats)) if recipe.guard else set()
    whole = np.arange(facts.n_ff_exp, dtype=np.int64)
    layers = []
    for row, index in enumerate(facts.moe_layers):
        order = np.argsort(-saliency[row], kind="stable").tolist()
        stays: set[int] = set()
        for group in range(facts.n_group):
            best = [e for e in order if e // size == group][: keep // facts.n_group]
            stays |= set(best)
            for expert in (
                e for layer, e in sorted(protected) if layer == row and e // size == group and e not in stays
            ):
                last = next((e for e in reversed(best) if (row, e) not in protected and e in stays), None)
                if last is not None:
                    stays = stays - {last} | {expert}
                    notes.append(f"layer {index}: super expert {expert} is protected, expert {last} goes instead")
        layers.append(LayerPlan(index, tuple(sorted(stays)), (whole,) * keep))
    return tuple(layers), tuple(notes)


def _experts_to_keep(facts: ModelFacts, ratio: float) -> int:
    """How many experts of a layer stay, the same number of every group. Raises GgufToolError for too few."""
    size = _group_size(facts)
    each = size - round(ratio * size)
    keep = each * facts.n_group
    if keep < facts.n_expert_used:
        raise GgufToolError(
            f"{keep} of {facts.n_expert} experts would remain in each layer but {facts.n_expert_used} are routed per "
            f"token; keep at least {facts.n_expert_used} or lower --ratio"
        )
    if each < _least_of_group(facts):
        raise GgufToolError(
            f"{each} of {size} experts would remain in each of the router's {facts.n_group} groups, but "
            f"{facts.n_expert_used} are routed per token, from {facts.n_group_used} groups, and a group is rated by two "
            "of its experts; lower --ratio"
        )
    return keep


def _drop_by(name: str) -> Callable[[CalibrationStats, Recipe, int], Decision]:
    def decide(stats: CalibrationStats, recipe: Recipe, _align: int) -> Decision:
        criterion = expert_criterion(recipe.criterion or name)
        layers, notes = drop_experts(stats, criterion.measure(stats), recipe)
        return Decision(layers, describe(criterion), notes)

    return decide


# What the calibration texts are, to the criterion that fits them: with texts of one task, how often an expert is chosen is
# what counts; with texts of all kinds it says more of the texts than of the expert (arXiv 2606.15716).
PRINCIPLE = {"task": "gated-sum", "general": "man"}


def _family(stats: CalibrationStats, recipe: Recipe, align: int) -> Decision:
    """Whole experts by the criterion that the paper's principle picks for the calibration data."""
    decision = _drop_by(PRINCIPLE[recipe.calibration])(stats, recipe, align)
    picked = (
        f"calibration data are {recipe.calibration}: {PRINCIPLE[recipe.calibration]} is the criterion ({FAMILY_PAPER})"
    )
    return replace(decision, notes=(picked, *decision.notes))


def _dern(stats: CalibrationStats, recipe: Recipe, _align: int) -> Decision:
    """Step 1 of DERN (arXiv 2509.10377): r_e = mean over the tokens of 1[e chosen] x its normalised weight.

    The stats have the sum of the weights as the model applies them. Where it makes them add up to 1 that is the paper's
    sum; elsewhere r is taken of the weights as applied, and the plan says so: it is these that scale an expert's output.
    """
    criterion = expert_criterion(recipe.criterion or "seer")
    layers, notes = drop_experts(stats, criterion.measure(stats), recipe)
    importance = stats.expert("gate") / max(1, stats.tokens)
    layers = tuple(
        replace(layer, importance=tuple(map(float, row))) for layer, row in zip(layers, importance, strict=True)
    )
    formula = "r = mean over all tokens of the weight of e, 0 where it is not chosen (arXiv 2509.10377)"
    if recipe.criterion:
        formula = f"kept by {describe(criterion)}, merged by {formula}"
    if not stats.model.norm_topk:
        known = "does not make" if stats.model.norm_topk is False else "may not make"
        notes = (
            *notes,
            f"the model {known} a token's weights add up to 1; r is taken of the weights as they are applied",
        )
    return Decision(layers, formula, notes)


def _inverted(stats: CalibrationStats, recipe: Recipe, _align: int) -> Decision:
    criterion = expert_criterion(recipe.criterion or "gated-sum")
    layers, _ = drop_experts(stats, -criterion.measure(stats), Recipe("inverted", recipe.ratio, guard=False))
    return Decision(layers, f"control: the best experts go, by {describe(criterion)}")


def _random(stats: CalibrationStats, recipe: Recipe, _align: int) -> Decision:
    shape = (len(stats.model.moe_layers), stats.model.n_expert)
    saliency = np.random.default_rng(recipe.seed).random(shape)
    layers, _ = drop_experts(stats, saliency, Recipe("random", recipe.ratio, guard=False))
    return Decision(layers, f"control: experts at random, seed {recipe.seed}")


def _global(stats: CalibrationStats, recipe: Recipe, align: int) -> Decision:
    """One budget of slices over all experts and layers; the shape over depth is found, not assumed."""
    criterion = neuron_criterion(slice_criterion(stats, recipe))
    return _slices(stats, recipe, align, criterion.measure(stats), describe(criterion))


def slice_criterion(stats: CalibrationStats, recipe: Recipe) -> str:
    """The name of the criterion that `auto` and `global` go by."""
    best = "obs" if recipe.method == "auto" and "obs" in stats.neurons else "gated-second-moment"
    return recipe.criterion or best


def _auto(stats: CalibrationStats, recipe: Recipe, align: int) -> Decision:
    """Global slices by OBS costs, for refitted weights: the best of what was measured on two models."""
    decision = _global(stats, recipe, align)
    if "obs" in stats.neurons or recipe.criterion:
        return decision
    return replace(decision, notes=("the stats hold no OBS costs: second moments decide", *decision.notes))


def residual_weights(stats: CalibrationStats) -> tuple[float, ...]:
    """What an error in a layer counts: the mean over tokens of 1 / squared length of the residual stream behind it,
    normalised to mean 1.

    The norms that read the stream divide by its length, so an error of the same size does less where the stream is longer,
    in deep layers. Token by token, because some models have single tokens whose stream is a hundred times as long. On the
    built-in model these weights are within a fifth of those that `sensitivity` measures.

    Raises GgufToolError for stats without these lengths.
    """
    if stats.residual_inverse is None:
        raise GgufToolError("--relative: the stats hold no lengths of the residual stream; calibrate again")
    weights = stats.residual_inverse / stats.residual_inverse.mean()
    return tuple(float(weight) for weight in weights)


def _random_slices(stats: CalibrationStats, recipe: Recipe, align: int) -> Decision:
    shape = stats.neurons["h_sq"].shape
    saliency = np.random.default_rng(recipe.seed).random(shape)
    return _slices(stats, recipe, align, saliency, f"control: slices of neurons at random, seed {recipe.seed}")


def _slices(stats: CalibrationStats, recipe: Recipe, align: int, saliency: Array, formula: str) -> Decision:
    weights = residual_weights(stats) if recipe.relative else recipe.layer_weights
    weighted = saliency
    if weights is not None:
        weighted = saliency * np.array(weights)[:, None, None]
        formula += f", times the weight of the layer ({', '.join(f'{weight:.2f}' for weight in weights)})"
    layers = keep_widths(stats, saliency, slice_widths(weighted, recipe, align))
    if not recipe.cut_router:
        return Decision(layers, formula)
    cut = tuple(leave_router(layer, stats.model) for layer in layers)
    gone = sum(len(old.router) - len(new.router) for old, new in zip(layers, cut, strict=True))
    note = f"{gone} experts without a neuron leave the router"
    if stats.model.n_group > 1:
        left = sum(width == 0 for layer in cut for width in layer.widths)
        note += f", {left} stay: each of its {stats.model.n_group} groups loses as many"
    return Decision(cut, formula, (note,))


def leave_router(layer: LayerPlan, facts: ModelFacts) -> LayerPlan:
    """The layer without the experts of width 0: the router then chooses among the others.

    As many stay in every group, enough to choose from; so some may stay that have no neuron.
    """
    size = _group_size(facts)
    groups: list[list[int]] = [[] for _ in range(facts.n_group)]
    for row in sorted(range(len(layer.router)), key=lambda row: -len(layer.retained[row])):
        groups[layer.router[row] // size].append(row)
    keep = max(_least_of_group(facts), *(sum(len(layer.retained[row]) > 0 for row in group) for group in groups))
    rows = sorted(row for group in groups for row in group[:keep])
    return LayerPlan(layer.index, tuple(layer.router[r] for r in rows), tuple(layer.retained[r] for r in rows))


def _group_size(facts: ModelFacts) -> int:
    """How many experts the router has in each of its groups."""
    if facts.n_expert % facts.n_group:
        raise GgufToolError(f"{facts.n_expert} experts do not divide into the router's {facts.n_group} groups")
    return facts.n_expert // facts.n_group


def _least_of_group(facts: ModelFacts) -> int:
    """How many experts of each group the router needs: those of a token, and two to rate a group by."""
    if facts.n_group == 1:
        return facts.n_expert_used
    return max(2, -(-facts.n_expert_used // facts.n_group_used))


def slice_widths(saliency: Array, recipe: Recipe, align: int) -> Ints:
    """Widths that keep the most value of `saliency` [L, E, K] where the recipe's ratio goes of these layers: [L, E]."""
    grid = width_grid(saliency.shape[2], align)
    neurons = int((1 - recipe.ratio) * saliency.size + 1e-6)
    return allocate(value_curves(saliency, grid), Budget(neurons, grid, recipe.max_tiers))


def _enp(stats: CalibrationStats, recipe: Recipe, align: int) -> Decision:
    """Every expert equally narrow."""
    criterion = neuron_criterion(recipe.criterion or "enp")
    facts = stats.model
    width = max(align, round((1 - recipe.ratio) * facts.n_ff_exp / align) * align)
    widths = np.full((len(facts.moe_layers), facts.n_expert), min(width, facts.n_ff_exp), dtype=np.int64)
    return Decision(keep_widths(stats, criterion.measure(stats), widths), describe(criterion))


def _tenp(stats: CalibrationStats, recipe: Recipe, align: int) -> Decision:
    """The most important experts stay whole, by a schedule over depth; the rest keep their best neurons by ENP."""
    facts = stats.model
    expert = EXPERT_CRITERIA["tenp-importance"]
    neuron = neuron_criterion(recipe.criterion or "enp")
    kept = 1 - recipe.ratio
    alpha = min(0.3, kept / 2) if recipe.whole is None else recipe.whole
    importance = tenp_importance(stats, recipe.mix)
    weights = SCHEDULES[recipe.schedule](recipe, len(facts.moe_layers))
    whole = whole_by_layer(round(alpha * importance.size), weights, facts.n_expert)
    is_whole = np.zeros(importance.shape, dtype=bool)
    for row, count in enumerate(whole):
        is_whole[row, np.argsort(-importance[row], kind="stable")[:count]] = True
    widths = _spread_rest(is_whole, importance, facts.n_ff_exp, kept, align, recipe.max_tiers)
    formula = f"whole: {describe(expert)}; neurons: {describe(neuron)}"
    notes = [
        f"alpha {alpha:.3g}: {is_whole.sum()} of {is_whole.size} experts stay whole, by layer {list(map(int, whole))} "
        f"({recipe.schedule})"
    ]
    if recipe.mix is not None:
        parts = (f"{weight:g} x {domain.name}" for weight, domain in zip(recipe.mix, stats.domains, strict=True))
        notes.append(f"importance is {' + '.join(parts)}")
    return Decision(keep_widths(stats, neuron.measure(stats), widths), formula, tuple(notes))


def _spread_rest(is_whole: np.ndarray, importance: Array, n_ff: int, kept: float, align: int, max_tiers: int) -> Ints:
    """Widths that give the experts which are not whole the same share beta of their neurons, up to one slice: [L, E].

    Where `max_tiers` leaves no room for that slice, all of them are equal and what is left of the budget is not used.
    """
    widths = np.where(is_whole, n_ff, 0).astype(np.int64)
    rest = ~is_whole
    if not rest.any():
        return widths
    budget = int(kept * widths.size * n_ff + 1e-6) - int(widths.sum())
    base = max(0, budget) // (int(rest.sum()) * align) * align
    base = min(base, n_ff)
    widths[rest] = base
    most = max(_count_tiers(row) for row in widths)
    if most > max_tiers:
        raise GgufToolError(
            f"--max-tiers {max_tiers}: tenp keeps some experts whole and others narrow, which are {most} widths in a "
            f"layer; take --max-tiers {most} or more, --whole 0, or --method enp"
        )
    left = budget - int(widths[rest].sum())
    order = np.argsort(np.where(rest, -importance, np.inf), axis=None, kind="stable")
    for flat in order[: int(rest.sum())]:
        step = min(align, n_ff - base)
        if step <= 0 or left < step:
            break
        row, expert = divmod(int(flat), widths.shape[1])
        widths[row, expert] += step
        if _count_tiers(widths[row]) > max_tiers:
            widths[row, expert] -= step
            continue
        left -= step
    return widths


def _count_tiers(row: Ints) -> int:
    """How many widths above zero a layer's experts have."""
    return len(np.unique(row[row > 0]))


def keep_widths(stats: CalibrationStats, saliency: Array, widths: Ints) -> tuple[LayerPlan, ...]:
    """Layers that keep every expert in the router, each with its `widths[l, e]` best neurons of `saliency` [L, E, K]."""
    rows = zip(stats.model.moe_layers, saliency, widths, strict=True)
    return tuple(keep_layer(index, values, own) for index, values, own in rows)


def keep_layer(index: int, saliency: Array, widths: Ints) -> LayerPlan:
    """The layer of decoder index `index` that keeps every expert, with its `widths[e]` best neurons of `saliency` [E, K]."""
    order = np.argsort(-saliency, axis=1, kind="stable")
    retained: tuple[Neurons, ...] = tuple(
        np.sort(best[:width]).astype(np.int64) for best, width in zip(order, widths, strict=True)
    )
    return LayerPlan(index, tuple(range(len(widths))), retained)


def describe(criterion: Criterion) -> str:
    """A criterion's name, formula and source in one line."""
    return f"{criterion.name} = {criterion.formula} ({criterion.source})"


def _drop_method(name: str) -> Method:
    criterion = EXPERT_CRITERIA[name]
    return Method(name, f"drop whole experts by {criterion.formula}", criterion.source, True, _drop_by(name))


METHODS = {
    method.name: method
    for method in (
        Method(
            "auto",
            "global slices by OBS costs, refitted: the best measured",
            "gguftool",
            False,
            _auto,
            refitted="sequential",
        ),
        Method("global", "one budget of neuron slices over all experts and layers", "gguftool", False, _global),
        Method(
            "tenp", "important experts whole, ENP on the rest, a schedule over depth", "arXiv 2606.09885", False, _tenp
        ),
        Method("enp", "every expert equally narrow, neurons by ENP", "arXiv 2606.09885", True, _enp),
        Method(
            "family", "drop whole experts by the criterion that fits the calibration data", FAMILY_PAPER, True, _family
        ),
        *(_drop_method(name) for name in EXPERT_CRITERIA if name != "tenp-importance"),
        Method(
            "dern",
            "drop whole experts by mean gate; `gguftool dern` merges their neurons into the rest",
            "arXiv 2509.10377",
            True,
            _dern,
        ),
        Method("random", "control: drop whole experts at random", "control", True, _random),
        Method("inverted", "control: drop the best whole experts", "control", True, _inverted),
        Method("random-slices", "control: one budget of slices at random", "control", False, _random_slices),
    )
}


def method(name: str) -> Method:
    """The method `name`; the free family triple `b,alpha,beta` drops whole experts by it."""
    if name.count(",") == 2:
        criterion = expert_criterion(name)
        return Method(name, f"drop whole experts by {criterion.formula}", criterion.source, True, _drop_by(name))
    return lookup(METHODS, name, "method")
