"""The stages that write GGUF files, and compress, each in processes that kill themselves, as `killed.py` does.

    python killed_stages.py INPUTS FOLDER WHAT...

INPUTS holds model/, base.gguf, plan.json, tiered.gguf, run.toml, calib.txt and eval.txt. Results lie in FOLDER/WHAT/.
compress is also killed right before what says what the folder holds gets its name.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

from gguftool import runtime
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.plan import PrunePlan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe_file import load
from gguftool.runs import carry_out
from gguftool.writer import prune
from killed import run

MOMENTS = {"prune": 4, "expand": 4, "quantize": 4, "compress": 4}
NAMED = {"compress": ["recipe.toml", "verified.json"]}


def stage(inputs: Path, what: str, out: Path) -> None:
    """What the command does."""
    found = runtime.require("cpu")
    if what == "prune":
        prune(inputs / "base.gguf", PrunePlan.load(inputs / "plan.json"), out)
    elif what == "expand":
        expand(inputs / "tiered.gguf", out)
    elif what == "quantize":
        quantize(inputs / "base.gguf", "Q8_0", out, tools=QuantizeTool(found.tool("llama-quantize"), threads=1))
    else:
        carry_out(load(inputs / "run.toml"), out)


def work(inputs: object, what: str, folder: Path) -> None:
    """The stage in `folder`; a file that is there is the end of it, a program that was left behind is waited for."""
    assert isinstance(inputs, Path)
    # Reports name their files: the same in every folder.
    os.chdir(folder)
    out = Path("out" if what == "compress" else "out.gguf")
    while what == "compress" or not out.exists():
        try:
            return stage(inputs, what, out)
        except GgufToolError as error:
            if "still runs" not in str(error):
                raise
            time.sleep(0.1)


def main() -> None:
    inputs, root = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    found = {}
    for what in sys.argv[3:]:
        calls = run(inputs, what, root / what / "whole", 0, work)
        rng = random.Random(what)
        moments: list[int | str] = [rng.randrange(1, calls) for _ in range(MOMENTS[what] - 1)]
        moments += [calls - rng.randrange(1, 12), *NAMED.get(what, [])]
        for at in moments:
            run(inputs, what, root / what / f"at-{at}", at, work)
            run(inputs, what, root / what / f"at-{at}", 0, work)
        found[what] = {"calls": calls, "moments": moments}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
