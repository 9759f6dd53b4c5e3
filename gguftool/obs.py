"""OBS: in which order the neurons of an expert can go, and what each costs when those that stay are refitted.

With the weighted second moment C = sum of g^2 h h^T of an expert's neurons and its down projection W, removing neuron k and
refitting the others by least squares changes the squared output by (Optimal Brain Surgeon, Hassibi and Stork 1993)

    ||W_:k||^2 / [C^-1]_kk        and moves the others by    W - W_:k [C^-1]_k: / [C^-1]_kk

Taken again and again, cheapest first, that gives an order and the cost of each step. Costs depend on the inverse of C, so
they are no sums: two halves of a calibration do not add up to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Ridge on C, as a share of its mean diagonal; refit takes the same.
RIDGE = 1e-2
# Steps that an elimination takes at least: wide experts lose several neurons in a step.
MIN_STEPS = 128


@torch.no_grad()
def eliminate(gram: Tensor, down: Tensor, tokens: int) -> Tensor:
    """The cost of every neuron at the moment when it goes, [K] float64; sorting by it gives the order.

    Costs rise along the order (a step that is cheaper than one before it counts like that one), so that the value of the
    best w neurons is concave in w. Where an expert saw few tokens, N < 2K, the refit corrects only N / 2K of the way, and
    the cost is mixed in that proportion with that of removing a neuron and leaving the others alone, C_kk ||W_:k||^2.

    Args:
        gram: C, [K, K]. down: W, [d, K]. tokens: N, how many tokens C runs over.
    """
    width = gram.shape[0]
    gram = gram.double()
    alone = gram.diagonal() * down.double().square().sum(dim=0)
    ridge = RIDGE * gram.diagonal().mean()
    if not tokens or ridge <= 0:
        return alone
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    inverse = torch.linalg.inv(damped)
    # W enters only by its products: K x K instead of d x K.
    product = down.double().T @ down.double()
    cost = torch.zeros(width, dtype=torch.float64, device=gram.device)
    stays = torch.ones(width, dtype=torch.bool, device=gram.device)
    step = max(1, width // MIN_STEPS)
    floor = 0.0
    while (left := int(stays.sum())) > 0:
        single = torch.where(stays, product.diagonal() / inverse.diagonal(), torch.inf)
        gone = torch.topk(single, min(step, left), largest=False, sorted=True).indices
        block = torch.linalg.inv(inverse[gone][:, gone])
        together = float((product[gone][:, gone] * block).sum())
        share = single[gone].clamp(min=0) / single[gone].clamp(min=0).sum().clamp(min=1e-300)
        for index, value in zip(gone.tolist(), (share * max(together, 0.0)).tolist(), strict=True):
            # A hair above the one before, so that equal costs keep their order.
            floor = max(value, floor * (1 + 1e-9) + 1e-300)
            cost[index] = floor
        move = inverse[:, gone] @ block
        product = product - product[:, gone] @ move.T - move @ product[gone] + move @ product[gone][:, gone] @ move.T
        inverse = inverse - move @ inverse[gone]
        stays[gone] = False
        # What is gone takes no part: a unit diagonal keeps the quotient finite.
        inverse[gone] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = 1
        product[gone] = 0
        product[:, gone] = 0
    sure = min(1.0, tokens / (2 * width))
    return sure * cost + (1 - sure) * alone
