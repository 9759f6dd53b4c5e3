"""Windows of token ids on their way into a model: whether it can be run on them, and in which batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .stats import Domain

Windows = NDArray[np.int64]


def batches(windows: Sequence[int], size: int) -> Iterator[tuple[int, slice]]:
    """(domain, windows) of at most `size` windows of one domain each, in order; `windows`: how many each domain has."""
    start = 0
    for domain, count in enumerate(windows):
        for offset in range(0, count, size):
            yield domain, slice(start + offset, start + min(offset + size, count))
        start += count


def check_domains(domains: Sequence[tuple[Domain, Windows]], longest: int | None, n_vocab: int) -> int:
    """The context length of the windows.

    Raises GgufToolError for windows that a model of `n_vocab` tokens and a context of `longest` cannot be run on.
    """
    if not domains:
        raise GgufToolError("no calibration text was given")
    lengths = {windows.shape[1] for _, windows in domains}
    if len(lengths) != 1:
        raise GgufToolError(f"the texts were cut into windows of different lengths: {sorted(lengths)}")
    n_ctx = int(lengths.pop())
    if longest is not None and n_ctx > longest:
        raise GgufToolError(f"a context of {n_ctx} tokens is more than the model's {longest}")
    for domain, windows in domains:
        if domain.tokens != windows.size or not windows.size:
            raise GgufToolError(f"{domain.name}: {windows.size} tokens in windows, {domain.tokens} stated")
        if windows.min() < 0 or windows.max() >= n_vocab:
            raise GgufToolError(
                f"{domain.name}: token ids run from {windows.min()} to {windows.max()}, the model knows"
                f" {n_vocab}; is it the model's own tokenizer?"
            )
    return n_ctx
