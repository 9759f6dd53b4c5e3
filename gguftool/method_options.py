"""Whether a recipe's options mean something to its method and to the stats: what would be ignored without a word is refused."""

from __future__ import annotations

from .errors import GgufToolError
from .recipe import Recipe
from .stats import CalibrationStats

# What only TENP reads.
TENP_ONLY = ("whole", "depth", "schedule", "mix")
# What takes measured weights of the layers besides TENP.
WEIGHED = ("auto", "global")


def check_options(recipe: Recipe) -> None:
    """Raises GgufToolError for options that the recipe's method would ignore without a word."""
    if recipe.method == "tenp":
        _check_schedule(recipe)
    else:
        if asked := [name for name in TENP_ONLY if _is_asked(recipe, name)]:
            raise GgufToolError(f"--{asked[0]} is only for tenp, not for {recipe.method}")
        if recipe.layer_weights is not None and recipe.method not in WEIGHED:
            raise GgufToolError(f"--layers is only for {', '.join(WEIGHED)} and tenp, not for {recipe.method}")
    if recipe.relative and (recipe.method not in WEIGHED or recipe.layer_weights is not None):
        raise GgufToolError(f"--relative is for {' and '.join(WEIGHED)}, in place of --layers")
    if recipe.cut_router and recipe.method not in (*WEIGHED, "random-slices"):
        raise GgufToolError(
            f"--cut-router is for slices of neurons, which may leave experts none; {recipe.method} takes none"
        )
    if recipe.method != "family" and recipe.calibration != "task":
        raise GgufToolError(f"--calibration picks the criterion of family; {recipe.method} has its own")
    if recipe.method == "family" and recipe.criterion is not None:
        raise GgufToolError("--criterion: family picks its own by --calibration; to name one, take it as the method")
    if recipe.criterion is not None and recipe.method in ("random", "random-slices"):
        raise GgufToolError(f"--criterion: {recipe.method} takes none")


def _check_schedule(recipe: Recipe) -> None:
    measured = recipe.schedule == "measured"
    if measured and recipe.layer_weights is None:
        raise GgufToolError(
            "--schedule measured needs weights: `gguftool sensitivity` measures them, `gguftool plan --layers` takes them"
        )
    if recipe.layer_weights is not None and not measured:
        raise GgufToolError(f"--layers: tenp takes them by --schedule measured, not {recipe.schedule}")
    if _is_asked(recipe, "depth") and recipe.schedule in ("uniform", "measured"):
        raise GgufToolError(f"--depth: the schedule {recipe.schedule} has no ends; it is for trapezoid and reverse")
    if recipe.whole == 0 and (asked := [name for name in ("depth", "schedule") if _is_asked(recipe, name)]):
        raise GgufToolError(f"--{asked[0]} shares out whole experts, and --whole 0 keeps none")


def _is_asked(recipe: Recipe, name: str) -> bool:
    return bool(getattr(recipe, name) != Recipe.__dataclass_fields__[name].default)


def check_lengths(stats: CalibrationStats, recipe: Recipe) -> None:
    """Raises GgufToolError where the recipe weighs another number of texts or layers than the stats hold."""
    if recipe.mix is not None and len(recipe.mix) != len(stats.domains):
        raise GgufToolError(
            f"--mix has {len(recipe.mix)} weights, the stats hold {len(stats.domains)} calibration texts "
            f"({', '.join(domain.name for domain in stats.domains)})"
        )
    n_layers = len(stats.model.moe_layers)
    if recipe.layer_weights is not None and len(recipe.layer_weights) != n_layers:
        raise GgufToolError(f"{len(recipe.layer_weights)} weights of layers for {n_layers} layers with experts")
