"""From a plan to the tensors of the file: which layout, which tensors, which shapes. Pure.

`stock` runs on any llama.cpp; `tiered` replaces an expert stack of a layer by one stack for each width, with a map from
experts to tiers. Both the planner (before anything is written) and the writer take their shapes from here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from .errors import GgufToolError
from .plan import STOCK, TIERED, LayerPlan, PrunePlan, Tier
from .tensors import BLOCKS, TensorSpec

_NAME = re.compile(
    r"blk\.(?P<layer>\d+)\.(?:ffn_(?P<part>gate|up|down|gate_up)_exps(?:\.(?P<tier>\d+))?\.(?P<suffix>weight|bias|scale|input_scale)"
    r"|(?P<router>ffn_gate_inp\.weight|ffn_gate_inp\.bias|exp_probs_b(?:_vl)?(?:\.bias)?)|(?P<map>ffn_exps_tier\.weight))$"
)


@dataclass(frozen=True)
class ExpertName:
    """A tensor name that belongs to the routed experts of a layer. `role` is gate, up, down, gate_up, router or map."""

    layer: int
    role: str
    tier: int | None = None
    suffix: str = "weight"


def parse(name: str) -> ExpertName | None:
    """What `name` is to the routed experts, or None for a tensor that pruning leaves alone."""
    match = _NAME.match(name)
    if match is None:
        return None
    role = match["part"] or ("router" if match["router"] else "map")
    tier = None if match["tier"] is None else int(match["tier"])
    return ExpertName(int(match["layer"]), role, tier, match["suffix"] or "weight")


def full_shape(name: str, ne: tuple[int, ...]) -> tuple[int, ...]:
    """`ne` with the ones that llama.cpp leaves off its end: the stack of a tier of one expert is still a stack."""
    parsed = parse(name)
    ranks = {"weight": 3, "bias": 2, "scale": 1, "input_scale": 1}
    rank = 2 if parsed and parsed.role == "map" else ranks[parsed.suffix] if parsed and parsed.role != "router" else 0
    return ne + (1,) * (rank - len(ne))


def tier_name(layer: int, role: str, tier: int, suffix: str = "weight") -> str:
    """Name of one tier's stack."""
    return f"blk.{layer}.ffn_{role}_exps.{tier}.{suffix}"


def map_name(layer: int) -> str:
    """Name of a layer's tier map: I32, ne = [experts, tiers], the index of an expert inside a tier or -1."""
    return f"blk.{layer}.ffn_exps_tier.weight"


def decide(plan: PrunePlan, base: Sequence[TensorSpec], tied: tuple[str, ...], whole: Container[int]) -> str:
    """`stock` where every llama.cpp can read the result, else `tiered`.

    Args:
        base: every tensor of the unpruned file.
        tied, whole: as `bystanders` takes them.

    Raises GgufToolError where the recipe wants a stock file and there can be none.
    """
    if not plan.uniform:
        return TIERED
    others = bystanders(plan, base, tied, whole)
    if others and plan.recipe.layout == STOCK:
        raise GgufToolError(
            f"{others[0]} would have to change with the experts, because a stock file says their number and width once; "
            "leave --layout stock out"
        )
    return TIERED if others else STOCK


def bystanders(
    plan: PrunePlan, base: Sequence[TensorSpec], tied: tuple[str, ...], whole: Container[int]
) -> tuple[str, ...]:
    """Tensors that a uniform plan does not prune, but whose size a stock file would change with the experts'.

    Args:
        tied: how names of tensors end that llama.cpp sizes by the experts' width: of shared experts or dense layers.
        whole: layers with experts that the plan does not know; they stay as they are.
    """
    if all(untouched(layer, plan) for layer in plan.layers):
        return ()
    names = [spec.name for spec in base]
    found = [name for name in names if (parsed := parse(name)) and parsed.layer in whole]
    if plan.layers[0].widths[0] != plan.n_ff_exp:
        found += [name for name in names if name.endswith(tied)]
    return tuple(found)


