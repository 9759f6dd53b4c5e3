"""Sensitivity: what pruning each layer alone costs the whole model, measured, and the layer weights that follow. Pure.

A criterion compares neurons inside a layer, but says little of layers against each other: the same value lost in one layer
may cost the model ten times what it costs in another. So each layer is pruned alone (`probe` does it) and the KL divergence
from the base is put beside the value that the criterion says is lost:

    slice methods   w_l = KL_l / lost_l, so that w_l times a value is in nats and layers can be compared (mean 1)
    TENP            w_l = KL_l, for the share of whole experts (mean 1)

TENP narrows the experts of every layer alike, so what it loses in a layer goes with KL_l itself; and its importance is
normalised in each layer, so it has no value to divide by. Whole experts in proportion to KL_l are the best allocation where
what n whole experts save in a layer grows like KL_l log n: the first ones save most, being the most important.

The probes are not refitted. OBS costs say what is lost behind a refit, so with them the weights are a proxy, too large for
layers in which a refit brings much.

On disk: JSON with a format version and the fingerprints of what it was measured on, a line for each layer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from .durable import write_text
from .errors import GgufToolError
from .methods import keep_layer, slice_criterion, slice_widths
from .plan import PrunePlan
from .planner import fingerprint, make_plan
from .recipe import Recipe
from .saliency import neuron_criterion
from .stats import CalibrationStats
from .strict_json import GARBLED, parse, text, whole

FORMAT = "gguftool.layers"
VERSION = 1


@dataclass(frozen=True)
class LayerCost:
    """What pruning one layer alone cost.

    Attributes:
        layer: its decoder index.
        kld, kld_err: mean KL(base || pruned) in nats over the scored tokens, and its standard error.
        lost: value of the neurons that went, by the criterion and in its units (sums over the calibration tokens).
    """

    layer: int
    kld: float
    kld_err: float
    lost: float


@dataclass(frozen=True)
class Conditions:
    """What the costs were measured on; costs under other conditions cannot stand beside them.

    Attributes:
        model_name, model_fingerprint: the checkpoint. stats_fingerprint: sha256 of what its stats held.
        base_bytes: size of the base GGUF.
        moe_layers: decoder index of every layer with experts.
        ratio: share of one layer's routed parameters that went. criterion, align, max_tiers: how.
        text, text_sha256: name of the text and sha256 of its UTF-8 bytes.
        n_ctx, windows, backend: tokens in a window, how many windows were asked for (None: all), what it ran on.
    """

    model_name: str
    model_fingerprint: str
    stats_fingerprint: str
    base_bytes: int
    moe_layers: tuple[int, ...]
    ratio: float
    criterion: str
    align: int
    max_tiers: int
    text: str
    text_sha256: str
    n_ctx: int
    windows: int | None
    backend: str

    @property
    def recipe(self) -> Recipe:
        """By which one layer was pruned."""
        return Recipe("global", self.ratio, criterion=self.criterion, align=self.align, max_tiers=self.max_tiers)


@dataclass(frozen=True)
class Sensitivity:
    """The costs of the layers measured so far, by rising depth."""

    conditions: Conditions
    costs: tuple[LayerCost, ...] = ()

    @property
    def missing(self) -> tuple[int, ...]:
        """Decoder indices of the layers that were not measured yet."""
        done = {cost.layer for cost in self.costs}
        return tuple(layer for layer in self.conditions.moe_layers if layer not in done)

    def with_costs(self, more: tuple[LayerCost, ...]) -> Sensitivity:
        """With further layers."""
        return replace(self, costs=tuple(sorted((*self.costs, *more), key=lambda cost: cost.layer)))

    def weights(self) -> tuple[float, ...]:
        """KL / lost value of each measured layer, of mean 1. A layer that lost no value says nothing and gets the mean."""
        return _of_mean_one([cost.kld / cost.lost if cost.lost > 0 else None for cost in self.costs])

    def shares(self) -> tuple[float, ...]:
        """KL of each measured layer, of mean 1."""
        return _of_mean_one([cost.kld for cost in self.costs])

    def check(self) -> None:
        """Raises GgufToolError for layers that there are not, or twice, and for numbers that cannot be."""
        layers = [cost.layer for cost in self.costs]
        if sorted(set(layers)) != layers or not set(layers) <= set(self.conditions.moe_layers):
            raise GgufToolError(f"costs of the layers {layers}; the model has experts in {self.conditions.moe_layers}")
        for cost in self.costs:
            values = (cost.kld, cost.kld_err, cost.lost)
            if not all(isfinite(value) and value >= 0 for value in values):
                raise GgufToolError(f"layer {cost.layer}: {values} are not costs of 0 or more")

    def dumps(self) -> str:
        """The JSON text, a line for each layer; `weight` stands there for people and is not read."""
        head = {"format": FORMAT, "version": VERSION, **asdict(self.conditions)}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = [asdict(cost) | {"weight": w} for cost, w in zip(self.costs, self.weights(), strict=True)]
        layers = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        return "{\n" + "\n".join(lines) + f'\n "layers": [\n{layers}\n ]\n}}\n'

    def save(self, path: Path) -> None:
        """Writes the JSON to `path`, in one step."""
        write_text(path, self.dumps())

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads and checks costs. Raises GgufToolError for a file that is missing, damaged or something else."""
        if not path.is_file():
            raise GgufToolError(f"{path}: no such file; `gguftool sensitivity` measures layers")
        try:
            raw = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GgufToolError(
                f"{path}: not measured layers ({error}); `gguftool sensitivity` measures them"
            ) from error
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise GgufToolError(f"{path}: not measured layers; `gguftool sensitivity` measures them")
        if (version := raw.pop("version", None)) != VERSION:
            raise GgufToolError(
                f"{path}: layers of version {version}, this gguftool reads {VERSION}; measure them again"
            )
        try:
            found = _from_json(raw)
        except GARBLED as error:
            raise GgufToolError(f"{path}: lacks or garbles {error}; measure the layers again") from error
        found.check()
        return found


