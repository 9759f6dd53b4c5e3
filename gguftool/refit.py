"""refit: what the neurons that stay can take over from those that go. One pass, a closed form, no gradient.

For an expert with kept neurons S and dropped neurons P, and C = sum over its tokens of g^2 h h^T, the down columns

    W_S' = W_S + W_P C_PS (C_SS + lambda I)^-1,    lambda = 1e-2 x mean of C's diagonal

minimise the squared change of the expert's weighted output (least squares with a ridge). C is taken a layer at a time
and never kept: at Qwen3-30B's sizes it is 300 MB a layer. Experts with few tokens are corrected less: N / 2K of it.

Where the router loses experts and does not make the weights of the others add up to 1, the same pass takes back how much
these grow, by one number an expert (see `router_fix`); whole experts get new down columns only for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import GgufToolError
from .forward import LayeredPass, LayerStream, Progress, Windows, identity
from .loader import usable_device
from .memory import MemoryPlan, Needs, fitted
from .obs import RIDGE
from .overrides import Key, Origin, Overrides
from .plan import LayerPlan, Neurons, PrunePlan
from .recorders import GramRecorder
from .refit_needs import plain_needs, sequential_needs
from .router_fix import RouterFix
from .routes import RoutesFile
from .stats import Domain
from .workdir import WorkDir

NOTHING = "the plan narrows no expert: there is nothing to refit"
NO_ROUTES = "the plan drops experts from the router, and a sequential refit needs the original's routes"


def refit(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    domains: Sequence[tuple[Domain, Windows]],
    work_dir: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    how: MemoryPlan | None = None,
    stream: LayerStream | None = None,
    progress: Progress | None = None,
) -> Overrides:
    """The refitted down columns of every expert that `plan` narrows, or whose weights it lets grow.

    Resumable, as `calibrate` is. `how` takes the place of `dtype`, and says what lies in memory; `stream` as there.

    They lie in `work_dir` until they are saved; `Overrides.save` removes it.

    Raises:
        GgufToolError: the plan is for another checkpoint, or there is nothing in it to refit.
    """
    check_plan(checkpoint, plan)
    usable_device(device, solves=True)
    if how is None:
        how = refit_memory(checkpoint, plan, domains, dtype, None)
    dtype = how.dtype
    narrowed = {layer.index: narrowed_experts(plan, layer.index) for layer in plan.layers}
    grown = {layer.index: layer for layer in grown_layers(checkpoint, plan)}
    row = checkpoint.architecture

    def record(module: nn.Module, layer: int) -> GramRecorder:
        kept = None
        if how.group and narrowed.get(layer):
            kept = RoutesFile(work_dir / "inputs.partial", run.windows.size, checkpoint.n_embd, dtype)
        if layer not in grown:
            return GramRecorder(module, narrowed.get(layer, {}), solve, kept=kept)
        router = run.stream.loader.model.get_submodule(f"{row.layers}.{layer}.{row.router}").get_parameter("weight")
        own = grown[layer]
        fix = RouterFix(router, own.router, layer)
        return GramRecorder(module, narrowed[layer], solve, fix, whole_experts(plan, own), kept)

    stream = stream or LayerStream(checkpoint, device, dtype)
    run = LayeredPass(stream, domains, record, batch=how.batch, progress=progress)
    key = identity(checkpoint, domains, dtype, dtype) | {
        "refit": plan.kept_hash,
        "ridge": RIDGE,
        "grown": sorted(grown),
    }
    work = WorkDir(work_dir, key, run.shape, dtype, resident=how.resident)
    run.run(work)
    places: dict[Key, tuple[Path, str]] = {
        (layer, int(name.partition(".")[0]), "down"): (work.sums_path(layer), name)
        for layer in narrowed
        for name in work.names(layer)
    }
    origin = Origin("refit", plan.kept_hash, tuple(domain.as_dict() for domain, _ in domains))
    return Overrides(origin, places, work.remove, work_dir)


def check_plan(checkpoint: Checkpoint, plan: PrunePlan, *, sequential: bool = False) -> None:
    """Raises GgufToolError for a plan of another checkpoint, and for one that cannot be refitted (in that way)."""
    if plan.model_fingerprint != checkpoint.fingerprint:
        raise GgufToolError(f"the plan was made for {plan.model_name}, not for the checkpoint {checkpoint.name}")
    if sequential and plan.drops_experts:
        raise GgufToolError(f"{NO_ROUTES}; refit it plainly")
    if not can_refit(checkpoint, plan):
        raise GgufToolError(NOTHING)


def refit_memory(
    checkpoint: Checkpoint, plan: PrunePlan, domains: Sequence[tuple[Domain, Windows]], dtype: torch.dtype | None,
    limit: int | None, *, device: str = "cpu", sequential: bool = False,
) -> MemoryPlan:  # fmt: skip
    """How to run a refit below `limit` bytes; `dtype`, `limit` and what is raised as `memory.plan_memory` has them."""
    count, n_ctx = sum(len(windows) for _, windows in domains), domains[0][1].shape[1]
    renewed = _renewed(checkpoint, plan, sequential)
    narrowed = [[width for width in layer.widths if 0 < width < plan.n_ff_exp] for layer in plan.layers]

    def needs(kind: torch.dtype) -> Needs:
        if sequential:
            return sequential_needs(checkpoint, renewed, count, n_ctx, kind)
        return plain_needs(checkpoint, narrowed, renewed, count, n_ctx, kind)

    return fitted(checkpoint, needs, dtype, limit, threads=1, device=device)


def most_narrowed(plan: PrunePlan) -> int:
    """How many experts of a layer are narrowed at most."""
    return max(len(narrowed_experts(plan, layer.index)) for layer in plan.layers)


class Routing(Protocol):
    """A model, as far as its router is concerned."""

    @property
    def norm_topk(self) -> bool | None:
        """Whether the weights of a token's experts are made to add up to 1."""
        ...


