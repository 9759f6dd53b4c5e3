"""One rank of a calibration: python ranked.py CHECKPOINT OUT [RANK DONE AT]

Rank RANK dies at its AT-th call that touches a file behind window DONE of its windows x layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.errors import GgufToolError
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
        calibrate(open_checkpoint(sys.argv[1]), domains(), scratch, batch=2, out=out, ranks=ranks, progress=progress)
except GgufToolError as error:
    sys.exit(f"error: {error}")
