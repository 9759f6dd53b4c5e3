"""Overrides: their file, and what the writer makes of them."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gguf_models import floats, write_random
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.layout import tier_name
from gguftool.overrides import Origin, Overrides, writing
from gguftool.plan import PrunePlan
from gguftool.tensors import TensorSpec
from gguftool.writer import prune
from synthetic import make_plan, tensors

E, K, D, TOP = 4, 64, 32, 2
DROP = make_plan([[K] * 3] * 2, K, TOP, router=[[0, 2, 3], [1, 2, 3]], n_expert=E)
NARROW = make_plan([[K, 32, 0, 32], [K] * E], K, TOP)
ORIGIN = Origin("by-hand", "")


def values(layer: int, expert: int, role: str, width: int = K) -> np.ndarray:
    """Small whole numbers, which BF16 holds exactly."""
    shape = (D, width) if role == "down" else (width, D)
    rng = np.random.default_rng([layer, expert, ("gate", "up", "down").index(role)])
    return rng.integers(-64, 64, shape).astype(np.float32)


def overrides(folder, plan: PrunePlan, *keys, width: int | None = None) -> Overrides:
    """Seeded matrices of the plan's shapes for `keys`, (layer, expert, role)."""
    path = folder / "weights.safetensors"
    widths = {p.index: dict(zip(p.router, p.widths, strict=True)) for p in plan.layers}
    made = {key: values(*key, width or widths.get(key[0], {}).get(key[1]) or K) for key in keys}
    room = [(key, value.shape) for key, value in made.items()]
    with writing(path, replace(ORIGIN, kept_hash=plan.kept_hash), room) as writer:
        for key, value in made.items():
            writer.add(key, value)
    return Overrides.load(path)


def base_file(folder, kind: str = "BF16", merged: bool = False):
    specs = tensors(2, E, K, D, kind)
    if merged:
        both = {s.name: TensorSpec(s.name.replace("gate_exps", "gate_up_exps"), (D, 2 * K, E), kind) for s in specs}
        specs = [both[s.name] if "gate_exps" in s.name else s for s in specs if "up_exps" not in s.name]
    return write_random(folder / "base.gguf", specs, n_expert=E, top_k=TOP, n_ff=K)


def experts_of(file: GgufFile, plan: PrunePlan, layer: int, role: str) -> dict[int, np.ndarray]:
    """Expert -> its matrix in the pruned file."""
    own, names = plan.layers[layer], {spec.name for spec in file.tensors}
    found: dict[int, np.ndarray] = {}
    for index, tier in enumerate(own.tiers()):
        name = tier_name(layer, role, index)
        stack = floats(file, name if name in names else f"blk.{layer}.ffn_{role}_exps.weight")
        found |= {own.router[row]: stack[place] for place, row in enumerate(tier.rows)}
    return found


def same_elsewhere(with_, without, *changed: str) -> None:
    """Every tensor is the same, bit for bit, but the changed ones."""
    new, old = GgufFile(with_), GgufFile(without)
    assert new.tensors == old.tensors
    differing = {spec.name for spec in new.tensors if not np.array_equal(new.raw(spec), old.raw(spec))}
    assert differing == set(changed)


@pytest.mark.parametrize("plan", [DROP, NARROW], ids=["whole", "narrowed"])
def test_gate_up_and_down_are_replaced_and_nothing_else(plan, tmp_path):
    base = base_file(tmp_path)
    # Layer 1 of NARROW is untouched: its stacks would be copied whole.
    keys = [(0, 3, "gate"), (0, 3, "down"), (0, 0, "down"), (1, 2, "up"), (1, 1, "down")]
    weights = overrides(tmp_path, plan, *keys)
    prune(base, plan, tmp_path / "plain.gguf")
    report = prune(base, plan, tmp_path / "new.gguf", overrides=weights)
    new, old = GgufFile(tmp_path / "new.gguf"), GgufFile(tmp_path / "plain.gguf")
    assert check(inspect(new)) == [] and report.requantized == []
    for layer in (0, 1):
        for role in ("gate", "up", "down"):
            before = experts_of(old, plan, layer, role)
            for expert, have in experts_of(new, plan, layer, role).items():
                own = (layer, expert, role) in keys
                assert np.array_equal(have, weights.get(layer, expert, role) if own else before[expert])
    assert new.value("gguftool.weights") == "by-hand" and old.value("gguftool.weights", None) is None
    assert inspect(new).as_dict()["weights"] == "by-hand" and inspect(old).as_dict()["weights"] is None


