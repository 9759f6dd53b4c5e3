"""What a pruned GGUF says of itself: the `gguftool.*` keys, written by the writer, read by everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGUFValueType as V

from . import __version__
from .errors import GgufToolError
from .gguf_file import GgufFile, KeyValue
from .layout import map_name
from .plan import LayerPlan, PrunePlan, pack_mask, unpack_mask

KEY = "gguftool."
FILE_VERSION = 1
# Rises when a criterion of the same name starts to choose differently.
FORMULA_VERSION = 1


@dataclass(frozen=True)
class Cut:
    """Which experts and neurons of the unpruned model a file holds."""

    method: str
    n_expert: int
    n_ff_exp: int
    layers: tuple[LayerPlan, ...]


def entries(plan: PrunePlan, layout: str) -> dict[str, KeyValue]:
    """The keys that describe `plan`. The kept neurons are one hexadecimal string: masks of every expert, in order."""
    layers = plan.layers
    masks = "".join(pack_mask(neurons, plan.n_ff_exp).hex() for layer in layers for neurons in layer.retained)
    recipe = plan.recipe
    return {
        f"{KEY}version": KeyValue(FILE_VERSION, V.UINT32),
        f"{KEY}tool_version": KeyValue(__version__, V.STRING),
        f"{KEY}layout": KeyValue(layout, V.STRING),
        f"{KEY}method": KeyValue(recipe.method, V.STRING),
        f"{KEY}formula": KeyValue(plan.formula, V.STRING),
        f"{KEY}formula_version": KeyValue(FORMULA_VERSION, V.UINT32),
        f"{KEY}ratio": KeyValue(1 - plan.kept_share, V.FLOAT32),
        f"{KEY}base.name": KeyValue(plan.model_name, V.STRING),
        f"{KEY}base.fingerprint": KeyValue(plan.model_fingerprint, V.STRING),
        f"{KEY}kept_hash": KeyValue(plan.kept_hash, V.STRING),
        f"{KEY}n_expert": KeyValue(plan.n_expert, V.UINT32),
        f"{KEY}n_ff_exp": KeyValue(plan.n_ff_exp, V.UINT32),
        f"{KEY}moe_layers": _u32([layer.index for layer in layers]),
        f"{KEY}router_counts": _u32([len(layer.router) for layer in layers]),
        f"{KEY}router": _u32([expert for layer in layers for expert in layer.router]),
        f"{KEY}widths": _u32([width for layer in layers for width in layer.widths]),
        f"{KEY}kept": KeyValue(masks, V.STRING),
        **_dataset(plan),
    }


def _dataset(plan: PrunePlan) -> dict[str, KeyValue]:
    if not plan.dataset:
        return {}
    names, tokens = zip(*plan.dataset, strict=True)
    return {
        f"{KEY}dataset.names": KeyValue(list(names), V.ARRAY, V.STRING),
        f"{KEY}dataset.tokens": _u32(list(tokens)),
    }


def _u32(values: Sequence[int]) -> KeyValue:
    return KeyValue(list(values), V.ARRAY, V.UINT32)


def read(file: GgufFile) -> Cut | None:
    """What was cut from a file; None for a file that gguftool did not prune.

    Raises GgufToolError where the keys contradict each other.
    """
    version = file.value(f"{KEY}version", None)
    if version is None:
        return None
    if version != FILE_VERSION:
        raise GgufToolError(
            f"{file.path}: pruned by a gguftool with file version {version}; this one reads {FILE_VERSION}"
        )
    n_expert, n_ff = file.integer(f"{KEY}n_expert"), file.integer(f"{KEY}n_ff_exp")
    try:
        layers = _layers(file, n_expert, n_ff)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise GgufToolError(f"{file.path}: its gguftool keys contradict each other: {error}") from error
    return Cut(str(file.value(f"{KEY}method")), n_expert, n_ff, layers)


def _layers(file: GgufFile, n_expert: int, n_ff: int) -> tuple[LayerPlan, ...]:
    counts = list(file.value(f"{KEY}router_counts"))
    router = list(file.value(f"{KEY}router"))
    widths = list(file.value(f"{KEY}widths"))
    indices = list(file.value(f"{KEY}moe_layers"))
    masks = bytes.fromhex(file.value(f"{KEY}kept"))
    size = -(-n_ff // 8)
    total = sum(counts)
    if len(indices) != len(counts) or len(router) != total or len(widths) != total or len(masks) != total * size:
        raise ValueError(f"{total} experts, {len(router)} ids, {len(widths)} widths, {len(masks)} mask bytes")
    if not all(0 <= expert < n_expert for expert in router):
        raise ValueError(f"an expert's id is not below {n_expert}")
    neurons = [unpack_mask(masks[i * size : (i + 1) * size], n_ff) for i in range(total)]
    if [len(kept) for kept in neurons] != widths:
        raise ValueError("widths and masks differ")
    layers, start = [], 0
    for index, count in zip(indices, counts, strict=True):
        rows = slice(start, start + count)
        layers.append(LayerPlan(int(index), tuple(int(e) for e in router[rows]), tuple(neurons[rows])))
        start += count
    return tuple(layers)


def tier_map(layer: LayerPlan) -> np.ndarray:
    """The map of a tiered layer: int32 [tiers, experts], an expert's index inside a tier or -1."""
    tiers = layer.tiers()
    out = np.full((len(tiers), len(layer.router)), -1, dtype=np.int32)
    for index, tier in enumerate(tiers):
        out[index, list(tier.rows)] = np.arange(len(tier.rows))
    return out


def read_tier_map(file: GgufFile, layer: int) -> np.ndarray | None:
    """The tier map of a layer, int32 [tiers, experts], or None for a layer without one.

    Raises GgufToolError where an expert is in two tiers or a tier's indices are not 0, 1, 2...
    """
    spec = next((t for t in file.tensors if t.name == map_name(layer)), None)
    if spec is None:
        return None
    if spec.type != "I32" or len(spec.ne) > 2:
        raise GgufToolError(f"{file.path}: {spec.name} is {spec.type} {spec.ne}, not I32 [experts, tiers]")
    found = file.ints(spec).reshape(-1, spec.ne[0])
    for tier, row in enumerate(found):
        members = np.sort(row[row >= 0])
        if (row < -1).any() or not np.array_equal(members, np.arange(len(members))):
            raise GgufToolError(f"{file.path}: {spec.name}: the indices of tier {tier} are not 0 to {len(members) - 1}")
    if ((found >= 0).sum(axis=0) > 1).any():
        raise GgufToolError(f"{file.path}: {spec.name}: an expert is in two tiers")
    return found