def can_refit(model: Routing, plan: PrunePlan) -> bool:
    """Whether there is anything in a plan that `refit` can make good."""
    return any(narrowed_experts(plan, layer.index) for layer in plan.layers) or bool(grown_layers(model, plan))


def refitted_widths(model: Routing, plan: PrunePlan, *, sequential: bool = False) -> list[int]:
    """The widths of all experts that get new down columns, those that no token reaches among them."""
    return [width for layer in _renewed(model, plan, sequential) for width in layer]


def _renewed(model: Routing, plan: PrunePlan, sequential: bool) -> list[list[int]]:
    """`refitted_widths` by layer."""
    grown = {layer.index for layer in grown_layers(model, plan)}
    return [
        [w for w in layer.widths if w and (w < plan.n_ff_exp or sequential or layer.index in grown)]
        for layer in plan.layers
    ]


def grown_layers(model: Routing, plan: PrunePlan) -> list[LayerPlan]:
    """The layers in which the router's weights grow because experts are dropped and they need not add up to 1."""
    return [] if model.norm_topk else [layer for layer in plan.layers if len(layer.router) < plan.n_expert]


def narrowed_experts(plan: PrunePlan, index: int) -> dict[int, Neurons]:
    """Experts of decoder layer `index` that keep some but not all neurons, with those neurons."""
    layer = next(layer for layer in plan.layers if layer.index == index)
    pairs = zip(layer.router, layer.retained, strict=True)
    return {expert: neurons for expert, neurons in pairs if 0 < len(neurons) < plan.n_ff_exp}


def whole_experts(plan: PrunePlan, layer: LayerPlan) -> set[int]:
    """Experts of a layer that keep every neuron."""
    return {expert for expert, width in zip(layer.router, layer.widths, strict=True) if width == plan.n_ff_exp}


def solve(down: Tensor, gram: Tensor, neurons: Neurons, tokens: int) -> Tensor:
    """The refitted columns: down [d, K], C [K, K], kept neurons [w], tokens seen -> [d, w].

    Where no token was seen, or the kept neurons were silent, the columns stay what they were. What it takes in memory is
    counted by `refit_needs.solve_bytes`.
    """
    width = gram.shape[0]
    kept = torch.from_numpy(neurons).to(gram.device)
    stays = torch.zeros(width, dtype=torch.bool, device=gram.device)
    stays[kept] = True
    dropped = torch.nonzero(~stays).flatten()
    weights = down.to(gram.dtype)
    ridge = RIDGE * gram.diagonal().mean()
    if not tokens or ridge <= 0:
        return weights[:, kept]
    inner = gram[kept][:, kept].double()
    inner.diagonal().add_(ridge.double())
    cross = weights[:, dropped].double() @ gram[dropped][:, kept].double()
    correction = torch.linalg.solve(inner, cross.T).T
    del inner, cross
    correction *= min(1.0, tokens / (2 * width))
    return weights[:, kept].add_(correction.to(gram.dtype))
