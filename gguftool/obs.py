"""OBS: in which order the neurons of an expert can go, and what each costs when those that stay are refitted.

With the weighted second moment C = sum of g^2 h h^T of an expert's neurons and its down projection W, removing neuron k and
refitting the others by least squares changes the squared output by (Optimal Brain Surgeon, Hassibi and Stork 1993)

    ||W_:k||^2 / [C^-1]_kk        and moves the others by    W - W_:k [C^-1]_k: / [C^-1]_kk

Taken again and again, cheapest first, that gives an order and the cost of each step. Costs depend on the inverse of C, so
they are no sums: two halves of a calibration do not add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

# Ridge on C, as a share of its mean diagonal; refit takes the same.
RIDGE = 1e-2
# Steps that an elimination takes at least: wide experts lose several neurons in a step.
MIN_STEPS = 128
# The matrices of an elimination are cut down when this share of their rows is left.
SHRINK = 0.8


@torch.no_grad()
def costs(
    grams: Sequence[Tensor] | Tensor, downs: Iterable[Tensor], tokens: Tensor, *, threads: int = 0,
    tell: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """What every neuron costs at the moment when it goes, float64 [E, K].

    Sorting an expert's neurons by it gives the order in which they go, where it saw 2K tokens or more. Costs rise along the
    order (a step that is cheaper than one before it counts like that one), so that the value of the best w neurons is
    concave in w. Where an expert saw few tokens, N < 2K, the refit corrects only N / 2K of the way, and the cost is mixed in
    that proportion with that of removing a neuron and leaving the others alone, C_kk ||W_:k||^2.

    Args:
        grams: C, E of [K, K]. downs: W, E of [d, K], asked for as they are needed.
        tokens: N, how many tokens each C runs over, [E].
        threads: experts that are worked on at the same time, each by one thread; 0 for as many as torch uses.
        tell: called with the number of experts that are done.
    """
    if not len(grams):
        return torch.zeros(0, 0, dtype=torch.float64)
    jobs = zip(grams, downs, tokens.tolist(), strict=True)
    parallel = grams[0].device.type == "cpu" and len(grams) > 1
    found: list[Tensor] = []
    # An expert that one thread works on stays in its caches, and matrices as small as these lose by being shared.
    with (
        _one_thread() as most,
        ThreadPoolExecutor(threads or most, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        # The GPU works on one expert after the other by itself.
        run = pool.map if parallel else map
        # A few at a time: `downs` may make each when it is asked for, and a layer of them is as large as the layer.
        while some := list(islice(jobs, 4 * (threads or most))):
            for cost in run(_quietly, *zip(*some, strict=True)):
                found.append(cost)
                if tell is not None:
                    tell(len(found))
    return torch.stack(found)


@contextmanager
def _one_thread() -> Iterator[int]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _quietly(gram: Tensor, down: Tensor, tokens: float) -> Tensor:
    """`_costs` in a thread, which has a gradient mode of its own."""
    return _costs(gram, down, tokens)


def _costs(gram: Tensor, down: Tensor, tokens: float) -> Tensor:
    # Matrices of K x K are what a solve takes in memory: no more of them than needed (`memory.SOLVE`).
    gram, down = gram.to(torch.float64, copy=True), down.double()
    width = gram.shape[0]
    alone = gram.diagonal() * down.square().sum(dim=0)
    ridge = RIDGE * gram.diagonal().mean()
    if not tokens or ridge <= 0:
        return alone
    gram.diagonal().add_(ridge)
    inverse = torch.linalg.inv(gram)
    del gram
    # W enters only by its products: K x K instead of d x K.
    cost = _eliminate(inverse, down.T @ down)
    sure = min(1.0, tokens / (2 * width))
    return sure * cost + (1 - sure) * alone


def _eliminate(inverse: Tensor, product: Tensor) -> Tensor:
    """The costs from [C + ridge]^-1 and W^T W, both [K, K]; they are used up."""
    width = inverse.shape[0]
    cost = torch.zeros(width, dtype=torch.float64, device=inverse.device)
    names = torch.arange(width, device=inverse.device)
    stays = torch.ones(width, dtype=torch.bool, device=inverse.device)
    step = max(1, width // MIN_STEPS)
    floor = 0.0
    for left in range(width, 0, -step):
        if left <= SHRINK * len(names):
            # Rows and columns of what is gone are moved out of the way, now and then: a move costs as much as a step.
            kept = torch.nonzero(stays).flatten()
            inverse, product, names = inverse[kept][:, kept], product[kept][:, kept], names[kept]
            stays = torch.ones_like(kept, dtype=torch.bool)
        single = torch.where(stays, (product.diagonal() / inverse.diagonal()).clamp(min=0), torch.inf)
        cheapest = torch.topk(single, min(step, left), largest=False, sorted=True)
        gone = cheapest.indices
        of_inverse, of_product = inverse[gone], product[gone]
        block, inner = torch.linalg.inv(of_inverse[:, gone]), of_product[:, gone]
        # What the step costs is shared out by what each of its neurons would cost alone.
        together = (inner * block).sum().clamp(min=0)
        share = cheapest.values / cheapest.values.sum().clamp(min=1e-300)
        for index, value in zip(names[gone].tolist(), (share * together).tolist(), strict=True):
            # A hair above the one before, so that equal costs keep their order.
            floor = max(value, floor * (1 + 1e-9) + 1e-300)
            cost[index] = floor
        move = of_inverse.T @ block
        # product += move inner move^T - move of_product - its transpose, as one product of two thin matrices.
        half = 0.5 * (move @ inner) - of_product.T
        product.addmm_(torch.cat([move, half], dim=1), torch.cat([half, move], dim=1).T)
        inverse.addmm_(move, of_inverse, alpha=-1)
        stays[gone] = False
        # What is gone takes no part: a unit diagonal keeps the quotient finite.
        for matrix, diagonal in ((inverse, 1.0), (product, 0.0)):
            matrix[gone] = 0
            matrix[:, gone] = 0
            matrix[gone, gone] = diagonal
    return cost
