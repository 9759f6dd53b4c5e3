"""What a router without renormalisation makes of a dropped expert, and the one number an expert that takes it back.

Where the weights of a token's experts are made to add up to 1, dropping rows of the router is exact for those that stay.
Where they are not, they are the softmax over all experts, and without the dropped ones every weight g of a survivor grows
to g' = g Z / Z', Z and Z' the sums of exp(logit) over all experts and over those that stay. The number

    c_e = sum of g g' / sum of g'^2        over the tokens that were routed to e

brings c_e g' nearest to g (least squares), and is folded into the down projection: c_e W. No gradient, one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .errors import GgufToolError

# How far the weights that a layer really applies may be from the softmax of its router's logits: rounding of BF16.
TOLERANCE = 1e-2


class RouterFix:
    """Adds up g g' and g'^2 for the experts of one layer, while tokens run through it.

    Attributes:
        products, squares: sum of g g' and of g'^2 over the tokens routed to an expert, float64 [E].
    """

    def __init__(self, router: Tensor, kept: Sequence[int], layer: int) -> None:
        """`router` [E, d] is the layer's router, `kept` the experts that stay in it."""
        self.router, self.layer = router, layer
        self.kept = torch.tensor(list(kept), dtype=torch.int64, device=router.device)
        self.products = torch.zeros(len(router), dtype=torch.float64, device=router.device)
        self.squares = torch.zeros_like(self.products)

    @torch.no_grad()
    def add(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Hidden states [T, d], the experts chosen of all [T, k] and their weights [T, k].

        Raises GgufToolError where these weights are not the softmax of the router's logits.
        """
        logits = functional.linear(hidden_states, self.router).float()
        before = top_k_weights.float()
        if not torch.allclose(logits.softmax(dim=1).gather(1, top_k_index), before, rtol=TOLERANCE, atol=1e-5):
            raise GgufToolError(
                f"layer {self.layer}: the router's weights are no plain softmax over its experts; what dropping some of "
                "them does to the rest is not known here"
            )
        shares = torch.zeros_like(logits)
        shares[:, self.kept] = logits[:, self.kept].softmax(dim=1)
        after = shares.gather(1, top_k_index).double()
        chosen = top_k_index.flatten()
        self.products.index_add_(0, chosen, (before * after).flatten())
        self.squares.index_add_(0, chosen, after.square().flatten())

    def scales(self) -> dict[int, float]:
        """c_e of every expert that stays and was chosen at least once."""
        found = {e: (float(self.products[e]), float(self.squares[e])) for e in self.kept.tolist()}
        return {expert: product / square for expert, (product, square) in found.items() if square > 0}