def test_a_plan_that_keeps_all_may_have_overrides(tmp_path):
    base, plan = base_file(tmp_path), make_plan([[K] * E] * 2, K, TOP)
    prune(base, plan, tmp_path / "new.gguf", overrides=overrides(tmp_path, plan, (1, 2, "up")))
    same_elsewhere(tmp_path / "new.gguf", base, "blk.1.ffn_up_exps.weight")
    assert GgufFile(tmp_path / "new.gguf").value("gguftool.weights") == "by-hand"
    none = overrides(tmp_path, plan)
    prune(base, plan, tmp_path / "none.gguf", overrides=none)
    same_elsewhere(tmp_path / "none.gguf", base)
    assert len(none) == 0 and GgufFile(tmp_path / "none.gguf").value("gguftool.weights", None) is None


@pytest.mark.parametrize("plan", [DROP, NARROW], ids=["whole", "narrowed"])
def test_the_halves_of_a_merged_stack(plan, tmp_path):
    base = base_file(tmp_path, merged=True)
    weights = overrides(tmp_path, plan, (0, 3, "gate"), (1, 2, "up"), (1, 3, "gate"), (1, 3, "up"))
    prune(base, plan, tmp_path / "plain.gguf")
    prune(base, plan, tmp_path / "new.gguf", overrides=weights)
    new, old = GgufFile(tmp_path / "new.gguf"), GgufFile(tmp_path / "plain.gguf")
    for layer in (0, 1):
        before = experts_of(old, plan, layer, "gate_up")
        for expert, have in experts_of(new, plan, layer, "gate_up").items():
            for role, half, own in zip(("gate", "up"), np.split(have, 2), np.split(before[expert], 2), strict=True):
                want = weights.get(layer, expert, role)
                assert np.array_equal(half, own if want is None else want)


def test_a_quantized_base_gets_quantized_rows(tmp_path, monkeypatch):
    base = base_file(tmp_path, "Q8_0")
    weights = overrides(tmp_path, DROP, (0, 2, "gate"), (1, 3, "down"))
    changed = ["blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"]
    with pytest.raises(GgufToolError, match="runtime build"):
        prune(base, DROP, tmp_path / "sub" / "new.gguf", overrides=weights)
    assert not (tmp_path / "sub").exists()

    def quantized(rows, target, _ggml):
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[target]).view(np.uint8)

    monkeypatch.setattr("gguftool.writer.quantize_rows", quantized)
    (tmp_path / "ggml.so").touch()
    assert prune(base, DROP, tmp_path / "plain.gguf").requantized == []
    report = prune(base, DROP, tmp_path / "new.gguf", overrides=weights, ggml=tmp_path / "ggml.so")
    assert report.requantized == changed
    same_elsewhere(tmp_path / "new.gguf", tmp_path / "plain.gguf", *changed)
    new = GgufFile(tmp_path / "new.gguf")
    for (layer, expert, role), place in {(0, 2, "gate"): 1, (1, 3, "down"): 2}.items():
        have = floats(new, f"blk.{layer}.ffn_{role}_exps.weight")[place]
        assert np.allclose(have, weights.get(layer, expert, role), atol=64 / 127)


@pytest.mark.parametrize(
    ("key", "width", "message"),
    [
        ((2, 0, "down"), K, "layer 2, which the plan does not prune"),
        ((0, 1, "down"), K, "layer 0, expert 1, which the plan does not keep"),
        ((0, 7, "up"), K, "layer 0, expert 7, which the plan does not keep"),
        ((0, 0, "up"), 32, r"up of layer 0, expert 0 is \[32, 32\], the plan needs \[64, 32\]"),
        ((0, 0, "down"), 32, r"down of layer 0, expert 0 is \[32, 32\], the plan needs \[32, 64\]"),
    ],
)
def test_what_belongs_to_nothing_is_refused_before_anything_is_written(key, width, message, tmp_path):
    base, weights = base_file(tmp_path), overrides(tmp_path, DROP, (0, 0, "gate"), key, width=width)
    for dry_run in (True, False):
        if width != K:
            weights.places = {key: weights.places[key]}
        with pytest.raises(GgufToolError, match=message):
            prune(base, DROP, tmp_path / "sub" / "new.gguf", overrides=weights, dry_run=dry_run)
    assert not (tmp_path / "sub").exists()


def test_an_empty_expert_of_a_narrowed_layer_has_no_weights(tmp_path):
    weights = overrides(tmp_path, NARROW, (0, 2, "up"))
    with pytest.raises(GgufToolError, match="expert 2, which the plan does not keep"):
        prune(base_file(tmp_path), NARROW, tmp_path / "new.gguf", overrides=weights)


