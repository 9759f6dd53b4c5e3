"""What a refit takes in memory, for `memory.fitted`: it solves other equations than a calibration, and keeps other results.

All in bytes. Each term follows what the code allocates, in its order; a test holds the sums against measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .checkpoint import Checkpoint
from .memory import Needs, needs_of
from .routes import CHUNK, ROUTE

# Widths of experts, by layer.
Widths = Sequence[Sequence[int]]


def plain_needs(
    checkpoint: Checkpoint, narrowed: Widths, renewed: Widths, windows: int, n_ctx: int, dtype: torch.dtype
) -> Needs:
    """What `refit.refit` takes: every layer's new columns are in memory, beside its weights, until the layer is saved.

    Args:
        narrowed: of the experts that are solved. renewed: of all that get new columns, these and those that are only scaled.
    """
    own = needs_of(checkpoint, windows, n_ctx, dtype, max(map(len, narrowed), default=0), 1)
    d, width = checkpoint.n_embd, checkpoint.n_ff_exp
    # One more than the layer has: a scaled expert is made beside the one it replaces, and saving copies one at a time.
    columns = 4 * d * max((sum(layer) + max(layer) for layer in renewed if layer), default=0)
    solves = [solve_bytes(d, width, kept, dtype) for kept in {kept for layer in narrowed for kept in layer}]
    # C are computed, solved and dropped one after the other where not all of them are added up while the layer runs.
    sizes = tuple(dict.fromkeys((own.n_expert, min(1, own.n_expert))))
    return replace(own, statistics=0, all_statistics=0, solve=max(solves, default=0), columns=columns, sizes=sizes)


def sequential_needs(checkpoint: Checkpoint, kept: Widths, windows: int, n_ctx: int, dtype: torch.dtype) -> Needs:
    """What `sequential.refit_sequentially` takes: an expert at a time. `kept` are the widths of all experts that have any.

    The hidden states of both streams, what is left to fit and the new columns lie in mapped files.
    """
    own = needs_of(checkpoint, windows, n_ctx, dtype, checkpoint.n_expert, 1)
    d, width, tokens = checkpoint.n_embd, checkpoint.n_ff_exp, windows * n_ctx
    chunk = min(tokens, CHUNK)
    widths = {one for layer in kept for one in layer}
    solve = max((_expert_bytes(d, width, one, dtype, chunk) for one in widths), default=0)
    return replace(
        own,
        statistics=0,
        all_statistics=0,
        solve=max(solve - own.moment, 0),
        hidden=2 * own.hidden,
        streams=2,
        # The rows (int64) and weights of every expert's tokens are kept from the first step to the second.
        routes=(2 * ROUTE * checkpoint.n_expert_used + 3 * 4) * tokens,
        sizes=(1,),
    )


def solve_bytes(n_embd: int, width: int, kept: int, dtype: torch.dtype) -> int:
    """What `refit.solve` takes at most beside C and its result, for an expert that keeps `kept` of `width` neurons."""
    gone, inner = width - kept, 8 * kept * kept
    stages = (
        4 * kept * (width + kept),  # C's rows of the kept neurons, and of those the columns
        inner + 4 * kept * kept,
        inner + 12 * n_embd * gone,  # dropped columns of W, in float32 and in float64
        inner + 8 * n_embd * gone + 4 * gone * max(width + kept, 3 * kept),  # C between dropped and kept
        inner + 8 * (n_embd * gone + gone * kept + n_embd * kept),
        2 * inner + 16 * n_embd * kept,  # solving: inner and its factors, right sides and results
    )
    return max(stages) + _in_float32(n_embd * width, dtype)


def _expert_bytes(n_embd: int, width: int, kept: int, dtype: torch.dtype, chunk: int) -> int:
    """What `sequential.LayerFit` takes at most for one expert, C included, `chunk` tokens at a time."""
    columns, inner, cross = 4 * n_embd * kept, 8 * kept * kept, 8 * n_embd * kept
    neurons = chunk * _token_bytes(n_embd, width, dtype)
    solving = solve_bytes(n_embd, width, kept, torch.float32) if kept < width else 0
    alone = _in_float32(n_embd * width, dtype) + columns + 4 * width * width + max(neurons, solving)
    # The neurons of the last chunk, and those of them that are kept, are there to the end.
    last = 4 * chunk * (width + kept)
    summed = last + chunk * (8 * n_embd + 4 * kept) + 12 * kept * max(kept, n_embd)  # in float32 and in float64
    together = (
        inner + cross + max(neurons, summed),  # adding up
        2 * inner + 2 * cross + last,  # solving
        inner + 3 * cross + last,
        inner + 2 * cross + columns + neurons + last,  # taking the step
    )
    return max(alone, *together)


def _token_bytes(n_embd: int, width: int, dtype: torch.dtype) -> int:
    """What a token of an expert takes in `sequential.LayerFit`: as in `routes.neurons_bytes`, and behind that."""
    size = dtype.itemsize
    each = (
        2 * size * n_embd + 4 * size * width + 8 * width,  # computing the neurons
        size * n_embd + 16 * n_embd + 8 * width,  # what they change, added to R
        size * n_embd + 28 * width,  # their squares in float64
    )
    return max(each)


def _in_float32(count: int, dtype: torch.dtype) -> int:
    """Bytes of a copy of `count` weights in float32; a matrix that is in it already is not copied."""
    return 0 if dtype == torch.float32 else 4 * count
