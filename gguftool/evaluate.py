"""KL divergence of pruned files from their base, in one streaming pass over the text and without a file of logits.

The protocol is that of `perplexity`. The base runs once for each window, however many files are compared with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Unpack

from .divergence import Divergence, DivergenceSum, Tokens
from .gguf_header import refuse_missing
from .perplexity import LoadedModel, Options, Perplexity, Progress, Protocol, Session, file_facts, measure, open_session

__all__ = ["Comparison", "Perplexity", "Protocol", "compare", "compare_many", "ln_ppl_tolerance", "measure", "pool"]

# Most KL divergence, in nats, by which a quantized model on one right backend may differ from itself on another: five
# times what other kernels and roundings make of the built-in model (`selftest` has the numbers).
DEVICE_KLD = 5e-3


@dataclass(frozen=True)
class Comparison:
    """A pruned file against its base. `scores` has what each position said, for `pool`."""

    base: Path
    pruned: Path
    divergence: Divergence
    protocol: Protocol
    scores: DivergenceSum = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, nested: base.ppl, pruned.ppl_err, kld.mean, kld.p99, same_top, ..., and the protocol's."""
        return {
            "base": file_facts(self.base, self.divergence.base_ppl),
            "pruned": file_facts(self.pruned, self.divergence.ppl),
            **self.divergence.as_dict(),
            **self.protocol.as_dict(),
        }


def ln_ppl_tolerance(tokens: int, kld: float = DEVICE_KLD) -> float:
    """How far ln(perplexity) of two right computations of one model may be apart over so many tokens.

    Two distributions that are `kld` nats apart give a token probabilities whose logarithms differ with a variance of
    about 2 kld (second order), and with a mean of at most about kld: kld + 3 sqrt(2 kld / tokens).
    """
    return kld + 3 * sqrt(2 * kld / tokens)


def compare(base: Path, pruned: Path, text: str, **options: Any) -> Comparison:
    """`compare_many` for one file, with its options."""
    return compare_many(base, [pruned], text, **options)[0]


def compare_many(
    base: Path,
    pruned: Sequence[Path],
    text: str,
    *,
    llama: Any,
    max_windows: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[Comparison]:
    """Compares every file of `pruned` with `base` on `text`.

    Args:
        llama, options: as `perplexity.open_session` has them.
        max_windows: take only the first ones of the text.
        memory: bytes that the pruned models may take at once; beyond it they go in groups, and the base runs once for
            each group. By default half of the machine's; with a GPU they go one at a time.

    Raises:
        GgufToolError: a file that does not load, another vocabulary than the base's, a text shorter than one window.
    """
    for path in pruned:
        refuse_missing(path)
    with open_session(llama, **options) as session, LoadedModel(session, base) as model:
        windows = model.windows(text, max_windows)
        if memory is None:
            memory = 0 if options.get("n_gpu_layers") else physical_memory() // 2
        groups = _groups(pruned, memory, overhead=model.context_bytes)
        sums: list[DivergenceSum] = []
        for number, group in enumerate(groups):
            where = f"group {number + 1} of {len(groups)}" if len(groups) > 1 else "compare"
            sums += _run_group(session, model, group, windows, where, progress)
        protocol = model.protocol(windows, text)
    return [Comparison(base, path, total.result(), protocol, total) for path, total in zip(pruned, sums, strict=True)]


def pool(parts: Sequence[Comparison]) -> Divergence:
    """One file on several texts as if they had been one: every scored position counts alike, quantiles are exact."""
    return DivergenceSum.pooled(part.scores for part in parts).result()


def _run_group(
    session: Session, base: LoadedModel, group: Sequence[Path], windows: Tokens, where: str, progress: Progress | None
) -> list[DivergenceSum]:
    """One pass over the windows with the base and the models of one group."""
    sums = [DivergenceSum() for _ in group]
    with ExitStack() as stack:
        models = [stack.enter_context(LoadedModel(session, path)) for path in group]
        for other in models:
            base.check_same_vocabulary(other)
        for done, window in enumerate(windows):
            reference = base.scores(window)
            for other, total in zip(models, sums, strict=True):
                total.add(*reference, *other.scores(window))
            if progress:
                progress(done + 1, len(windows), where)
    return sums


def _groups(paths: Sequence[Path], memory: int, overhead: int) -> list[list[Path]]:
    """Consecutive files whose sizes and contexts fit into `memory` bytes together; at least one in each group."""
    groups: list[list[Path]] = []
    free = 0
    for path in paths:
        needed = path.stat().st_size + overhead
        if not groups or needed > free:
            groups.append([])
            free = memory
        groups[-1].append(path)
        free -= needed
    return groups


def physical_memory() -> int:
    """Bytes of memory that the machine has; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on this system
        return 8 << 30
