"""What the patched llama.cpp loads, `inspect --check` accepts, and the reverse, on broken files and on seeded changes.

Python's own verdict is compared, before llama.cpp is asked. What inspect refuses beyond llama.cpp is listed in
hostile_gguf.STRICTER: weights that are not finite, and metadata of gguftool's own that contradict the tensors.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType as V

import hostile_gguf
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile, KeyValue
from gguftool.inspection import check, inspect
from gguftool.layout import parse
from gguftool.loading import refusals
from hostile import Tensors, rebuild, resized, tiny_gguf

CHANGES = 300


def verdict(path: Path) -> str | None:
    """What inspect --check says of a file by itself; None for a sound one."""
    try:
        return next(iter(check(inspect(GgufFile(path)))), None)
    except GgufToolError as error:
        return str(error)


def change_experts(rng: random.Random, entries: dict[str, KeyValue], tensors: Tensors) -> str:
    """One random change of the experts' tensors, their maps or the numbers about them; says which."""
    names = [name for name in tensors if parse(name)]
    name = rng.choice(names)
    spec, raw = tensors[name]
    kind = rng.choice(["map", "map", "dimension", "remove", "rename", "copy", "type", "number"])
    if kind == "map":
        name = rng.choice([name for name in names if name.endswith("exps_tier.weight")])
        spec, raw = tensors[name]
        flat = raw.reshape(-1).view(np.int32).copy()
        for _ in range(rng.choice([1, 1, 2])):
            flat[rng.randrange(len(flat))] = rng.choice([-2, -1, 0, 1, 2, 3, 2**31 - 1])
        if rng.random() < 0.3:  # still a partition: experts change their places
            order = list(range(spec.ne[0]))
            rng.shuffle(order)
            flat = raw.reshape(-1).view(np.int32).reshape(-1, spec.ne[0])[:, order].reshape(-1).copy()
        tensors[name] = spec, flat.view(np.uint8)
    elif kind == "dimension":
        axis = rng.randrange(len(spec.ne))
        ne = list(spec.ne)
        ne[axis] = max(1, rng.choice([ne[axis] - 1, ne[axis] + 1, 2 * ne[axis], ne[axis] // 2, 1]))
        tensors[name] = resized(spec, raw, ne)
    elif kind == "remove":
        del tensors[name]
    elif kind in ("rename", "copy"):
        new = name
        while new == name:  # another layer, tier or role
            layer, rest = f"blk.{rng.randrange(3)}", name.split(".", 2)[2]
            new = rng.choice([f"{layer}.{rest}", re.sub(r"exps\.\d", f"exps.{rng.randrange(4)}", name),
                              re.sub(r"(gate|up|down)_exps", rng.choice(["gate", "up", "down"]) + "_exps", name)])  # fmt: skip
        if kind == "rename":
            del tensors[name]
        tensors[new] = type(spec)(new, spec.ne, spec.type), raw
    elif kind == "type":
        # Zeros: other bytes may be no number in another type, which only inspect looks at.
        tensors[name] = resized(spec, np.zeros_like(raw), spec.ne, rng.choice(["F16", "BF16", "I32", "F32"]))
    else:
        key = rng.choice(["block_count", "expert_count", "expert_used_count", "expert_group_count", "embedding_length"])
        name, value = f"qwen3moe.{key}", rng.choice([0, 1, 2, 3, 5, 6, 7, 31, 33, 2**31])
        entries[name] = KeyValue(value, rng.choice([V.UINT32] * 4 + [V.INT64]))
    return f"{kind} {name}"


def compare(runtime, made: list[tuple[str, Path]]) -> tuple[int, int]:
    """Fails with every file on which the two differ; else how many both accept and both refuse."""
    mine = [verdict(path) for _, path in made]
    theirs = list(refusals(runtime, [path for _, path in made]))
    differ = [
        (name, own, other)
        for (name, _), own, other in zip(made, mine, theirs, strict=True)
        if (own is None) != (other is None)
    ]
    assert not differ, f"{len(differ)} of {len(made)}, (file, inspect, llama.cpp): {differ[:8]}"
    return mine.count(None), len(mine) - mine.count(None)


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_sound_files_are_accepted_by_both(arch, runtime, tmp_path):
    made = [(str(tiered), tiny_gguf(tmp_path / f"{tiered}.gguf", arch, tiered=tiered)) for tiered in (True, False)]
    assert compare(runtime, made) == (2, 0)


def test_hostile_files_are_refused_by_both(runtime, tmp_path):
    tiered = tiny_gguf(tmp_path / "tiered.gguf")
    names = [*hostile_gguf.HEADERS, *hostile_gguf.STRUCTURE]
    made = [(name, hostile_gguf.write(name, tiered, tmp_path / f"{i}.gguf")) for i, name in enumerate(names)]
    assert compare(runtime, made) == (0, len(names))


def test_only_weights_and_gguftools_own_metadata_are_read_more_strictly(runtime, tmp_path):
    tiered = tiny_gguf(tmp_path / "tiered.gguf")
    made = [hostile_gguf.write(name, tiered, tmp_path / f"{i}.gguf") for i, name in enumerate(hostile_gguf.STRICTER)]
    assert all(verdict(path) for path in made) and list(refusals(runtime, made)) == [None] * len(made)


@pytest.mark.parametrize("seed", range(3))
def test_seeded_changes_of_the_experts(seed, runtime, tmp_path):
    rng = random.Random(seed)
    tiered = tiny_gguf(tmp_path / "tiered.gguf", layers=2)
    made = []
    for number in range(CHANGES // 3):
        names: list[str] = []
        path = rebuild(tiered, tmp_path / f"{number}.gguf", lambda e, t, n=names: n.append(change_experts(rng, e, t)))
        made.append((names[0], path))
    accepted, refused = compare(runtime, made)
    assert accepted >= 3 and refused >= 60  # the changes are of both kinds


def test_a_file_that_ends_the_process_is_refused_and_the_next_is_asked_about(runtime, tmp_path):
    tiered = tiny_gguf(tmp_path / "tiered.gguf")
    dying = hostile_gguf.write("2^32 - 1 layers", tiered, tmp_path / "dying.gguf")
    first, second, third = refusals(runtime, [dying, tiered, dying])
    assert second is None and first == third and "GGML_ASSERT" in str(first)
