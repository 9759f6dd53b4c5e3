"""What a pass over a model takes in memory, and how it is run so that it stays below a limit.

Everything follows from sizes in the checkpoint's headers and the command's options, so that the same command is run in the
same way each time it is started. What is counted is memory of the process' own: pages of mapped files, which the system takes
back when it needs them, are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch

from .checkpoint import EXPERT_PARAMETERS, Checkpoint
from .errors import GgufToolError
from .routes import ROUTE, neurons_bytes
from .stats import EXPERT_SUMS, NEURON_SUMS, SOLVED, WEIGHT_NORMS

# Python, torch and transformers, a tokenizer and its texts, what matrix products keep for the next one, and memory that is free
# but not given back. Measured: 0.25 GiB at the start, 0.3 to 0.5 behind the first layer.
PROCESS = 640 << 20
# Matrices of K x K in float64 that an OBS solve works with, and the down projection.
SOLVE = 5
BATCHES = (16, 12, 8, 6, 4, 3, 2, 1)
DEFAULT_BATCH = 4
# Where no limit is given, a layer's second moments are together in memory up to this: 302 MB at Qwen3-30B's sizes.
MOMENTS_TOGETHER = 2 << 30

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """'12GiB', '0.5 GiB', '800MB', '8589934592' (bytes) -> bytes. Raises GgufToolError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else ""
    if found is None or unit not in UNITS:
        hint = (
            f"; did you mean {found.group(1)}{unit}iB or {found.group(1)}{unit}B?"
            if unit in tuple("KMGT") and found
            else ""
        )
        raise GgufToolError(f"{text!r} is no size in bytes: it takes a number and a unit, as 12GiB or 800MB{hint}")
    size = int(float(found.group(1)) * UNITS[unit])
    if size < 1:
        raise GgufToolError(f"{text!r} is no size in bytes: it is less than one byte")
    if not unit and size < 1 << 20:
        hint = f"did you mean {text.strip()}GiB?" if size < 1000 else "give one, as 500MB or 12GiB"
        raise GgufToolError(f"{text!r} has no unit, and is too little as bytes; {hint}")
    return size


