import struct
from collections import Counter

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_models import floats, write_random
from gguftool import cut, layout, planner
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.gguf_file import GgufFile, KeyValue, header_bytes, write_gguf
from gguftool.inspection import check, inspect
from gguftool.overrides import Origin, Overrides
from gguftool.recipe import Recipe
from gguftool.requant import take_columns, whole_blocks
from gguftool.tensors import TensorSpec
from gguftool.writer import prune
from synthetic import make_plan, make_stats, tensors

E, K, D, TOP = 4, 64, 64, 2
WIDTHS = [[64, 32, 0, 32], [64, 64, 64, 64], [16, 48, 8, 16]]


@pytest.fixture(params=["F32", "BF16", "F16", "Q8_0"])
def base(request, tmp_path):
    return write_random(tmp_path / "base.gguf", tensors(3, E, K, D, request.param), n_expert=E, top_k=TOP, n_ff=K)


@pytest.fixture
def plain(tmp_path):
    return write_random(tmp_path / "plain.gguf", tensors(3, E, K, D), n_expert=E, top_k=TOP, n_ff=K)


def rewrite(source, out, *, entries=None, without=(), specs=None, add=None):
    """`source` with other metadata, without some tensors, with changed specs (zeros) or added arrays."""
    file, add = GgufFile(source), add or {}
    changed = {spec.name: spec for spec in specs or ()}
    kept = [changed.get(t.name, t) for t in file.tensors if t.name not in without]
    made = [
        TensorSpec(name, tuple(reversed(v.shape)), "I32" if v.dtype == np.int32 else "F32") for name, v in add.items()
    ]

    def produce(spec):
        if spec.name in add:
            return add[spec.name].view(np.uint8)
        return np.zeros(spec.nbytes, np.uint8) if spec.name in changed else file.raw(spec)

    copied = {key: file.entry(key) for key in file.keys()} | (entries or {})
    write_gguf(out, file.arch, copied, [*kept, *made], produce)
    return out


def with_empty_array(source, out):
    """`source` with an empty array in its metadata, which gguf-py does not write; 32 bytes, so that nothing moves."""
    raw = source.read_bytes()
    version, n_tensors, n_kv = struct.unpack("<IQQ", raw[4:24])
    entry = struct.pack("<Q", 8) + b"none.at.all"[:8] + struct.pack("<IIQ", int(V.ARRAY), int(V.STRING), 0)
    assert len(entry) == 32
    out.write_bytes(raw[:4] + struct.pack("<IQQ", version, n_tensors, n_kv + 1) + entry + raw[24:])
    return out


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


