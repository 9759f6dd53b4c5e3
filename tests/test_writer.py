import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_models import floats, write_random
from gguftool import cut, layout, planner
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.recipe import Recipe
from gguftool.requant import take_columns, whole_blocks
from gguftool.writer import expand, prune
from synthetic import make_plan, make_stats, tensors

E, K, D, TOP = 4, 64, 64, 2
WIDTHS = [[64, 32, 0, 32], [64, 64, 64, 64], [16, 48, 8, 16]]


@pytest.fixture(params=["F32", "BF16", "F16", "Q8_0"])
def base(request, tmp_path):
    return write_random(tmp_path / "base.gguf", tensors(3, E, K, D, request.param), n_expert=E, top_k=TOP, n_ff=K)


@pytest.fixture
def plain(tmp_path):
    return write_random(tmp_path / "plain.gguf", tensors(3, E, K, D), n_expert=E, top_k=TOP, n_ff=K)


def test_keep_all_writes_every_tensor_byte_for_byte(base, tmp_path):
    plan = make_plan([[K] * E] * 3, K, TOP)
    report = prune(base, plan, tmp_path / "out.gguf")
    old, new = GgufFile(base), GgufFile(tmp_path / "out.gguf")
    assert report.layout == "stock" and old.tensors == new.tensors
    assert all(np.array_equal(old.raw(spec), new.raw(spec)) for spec in old.tensors)
    assert list(old.keys()) == list(new.keys())
    assert all(old.entry(key) == new.entry(key) for key in old.keys())


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_tiers_hold_the_planned_weights(kind, tmp_path):
    base = write_random(tmp_path / "base.gguf", tensors(3, E, K, D, kind), n_expert=E, top_k=TOP, n_ff=K)
    plan = make_plan(WIDTHS, K, TOP)
    report = prune(base, plan, tmp_path / "out.gguf")
    old, new = GgufFile(base), GgufFile(tmp_path / "out.gguf")
    view = inspect(new)
    assert view.layout == "tiered" and check(view) == [] and not report.requantized
    assert new.path.stat().st_size == report.file_bytes
    assert [[width for _, width in layer.experts] for layer in view.layers] == WIDTHS
    for layer in (plan.layers[0], plan.layers[2]):
        tier_map = cut.read_tier_map(new, layer.index)
        for role in ("gate", "up", "down"):
            whole = floats(old, f"blk.{layer.index}.ffn_{role}_exps.weight")
            for tier, row in enumerate(tier_map):
                stack = floats(new, layout.tier_name(layer.index, role, tier))
                for expert in np.nonzero(row >= 0)[0]:
                    kept = layer.retained[expert]
                    assert np.array_equal(
                        stack[row[expert]], whole[expert][:, kept] if role == "down" else whole[expert][kept]
                    )
    assert cut.read_tier_map(new, 1) is None


def test_whole_experts_are_dropped_bit_for_bit_from_a_quantized_file(tmp_path):
    base = write_random(tmp_path / "base.gguf", tensors(3, E, K, D, "Q8_0"), n_expert=E, top_k=TOP, n_ff=K)
    router = [[0, 2, 3], [1, 2, 3], [0, 1, 3]]
    report = prune(base, make_plan([[K] * 3] * 3, K, TOP, router=router, n_expert=E), tmp_path / "out.gguf")
    old, new = GgufFile(base), GgufFile(tmp_path / "out.gguf")
    assert report.layout == "stock" and report.requantized == [] and new.arch_value("expert_count") == 3
    for layer, rows in enumerate(router):
        for name in ("ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps"):
            name = f"blk.{layer}.{name}.weight"
            before, after = ({t.name: t for t in f.tensors}[name] for f in (old, new))
            assert np.array_equal(old.raw(before)[rows], new.raw(after))


def test_layers_may_keep_different_numbers_of_experts(plain, tmp_path):
    plan = make_plan([[K] * 3, [K] * 2, [K] * 4], K, TOP, router=[[0, 2, 3], [1, 2], [0, 1, 2, 3]], n_expert=E)
    assert prune(plain, plan, tmp_path / "out.gguf").layout == "tiered"
    view = inspect(GgufFile(tmp_path / "out.gguf"))
    assert check(view) == []
    assert [[expert for expert, _ in layer.experts] for layer in view.layers] == [[0, 2, 3], [1, 2], [0, 1, 2, 3]]
    with pytest.raises(GgufToolError, match="different numbers of experts"):
        expand(tmp_path / "out.gguf", tmp_path / "stock.gguf")


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_expanding_gives_the_masked_model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expand")
    widths = [data.draw(st.lists(st.integers(0, 8), min_size=E, max_size=E)) for _ in range(3)]
    widths = [[8 * w for w in row] if any(row) else [K] * E for row in widths]
    if all(w == widths[0][0] for row in widths for w in row):
        widths[0][0] = 8 if widths[0][0] != 8 else 16
    base = write_random(folder / "base.gguf", tensors(3, E, K, D), n_expert=E, top_k=TOP, n_ff=K)
    plan = make_plan(widths, K, TOP, seed=data.draw(st.integers(0, 99)))
    prune(base, plan, folder / "tiered.gguf")
    expand(folder / "tiered.gguf", folder / "stock.gguf")
    old, new = GgufFile(base), GgufFile(folder / "stock.gguf")
    assert {t.name: t for t in new.tensors} == {t.name: t for t in old.tensors}
    for layer in plan.layers:
        for role in ("gate", "up", "down"):
            name = f"blk.{layer.index}.ffn_{role}_exps.weight"
            before, after = floats(old, name), floats(new, name)
            for expert, kept in enumerate(layer.retained):
                order = before[expert].T if role == "down" else before[expert]
                padded = after[expert].T if role == "down" else after[expert]
                assert np.array_equal(padded[: len(kept)], order[kept]) and not padded[len(kept) :].any()