@dataclass(frozen=True)
class Needs:
    """Bytes that a pass takes in memory.

    Attributes:
        layer: the weights of the largest decoder layer, in the type of the computation.
        embedding: what is loaded beside the layers at the start.
        statistics: the sums of one layer. all_statistics: those of all layers, twice, when the stats are put together.
        moment: C of one expert, K x K. n_expert: how many experts have one.
        solve: what solving one expert takes beside that.
        window: the activations of one window while it runs through a layer.
        hidden: the hidden states of all windows. streams: of how many runs of the model; those of two lie in files only.
        columns: new weights of one layer, which are kept until the layer is saved.
        routes: which experts all tokens chose. again: what computing the neurons of an expert takes. Both are there only
            where C is not added up while a layer runs, but computed behind it.
        sizes: how many C may be in memory at a time, most first; empty for all of them and any smaller number.
    """

    layer: int
    embedding: int
    statistics: int
    all_statistics: int
    moment: int
    n_expert: int
    solve: int
    window: int
    hidden: int
    streams: int = 1
    columns: int = 0
    routes: int = 0
    again: int = 0
    sizes: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[int, ...]:
        """How many C to try to have in memory at a time, most first."""
        if self.sizes:
            return self.sizes
        least = min(1, self.n_expert)
        parts = (max(least, self.n_expert // n) for n in (2, 4, 8, 16))
        return tuple(sorted({self.n_expert, *parts, least}, reverse=True))

    @property
    def least(self) -> int:
        """The least that it can be run in."""
        return min(self.peak(1, group, 1, False) for group in self.groups)

    def peak(self, batch: int, group: int, threads: int, resident: bool) -> int:
        """The most that is in memory at any time.

        `group`: experts whose C are in memory at a time, 0 for none. `threads`: experts that are solved at the same time.
        `resident`: whether the hidden states lie in memory too.
        """
        base = PROCESS + (self.hidden if resident else 0)
        behind = 0 < group < self.n_expert
        held = self.layer + self.statistics + group * self.moment + (self.routes if behind else 0)
        solving = max(threads * self.solve if group else 0, self.again if behind else 0)
        window = batch * self.window
        return base + max(self.embedding + window, held + window, held + self.columns + solving, self.all_statistics)


@dataclass(frozen=True)
class MemoryPlan:
    """How a pass is run.

    Attributes:
        dtype: of the computation and of the hidden states.
        batch: windows that run through a layer at once.
        group: experts whose second moments are in memory at a time, 0 for all of them.
        threads: experts whose OBS costs are solved at the same time, 0 for as many as torch uses threads.
        resident: whether the hidden states lie in memory, and not in a mapped file only.
        peak: bytes that this takes by estimate. needs: what they are made of.
    """

    dtype: torch.dtype
    batch: int
    group: int
    threads: int
    resident: bool
    peak: int
    needs: Needs

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        files = "in a mapped file" if self.needs.streams == 1 else "of both streams in mapped files"
        hidden = "in memory" if self.resident else files
        experts = f"{self.group} expert{'s' if self.group > 1 else ''}"
        moments = f", moments of {experts} at a time" if self.group else ""
        return (
            f"{kind}, {self.batch} windows at a time, hidden states ({gib(self.needs.hidden)}) {hidden}{moments}: "
            f"{gib(self.peak)} by estimate"
        )


def plan_memory(
    checkpoint: Checkpoint, windows: int, n_ctx: int, dtype: torch.dtype | None, limit: int | None, *,
    moments: int | None = None, n_domains: int = 1, threads: int = 0, device: str = "cpu", batch: int = DEFAULT_BATCH,
) -> MemoryPlan:  # fmt: skip
    """How to calibrate on `windows` windows below `limit` bytes (None: no limit).

    Args:
        dtype: of the computation; None picks float32 on the CPU, or bfloat16 where the limit allows no more, and the
            checkpoint's own type elsewhere.
        moments: experts of a layer whose second moments are taken; None for all, 0 for none.
        threads: of torch, for the solves. device: where the computation runs.
        batch: windows that run through a layer at once, where no limit decides that.

    Raises:
        GgufToolError: the limit does not hold a layer, its statistics and one window; with the numbers.
    """

    def needs(kind: torch.dtype) -> Needs:
        return needs_of(checkpoint, windows, n_ctx, kind, moments, n_domains)

    return fitted(
        checkpoint,
        needs,
        dtype,
        limit,
        threads=threads,
        device=device,
        batch=batch,
        without="calibrating with --no-obs",
    )


def fitted(
    checkpoint: Checkpoint, needs: Callable[[torch.dtype], Needs], dtype: torch.dtype | None, limit: int | None, *,
    threads: int = 0, device: str = "cpu", batch: int = DEFAULT_BATCH, without: str = "",
) -> MemoryPlan:  # fmt: skip
    """How to run a pass that needs so much, by the type of its computation; all else as in `plan_memory`.

    Args:
        without: what to advise where it would fit without second moments; "" for a pass that is about these.

    Raises:
        GgufToolError: the limit does not hold what the pass takes at least; with the numbers.
    """
    if dtype is None and device != "cpu":
        dtype = torch.float16 if all(t.dtype == "F16" for t in checkpoint.tensors.values()) else torch.bfloat16
    choices = (dtype,) if dtype is not None else (torch.float32, torch.bfloat16)
    threads = threads or torch.get_num_threads()
    for kind in choices:
        found = _fit(needs(kind), kind, limit, threads, batch)
        if found is not None:
            return found
    assert limit is not None
    raise GgufToolError(_refusal(needs(choices[0]), choices, limit, without))


def _fit(needs: Needs, dtype: torch.dtype, limit: int | None, threads: int, batch: int) -> MemoryPlan | None:
    """The fastest way to stay below the limit, or None; without a limit, `batch` windows at a time."""
    if limit is None:
        group = needs.groups[0 if needs.groups[0] * needs.moment <= MOMENTS_TOGETHER else -1]
        peak = needs.peak(batch, group, threads, False)
        return MemoryPlan(dtype, batch, group if group < needs.n_expert else 0, 0, False, peak, needs)

    def first(batches: tuple[int, ...], resident: bool) -> MemoryPlan | None:
        # Moments of all experts together save computing the neurons twice; more than a few windows at once bring less.
        for group in needs.groups:
            for batch in batches:
                for solvers in range(threads, 0, -1):
                    peak = needs.peak(batch, group, solvers, resident)
                    if peak <= limit:
                        own = 0 if group == needs.n_expert else group
                        return MemoryPlan(dtype, batch, own, solvers, resident, peak, needs)
        return None

    small = first(tuple(b for b in BATCHES if b <= DEFAULT_BATCH), False)
    if small is None:
        return None
    found = small
    # A sequential refit leaves those of both its streams in files, which the system caches where there is room.
    held = (replace(small, resident=True),) if needs.streams == 1 else ()
    for better in (*held, *(replace(small, batch=b) for b in BATCHES if b > small.batch)):
        tried = replace(better, resident=better.resident or found.resident)
        peak = needs.peak(tried.batch, tried.group or needs.n_expert, tried.threads, tried.resident)
        if peak <= limit and tried.batch >= found.batch:
            found = replace(tried, peak=peak)
    return found


def needs_of(
    checkpoint: Checkpoint, windows: int, n_ctx: int, dtype: torch.dtype, moments: int | None, n_domains: int
) -> Needs:
    """What a calibration takes in memory, from the checkpoint's headers; arguments as in `plan_memory`."""
    n_expert, width, n_embd, size = checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd, dtype.itemsize
    weights, widest = _weights_of(checkpoint)
    neurons = len(NEURON_SUMS) + len(WEIGHT_NORMS) + (len(SOLVED) if moments != 0 else 0)
    statistics = 8 * n_expert * (len(EXPERT_SUMS) * n_domains + neurons * width + n_embd) + 8 * 8 * widest
    count = n_expert if moments is None else moments
    work, tokens = max(4, size), windows * n_ctx
    # Of a token: residual stream, queries, keys, values and their rotated copies; squares for the sums; the experts' share.
    share = min(1.0, 4 * checkpoint.n_expert_used / n_expert)
    token = size * (8 * n_embd + 4 * widest) + work * (2 * widest + 2 * n_embd + n_expert)
    token += int(share * (size * (4 * width + 2 * n_embd) + work * (3 * width + 3 * n_embd)))
    return Needs(
        layer=weights * size,
        embedding=checkpoint.n_vocab * n_embd * size,
        statistics=statistics,
        all_statistics=2 * len(checkpoint.moe_layers) * statistics,
        moment=work * width * width if count else 0,
        n_expert=count,
        solve=8 * (SOLVE * width * width + width * n_embd),
        window=n_ctx * token,
        hidden=tokens * n_embd * size,
        routes=ROUTE * checkpoint.n_expert_used * tokens if count else 0,
        again=neurons_bytes(tokens, n_embd, width, dtype) if count else 0,
    )


def _weights_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many weights the largest layer has when it is loaded, and the longest side of a matrix outside of the experts."""
    packed: Counter[str] = Counter()  # a byte of MXFP4 is two weights, and its scales are none
    for layer in filter(checkpoint.is_mxfp4, checkpoint.moe_layers):
        for source in (s for leaf in EXPERT_PARAMETERS for s in checkpoint.expert_sources(layer, leaf)):
            assert source.scales is not None
            packed[source.tensor.name] += prod(source.shape)
            packed[source.scales.name] = 0
    weights = [0] * checkpoint.n_layers
    widest = checkpoint.n_embd
    for name, tensor in checkpoint.tensors.items():
        index, suffix = checkpoint.split_layer(checkpoint.converter_name(name))
        if index is None or index >= checkpoint.n_layers or checkpoint.is_unread(name):
            continue
        weights[index] += packed[name] if name in packed else prod(tensor.shape)
        if "expert" not in suffix and len(tensor.shape) > 1:
            widest = max(widest, *tensor.shape)
    return max(weights), widest


def _refusal(needs: Needs, choices: tuple[torch.dtype, ...], limit: int, without: str) -> str:
    """What is missing, in numbers, and what to do about it, in words: each caller names the same things otherwise."""
    kind = " or ".join(str(choice).removeprefix("torch.") for choice in choices)
    least = needs.least
    parts = [f"the process {gib(PROCESS)}", f"one layer's weights {gib(needs.layer)}"]
    if needs.all_statistics:
        parts.append(
            f"its statistics {gib(needs.statistics)} (those of all layers together {gib(needs.all_statistics)})"
        )
    if needs.columns:
        parts.append(f"its new weights {gib(needs.columns)}")
    parts.append(f"one window {gib(needs.window)}")
    remedies = []
    if needs.n_expert:
        work = max(needs.solve, needs.again)
        parts.append(f"second moments {gib(needs.moment)} an expert and {gib(work)} to take and solve them")
        if without and needs.peak(1, 0, 1, False) <= limit:
            remedies.append(without)
    if choices == (torch.float32,):
        remedies.append("computing in bfloat16")
    if needs.window > needs.layer // 8:
        remedies.append("shorter windows")
    remedies.append(f"a limit of {gib(least, up=True).replace(' ', '')} or more")
    return (
        f"a limit of {gib(limit)} does not hold what one layer takes in {kind}, {gib(least)} at least: {', '.join(parts)}; "
        f"hidden states ({gib(needs.hidden)}) would lie in a file. What helps: {', '.join(remedies)}"
    )


def gib(size: int, up: bool = False) -> str:
    """Bytes for a person: 2.32 GiB, 800.0 MiB."""
    unit, places = (2**30, 2) if size >= 2**30 else (2**20, 1)
    value = size / unit
    if up:
        value = -(-size * 10**places // unit) / 10**places
    return f"{value:.{places}f} {'GiB' if unit == 2**30 else 'MiB'}"


def parse_dtype(text: str) -> torch.dtype | None:
    """'float32', 'bfloat16', 'float16', or None for 'auto'."""
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in known:
        raise GgufToolError(f"no type {text!r}; known are {', '.join(known)}")
    return known[text]
