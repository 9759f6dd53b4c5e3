"""What refits take in memory, each in a process of its own: python peaks.py FOLDER

Prints for every case the most anonymous memory that its process had, what it had at the start, and what was planned. The
checkpoints are of random weights: `many` experts, whose new columns are the most of it, and few `wide` ones, whose second
moments and equations are.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from gguftool.bench_calibrate import _pages
from gguftool.checkpoint import Checkpoint, open_checkpoint
from gguftool.memory import MemoryPlan
from gguftool.plan import PrunePlan
from gguftool.random_checkpoint import shape_named, write_random_checkpoint
from gguftool.refit import refit, refit_memory
from gguftool.sequential import refit_sequentially
from gguftool.stats import Domain
from synthetic import make_plan

SMALL = {"n_head": 4, "n_head_kv": 2, "head_dim": 32, "n_expert_used": 2}
SIZES = {
    "many": {"n_embd": 2048, "n_expert": 24, "n_ff_exp": 1024, **SMALL},
    "wide": {"n_embd": 256, "n_expert": 4, "n_ff_exp": 3072, **SMALL},
}
N_CTX = {"many": 4, "wide": 512}
# Checkpoint, share of the neurons that stays, type, experts whose second moments are in memory at a time, sequentially.
CASES = {
    "columns": ("many", 0.9, torch.float32, 0, False),
    "columns in bfloat16, one at a time": ("many", 0.9, torch.bfloat16, 1, False),
    "whole experts": ("many", 1.0, torch.float32, 0, False),
    "moments": ("wide", 0.5, torch.float32, 0, False),
    "one at a time": ("wide", 0.5, torch.float32, 1, False),
    "sequential": ("wide", 0.75, torch.float32, 1, True),
}


def written(folder: Path, name: str) -> Checkpoint:
    """A checkpoint of one layer, whose router does not make the weights of a token add up to 1."""
    write_random_checkpoint(folder, replace(shape_named("qwen3-30b-a3b"), **SIZES[name]), 1)
    config = json.loads((folder / "config.json").read_text()) | {"norm_topk_prob": False}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def cut(checkpoint: Checkpoint, share: float) -> PrunePlan:
    """Every expert narrowed to a share of its neurons; where that is all of them, a quarter of the experts goes."""
    count, width = checkpoint.n_expert, checkpoint.n_ff_exp
    stays = range(count) if share < 1 else range(count // 4, count)
    plan = make_plan(
        [[int(share * width)] * len(stays)], width, checkpoint.n_expert_used, router=[list(stays)], n_expert=count
    )
    return replace(plan, model_fingerprint=checkpoint.fingerprint)


def watched(work: Callable[[], object]) -> tuple[int, int]:
    """The anonymous memory of a forked process that does the work: at the start and the most."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    start = peak = _pages(child)[0]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        peak = max(peak, _pages(child)[0])
        time.sleep(0.002)
    if ended[1]:
        sys.exit("the refit failed")
    return start, peak


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # and so no thread is lost in a fork
    checkpoints = {name: written(folder / name, name) for name in SIZES}
    found = {}
    for case, (name, share, dtype, group, sequential) in CASES.items():
        checkpoint, plan = checkpoints[name], cut(checkpoints[name], share)
        windows = np.random.default_rng(0).integers(0, checkpoint.n_vocab, (2, N_CTX[name]))
        domains = [(Domain("random", "0" * 64, windows.size), windows)]
        usual = refit_memory(checkpoint, plan, domains, dtype, None, sequential=sequential)
        peak = usual.needs.peak(1, group or usual.needs.n_expert, 1, False)
        how = replace(usual, batch=1, group=group, peak=peak)

        def work(
            checkpoint: Checkpoint = checkpoint, plan: PrunePlan = plan, domains=domains, how: MemoryPlan = how,
            fit=refit_sequentially if sequential else refit, case: str = case,
        ) -> None:  # fmt: skip
            fit(checkpoint, plan, domains, folder / f"{case}.work", how=how)

        start, most = watched(work)
        shutil.rmtree(folder / f"{case}.work")
        found[case] = {"start": start, "peak": most, "planned": how.peak, "needs": asdict(how.needs)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
