"""dern: neurons of dropped experts find a home in the experts that stay. No text, no gradient.

DERN (arXiv 2509.10377) drops whole experts by r_e, the mean of their router weights (method `dern`), and recombines
what they were made of. A segment is one neuron of one expert, s = gate row | up row | down column.

1. Each segment of a dropped expert goes to the kept expert that holds the segment nearest to it by cosine, if that is
   above a threshold; else it is lost.
2. In each kept expert its own K segments and those that came are clustered to K again by weighted spherical k-means: a
   segment goes to the centre c of largest cosine, and a centre is c = u / |u| with u = sum of r_i s_i / |s_i|, r_i the
   importance of the expert that segment i comes from. Centres start from the segments of the largest |gate row|.
3. A cluster becomes one neuron, (sum of r_i |s_i| / sum of r_i) c: inside of it all norms count as equal, and their mean
   is what the neuron gets. A cluster of one segment stays that segment, bit for bit.

An expert to which nothing came stays as it is, and the file has nothing of it.

The paper's full text was not to be had, so these are reconstructions: that the cosine is over gate, up and down (`match`
"up-down" leaves the gate out); the norm in step 3; that a centre which loses all its segments takes the segment farthest
from its own centre, one after the other, so that two equal segments never hold two centres while others have none.

Two experts are in memory at a time, with the segments that one kept expert received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import GgufToolError
from .forward import Progress
from .overrides import Key, Origin, Overrides, writing
from .plan import LayerPlan, PrunePlan

THRESHOLD = 0.5
MATCHES = {"gate-up-down": ("gate", "up", "down"), "up-down": ("up", "down")}
# Rows of a matrix of cosines that are taken at a time, and rounds of k-means at most.
ROWS = 1024
ROUNDS = 50

# Kept expert -> (dropped expert, its segments that come) in the order of the dropped experts.
Homes = dict[int, list[tuple[int, Tensor]]]
Read = Callable[[int], Tensor]


@dataclass(frozen=True)
class Moved:
    """What became of a layer's segments: of `dropped` ones `found` found a home, in `experts` kept experts."""

    layer: int
    dropped: int
    found: int
    experts: int


@dataclass(frozen=True)
class Recombined:
    """New weights of the experts that received something, and what moved, by layer."""

    weights: Overrides
    layers: tuple[Moved, ...]


def dern(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    out: Path,
    *,
    threshold: float = THRESHOLD,
    match: str = "gate-up-down",
    device: str = "cpu",
    progress: Progress | None = None,
) -> Recombined:
    """Recombines what a plan of the method `dern` drops, and writes the new matrices to `out`.

    Args:
        threshold: cosine above which a segment of a dropped expert is taken in, from 0 up to, but without, 1.
        match: name in MATCHES: the parts of a segment that cosines are taken of.
        progress: called with (experts dropped so far, all of them, what is being done).

    Raises:
        GgufToolError: the plan is for another checkpoint, drops no expert, narrows some, or has no importance.
    """
    _check(checkpoint, plan, threshold, match)
    layers = [layer for layer in plan.layers if len(layer.router) < plan.n_expert]
    width, n_embd = plan.n_ff_exp, checkpoint.n_embd
    columns = _columns(match, n_embd)
    total = sum(plan.n_expert - len(layer.router) for layer in layers)
    keys: list[Key] = [(p.index, e, role) for p in layers for e in p.router for role in ("gate", "up", "down")]
    room = ((key, (n_embd, width) if key[2] == "down" else (width, n_embd)) for key in keys)
    moved: list[Moved] = []
    done = 0
    with writing(out, Origin("dern", plan.kept_hash), room, notes=200 + 60 * len(layers)) as writer:
        for layer in layers:

            def read(expert: int, index: int = layer.index) -> Tensor:
                return segments(checkpoint, index, expert, device)

            def tell(count: int, index: int = layer.index, before: int = done) -> None:
                if progress:
                    progress(before + count, total, f"layer {index}")

            dropped = [expert for expert in range(plan.n_expert) if expert not in layer.router]
            homes = find_homes(read, dropped, layer.router, columns, threshold, tell)
            for expert in sorted(homes):
                merged = _merge_into(read, expert, homes[expert], layer.importance, columns)
                gate, up, down = merged.cpu().split(n_embd, dim=1)
                for role, values in (("gate", gate), ("up", up), ("down", down.T)):
                    writer.add((layer.index, expert, role), values.numpy())
            found = sum(len(rows) for came in homes.values() for _, rows in came)
            moved.append(Moved(layer.index, len(dropped) * width, found, len(homes)))
            done += len(dropped)
        writer.notes.append(summary(moved, threshold))
    return Recombined(Overrides.load(out), tuple(moved))


