"""Calibration: one pass over the texts that takes every sum that a criterion, a plan or an imatrix needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .checkpoint import Checkpoint
from .durable import SAVED
from .forward import LayeredPass, LayerStream, Progress, Windows, identity
from .grams import Grams, ObsPlan
from .inventory import in_gguf_order, model_facts
from .memory import DEFAULT_BATCH, MemoryPlan, plan_memory
from .ranks import ALONE, Ranks
from .recorders import ExpertRecorder
from .stats import EXPERT_SUMS, NEURON_SUMS, SOLVED, WEIGHT_NORMS, CalibrationStats, Domain
from .workdir import WorkDir


def calibrate(
    checkpoint: Checkpoint,
    domains: Sequence[tuple[Domain, Windows]],
    work_dir: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    hidden_dtype: torch.dtype = torch.float32,
    batch: int = DEFAULT_BATCH,
    how: MemoryPlan | None = None,
    stream: LayerStream | None = None,
    obs: bool = True,
    progress: Progress | None = None,
    out: Path | None = None,
    ranks: Ranks = ALONE,
) -> CalibrationStats:
    """Runs the checkpoint over the windows of all domains and returns what was measured.

    Args:
        domains: one (domain, token ids [windows, n_ctx]) for each text, as `corpus.load_domain` gives them.
        work_dir: holds the state between layers: the hidden states of all windows (twice, while a layer runs) and the
            sums. A run that was stopped goes on behind its last finished layer when it is started again on the same
            model, texts and types; otherwise it starts anew. Removed at the end, behind the saving to `out`.
        dtype: of the computation. hidden_dtype: of the hidden states on disk.
        batch: windows that run through a layer at once.
        how: takes the place of the three above, and says what lies in memory.
        stream: the model where it was built already, for `how`; on its own device.
        obs: whether to solve OBS costs too.
        progress: called with (windows x layers done, all of them, what is being done).
        out: where to save the stats; where that fails, `work_dir` still has everything for another try.
        ranks: the processes that share the windows, each with a work directory of its own inside `work_dir`. All return
            the stats of all windows, the first saves them.

    Raises GgufToolError for a checkpoint or windows that do not fit, and where a layer's output is not finite.
    """
    facts = model_facts(checkpoint)
    shape = (checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd)

    if how is None:
        total = sum(len(windows) for _, windows in domains)
        n_ctx = domains[0][1].shape[1] if domains else 1
        how = plan_memory(checkpoint, total, n_ctx, dtype, None, moments=None if obs else 0, batch=batch)
    else:
        dtype = hidden_dtype = how.dtype

    def record(module: nn.Module, layer: int) -> ExpertRecorder:
        def tell(done: int, total: int) -> None:
            run.note(layer, f"OBS of expert {done} of {total}")

        grams = Grams(module, ObsPlan(how.group, own, run.windows.size, how.threads), ranks, tell) if obs else None
        return ExpertRecorder(module, len(domains), shape, layer, grams)

    run = LayeredPass(
        stream or LayerStream(checkpoint, device, dtype),
        domains,
        record,
        linears=True,
        batch=how.batch,
        progress=progress,
        ranks=ranks,
    )
    key = identity(checkpoint, domains, dtype, hidden_dtype) | {"obs": obs, "ranks": ranks.count}
    own = work_dir if ranks.count == 1 else work_dir / f"rank-{ranks.rank}-of-{ranks.count}"
    work = WorkDir(own, key, run.shape, hidden_dtype, resident=how.resident)
    run.run(work)
    linears = run.finish(work)
    saved = [work.sums(layer) for layer in range(checkpoint.n_layers)]
    moe = [saved[layer] for layer in checkpoint.moe_layers]
    for arrays in saved:
        linears |= {name.removeprefix("linear."): v for name, v in arrays.items() if name.startswith("linear.")}
    names = NEURON_SUMS | WEIGHT_NORMS | (SOLVED if obs else {})
    stats = CalibrationStats(
        model=facts,
        domains=tuple(domain for domain, _ in domains),
        n_ctx=run.n_ctx,
        experts={name: np.stack([arrays[f"expert.{name}"] for arrays in moe], axis=1) for name in EXPERT_SUMS},
        neurons={name: np.stack([arrays[f"neuron.{name}"] for arrays in moe]) for name in names},
        expert_inputs=np.stack([arrays["expert_inputs"] for arrays in moe]),
        residual_inverse=np.concatenate([arrays["residual_inverse"] for arrays in moe]),
        linears=in_gguf_order(checkpoint, linears),
        linear_tokens=run.tokens,
    )
    stats.check()
    with ranks.together():
        if out is not None and ranks.rank == 0:
            stats.save(out, work_dir)
    work.remove()
    with ranks.together():
        pass  # the last one leaves the folder empty
    if ranks.count > 1 and ranks.rank == 0:
        (work_dir / SAVED).unlink(missing_ok=True)
        with suppress(OSError):
            work_dir.rmdir()
    return stats