def test_a_role_that_the_base_does_not_have(tmp_path):
    specs = [spec for spec in tensors(2, E, K, D) if "gate_exps" not in spec.name]
    base = write_random(tmp_path / "base.gguf", specs, n_expert=E, top_k=TOP, n_ff=K)
    with pytest.raises(GgufToolError, match="a gate of layer 1, expert 2; the base file has none"):
        prune(base, DROP, tmp_path / "x.gguf", overrides=overrides(tmp_path, DROP, (1, 2, "gate")), dry_run=True)


def test_another_plan(tmp_path):
    weights = overrides(tmp_path, DROP, (0, 0, "gate"))
    with pytest.raises(GgufToolError, match="another plan; run `gguftool by-hand`"):
        prune(base_file(tmp_path), NARROW, tmp_path / "x.gguf", overrides=weights)


def test_the_file_is_safetensors_and_says_what_made_it(tmp_path):
    keys = [(0, 0, "gate"), (0, 0, "down"), (11, 103, "up")]
    origin = Origin("by-hand", "abc", ({"name": "code", "tokens": 3},), ("one",))
    path = tmp_path / "w.safetensors"
    with writing(path, origin, ((key, (K, D)) for key in [*keys, (12, 0, "up")]), notes=100) as writer:
        for key in keys:
            writer.add(key, values(*key))
        writer.notes.append("two")
    arrays, loaded = load_file(path), Overrides.load(path)
    assert set(arrays) == {"0.0.gate", "0.0.down", "11.103.up"} and set(loaded.keys()) == set(keys)
    for key in keys:
        assert np.array_equal(arrays[".".join(map(str, key))], values(*key))
        assert np.array_equal(loaded.get(*key), values(*key)) and loaded.shape(key) == values(*key).shape
    assert loaded.origin == replace(origin, notes=("one", "two")) and loaded.experts == {(0, 0), (11, 103)}
    loaded.save(tmp_path / "again.safetensors")
    again = Overrides.load(tmp_path / "again.safetensors")
    assert again.origin == loaded.origin and np.array_equal(again.get(11, 103, "up"), values(11, 103, "up"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "w.safetensors"]


def test_a_failure_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "w", ORIGIN, []):
        raise RuntimeError
    (tmp_path / "file").touch()
    with pytest.raises(GgufToolError, match="cannot be written"), writing(tmp_path / "file" / "w", ORIGIN, []):
        pass
    (tmp_path / "file").unlink()
    assert not list(tmp_path.iterdir())


def test_what_is_no_weights_file_is_one_clear_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(GgufToolError, match="no such file"):
        Overrides.load(path)
    path.write_bytes(b"no")
    with pytest.raises(GgufToolError, match="damaged"):
        Overrides.load(path)
    one = {"0.0.down": np.ones((2, 2), np.float32)}
    whole = {"format": "gguftool.weights", "version": 2, "made_by": "x", "kept_hash": "", "dataset": [], "notes": []}
    for name, header, message in (
        ("0.0.down", {}, "not weights of gguftool"),
        (
            "0.0.down",
            {"format": "gguftool.refit", "version": 1, "kept_hash": "", "dataset": []},
            "version 1, .* reads 2",
        ),
        ("0.0.down", whole | {"version": 3}, "version 3, .* reads 2"),
        ("0.0.down", {k: v for k, v in whole.items() if k != "made_by"}, "damaged"),
        ("0.0.side", whole, "no gate, up or down"),
        ("0.down", whole, "damaged"),
    ):
        save_file({name: one["0.0.down"]}, path, {"gguftool": json.dumps(header)})
        with pytest.raises(GgufToolError, match=message) as caught:
            Overrides.load(path)
        assert "\n" not in str(caught.value)
    with writing(path, ORIGIN, [((0, 0, "up"), (2, 2))]) as writer:
        writer.add((0, 0, "up"), np.ones((2, 2), np.float32))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(GgufToolError, match="damaged"):
        Overrides.load(path)


def test_saving_holds_one_matrix_at_a_time(tmp_path):
    matrix = np.ones((256, 256), dtype=np.float32)
    save_file({str(expert): matrix for expert in range(64)}, tmp_path / "layer")
    places = {(0, expert, "down"): (tmp_path / "layer", str(expert)) for expert in range(64)}
    Overrides(ORIGIN, places).save(tmp_path / "warm")
    tracemalloc.start()
    Overrides(ORIGIN, places).save(tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * matrix.nbytes