def test_plan_prune_inspect_agree_to_the_byte(tmp_path):
    stats = make_stats(3, E, K, D, TOP)
    base = write_random(tmp_path / "base.gguf", stats.model.tensors, n_expert=E, top_k=TOP, n_ff=K)
    for method in ("global", "tenp", "reap"):
        plan = planner.make_plan(stats, Recipe(method, 0.4, align=8))
        out = tmp_path / f"{method}.gguf"
        report = prune(base, plan, out)
        assert report.notes == [] and report.file_bytes == out.stat().st_size
        facts = inspect(GgufFile(out)).as_dict()
        assert facts["tensor_bytes"] == plan.tensor_bytes
        widths = [tuple(e["width"] for e in layer["experts"]) for layer in facts["layers"]]
        assert widths == [layer.widths for layer in plan.layers]
        again = prune(base, plan, tmp_path / "dry.gguf", dry_run=True)
        assert again.file_bytes == report.file_bytes and not (tmp_path / "dry.gguf").exists()


def test_a_base_with_other_tensors_than_planned_is_said(plain, tmp_path):
    stats = make_stats(3, E, K, D, TOP)
    plan = planner.make_plan(stats, Recipe("global", 0.4, align=8))
    specs = [*stats.model.tensors]
    specs[0] = specs[0].__class__("token_embd.weight", (D, 50), "BF16")
    base = write_random(tmp_path / "other.gguf", specs, n_expert=E, top_k=TOP, n_ff=K)
    assert "its bytes are not exact" in prune(base, plan, tmp_path / "out.gguf").notes[0]


def test_outputs_are_not_replaced_and_inputs_not_lost(plain, tmp_path):
    plan = make_plan(WIDTHS, K, TOP)
    before = plain.read_bytes()
    with pytest.raises(GgufToolError, match="--force"):
        (tmp_path / "there.gguf").write_text("mine")
        prune(plain, plan, tmp_path / "there.gguf")
    with pytest.raises(GgufToolError, match="is an input"):
        prune(plain, plan, plain, force=True)
    assert plain.read_bytes() == before and (tmp_path / "there.gguf").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(plain, tmp_path, monkeypatch):
    def broken(*_args):
        raise GgufToolError("no")

    monkeypatch.setattr("gguftool.writer.take_columns", broken)
    with pytest.raises(GgufToolError):
        prune(plain, make_plan(WIDTHS, K, TOP), tmp_path / "sub" / "out.gguf")
    assert not list((tmp_path / "sub").iterdir())


def test_too_little_disk_is_said_before_anything_is_written(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(GgufToolError, match="the disk has 0.00 GB free"):
        prune(plain, make_plan(WIDTHS, K, TOP), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("size", [0, 3, 20, 100, 1000, -1000, -1])
def test_truncated_files_are_one_clear_line(plain, tmp_path, size):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(plain.read_bytes()[:size])
    with pytest.raises(GgufToolError) as caught:
        GgufFile(bad)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbled_headers_never_crash(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("garbled")
    base = write_random(folder / "base.gguf", tensors(1, E, K, D), n_expert=E, top_k=TOP, n_ff=K)
    raw = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(4, 1200))] = data.draw(st.integers(0, 255))
    base.write_bytes(raw)
    try:
        check(inspect(GgufFile(base)))
    except GgufToolError as error:
        assert len(str(error)) < 2000


def test_hostile_counts_are_refused_unread(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 5) + bytes(100))
    with pytest.raises(GgufToolError, match="claims"):
        GgufFile(bad)


def test_check_finds_what_is_wrong(plain, tmp_path):
    prune(plain, make_plan(WIDTHS, K, TOP), tmp_path / "out.gguf")
    file = GgufFile(tmp_path / "out.gguf")
    spec = next(t for t in file.tensors if t.name == "blk.0.ffn_exps_tier.weight")
    offset = int(file._data[spec.name].data_offset)
    raw = bytearray((tmp_path / "out.gguf").read_bytes())
    raw[offset : offset + 4] = struct.pack("<i", 7)
    (tmp_path / "map.gguf").write_bytes(raw)
    with pytest.raises(GgufToolError, match="indices of tier 0"):
        inspect(GgufFile(tmp_path / "map.gguf"))
    nan = bytearray((tmp_path / "out.gguf").read_bytes())
    where = int(file._data["output_norm.weight"].data_offset)
    nan[where : where + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "nan.gguf").write_bytes(nan)
    assert check(inspect(GgufFile(tmp_path / "nan.gguf"))) == ["output_norm.weight: holds values that are not finite"]


def test_whole_blocks():
    assert whole_blocks(np.arange(32, 96), 32).tolist() == [1, 2]
    assert whole_blocks(np.arange(31, 95), 32) is None
    assert whole_blocks(np.arange(32, 90), 32) is None


def test_aligned_columns_of_a_quantized_matrix_are_copied(tmp_path):
    rows = np.random.default_rng(0).integers(0, 255, (3, 4 * 34), dtype=np.uint8)
    columns = np.concatenate([np.arange(0, 32), np.arange(64, 96)])
    taken, anew = take_columns(rows, "Q8_0", "Q8_0", columns, None)
    assert not anew and np.array_equal(taken.reshape(3, 2, 34), rows.reshape(3, 4, 34)[:, [0, 2]])
    with pytest.raises(GgufToolError, match="runtime build"):
        take_columns(rows, "Q8_0", "Q8_0", columns + 1, None)
