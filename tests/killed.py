"""A calibration or refit in a process of its own that kills itself at a chosen moment, as kill -9 does.

    python killed.py CHECKPOINT FOLDER WHAT...

runs every WHAT (calibrate, plain, sequential) in forked children: undisturbed, and killed at five calls that touch a file,
each time followed by a run that goes on; then killed three times in a row. Results lie in FOLDER/WHAT/; it prints how many
calls a run makes and at which it was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.inventory import model_facts
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.refit import refit
from gguftool.sequential import refit_sequentially
from gguftool.stats import CalibrationStats, Domain
from gguftool.workdir import clear_leftovers

torch.set_num_threads(1)
CALLS = {"write", "open", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "posix_fallocate",
         "serialize_file", "seek"}  # fmt: skip


class Killer:
    """Counts the calls of functions that touch files, and kills the process in front of or behind one of them: the one of
    that number, or the one by which the file of that name gets it."""

    def __init__(self, at: int | str) -> None:
        self.at, self.seen = at, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        # Behind every other call: a write is then done, and what follows it is not.
        if event in ("c_call", "c_return") and getattr(arg, "__name__", "") in CALLS:
            self.seen += 1
            if self.seen == self.at or (arg is os.replace and self._names(frame)):
                os.kill(os.getpid(), signal.SIGKILL)

    def _names(self, frame: FrameType) -> bool:
        path = frame.f_locals.get("path")
        return isinstance(path, Path) and path.name == self.at


def domains() -> list[tuple[Domain, np.ndarray]]:
    found = []
    for name, windows, seed in (("code", 5, 1), ("math", 3, 2)):
        ids = np.random.default_rng(seed).integers(0, 320, (windows, 12))
        found.append((Domain(name, f"sha of {name}", ids.size), ids))
    return found


def plan_for(checkpoint: object) -> PrunePlan:
    """A plan that keeps a random half of the neurons: most experts are narrowed."""
    stats = CalibrationStats.blank(model_facts(checkpoint), 2)
    values = np.random.default_rng(3).random(stats.neurons["gate_sq_h_sq"].shape)
    return make_plan(replace(stats, neurons={**stats.neurons, "gate_sq_h_sq": values}), Recipe("global", 0.5, align=8))


Work = Callable[[object, str, Path], None]


def work(checkpoint: object, what: str, folder: Path) -> None:
    """What the command does: an output that is there is the end of it."""
    out, scratch = folder / "out.safetensors", folder / "out.work"
    clear_leftovers(scratch, out)
    if out.exists():
        return
    if what == "calibrate":
        calibrate(checkpoint, domains(), scratch, batch=2, out=out)
        return
    run = refit if what == "plain" else refit_sequentially
    made = run(checkpoint, plan_for(checkpoint), domains(), scratch)
    made.save(out)


def run(checkpoint: object, what: str, folder: Path, at: int | str, work: Work = work) -> int:
    """One run in a forked child: how many calls it made, or 0 where it was killed at call `at` (none for 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        killer = Killer(at)
        sys.setprofile(killer)
        work(checkpoint, what, folder)
        sys.setprofile(None)
        os.write(tell, str(killer.seen).encode())
        os._exit(0)
    os.close(tell)
    calls = int(os.read(told, 100) or 0)
    os.close(told)
    _, status = os.waitpid(child, 0)
    expected = os.WIFSIGNALED(status) if at else os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    assert expected, (what, at, status)
    return calls


def main() -> None:
    checkpoint, root = open_checkpoint(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for what in sys.argv[3:]:
        calls = run(checkpoint, what, root / what / "whole", 0)
        # Drawn from all of a run, and one from its last calls, where the result gets its name and the state goes.
        rng = random.Random(what)
        moments = [rng.randrange(1, calls) for _ in range(4)] + [calls - rng.randrange(1, 12)]
        for at in moments:
            run(checkpoint, what, root / what / f"at-{at}", at)
            run(checkpoint, what, root / what / f"at-{at}", 0)
        # Killed again and again in the same folder, never far.
        for _ in range(3):
            run(checkpoint, what, root / what / "again", rng.randrange(1, calls // 4))
        run(checkpoint, what, root / what / "again", 0)
        found[what] = {"calls": calls, "moments": moments}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
