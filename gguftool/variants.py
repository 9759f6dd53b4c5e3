"""Variants: what a sweep compares, written as NAME or NAME+refit. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import GgufToolError
from .methods import METHODS, method
from .plan import PrunePlan
from .recipe import Recipe

# What may follow a method's name -> what `pipeline.build` is told by `refit`.
MODIFIERS = {"": "", "+refit": "plain", "+refit=sequential": "sequential"}


@dataclass(frozen=True)
class Variant:
    """A method, and whether and how it is refitted. `name` is how it was written."""

    name: str
    method: str
    refit: str = ""

    @property
    def is_control(self) -> bool:
        """Whether it is there to be beaten: pruning at random, or the wrong way round."""
        known = METHODS.get(self.method)
        return known is not None and known.source == "control"

    def recipe(self, ratio: float, target: str | None, seed: int) -> Recipe:
        """What `planner.make_plan` is asked; the seed is that of the random controls."""
        return Recipe(self.method, ratio, target=target, seed=seed)

    def check(self, plan: PrunePlan, norm_topk: bool | None) -> None:
        """Raises GgufToolError where the plan leaves a refit nothing to do: it drops whole experts only, and the weights of
        the others add up to 1 all the same (`norm_topk`)."""
        whole = all(width == plan.n_ff_exp for layer in plan.layers for width in layer.widths)
        if not self.refit or not whole or not plan.drops_experts:
            return
        if self.method == "dern":
            raise GgufToolError(
                f"--method {self.name}: dern makes weights of its own, and a model takes one set of them"
            )
        if norm_topk is not False:
            raise GgufToolError(
                f"--method {self.name}: {self.method} drops whole experts and narrows none, so there is nothing to refit"
            )


def parse_variant(text: str) -> Variant:
    """The variant that `text` names: NAME or a family triple b,alpha,beta, with or without a modifier behind it.

    Raises GgufToolError, with near names, for a method or a modifier that there is not.
    """
    name, plus, rest = text.strip().partition("+")
    if (modifier := plus + rest) not in MODIFIERS:
        known = ", ".join(repr(f"{name}{end}") for end in MODIFIERS)
        raise GgufToolError(f"--method {text!r}: what follows the method is not known; known are {known}")
    return Variant(name + modifier, method(name).name, MODIFIERS[modifier])
