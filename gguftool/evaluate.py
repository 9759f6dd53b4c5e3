"""KL divergence of pruned files from their base, in one streaming pass over the text and without a file of logits.

The protocol is that of `perplexity`. The base runs once for each window, however many files are compared with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .divergence import Divergence, DivergenceSum, Tokens
from .errors import GgufToolError
from .perplexity import LoadedModel, Perplexity, Progress, Protocol, Session, file_facts, measure, open_session

__all__ = ["Comparison", "Perplexity", "Protocol", "compare", "compare_many", "measure"]


@dataclass(frozen=True)
class Comparison:
    """A pruned file against its base."""

    base: Path
    pruned: Path
    divergence: Divergence
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        """Plain values, nested: base.ppl, pruned.ppl_err, kld.mean, kld.p99, same_top, ..., and the protocol's."""
        return {
            "base": file_facts(self.base, self.divergence.base_ppl),
            "pruned": file_facts(self.pruned, self.divergence.ppl),
            **self.divergence.as_dict(),
            **self.protocol.as_dict(),
        }


def compare(base: Path, pruned: Path, text: str, **options: Any) -> Comparison:
    """`compare_many` for one file, with its options."""
    return compare_many(base, [pruned], text, **options)[0]


def compare_many(
    base: Path,
    pruned: Sequence[Path],
    text: str,
    *,
    llama: Any,
    n_ctx: int = 512,
    max_windows: int | None = None,
    threads: int | None = None,
    n_gpu_layers: int = 0,
    backend: str | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Compares every file of `pruned` with `base` on `text`.

    Args:
        llama: the llama_cpp module, bound to the runtime that can read all the files.
        max_windows: take only the first ones of the text.
        n_gpu_layers: layers to put on a GPU; negative for all.
        backend: what the protocol is to call the backend; by default, the devices that llama.cpp reports.
        memory: bytes that the pruned models may take at once; beyond it they go in groups, and the base runs once for
            each group. By default half of the machine's; with a GPU they go one at a time.

    Raises:
        GgufToolError: a file that does not load, another vocabulary than the base's, a text shorter than one window.
    """
    for path in pruned:
        if not path.is_file():
            raise GgufToolError(f"{path}: no such file")
    with open_session(llama, n_ctx, threads, n_gpu_layers, backend) as session, LoadedModel(session, base) as model:
        windows = model.windows(text, max_windows)
        if memory is None:
            memory = 0 if n_gpu_layers else _physical_memory() // 2
        groups = _groups(pruned, memory, overhead=model.context_bytes)
        sums: list[DivergenceSum] = []
        for number, group in enumerate(groups):
            where = f"group {number + 1} of {len(groups)}" if len(groups) > 1 else "compare"
            sums += _run_group(session, model, group, windows, where, progress)
        protocol = model.protocol(windows, text)
    return [Comparison(base, path, total.result(), protocol) for path, total in zip(pruned, sums, strict=True)]


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


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on this system
        return 8 << 30