def summary(moved: Sequence[Moved], threshold: float) -> str:
    """How many segments found a home, in one line."""
    by_layer = ", ".join(f"{m.layer}: {m.found}" for m in moved)
    return (
        f"{sum(m.found for m in moved)} of {sum(m.dropped for m in moved)} neurons of dropped experts found a home above "
        f"cosine {threshold:g}, by layer {by_layer}"
    )


def segments(checkpoint: Checkpoint, layer: int, expert: int, device: str = "cpu") -> Tensor:
    """An expert's segments, float32 [K, 3d]: gate row, up row and down column of each neuron."""
    one = checkpoint.expert(layer, expert)
    return torch.cat([one["gate"], one["up"], one["down"].T], dim=1).to(device=device, dtype=torch.float32)


def find_homes(
    read: Read,
    dropped: Sequence[int],
    kept: Sequence[int],
    columns: slice,
    threshold: float,
    tell: Callable[[int], None] = lambda count: None,
) -> Homes:
    """Where each segment of the dropped experts goes; kept experts to which nothing comes are left out.

    Args:
        read: an expert's segments, [K, 3d].
        columns: of a segment that cosines are taken of.
        tell: called with the number of dropped experts that are done.
    """
    homes: Homes = {}
    for count, source in enumerate(dropped, start=1):
        mine = _directions(read(source)[:, columns])
        best = torch.full((len(mine),), -torch.inf, device=mine.device)
        home = torch.zeros(len(mine), dtype=torch.int64, device=mine.device)
        for place, expert in enumerate(kept):
            theirs = _directions(read(expert)[:, columns])
            nearest = torch.cat([(rows @ theirs.T).amax(dim=1) for rows in mine.split(ROWS)])
            # Strictly nearer: of experts that are equally near the first one is taken.
            nearer = nearest > best
            best, home = torch.where(nearer, nearest, best), torch.where(nearer, place, home)
        for place, expert in enumerate(kept):
            rows = torch.nonzero((home == place) & (best > threshold)).flatten()
            if len(rows):
                homes.setdefault(expert, []).append((source, rows))
        tell(count)
    return homes


def _merge_into(
    read: Read, expert: int, came: Sequence[tuple[int, Tensor]], importance: Sequence[float], columns: slice
) -> Tensor:
    """A kept expert's segments with those that came, as many as it had: [K, 3d]."""
    own = read(expert)
    points = torch.cat([own, *(read(source)[rows] for source, rows in came)])
    counts: Mapping[int, int] = {expert: len(own)} | {source: len(rows) for source, rows in came}
    weights = torch.cat([torch.full((n,), importance[e], device=own.device) for e, n in counts.items()])
    return merge(points, weights, len(own), columns)