def _from_json(raw: dict[str, Any]) -> Sensitivity:
    costs = tuple(
        LayerCost(whole(row["layer"], "layer"), float(row["kld"]), float(row["kld_err"]), float(row["lost"]))
        for row in raw.pop("layers")
    )
    for name in ("model_name", "model_fingerprint", "stats_fingerprint", "criterion", "text", "text_sha256", "backend"):
        text(raw[name], name)
    for name in ("base_bytes", "align", "max_tiers", "n_ctx"):
        whole(raw[name], name)
    if raw["windows"] is not None:
        whole(raw["windows"], "windows")
    layers = tuple(whole(index, "moe_layers") for index in raw["moe_layers"])
    return Sensitivity(Conditions(**{**raw, "ratio": float(raw["ratio"]), "moe_layers": layers}), costs)


def _of_mean_one(values: list[float | None]) -> tuple[float, ...]:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return tuple(1.0 if value is None or mean == 0 else value / mean for value in values)


def conditions(stats: CalibrationStats, recipe: Recipe, **measured_on: Any) -> Conditions:
    """Those of probing a model with `recipe` (of the method global); `measured_on` are the fields about base and text.

    Raises GgufToolError for a recipe by which nothing can be planned, or by which nothing goes.
    """
    if recipe.ratio == 0:
        raise GgufToolError("--ratio 0 prunes nothing, which costs nothing in any layer")
    facts = stats.model
    align = make_plan(stats, recipe).recipe.align
    assert align is not None
    return Conditions(
        facts.name, facts.fingerprint, fingerprint(stats), moe_layers=facts.moe_layers, ratio=recipe.ratio,
        criterion=slice_criterion(stats, recipe), align=align, max_tiers=recipe.max_tiers, **measured_on,
    )  # fmt: skip


def layer_plan(stats: CalibrationStats, whole: PrunePlan, recipe: Recipe, layer: int) -> tuple[PrunePlan, float]:
    """The plan that prunes one layer alone, by its decoder index, and the value that the criterion loses by it.

    `whole` is the plan that keeps everything, `recipe` the `Conditions.recipe`.
    """
    assert recipe.align is not None
    row = stats.model.moe_layers.index(layer)
    saliency = neuron_criterion(slice_criterion(stats, recipe)).measure(stats)[row]
    widths = slice_widths(saliency[None], recipe, recipe.align)[0]
    # As `tiers` counts: a neuron of negative value costs nothing when it goes.
    values = -np.sort(-np.maximum(saliency, 0.0), axis=1)
    lost = sum(float(own[width:].sum()) for own, width in zip(values, widths, strict=True))
    layers = (*whole.layers[:row], keep_layer(layer, saliency, widths), *whole.layers[row + 1 :])
    # Its layout is not that of the whole model's plan; the writer decides.
    plan = replace(whole, recipe=recipe, layers=layers, notes=(f"layer {layer} alone",), layout="", tensors=())
    plan.check()
    return plan, lost


def weighted(found: Sensitivity, stats: CalibrationStats, recipe: Recipe) -> Recipe:
    """The recipe with the measured weights of the layers, those that its method takes.

    Raises GgufToolError for costs of another model, for layers that were not measured, and where the recipe goes by
    another criterion than the costs: the value lost is in that criterion's units.
    """
    known = found.conditions
    if known.model_fingerprint != stats.model.fingerprint or known.moe_layers != stats.model.moe_layers:
        raise GgufToolError(
            f"the layers were measured on {known.model_name} ({known.model_fingerprint[:12]}), the stats are of "
            f"{stats.model.name} ({stats.model.fingerprint[:12]})"
        )
    if found.missing:
        raise GgufToolError(
            f"the layers {', '.join(map(str, found.missing))} were not measured; go on with `sensitivity`"
        )
    if recipe.method == "tenp":
        return replace(recipe, layer_weights=found.shares())
    criterion = slice_criterion(stats, recipe)
    if recipe.method in ("auto", "global") and criterion != known.criterion:
        raise GgufToolError(
            f"the layers were measured by {known.criterion}, {recipe.method} goes by {criterion}: measure them with "
            f"--criterion {criterion}, or plan with --criterion {known.criterion}"
        )
    return replace(recipe, layer_weights=found.weights())
