"""Recipe: what a user asks of a plan. A value; it is stored in the plan that it leads to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from .errors import GgufToolError

LAYOUTS = ("auto", "stock")
CALIBRATIONS = ("task", "general")
SCHEDULE_NAMES = ("trapezoid", "uniform", "reverse", "measured")


@dataclass(frozen=True)
class Recipe:
    """How to prune.

    Attributes:
        method: name in `methods.METHODS`.
        ratio: share of routed-expert parameters that goes, 0 <= ratio < 1.
        target: file type that the pruned model will be quantized to (Q4_K_M...); None keeps the base file's types.
        align: widths are multiples of this; None takes what the target type asks for.
        max_tiers: most widths above zero in a layer.
        layout: "stock" wants a file for any llama.cpp: one width, one number of experts everywhere.
        criterion: overrides the method's criterion (an expert or a neuron criterion, by the method).
        whole: TENP's alpha, share of experts kept whole; None takes min(0.3, half of what is kept).
        depth: TENP's weights of the first and the last layer for whole experts, where the schedule is a trapezoid.
        schedule: how TENP's whole experts are shared out over depth, a name in `schedules.SCHEDULES`.
        mix: TENP's weights of the calibration texts, one for each; None weighs them alike.
        layer_weights: measured weights of the MoE layers by rising depth, from `sensitivity`; None weighs them alike. They
            multiply the values of a slice method; of TENP they are the weights of the schedule "measured".
        calibration: what the calibration texts are, "task" or "general": picks the criterion of the method `family`.
        relative: slices count a layer's errors relative to the length of its residual stream (`methods.residual_weights`).
        cut_router: experts that keep no neuron leave the router too, instead of being chosen and adding nothing.
        guard: protect super experts from whole-expert drops.
        seed: of the random controls.
        imatrix: `quantize` will be given the stats, on which some targets' types depend.
    """

    method: str
    ratio: float
    target: str | None = None
    align: int | None = None
    max_tiers: int = 4
    layout: str = "auto"
    criterion: str | None = None
    whole: float | None = None
    depth: tuple[float, float] = (1.0, 2.0)
    schedule: str = "trapezoid"
    mix: tuple[float, ...] | None = None
    layer_weights: tuple[float, ...] | None = None
    calibration: str = "task"
    relative: bool = False
    cut_router: bool = False
    guard: bool = True
    seed: int = 0
    imatrix: bool = True

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            if type(getattr(self, name)) not in kinds:
                raise GgufToolError(
                    f"the recipe's {name} is {str(getattr(self, name))[:40]!r}, not {kinds[0].__name__}"
                )
        if not 0.0 <= self.ratio < 1.0:  # nan is not either
            raise GgufToolError(
                f"--ratio {self.ratio:g} (1 - --keep) is not a share from 0 up to, but without, 1: write 40 % as 0.4"
            )
        if self.whole is not None and not 0.0 <= self.whole <= 1.0 - self.ratio:
            raise GgufToolError(
                f"--whole {self.whole}: at --ratio {self.ratio} at most {1 - self.ratio:.3g} of the experts can stay whole"
            )
        if self.max_tiers < 1:
            raise GgufToolError(f"--max-tiers {self.max_tiers} is less than 1")
        if self.align is not None and self.align < 1:
            raise GgufToolError(f"--align {self.align} is less than 1")
        if self.seed < 0:
            raise GgufToolError(f"--seed {self.seed} is less than 0")
        if self.layout not in LAYOUTS:
            raise GgufToolError(f"--layout {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.calibration not in CALIBRATIONS:
            raise GgufToolError(f"--calibration {self.calibration!r} is not one of {', '.join(CALIBRATIONS)}")
        if self.schedule not in SCHEDULE_NAMES:
            raise GgufToolError(f"--schedule {self.schedule!r} is not one of {', '.join(SCHEDULE_NAMES)}")
        if len(self.depth) != 2 or not are_weights(self.depth):
            raise GgufToolError(
                f"--depth {':'.join(map(str, self.depth))} needs two finite weights of 0 or more, one above 0"
            )
        for name, weights in (("--mix", self.mix), ("the weights of the layers", self.layer_weights)):
            if weights is not None and not are_weights(weights):
                raise GgufToolError(
                    f"{name}: {','.join(map(str, weights))} are not finite weights of 0 or more, one above 0"
                )


# A recipe may come out of a file: what each field may be, the usual kind first.
_OR_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "method": (str,), "ratio": (float, int), "target": (str, _OR_NONE), "align": (int, _OR_NONE), "max_tiers": (int,),
    "layout": (str,), "criterion": (str, _OR_NONE), "whole": (float, int, _OR_NONE), "depth": (tuple,),
    "schedule": (str,), "mix": (tuple, _OR_NONE), "layer_weights": (tuple, _OR_NONE), "calibration": (str,),
    "relative": (bool,), "cut_router": (bool,), "guard": (bool,), "seed": (int,), "imatrix": (bool,),
}  # fmt: skip


def are_weights(values: Sequence[float]) -> bool:
    """Whether these are finite numbers of 0 or more, one of them above 0."""
    return all(isfinite(value) and value >= 0 for value in values) and any(value > 0 for value in values)
