"""One rank of a calibration: python ranked.py CHECKPOINT OUT [RANK DONE AT]

Rank RANK dies at its AT-th call that touches a file behind window DONE of its windows x layers. GROUP in the
environment: experts whose second moments are in memory at a time.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.errors import GgufToolError
from gguftool.memory import plan_memory
from gguftool.ranks import joined
from killed import Killer, domains

out = Path(sys.argv[2])
rank, windows, at = map(int, sys.argv[3:]) if sys.argv[3:] else (-1, 0, 0)


def progress(done: int, _total: int, _text: str) -> None:
    if ranks.rank == rank and done >= windows and sys.getprofile() is None:
        sys.setprofile(Killer(at))


try:
    with joined() as ranks:
        scratch = out.with_name("out.work")
        checkpoint = open_checkpoint(sys.argv[1])
        how = plan_memory(checkpoint, 8, 12, torch.float32, None, n_domains=2)
        how = replace(how, batch=2, group=int(os.environ.get("GROUP", "0")))
        calibrate(checkpoint, domains(), scratch, how=how, out=out, ranks=ranks, progress=progress)
except GgufToolError as error:
    sys.exit(f"error: {error}")