def merge(points: Tensor, weights: Tensor, count: int, columns: slice) -> Tensor:
    """Weighted spherical k-means of segments, see the module's steps 2 and 3.

    Args:
        points: [n, 3d], n >= count, an expert's own segments first.
        weights: importance of each, [n]; where a cluster has none all of its segments count the same.
        columns: of a segment that cosines are taken of.

    Returns:
        [count, 3d]: the clusters in the order of their first segments, so that an own segment that nothing joins stays
        where it was.
    """
    directions = _directions(points[:, columns])
    norms = torch.linalg.vector_norm(points, dim=1)
    # A dead neuron has no direction: it takes no part in a mean.
    weights = torch.where(norms > 0, weights, 0.0)
    gate = torch.linalg.vector_norm(points[:, : points.shape[1] // 3], dim=1)
    centres = directions[torch.argsort(gate, descending=True, stable=True)[:count]].clone()
    label = torch.full((len(points),), -1, device=points.device)
    for _ in range(ROUNDS):
        before, label = label, _refill(directions, centres, _nearest(directions, centres))
        if torch.equal(before, label):
            break
        centres = _directions(_means(directions, label, weights, count))
    found = _means(torch.cat([_directions(points), norms[:, None]], dim=1), label, weights, count)
    merged = _directions(found[:, :-1]) * found[:, -1:]
    first = torch.full((count,), len(points), device=points.device)
    first = first.scatter_reduce(0, label, torch.arange(len(points), device=points.device), "amin")
    alone = torch.bincount(label, minlength=count) == 1
    merged = torch.where(alone[:, None], points[first], merged)
    return merged[torch.argsort(first, stable=True)]


def _nearest(directions: Tensor, centres: Tensor) -> Tensor:
    """The centre of largest cosine for every segment, [n]."""
    return torch.cat([(rows @ centres.T).argmax(dim=1) for rows in directions.split(ROWS)])


def _refill(directions: Tensor, centres: Tensor, label: Tensor) -> Tensor:
    """The labels in which every cluster has a segment; `centres` is changed in place for those that had none.

    An empty cluster takes the segment that is farthest from its centre, and then whatever is nearer to that one.
    """
    label = label.clone()
    cosine = torch.where(directions.any(dim=1), (directions * centres[label]).sum(dim=1), 1.0)
    for empty in torch.nonzero(torch.bincount(label, minlength=len(centres)) == 0).flatten().tolist():
        # A segment alone in its cluster stays there: another cluster would be empty instead.
        shares = torch.bincount(label, minlength=len(centres))[label] > 1
        farthest = int(torch.where(shares, cosine, torch.inf).argmin())
        centres[empty] = directions[farthest]
        to_new = directions @ centres[empty]
        moves = shares & (to_new > cosine)
        moves[farthest] = True
        for cluster in label[moves].unique().tolist():
            left = torch.where(label == cluster, cosine, -torch.inf)
            left[farthest] = -torch.inf
            if not ((label == cluster) & ~moves).any():
                moves[left.argmax()] = False
        label[moves], cosine[moves] = empty, to_new[moves]
    return label


def _means(rows: Tensor, label: Tensor, weights: Tensor, count: int) -> Tensor:
    """The weighted mean of each cluster's rows [n, m]: [count, m]. Sums in a fixed order, on a GPU too."""
    total = torch.bincount(label, weights=weights, minlength=count)
    weights = torch.where(total[label] > 0, weights, 1.0)
    parts = []
    for clusters in torch.arange(count, device=label.device).split(ROWS):
        share = (label == clusters[:, None]) * weights
        parts.append(share @ rows / share.sum(dim=1, keepdim=True))
    return torch.cat(parts)


def _directions(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norm > 0, rows / norm.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)


def _columns(match: str, n_embd: int) -> slice:
    """The columns of a segment, [gate | up | down] of `n_embd` each, that a name in MATCHES stands for."""
    return slice(n_embd * ("gate", "up", "down").index(MATCHES[match][0]), 3 * n_embd)


def _check(checkpoint: Checkpoint, plan: PrunePlan, threshold: float, match: str) -> None:
    if plan.model_fingerprint != checkpoint.fingerprint:
        raise GgufToolError(f"the plan was made for {plan.model_name}, not for the checkpoint {checkpoint.name}")
    if not 0 <= threshold < 1:
        raise GgufToolError(f"--threshold {threshold} is not a cosine from 0 up to, but without, 1")
    if match not in MATCHES:
        raise GgufToolError(f"--match {match!r} is not one of {', '.join(MATCHES)}")
    if checkpoint.architecture.expert_bias:
        raise GgufToolError(
            f"{checkpoint.architecture.model_type}: its experts have biases, which dern does not merge; take --method reap"
        )
    if not plan.drops_experts:
        raise GgufToolError("the plan drops no expert: there is nothing to recombine")
    for layer in plan.layers:
        _check_layer(layer, plan)


def _check_layer(layer: LayerPlan, plan: PrunePlan) -> None:
    if len(layer.importance) != plan.n_expert:
        raise GgufToolError(
            f"layer {layer.index}: the plan does not say how important its experts are, which their neurons are merged "
            f"by; plan with --method dern, not {plan.recipe.method}"
        )
    if narrow := [e for e, width in zip(layer.router, layer.widths, strict=True) if width != plan.n_ff_exp]:
        raise GgufToolError(f"layer {layer.index}: expert {narrow[0]} is narrowed; dern merges into whole experts only")
