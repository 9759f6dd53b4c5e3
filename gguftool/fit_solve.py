"""Which files fit: for a target type the unpruned one, or the one of which the least goes, by exact bytes and a dry run.

The bytes of a ratio come from its plan, so the ratio is found by bisection over slices of neurons. What else is in memory
(caches, buffers, workspaces) is measured on a skeleton of the file that was found, until the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from . import __version__
from .budget import JITTER, Memory, measure
from .encoding import FLOATS, parse_target
from .errors import GgufToolError
from .gguf_model import GgufModel
from .measurements import Store, digest, plain
from .methods import method
from .outline import Base, Outline, pruned, quantized, unpruned
from .perplexity import usable_cpus
from .plan import PrunePlan
from .planner import DEFAULT_ALIGN, make_plan
from .prepare import Job, Prepared
from .quantize import planned_types
from .recipe import Recipe
from .refit import can_refit
from .stats import CalibrationStats
from .workspace import Workspace

# The most that may go: further down nothing was ever measured that a smaller type did not beat.
MOST = 0.9
# What may go of the experts, tried from the most on until there is a plan: a method may want some of them or of their width.
SHARES = (MOST, 0.8, 0.7, 0.6, 0.5, 0.4, 0.25, 0.1)
# How often a ratio is found anew because a skeleton took something else than the one before.
ROUNDS = 5
# Share of the room for a file that may stay unused.
NEAR = 1e-4
SCRATCH = "fit.work"


@dataclass(frozen=True)
class Choice:
    """A file that could be made: `plan` and `recipe` are None for the unpruned model. `memory` is what its skeleton took."""

    target: str
    recipe: Recipe | None
    plan: PrunePlan | None
    outline: Outline = field(repr=False)
    memory: Memory | None = None

    @property
    def ratio(self) -> float:
        """Share of routed-expert parameters that goes."""
        return 1 - self.plan.kept_share if self.plan else 0.0

    @property
    def label(self) -> str:
        """For a table."""
        if self.recipe is None:
            return f"unpruned {self.target}"
        return f"{self.recipe.method} {100 * self.ratio:.1f} % {self.target}"


@dataclass
class Solver:
    """The files that a budget holds.

    Attributes:
        budget: bytes. ctx: tokens of the context.
        recipe: how to prune, but for ratio and target. refit: as `pipeline.build` takes it.
        beside: bytes that files take in memory beside their own size, by the last skeleton that was run.
        tightened: target -> bytes that its files have to stay below the budget further, because one took more than its
            skeleton did.
    """

    job: Job
    work: Workspace
    source: Prepared
    budget: int
    ctx: int
    recipe: Recipe
    refit: str = ""
    beside: int = 0
    tightened: dict[str, int] = field(default_factory=dict)
    _sizes: dict[str, dict[int, int]] = field(default_factory=dict, repr=False)

    @cached_property
    def base(self) -> Base:
        """The unpruned file."""
        return Base.open(self.source.base)

    @cached_property
    def _slices(self) -> int:
        """In how many steps the experts can be narrowed."""
        facts = self.source.stats.model
        neurons = len(facts.moe_layers) * facts.n_expert * facts.n_ff_exp
        return neurons // min(DEFAULT_ALIGN, facts.n_ff_exp)

    def limit(self, target: str) -> int:
        """The most that a file of `target` may take by its skeleton."""
        return self.budget - JITTER - self.tightened.get(target, 0)

    def unpruned(self, target: str) -> Choice:
        """The unpruned model at `target`, whether it fits or not; its memory is measured where it may fit."""
        choice = self.whole(target)
        return self.tried(choice) if choice.outline.file_bytes < self.limit(target) else choice

    def whole(self, target: str) -> Choice:
        """The unpruned model at `target`; its memory is not measured."""
        outline = unpruned(self.base)
        if not self.source.has_encoding(target):
            outline = quantized(
                outline, target, planned_types(self.base.file, target, has_imatrix=True), self.source.stats
            )
        return Choice(target, None, None, outline)

    def fits(self, choice: Choice) -> bool:
        """Whether its skeleton stayed below the budget."""
        return choice.memory is not None and choice.memory.peak <= self.limit(choice.target)

    def pruned(self, target: str) -> Choice | None:
        """The file of `target` of which the least goes so that it fits; None where even the smallest does not."""
        room, found = self.limit(target) - self.beside, None
        seen: set[int] = set()
        for _ in range(ROUNDS):
            slices = self._most_slices(target, room)
            if slices is None or slices in seen:
                break
            seen.add(slices)
            choice = self.tried(self.at(target, slices))
            if self.fits(choice) and (found is None or choice.ratio < found.ratio):
                found = choice
            assert choice.memory is not None
            room = self.limit(target) - choice.memory.beside
        return found

    def smallest(self, target: str) -> Choice:
        """The file of `target` of which the most goes."""
        return self.at(target, self._fewest(target))

    def at(self, target: str, slices: int) -> Choice:
        """The pruned file in which so many slices of neurons stay."""
        return self.cut(target, 1 - slices / self._slices)

    def cut(self, target: str, ratio: float) -> Choice:
        """The pruned file of which that share of routed-expert parameters goes; its memory is not measured."""
        recipe = replace(self.recipe, ratio=ratio, target=target)
        plan = make_plan(self.source.stats, recipe)
        outline = pruned(self.base, plan, self._made_by(plan))
        if plan.encoded and not self.source.has_encoding(target):
            outline = quantized(outline, target, plan.encoded, self.source.stats)
        return Choice(target, recipe, plan, outline)

    def _made_by(self, plan: PrunePlan) -> str | None:
        """The name that the new weights of a plan will carry."""
        if plan.recipe.method == "dern":
            return "dern" if plan.drops_experts else None
        refit = self.refit or method(plan.recipe.method).refitted
        return "refit" if refit and can_refit(self.source.model, plan) else None

    def _most_slices(self, target: str, room: int) -> int | None:
        """How many slices may stay so that the file takes at most `room` bytes; None where even the fewest take more.

        Up to NEAR of the room, below which nothing more is looked for: a plan of a large model takes seconds. Sizes grow
        nearly in a line, so the next guess is on it; every third one is in the middle, should they not.
        """
        known = self._sizes.setdefault(target, {})
        if not known:
            self._size(target, self._fewest(target))
            self._size(target, self._slices)
        if known[min(known)] > room:
            return None
        for count in range(64):
            low = max(slices for slices, size in known.items() if size <= room)
            above = [slices for slices in known if slices > low]
            if not above or (high := min(above)) - low == 1 or room - known[low] <= NEAR * room:
                return low
            share = (room - known[low]) / (known[high] - known[low]) if count % 3 < 2 else 0.5
            self._size(target, min(max(low + int(share * (high - low)), low + 1), high - 1))
        return low

    def _size(self, target: str, slices: int) -> int:
        sizes = self._sizes.setdefault(target, {})
        if slices not in sizes:
            sizes[slices] = self.at(target, slices).outline.file_bytes
        return sizes[slices]

    def _fewest(self, target: str) -> int:
        """The fewest slices of which there is a plan: a method may want some experts or widths at least."""
        tried = [max(1, round(self._slices * (1 - share))) for share in SHARES]
        for slices in tried[:-1]:
            with suppress(GgufToolError):
                self._size(target, slices)
                return slices
        self._size(target, tried[-1])
        return tried[-1]

    def tried(self, choice: Choice) -> Choice:
        """With what its skeleton takes in memory; measured once for the same tensors."""
        runtime = self.job.runtime
        key = plain({
            "gguftool": __version__, "skeleton": [[s.name, s.ne, s.type] for s in choice.outline.specs],
            "entries": choice.outline.entry_bytes, "base": self.work.state.get("base.gguf"), "ctx": self.ctx,
            "runtime": runtime.path.name, "threads": usable_cpus(),
        })  # fmt: skip
        store = Store(self.work.folder / "rows")
        kept = store.load(key)
        if kept is None:
            path = self.work.folder / SCRATCH / f"{digest(key)}.skeleton.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.job.progress(0, 1, f"what {choice.label} takes in memory")
            try:
                choice.outline.write_skeleton(path, self.base)
                memory = measure(runtime, path, self.ctx)
            finally:
                path.unlink(missing_ok=True)
            store.save(key, memory.as_dict())
        else:
            memory = Memory.of(kept)
        self.beside = memory.beside
        return replace(choice, memory=memory)


def check_recipe(stats: CalibrationStats, recipe: Recipe) -> PrunePlan:
    """Its plan at the largest of SHARES that has one. Raises GgufToolError where none has, with what is said of the least."""
    said = []
    for share in SHARES:
        try:
            return make_plan(stats, replace(recipe, ratio=share))
        except GgufToolError as error:
            said.append(str(error))
    # What has nothing to do with the ratio is the same at all of them.
    tried = f"tried from {MOST:.0%} down to {SHARES[-1]:.0%}, no share of the experts can go; of the last: "
    raise GgufToolError(said[-1] if len(set(said)) == 1 else tried + said[-1])


def targets_for(
    source: Prepared, targets: Sequence[str], base: Base, *, named: bool = False
) -> tuple[list[str], list[str]]:
    """The types worth trying, and notes on those that are not: of a quantized original only its own and smaller ones.

    Its own is tried too where nobody `named` the types. Raises GgufToolError where none is left.
    """
    names = list(dict.fromkeys(parse_target(name).name for name in targets))
    if not source.quantized_types:
        return names, []
    # Quantized checkpoints have MXFP4 experts and floats beside them: no file type, but this one keeps the experts.
    own = source.model.encoding if isinstance(source.model, GgufModel) else "MXFP4_MOE"
    size = base.file.path.stat().st_size

    def smaller(name: str) -> bool:
        specs = planned_types(base.file, name, has_imatrix=True)
        return name not in FLOATS and sum(spec.padded_bytes for spec in specs) < size

    kept = [name for name in names if name == own or smaller(name)]
    left = [name for name in names if name not in kept]
    if not named and own not in kept:
        with suppress(GgufToolError):  # an encoding that gguftool does not write
            kept.insert(0, parse_target(own).name)
    why = f"the original is {own} and more bits bring nothing back"
    if not kept:
        raise GgufToolError(f"{', '.join(left)}: {why}; name a smaller type to choose from, or that one")
    return kept, [f"{', '.join(left)}: not tried, {why}"] if left else []
