"""OBS: in which order the neurons of an expert can go, and what each costs when those that stay are refitted.

With the weighted second moment C = sum of g^2 h h^T of an expert's neurons and its down projection W, removing neuron k and
refitting the others by least squares changes the squared output by (Optimal Brain Surgeon, Hassibi and Stork 1993)

    ||W_:k||^2 / [C^-1]_kk        and moves the others by    W - W_:k [C^-1]_k: / [C^-1]_kk

Taken again and again, cheapest first, that gives an order and the cost of each step. Costs depend on the inverse of C, so
they are no sums: two halves of a calibration do not add up to the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Ridge on C, as a share of its mean diagonal; refit takes the same.
RIDGE = 1e-2
# Steps that an elimination takes at least: wide experts lose several neurons in a step.
MIN_STEPS = 128


@torch.no_grad()
def costs(grams: Tensor, downs: Iterable[Tensor], tokens: Tensor) -> Tensor:
    """What every neuron costs at the moment when it goes, float64 [E, K].

    Sorting an expert's neurons by it gives the order in which they go, where it saw 2K tokens or more. Costs rise along the
    order (a step that is cheaper than one before it counts like that one), so that the value of the best w neurons is
    concave in w. Where an expert saw few tokens, N < 2K, the refit corrects only N / 2K of the way, and the cost is mixed in
    that proportion with that of removing a neuron and leaving the others alone, C_kk ||W_:k||^2.

    Args:
        grams: C, [E, K, K]. downs: W of each of the E experts, [d, K]. tokens: N, how many tokens each C runs over, [E].
    """
    # One expert at a time stays in the caches, and matrices as small as these lose by being shared among threads.
    with _one_thread():
        return torch.stack([_costs(*one) for one in zip(grams, downs, tokens.tolist(), strict=True)])


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _costs(gram: Tensor, down: Tensor, tokens: float) -> Tensor:
    gram, down = gram.double(), down.double()
    width = gram.shape[0]
    alone = gram.diagonal() * down.square().sum(dim=0)
    ridge = RIDGE * gram.diagonal().mean()
    if not tokens or ridge <= 0:
        return alone
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    # W enters only by its products: K x K instead of d x K.
    cost = _eliminate(torch.linalg.inv(damped), down.T @ down)
    sure = min(1.0, tokens / (2 * width))
    return sure * cost + (1 - sure) * alone


def _eliminate(inverse: Tensor, product: Tensor) -> Tensor:
    """The costs from [C + ridge]^-1 and W^T W, both [K, K]; they are used up."""
    width = inverse.shape[0]
    cost = torch.zeros(width, dtype=torch.float64, device=inverse.device)
    stays = torch.ones(width, dtype=torch.bool, device=inverse.device)
    step = max(1, width // MIN_STEPS)
    floor = 0.0
    for left in range(width, 0, -step):
        single = torch.where(stays, (product.diagonal() / inverse.diagonal()).clamp(min=0), torch.inf)
        cheapest = torch.topk(single, min(step, left), largest=False, sorted=True)
        gone = cheapest.indices
        of_inverse, of_product = inverse[gone], product[gone]
        block, inner = torch.linalg.inv(of_inverse[:, gone]), of_product[:, gone]
        # What the step costs is shared out by what each of its neurons would cost alone.
        together = (inner * block).sum().clamp(min=0)
        share = cheapest.values / cheapest.values.sum().clamp(min=1e-300)
        for index, value in zip(gone.tolist(), (share * together).tolist(), strict=True):
            # A hair above the one before, so that equal costs keep their order.
            floor = max(value, floor * (1 + 1e-9) + 1e-300)
            cost[index] = floor
        move = of_inverse.T @ block
        change = move @ of_product
        product += move @ inner @ move.T - change - change.T
        inverse -= move @ of_inverse
        stays[gone] = False
        # What is gone takes no part: a unit diagonal keeps the quotient finite.
        for matrix, diagonal in ((inverse, 1.0), (product, 0.0)):
            matrix[gone] = 0
            matrix[:, gone] = 0
            matrix[gone, gone] = diagonal
    return cost
