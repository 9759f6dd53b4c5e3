"""Fuzzes gguftool's readers with atheris, guided by coverage: fuzz_readers.py TARGET CORPUS [libFuzzer options].

Every input either is read or is refused with GgufToolError; anything else is a finding, and so is a second of time or memory
beyond what scripts/fuzz allows. `fuzz_readers.py seeds FOLDER` writes small sound files to start from.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]
import numpy  # noqa: F401, E402

with atheris.instrument_imports(include=["gguftool", "json"]):
    from gguftool import cut  # noqa: F401
    from gguftool.documents import Reading
    from gguftool.errors import GgufToolError
    from gguftool.gguf_file import GgufFile
    from gguftool.inspection import check, inspect
    from gguftool.overrides import Overrides
    from gguftool.plan import PrunePlan, dumps
    from gguftool.sensitivity import Sensitivity
    from gguftool.sources import Source
    from gguftool.stats import CalibrationStats
    from gguftool.stored import stored_tensors


def _weights(path: Path) -> None:
    found = Overrides.load(path)
    for key in list(found.keys())[:10]:
        found.get(*key)


TARGETS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gguf": ("x.gguf", lambda path: check(inspect(GgufFile(path)))),
    "plan": ("x.json", lambda path: dumps(PrunePlan.load(path))),
    "layers": ("x.json", lambda path: Sensitivity.load(path).dumps()),
    "stats": ("x.safetensors", CalibrationStats.load),
    "weights": ("x.safetensors", _weights),
    "shard": ("model.safetensors", lambda path: stored_tensors(path.parent)),
    "documents": ("x.jsonl", lambda path: list(Reading(Source(str(path)), lambda: None))),
}


def seeds(folder: Path) -> None:
    """One sound file, or some, for each target, as small as they come."""
    import numpy as np

    from gguftool.overrides import Origin, writing
    from gguftool.sensitivity import Conditions, LayerCost
    from hostile import tiny_gguf
    from synthetic import make_plan, make_stats

    for target in TARGETS:
        (folder / target).mkdir(parents=True, exist_ok=True)
    tiny_gguf(folder / "gguf" / "tiered", layers=1)
    tiny_gguf(folder / "gguf" / "stock", tiered=False, layers=1)
    plan = make_plan([[16, 8, 0]], 16, 2)
    plan.save(folder / "plan" / "plan")
    make_stats(1, 2, 2, 2, 1).save(folder / "stats" / "stats")
    known = Conditions("m", "f", "s", 1, (0,), 0.5, "c", 8, 4, "t", "0", 8, None, "cpu")
    Sensitivity(known, (LayerCost(0, 0.1, 0.01, 2.0),)).save(folder / "layers" / "layers")
    with writing(folder / "weights" / "w", Origin("refit", plan.kept_hash), [((0, 1, "down"), (2, 2))]) as out:
        out.add((0, 1, "down"), np.ones((2, 2), np.float32))
    (folder / "shard" / "shard").write_bytes((folder / "weights" / "w").read_bytes())
    lines = [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "b"}]},
        {"conversations": [{"from": "gpt", "value": "c"}]},
    ]
    for number, line in enumerate(lines):
        (folder / "documents" / str(number)).write_text(json.dumps(line))


def main() -> None:
    """Runs one target until libFuzzer stops."""
    target = sys.argv.pop(1)
    if target == "seeds":
        seeds(Path(sys.argv[1]))
        return
    name, read = TARGETS[target]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / name

        def once(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read(path)
            except GgufToolError as error:
                assert str(error)

        atheris.Setup(sys.argv, once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