def check_routers(plan: PrunePlan, base: Sequence[TensorSpec], n_group: int) -> None:
    """Raises GgufToolError where experts leave a router that tells them by their number.

    Args:
        base: every tensor of the unpruned file.
        n_group: equal groups of neighbouring experts that the router picks from; it tells them by their size.
    """
    for layer in plan.layers:
        found = Counter(expert * n_group // plan.n_expert for expert in layer.router)
        if len(found) < n_group or len(set(found.values())) > 1:
            by_group = [found[group] for group in range(min(n_group, plan.n_expert))]
            raise GgufToolError(
                f"layer {layer.index}: the router has {n_group} groups and the plan keeps {by_group} experts of them; "
                "groups must stay equal"
            )
    table = hash_table(base)
    if table and any(len(layer.router) != plan.n_expert for layer in plan.layers):
        raise GgufToolError(
            f"{table} routes tokens by a table of expert ids: no expert can be dropped, only narrowed; take a method that "
            "does not drop whole experts"
        )


def hash_table(base: Sequence[TensorSpec]) -> str | None:
    """The first tensor that routes tokens to experts by a table of their ids (llama.cpp's `ffn_gate_tid2eid`)."""
    return next((spec.name for spec in base if "ffn_gate_tid2eid" in spec.name), None)


def untouched(layer: LayerPlan, plan: PrunePlan) -> bool:
    """Whether a layer keeps every expert and every neuron, so that its tensors stay as they are."""
    return len(layer.router) == plan.n_expert and all(width == plan.n_ff_exp for width in layer.widths)


def down_type(base_type: str, width: int, twin: str) -> str:
    """Type of a down stack with rows of `width`: the base file's where its blocks fit, else `twin`."""
    return base_type if width % BLOCKS[base_type][0] == 0 else twin


@dataclass(frozen=True)
class Piece:
    """One tensor of the pruned file and where it comes from.

    `source` is the base tensor; None for a tier map. `tier` is None where the tensor is copied, or only loses experts.
    """

    spec: TensorSpec
    source: TensorSpec | None
    layer: LayerPlan | None = None
    tier: Tier | None = None


def pieces(
    plan: PrunePlan,
    base: Sequence[TensorSpec],
    twins: dict[str, str],
    *,
    layout: str,
    whole: Container[int] = (),
) -> tuple[Piece, ...]:
    """Every tensor of the pruned file, in the base file's order, a layer's tier map before its first tier.

    Args:
        base: every tensor of the unpruned file.
        twins: 32-block type of about the same size, for a type whose blocks do not fit a width.
        layout: what `decide` said.
        whole: layers that the plan need not know; they stay as they are.

    Raises:
        GgufToolError: the base is not the model that the plan was made for, or was pruned before.
    """
    plan.check()
    layers = {layer.index: layer for layer in plan.layers}
    stock = layout == STOCK
    out: list[Piece] = []
    used: set[int] = set()
    for spec in base:
        name = parse(spec.name)
        if name is None:
            out.append(Piece(spec, spec))
            continue
        if name.tier is not None or name.role == "map":
            raise GgufToolError(f"{spec.name}: the base file is tiered already; prune the unpruned file")
        if name.layer not in layers and name.layer in whole:
            out.append(Piece(spec, spec))
            continue
        if name.layer not in layers:
            raise GgufToolError(f"{spec.name}: the plan has no layer {name.layer}; it was made for another model")
        layer = layers[name.layer]
        _check_source(spec, name, plan)
        if untouched(layer, plan):
            out.append(Piece(spec, spec))
        elif name.role == "router":
            out.append(Piece(_with_experts(spec, len(layer.router)), spec, layer))
        elif stock:
            out.append(_stack(spec, name, layer, layer.tiers()[0], twins, None))
        else:
            if layer.index not in used:
                ne = (len(layer.router), len(layer.tiers()))
                out.append(Piece(TensorSpec(map_name(layer.index), ne, "I32"), None, layer))
            out.extend(_tier_pieces(spec, name, layer, twins))
        if name.role != "router":
            used.add(layer.index)
    if missing := sorted(set(layers) - used):
        raise GgufToolError(f"the base file has no experts in layer {missing[0]}, which the plan prunes")
    return tuple(out)


def _tier_pieces(spec: TensorSpec, name: ExpertName, layer: LayerPlan, twins: dict[str, str]) -> Iterator[Piece]:
    for index, tier in enumerate(layer.tiers()):
        yield _stack(spec, name, layer, tier, twins, index)


def _stack(
    spec: TensorSpec, name: ExpertName, layer: LayerPlan, tier: Tier, twins: dict[str, str], index: int | None
) -> Piece:
    """One tier's stack of one projection; `index` None for the only stack of a stock layer."""
    width, count, kind = tier.width, len(tier.rows), spec.type
    if name.suffix == "weight":
        if name.role == "down":
            kind = down_type(spec.type, width, twins.get(spec.type, "F16"))
            ne: tuple[int, ...] = (width, spec.ne[1], count)
        else:
            ne = (spec.ne[0], width * (2 if name.role == "gate_up" else 1), count)
    elif name.suffix == "bias":
        length = spec.ne[0] if name.role == "down" else width * (2 if name.role == "gate_up" else 1)
        ne = (length, count)
    else:
        ne = (count,)
    out = spec.name if index is None else tier_name(name.layer, name.role, index, name.suffix)
    return Piece(TensorSpec(out, ne, kind), spec, layer, tier)


def n_entries(ne: tuple[int, ...]) -> int:
    """For how many experts a router's tensor has entries; a bias may come as [experts, 1]."""
    return ne[_expert_axis(ne)]


def _expert_axis(ne: tuple[int, ...]) -> int:
    return max((i for i, n in enumerate(ne) if n > 1), default=0)


def _with_experts(spec: TensorSpec, count: int) -> TensorSpec:
    axis = _expert_axis(spec.ne)
    return TensorSpec(spec.name, (*spec.ne[:axis], count, *spec.ne[axis + 1 :]), spec.type)


def _check_source(spec: TensorSpec, name: ExpertName, plan: PrunePlan) -> None:
    width = {"gate": 1, "up": 1, "gate_up": 2}.get(name.role)
    have = n_entries(spec.ne) if name.role == "router" else spec.ne[-1]
    if have != plan.n_expert:
        raise GgufToolError(f"{spec.name} has {have} experts, the plan {plan.n_expert}: it is for another model")
    if name.suffix != "weight" or name.role == "router":
        return
    have = spec.ne[0] if width is None else spec.ne[1] // width
    if have != plan.n_ff_exp:
        raise GgufToolError(
            f"{spec.name} has experts of width {have}, the plan {plan.n_ff_exp}: it is for another model"
        )
