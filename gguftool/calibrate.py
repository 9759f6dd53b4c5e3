"""Calibration: one pass over the texts that takes every sum that a criterion, a plan or an imatrix needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .checkpoint import Checkpoint
from .forward import LayeredPass, LayerStream, Progress, Windows, identity
from .inventory import in_gguf_order, model_facts
from .recorders import ExpertRecorder
from .stats import EXPERT_SUMS, NEURON_SUMS, SOLVED, WEIGHT_NORMS, CalibrationStats, Domain
from .workdir import WorkDir

# A layer's K x K second moments may take so much memory before OBS costs are left out: 302 MB at Qwen3-30B's sizes.
OBS_BYTES = 2 << 30


def calibrate(
    checkpoint: Checkpoint,
    domains: Sequence[tuple[Domain, Windows]],
    work_dir: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    hidden_dtype: torch.dtype = torch.float32,
    batch: int = 4,
    obs: bool | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
) -> CalibrationStats:
    """Runs the checkpoint over the windows of all domains and returns what was measured.

    Args:
        domains: one (domain, token ids [windows, n_ctx]) for each text, as `corpus.load_domain` gives them.
        work_dir: holds the state between layers: the hidden states of all windows (twice, while a layer runs) and the
            sums. A run that was stopped goes on behind its last finished layer when it is started again on the same
            model, texts and types; otherwise it starts anew. Removed at the end, behind the saving to `out`.
        dtype: of the computation. hidden_dtype: of the hidden states on disk.
        batch: windows that run through a layer at once.
        obs: whether to solve OBS costs too; None where a layer's second moments take at most OBS_BYTES.
        progress: called with (windows x layers done, all of them, what is being done).
        out: where to save the stats; where that fails, `work_dir` still has everything for another try.

    Raises GgufToolError for a checkpoint or windows that do not fit, and where a layer's output is not finite.
    """
    facts = model_facts(checkpoint)
    shape = (checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd)

    if obs is None:
        obs = obs_bytes(checkpoint) <= OBS_BYTES

    def record(module: nn.Module, layer: int) -> ExpertRecorder:
        return ExpertRecorder(module, len(domains), shape, layer, obs=obs)

    run = LayeredPass(
        LayerStream(checkpoint, device, dtype), domains, record, linears=True, batch=batch, progress=progress
    )
    work = WorkDir(work_dir, identity(checkpoint, domains, dtype, hidden_dtype) | {"obs": obs}, run.shape, hidden_dtype)
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
        linear_tokens=run.windows.size,
    )
    stats.check()
    if out is not None:
        stats.save(out)
    work.remove()
    return stats


def obs_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of one layer's second moments, [E, K, K] in float32."""
    return 4 * checkpoint.n_expert * checkpoint.n_ff_exp**2