def test_tiers_read_each_expert_once_and_alone(plain, tmp_path, monkeypatch):
    """Four tiers of one layer, three of another, an expert that goes, and a layer that stays."""
    plan, read, largest = make_plan([[64, 32, 48, 16], [64, 64, 64, 64], [0, 48, 8, 16]], K, TOP), Counter(), Counter()
    original = GgufFile.piece

    def piece(self, spec, start, stop):
        read[spec.name] += stop - start
        largest[spec.name] = max(largest[spec.name], stop - start)
        return original(self, spec, start, stop)

    monkeypatch.setattr(GgufFile, "piece", piece)
    prune(plain, plan, tmp_path / "out.gguf")
    for spec in GgufFile(plain).tensors:
        parts = E if "_exps" in spec.name and not spec.name.startswith("blk.1.") else 1
        stays = 3 if parts == E and spec.name.startswith("blk.2.") else parts
        assert (read[spec.name], largest[spec.name]) == (stays * spec.nbytes // parts, spec.nbytes // parts), spec.name


def test_matrices_biases_and_numbers_of_single_experts(plain, tmp_path):
    rng = np.random.default_rng(1)
    more = {
        f"blk.0.ffn_{name}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"down_exps.bias": (E, D), "up_exps.bias": (E, K), "down_exps.scale": (E,)}.items()
    }
    base = GgufFile(rewrite(plain, tmp_path / "base.gguf", add=more))
    for spec in (spec for spec in base.tensors if "_exps" in spec.name):
        raw = base.raw(spec)
        whole = raw if raw.ndim > 1 else raw.reshape(E, -1)
        assert all(np.array_equal(base.expert(spec, e), whole[e]) for e in range(E)), spec.name
    prune(base.path, make_plan(WIDTHS, K, TOP), tmp_path / "out.gguf")
    out, layer = GgufFile(tmp_path / "out.gguf"), make_plan(WIDTHS, K, TOP).layers[0]
    for tier, row in enumerate(cut.read_tier_map(out, 0)):
        for expert in np.nonzero(row >= 0)[0]:
            bias, up, scale = (floats(out, f"blk.0.ffn_{n}") for n in (
                f"down_exps.{tier}.bias", f"up_exps.{tier}.bias", f"down_exps.{tier}.scale"))  # fmt: skip
            assert np.array_equal(bias[row[expert]], more["blk.0.ffn_down_exps.bias"][expert])
            assert np.array_equal(up[row[expert]], more["blk.0.ffn_up_exps.bias"][expert][layer.retained[expert]])
            assert scale[row[expert]] == more["blk.0.ffn_down_exps.scale"][expert]


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


def test_routers_that_know_experts_by_their_number_are_not_cut(plain, tmp_path):
    fewer = make_plan([[K] * 3] * 3, K, TOP, router=[[0, 1, 2]] * 3, n_expert=E)
    one_each = make_plan([[K] * 2] * 3, K, TOP, router=[[0, 3]] * 3, n_expert=E)
    key = {"qwen3moe.expert_group_count": KeyValue(2, V.UINT32)}
    groups = rewrite(plain, tmp_path / "groups.gguf", entries=key)
    with pytest.raises(GgufToolError, match=r"layer 0: the router has 2 groups and the plan keeps \[2, 1\] experts"):
        prune(groups, fewer, tmp_path / "out.gguf")
    table = {"blk.0.ffn_gate_tid2eid.weight": np.array([[0, 1], [3, 2]], np.int32)}
    hashed = rewrite(plain, tmp_path / "hashed.gguf", add=table)
    with pytest.raises(GgufToolError, match="blk.0.ffn_gate_tid2eid.weight routes tokens by a table of expert ids"):
        prune(hashed, one_each, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    prune(groups, one_each, tmp_path / "out.gguf")
    prune(hashed, make_plan(WIDTHS, K, TOP), tmp_path / "narrow.gguf")


def test_outputs_are_not_replaced_and_inputs_not_lost(plain, tmp_path):
    plan = make_plan(WIDTHS, K, TOP)
    before = plain.read_bytes()
    with pytest.raises(GgufToolError, match="--force"):
        (tmp_path / "there.gguf").write_text("mine")
        prune(plain, plan, tmp_path / "there.gguf")
    with pytest.raises(GgufToolError, match="is an input"):
        prune(plain, plan, plain, force=True)
    new = tmp_path / "w.safetensors"
    new.write_text("weights")
    with pytest.raises(GgufToolError, match="is an input"):
        weights = Overrides(Origin("refit", plan.kept_hash), {(0, 0, "down"): (new, "0.0.down")})
        prune(plain, plan, new, overrides=weights, force=True)
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
    offset = file._offsets[spec.name]
    raw = bytearray((tmp_path / "out.gguf").read_bytes())
    raw[offset : offset + 4] = struct.pack("<i", 7)
    (tmp_path / "map.gguf").write_bytes(raw)
    with pytest.raises(GgufToolError, match="indices of tier 0"):
        inspect(GgufFile(tmp_path / "map.gguf"))
    nan = bytearray((tmp_path / "out.gguf").read_bytes())
    where = file._offsets["output_norm.weight"]
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


DROP = make_plan([[K] * 3] * 3, K, TOP, router=[[0, 2, 3], [1, 2, 3], [0, 1, 3]], n_expert=E)


def test_vectors_of_the_router_lose_the_right_entries(plain, tmp_path):
    vectors = {
        f"blk.{i}.{name}": np.arange(E, dtype=np.float32) + 10 * i
        for i in range(3)
        for name in ("exp_probs_b.bias", "ffn_gate_inp.bias")
    }
    prune(rewrite(plain, tmp_path / "base.gguf", add=vectors), DROP, tmp_path / "out.gguf")
    file = GgufFile(tmp_path / "out.gguf")
    for layer in DROP.layers:
        for name in ("exp_probs_b.bias", "ffn_gate_inp.bias"):
            assert floats(file, f"blk.{layer.index}.{name}").tolist() == [10 * layer.index + e for e in layer.router]
    assert check(inspect(file)) == []


@pytest.mark.parametrize("alignment", [64, 4096])
def test_a_base_of_another_alignment(plain, tmp_path, alignment):
    file = GgufFile(plain)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", file.arch)
    for key in list(file.keys())[1:]:
        entry = file.entry(key)
        writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    writer.add_custom_alignment(alignment)
    for spec in file.tensors:
        kind = gguf.GGMLQuantizationType[spec.type]
        writer.add_tensor(spec.name, np.ascontiguousarray(file.raw(spec)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = GgufFile(tmp_path / "base.gguf")
    assert base.value("general.alignment") == alignment
    report = prune(tmp_path / "base.gguf", make_plan(WIDTHS, K, TOP), tmp_path / "tiered.gguf")
    expand(tmp_path / "tiered.gguf", tmp_path / "stock.gguf")
    assert (tmp_path / "tiered.gguf").stat().st_size == report.file_bytes
    for name in ("tiered", "stock"):
        new = GgufFile(tmp_path / f"{name}.gguf")
        assert new.value("general.alignment", None) is None and check(inspect(new)) == []
        assert np.array_equal(floats(new, "blk.2.attn_k.weight"), floats(base, "blk.2.attn_k.weight"))


def test_a_file_that_cannot_be_read_again_gets_no_name(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_args: None)
    with pytest.raises(GgufToolError, match="truncated"):
        prune(plain, make_plan(WIDTHS, K, TOP), tmp_path / "sub" / "out.gguf")
    assert not list((tmp_path / "sub").iterdir())


def test_empty_arrays_are_left_out_and_said(plain, tmp_path):
    base = with_empty_array(plain, tmp_path / "base.gguf")
    assert GgufFile(base).value("none.at.") == []
    for plan in (make_plan(WIDTHS, K, TOP), make_plan([[K] * E] * 3, K, TOP)):
        report = prune(base, plan, tmp_path / "out.gguf", force=True)
        assert report.notes == ["empty arrays of the metadata are left out: none.at."]
        assert GgufFile(tmp_path / "out.gguf").value("none.at.", None) is None


def test_metadata_that_cannot_be_written_is_one_line(plain, tmp_path):
    file = GgufFile(plain)
    for value in (KeyValue([], V.ARRAY, V.STRING), KeyValue("text", V.UINT32), KeyValue(2**40, V.UINT32)):
        with pytest.raises(GgufToolError, match="header cannot be written"):
            write_gguf(tmp_path / "x.gguf", "qwen3moe", {"k": value}, file.tensors, file.raw)
    with pytest.raises(GgufToolError, match="Duplicated tensor"):
        header_bytes("qwen3moe", {}, [file.tensors[0], file.tensors[0]])
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.fixture
def quantized(tmp_path):
    return write_random(tmp_path / "q8.gguf", tensors(3, E, K, D, "Q8_0"), n_expert=E, top_k=TOP, n_ff=K)


def test_what_is_quantized_anew_is_known_before_anything_is_written(quantized, tmp_path):
    out = tmp_path / "sub" / "out.gguf"
    for dry_run in (True, False):
        with pytest.raises(GgufToolError, match="runtime build"):
            prune(quantized, make_plan(WIDTHS, K, TOP), out, dry_run=dry_run)
    with pytest.raises(GgufToolError, match="runtime build"):
        prune(quantized, make_plan(WIDTHS, K, TOP), out, ggml=tmp_path / "gone.so")
    (tmp_path / "ggml.so").touch()
    report = prune(quantized, make_plan(WIDTHS, K, TOP), out, ggml=tmp_path / "ggml.so", dry_run=True)
    assert report.requantized == [
        "blk.0.ffn_down_exps.1.weight", *(f"blk.2.ffn_down_exps.{tier}.weight" for tier in range(3))
    ]  # fmt: skip
    assert not out.parent.exists()


def test_floats_out_of_blocks_need_no_quantizer(quantized, tmp_path):
    plan = make_plan([[16, 48, 8, 16]] * 3, K, TOP)
    for dry_run in (True, False):
        report = prune(quantized, plan, tmp_path / "out.gguf", dry_run=dry_run)
        assert [spec.type for spec in report.tensors if ".ffn_down_exps." in spec.name] == ["F16"] * 9
        assert len(report.requantized) == 9


def test_types_that_need_an_imatrix_are_refused_before_anything_is_written(tmp_path):
    specs = tensors(1, E, 512, 256, "BF16")
    specs = [TensorSpec(t.name, t.ne, "IQ2_XS" if "_exps" in t.name else t.type) for t in specs]
    file = GgufFile(write_random(tmp_path / "f.gguf", tensors(1, E, 512, 256), n_expert=E, top_k=TOP, n_ff=512))
    entries = {key: file.entry(key) for key in file.keys()}
    write_gguf(tmp_path / "b.gguf", "qwen3moe", entries, specs, lambda spec: np.zeros(spec.nbytes, np.uint8))
    (tmp_path / "ggml.so").touch()
    plan = make_plan([[256, 512, 512, 512]], 512, TOP)
    with pytest.raises(GgufToolError, match="IQ2_XS cannot be quantized without an imatrix"):
        prune(tmp_path / "b.gguf", plan, tmp_path / "sub" / "out.gguf", ggml=tmp_path / "ggml.so")
    assert not (tmp_path / "sub").exists()


def test_refitted_columns_count_as_quantized_anew(quantized, plain, tmp_path):
    """Whole blocks stay, so that without a refit nothing would be."""
    kept = tuple(np.arange(K) if expert else np.arange(32) for expert in range(E))
    layers = tuple(layout.LayerPlan(i, tuple(range(E)), kept) for i in range(3))
    plan = make_plan([[K] * E] * 3, K, TOP)
    plan = type(plan)(**(vars(plan) | {"layers": layers}))
    from safetensors.numpy import save_file

    save_file({"x": np.ones((D, 32), np.float32)}, tmp_path / "w.safetensors")
    refit = Overrides(Origin("refit", plan.kept_hash), {(1, 0, "down"): (tmp_path / "w.safetensors", "x")})
    (tmp_path / "ggml.so").touch()
    out = tmp_path / "out.gguf"
    assert prune(quantized, plan, out, dry_run=True).requantized == []
    assert prune(plain, plan, out, overrides=refit, dry_run=True).requantized == []
    with pytest.raises(GgufToolError, match="runtime build"):
        prune(quantized, plan, out, overrides=refit)
    report = prune(quantized, plan, out, overrides=refit, ggml=tmp_path / "ggml.so", dry_run=True)
    assert report.requantized == ["blk.1.ffn_down_exps.1.weight"]


def test_expanding_fewer_experts_gives_a_stock_file(plain, tmp_path):
    plan = make_plan([[64, 32, 16]] * 3, K, TOP, router=[[0, 2, 3], [1, 2, 3], [0, 1, 3]], n_expert=E)
    prune(plain, plan, tmp_path / "tiered.gguf")
    expand(tmp_path / "tiered.gguf", tmp_path / "stock.gguf")
    file = GgufFile(tmp_path / "stock.gguf")
    assert file.arch_value("expert_count") == 3 and check(inspect(file)) == []
    old = floats(GgufFile(plain), "blk.1.ffn_up_exps.weight")
    assert np.array_equal(floats(file, "blk.1.ffn_up_exps.weight")[0], old[1])


def test_expanding_with_one_layer_whole_is_refused(plain, tmp_path):
    plan = make_plan([[K] * E, [K, K, 32], [K, K, 32]], K, TOP, router=[range(E), [0, 1, 2], [1, 2, 3]], n_expert=E)
    prune(plain, plan, tmp_path / "tiered.gguf")
    with pytest.raises(GgufToolError, match="layer 1 keeps 3 experts and layer 0 4"):
        expand(tmp_path / "tiered.gguf", tmp_path / "stock.gguf")


@pytest.mark.parametrize("key", ["router_counts", "router", "widths", "moe_layers", "kept", "n_expert", "n_ff_exp"])
@pytest.mark.parametrize(
    "value", [KeyValue(3, V.UINT32), KeyValue("zz", V.STRING), KeyValue([1.5, 2.5], V.ARRAY, V.FLOAT32)]
)
def test_garbled_keys_are_one_clear_line(plain, tmp_path, key, value):
    prune(plain, make_plan(WIDTHS, K, TOP), tmp_path / "out.gguf")
    bad = rewrite(tmp_path / "out.gguf", tmp_path / "bad.gguf", entries={f"gguftool.{key}": value})
    with pytest.raises(GgufToolError, match="gguftool"):
        cut.read(GgufFile(bad))


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count", "expert_group_count", "block_count"])
def test_arrays_where_a_number_is_needed(plain, tmp_path, key):
    array = KeyValue([2, 2, 2], V.ARRAY, V.UINT32)
    bad = rewrite(plain, tmp_path / "bad.gguf", entries={f"qwen3moe.{key}": array})
    with pytest.raises(GgufToolError, match=f"qwen3moe.{key} is an array of 3"):
        check(inspect(GgufFile(bad)))
    if key != "block_count":
        with pytest.raises(GgufToolError, match=f"qwen3moe.{key} is an array of 3"):
            prune(bad, make_plan(WIDTHS, K, TOP), tmp_path / "out.gguf")


def test_text_that_is_no_text_is_one_clear_line(plain, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(plain.read_bytes().replace(b"Synthetic", b"\xff\xfenthetic", 1))
    with pytest.raises(GgufToolError, match="general.name cannot be read"):
        GgufFile(tmp_path / "bad.gguf").value("general.name")


def test_a_dry_run_writes_nothing_beside_its_output(plain, tmp_path, monkeypatch):
    folder = tmp_path / "theirs"
    folder.mkdir()
    real = gguf.GGUFWriter.__init__

    def guarded(self, path, *args, **kwargs):
        assert folder not in path.parents
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "__init__", guarded)
    monkeypatch.chdir(folder)
    prune(plain, make_plan(WIDTHS, K, TOP), folder / "out.gguf", dry_run=True)
    prune(plain, make_plan(WIDTHS, K, TOP), folder / "not" / "there" / "out.gguf", dry_run=True)


def test_experts_of_another_type_than_planned_are_said(tmp_path):
    stats = make_stats(3, E, K, D, TOP)
    plan = planner.make_plan(stats, Recipe("global", 0.4, align=8))
    specs = [
        TensorSpec(t.name, t.ne, "F32" if "_exps" in t.name and ".0." in t.name else t.type)
        for t in stats.model.tensors
    ]
    base = write_random(tmp_path / "other.gguf", specs, n_expert=E, top_k=TOP, n_ff=K)
    (note,) = prune(base, plan, tmp_path / "out.gguf").notes
    assert "such as blk.0.ffn_" in note and "_exps" in note


def test_metadata_follows_the_conventions(plain, tmp_path):
    plan = type(DROP)(**(vars(DROP) | {"dataset": (("code", 10), ("prose", 20))}))
    label = {"general.size_label": KeyValue("4x1M", V.STRING)}
    base = rewrite(plain, tmp_path / "base.gguf", entries=label)
    prune(base, plan, tmp_path / "out.gguf")
    file = GgufFile(tmp_path / "out.gguf")
    assert file.value("general.size_label", None) is None and file.value("gguftool.formula_version") == 1
    assert [file.value(f"general.dataset.{key}") for key in ("count", "0.name", "1.name")] == [2, "code", "prose"]
    own = {"general.dataset.count": KeyValue(1, V.UINT32), "general.dataset.0.name": KeyValue("own", V.STRING)}
    base = rewrite(plain, tmp_path / "base.gguf", entries=label | own)
    prune(base, plan, tmp_path / "out.gguf", force=True)
    assert GgufFile(tmp_path / "out.gguf").value("general.dataset.0.name") == "own"
    assert GgufFile(tmp_path / "out.gguf").value("general.dataset.1.name", None) is None
    prune(base, make_plan([[K] * E] * 3, K, TOP), tmp_path / "out.gguf", force=True)
    assert GgufFile(tmp_path / "out.gguf").value("general.size_label") == "4x1M"


@pytest.fixture
def tiered(plain, tmp_path):
    prune(plain, make_plan(WIDTHS, K, TOP), tmp_path / "tiered.gguf")
    return tmp_path / "tiered.gguf"


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_up_exps.1.weight", "blk.0.ffn_gate_exps.0.weight", "blk.1.ffn_gate_exps.weight",
             "blk.1.ffn_up_exps.weight", "blk.2.ffn_gate_inp.weight"],
)  # fmt: skip
def test_check_misses_no_tensor(tiered, tmp_path, name):
    found = check(inspect(GgufFile(rewrite(tiered, tmp_path / "bad.gguf", without=[name]))))
    assert len(found) == 1 and name in found[0] and "missing" in found[0]


def test_check_misses_no_layer(plain, tmp_path):
    names = [spec.name for spec in GgufFile(plain).tensors]
    experts = [name for name in names if "blk.1." in name and "_exps" in name]
    bad = rewrite(plain, tmp_path / "bad.gguf", without=experts)
    assert check(inspect(GgufFile(bad))) == ["layer 1: blk.1.ffn_gate_inp.weight, but no experts"]
    bad = rewrite(plain, tmp_path / "bad.gguf", without=[n for n in names if "_exps" in n or "gate_inp" in n])
    assert check(inspect(GgufFile(bad))) == ["the metadata says 4 experts, and no layer has any"]


def test_check_knows_experts_without_a_gate_and_merged_ones(plain, tmp_path):
    gates = [f"blk.{i}.ffn_gate_exps.weight" for i in range(3)]
    assert check(inspect(GgufFile(rewrite(plain, tmp_path / "a.gguf", without=gates)))) == []
    merged = {f"blk.{i}.ffn_gate_up_exps.weight": np.ones((E, 2 * K, D), np.float32) for i in range(3)}
    ups = [f"blk.{i}.ffn_up_exps.weight" for i in range(3)]
    assert check(inspect(GgufFile(rewrite(plain, tmp_path / "b.gguf", without=[*gates, *ups], add=merged)))) == []


def test_check_finds_what_is_left_over(tiered, tmp_path):
    extra = {
        "blk.0.ffn_up_exps.2.weight": np.ones((2, 8, D), np.float32),
        "blk.0.ffn_down_exps.weight": np.ones((E, D, K), np.float32),
        "blk.1.ffn_up_exps.0.weight": np.ones((2, 8, D), np.float32),
    }
    found = check(inspect(GgufFile(rewrite(tiered, tmp_path / "bad.gguf", add=extra))))
    assert sorted(line.split(":")[0] for line in found) == sorted(extra) and all("left over" in line for line in found)


def test_check_finds_experts_of_another_size_than_the_model(plain, tmp_path):
    facts = {"qwen3moe.embedding_length": KeyValue(D, V.UINT32)}
    assert check(inspect(GgufFile(rewrite(plain, tmp_path / "ok.gguf", entries=facts)))) == []
    for role, ne in (("down", (K, 32, E)), ("gate", (32, K, E)), ("up", (D, K + 1, E))):
        spec = TensorSpec(f"blk.1.ffn_{role}_exps.weight", ne, "F32")
        for entries in (facts, {}):
            found = check(inspect(GgufFile(rewrite(plain, tmp_path / "bad.gguf", entries=entries, specs=[spec]))))
            assert any(line.startswith("blk.1.ffn_") and " need " in line for line in found)


def test_check_counts_the_rows_of_biases(plain, tmp_path):
    extra = {
        "blk.0.exp_probs_b.bias": np.ones(E - 1, np.float32),
        "blk.1.ffn_gate_inp.bias": np.ones(E + 1, np.float32),
        "blk.1.ffn_up_exps.bias": np.ones((E, K - 1), np.float32),
        "blk.1.ffn_down_exps.bias": np.ones((E - 1, D), np.float32),
        "blk.2.ffn_down_exps.scale": np.ones(E - 1, np.float32),
    }
    found = check(inspect(GgufFile(rewrite(plain, tmp_path / "bad.gguf", add=extra))))
    assert sorted(line.split()[0] for line in found) == sorted(extra)


def test_check_reads_hash_tables(plain, tmp_path):
    table = np.array([[0, 1], [2, 2], [3, 0], [1, 4]], np.int32)
    bad = rewrite(plain, tmp_path / "bad.gguf", add={"blk.0.ffn_gate_tid2eid.weight": table})
    assert [line.split(": ")[1] for line in check(inspect(GgufFile(bad)))] == [
        "1 tokens go to the same expert twice",
        "1 tokens go to experts that the layer does not have",
    ]
    good = rewrite(plain, tmp_path / "good.gguf", add={"blk.0.ffn_gate_tid2eid.weight": table[[0, 2]]})
    assert check(inspect(GgufFile(good))) == []


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.head_count", "feed_forward_length"])
def test_check_counts_the_entries_of_arrays(plain, tmp_path, key):
    for count in (2, 3, 4):
        array = {f"qwen3moe.{key}": KeyValue([2] * count, V.ARRAY, V.UINT32)}
        found = check(inspect(GgufFile(rewrite(plain, tmp_path / "x.gguf", entries=array))))
        assert found == ([] if count == 3 else [f"qwen3moe.{key} has {count} entries for 3 blocks"])
