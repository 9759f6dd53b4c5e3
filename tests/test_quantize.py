"""Quantizing through the binary: exact types, the importance matrix by hand and against llama-imatrix, refusals."""

from __future__ import annotations

import hashlib
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from gguftool.cli import cli
from gguftool.convert import convert
from gguftool.encoding import TARGETS
from gguftool.errors import GgufToolError
from gguftool.plan import LayerPlan, PrunePlan
from gguftool.recipe import Recipe
from gguftool.stats import EXPERT_SUMS, NEURON_SUMS, WEIGHT_NORMS, CalibrationStats, Domain, ModelFacts
from gguftool.tensors import TensorSpec

gguf = pytest.importorskip("gguf")

from gguftool import cut  # noqa: E402
from gguftool.gguf_file import GgufFile, write_gguf  # noqa: E402
from gguftool.hf_to_gguf import FINGERPRINT_KEY  # noqa: E402
from gguftool.quantize import (  # noqa: E402
    QuantizeTool,
    imatrix_entries,
    mix_facts,
    planned_types,
    quantize,
    write_imatrix,
)


def make_stats(n_layer: int, n_expert: int, n_ff: int, n_embd: int, seed: int = 0) -> CalibrationStats:
    """Stats of a made-up calibration: positive random sums, 100 tokens, top-2."""
    rng = np.random.default_rng(seed)
    facts = ModelFacts(
        "made-up", "0" * 64, "qwen3_moe", "qwen3moe", n_layer, tuple(range(n_layer)), n_expert, 2, n_ff, n_embd, 8, ()
    )
    return CalibrationStats(
        model=facts,
        domains=(Domain("text", "0" * 64, 100),),
        n_ctx=50,
        experts={name: rng.uniform(5, 10, (1, n_layer, n_expert)).round() for name in EXPERT_SUMS},
        neurons={name: rng.uniform(1, 2, (n_layer, n_expert, n_ff)) for name in (*NEURON_SUMS, *WEIGHT_NORMS)},
        expert_inputs=rng.uniform(1, 2, (n_layer, n_expert, n_embd)),
        linear_tokens=100,
    )


def stats_for(path: Path) -> CalibrationStats:
    """Made-up stats with the shapes of a real file, every matrix of its blocks measured."""
    file = GgufFile(path)
    stack = next(spec for spec in file.tensors if spec.name == "blk.0.ffn_down_exps.weight")
    layers = int(file.arch_value("block_count"))
    stats = make_stats(layers, stack.ne[2], stack.ne[0], stack.ne[1])
    rng = np.random.default_rng(1)
    linears = {s.name: rng.uniform(1, 2, s.ne[0]) for s in file.tensors if ".attn_" in s.name and len(s.ne) == 2}
    model = replace(stats.model, fingerprint=file.value(FINGERPRINT_KEY, stats.model.fingerprint))
    return replace(stats, model=model, linears=linears)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the importance matrix, by hand -------------------------------------------------------------------------------


def test_imatrix_of_tiers_by_hand() -> None:
    stats = make_stats(1, 4, 4, 3)
    # Expert 2 is gone from the router; 0 and 3 keep two neurons, 1 keeps four.
    kept = [LayerPlan(0, (0, 1, 3), (np.array([0, 2]), np.arange(4), np.array([1, 3])))]
    specs = [
        TensorSpec("blk.0.ffn_up_exps.0.weight", (3, 4, 1), "BF16"),
        TensorSpec("blk.0.ffn_down_exps.0.weight", (4, 3, 1), "BF16"),
        TensorSpec("blk.0.ffn_gate_exps.1.weight", (3, 2, 2), "BF16"),
        TensorSpec("blk.0.ffn_down_exps.1.weight", (2, 3, 2), "BF16"),
        TensorSpec("blk.0.ffn_exps_tier.weight", (3, 2), "I32"),
        TensorSpec("blk.0.ffn_gate_inp.weight", (3, 3), "F32"),
    ]
    got = imatrix_entries(stats, kept, specs)
    assert sorted(got) == sorted(spec.name for spec in specs[:4])
    h, x, n = stats.neurons["h_sq"][0], stats.expert_inputs[0], stats.expert("count")[0]
    expected = {
        specs[0].name: (x[[1]], n[[1]]),
        specs[1].name: (h[[1]], n[[1]]),
        specs[2].name: (x[[0, 3]], n[[0, 3]]),
        specs[3].name: (np.array([[h[0, 0], h[0, 2]], [h[3, 1], h[3, 3]]]), n[[0, 3]]),
    }
    for name, (sums, counts) in expected.items():
        np.testing.assert_array_equal(got[name][0], sums.astype(np.float32))
        np.testing.assert_array_equal(got[name][1], counts.astype(np.float32))


def test_imatrix_of_a_whole_layer_and_of_padding() -> None:
    stats = replace(
        make_stats(1, 4, 4, 3), linears={"blk.0.attn_q.weight": np.arange(3.0), "output.weight": np.ones(3)}
    )
    specs = [
        TensorSpec("blk.0.ffn_down_exps.weight", (4, 3, 4), "BF16"),
        TensorSpec("blk.0.attn_q.weight", (3, 5), "BF16"),
        TensorSpec("output.weight", (3, 8), "BF16"),
    ]
    got = imatrix_entries(stats, (), specs)
    np.testing.assert_array_equal(got["blk.0.ffn_down_exps.weight"][0], stats.neurons["h_sq"][0].astype(np.float32))
    np.testing.assert_array_equal(got["blk.0.attn_q.weight"][0], [[0.0, 1.0, 2.0]])
    np.testing.assert_array_equal(got["blk.0.attn_q.weight"][1], [100.0])
    assert "output.weight" not in got  # as llama-imatrix leaves it out
    narrow = [LayerPlan(0, (0, 1, 2, 3), (np.array([0, 2]),) * 4)]
    padded = imatrix_entries(stats, narrow, specs[:1])["blk.0.ffn_down_exps.weight"][0]
    np.testing.assert_array_equal(padded[:, :2], stats.neurons["h_sq"][0][:, ::2].astype(np.float32))
    np.testing.assert_array_equal(padded[:, 2:], 0)


def test_stats_of_another_model_are_refused() -> None:
    stats = make_stats(1, 4, 4, 3)
    with pytest.raises(GgufToolError, match="no MoE layer 7"):
        imatrix_entries(stats, (), [TensorSpec("blk.7.ffn_down_exps.weight", (4, 3, 4), "BF16")])
    with pytest.raises(GgufToolError, match="rows of 5"):
        imatrix_entries(stats, (), [TensorSpec("blk.0.ffn_up_exps.weight", (5, 4, 4), "BF16")])
    with pytest.raises(GgufToolError, match="another model"):
        imatrix_entries(stats, (), [TensorSpec("blk.0.ffn_down_exps.weight", (3, 3, 4), "BF16")])


def test_stats_of_another_version_of_the_model_are_refused(
    tiered: tuple[Path, tuple[LayerPlan, ...]], base_gguf: Path, runtime: Any, tmp_path: Path
) -> None:
    stats = stats_for(base_gguf)
    other = replace(stats, model=replace(stats.model, name="finetuned", fingerprint="1" * 64))
    with pytest.raises(GgufToolError, match="was cut from made-up.*the stats are of finetuned"):
        tools = QuantizeTool(runtime.tool("llama-quantize"))
        quantize(tiered[0], "Q4_K_M", tmp_path / "out.gguf", tools=tools, imatrix=other)
    assert not list(tmp_path.iterdir())


# --- tiered files ------------------------------------------------------------------------------------------------


def write_tiered(base: Path, out: Path) -> tuple[LayerPlan, ...]:
    """A tiered file from a stock one: the last expert of each layer keeps all, the others 96 neurons, expert 0 none."""
    file = GgufFile(base)
    stack = next(spec for spec in file.tensors if spec.name == "blk.0.ffn_down_exps.weight")
    n_ff, n_expert = stack.ne[0], stack.ne[2]
    retained = (np.arange(0), *[np.arange(8, 104)] * (n_expert - 2), np.arange(n_ff))
    layers = tuple(LayerPlan(i, tuple(range(n_expert)), retained) for i in range(int(file.arch_value("block_count"))))
    made: dict[str, np.ndarray] = {}
    specs: list[TensorSpec] = []
    for spec in file.tensors:
        if "_exps.weight" not in spec.name:
            specs.append(spec)
            made[spec.name] = file.raw(spec)
            continue
        values = file.raw(spec).view(np.uint16)
        is_down = ".ffn_down" in spec.name
        for index, tier in enumerate(layers[0].tiers()):
            parts = [values[e][..., retained[e]] if is_down else values[e][retained[e]] for e in tier.rows]
            stacked = np.ascontiguousarray(np.stack(parts))
            name = spec.name.replace("_exps.", f"_exps.{index}.")
            specs.append(TensorSpec(name, stacked.shape[::-1], spec.type))
            made[name] = stacked.view(np.uint8)
        if is_down:
            tier_map = cut.tier_map(layers[0])
            name = spec.name.replace("ffn_down_exps", "ffn_exps_tier")
            specs.append(TensorSpec(name, tier_map.shape[::-1], "I32"))
            made[name] = tier_map.view(np.uint8)
    plan = PrunePlan(
        Recipe("made-up", 0.5),
        "",
        "made-up",
        file.value(FINGERPRINT_KEY, "0" * 64),
        file.arch,
        None,
        (),
        n_expert,
        4,
        n_ff,
        layers,
    )
    entries = {key: file.entry(key) for key in file.keys()} | cut.entries(plan, "tiered")
    write_gguf(out, file.arch, entries, specs, lambda spec: made[spec.name])
    return layers


@pytest.fixture(scope="module")
def tiered(base_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[LayerPlan, ...]]:
    path = tmp_path_factory.mktemp("tiered") / "tiered.gguf"
    return path, write_tiered(base_gguf, path)


def test_a_pruned_file_counts_as_the_model_that_it_was_cut_from(
    tiered: tuple[Path, tuple[LayerPlan, ...]], base_gguf: Path
) -> None:
    base, pruned = mix_facts(GgufFile(base_gguf)), mix_facts(GgufFile(tiered[0]))
    assert pruned == replace(base, twins=True)
    assert base.n_layer == len(tiered[1]) and base.n_gqa >= 1 and not base.has_imatrix


@pytest.mark.parametrize("target", ["Q4_K_M", "Q6_K", "Q5_K_S", "Q8_0", "Q2_K", "IQ4_XS"])
def test_tiered_files_get_exactly_the_planned_types(
    target: str, tiered: tuple[Path, tuple[LayerPlan, ...]], runtime: Any, tmp_path: Path
) -> None:
    path, _ = tiered
    before = sha256(path)
    done = quantize(path, target, tmp_path / "out.gguf", tools=QuantizeTool(runtime.tool("llama-quantize")))
    result = GgufFile(tmp_path / "out.gguf")
    types = {spec.name: spec.type for spec in result.tensors}
    assert types == {spec.name: spec.type for spec in planned_types(GgufFile(path), target)}
    assert types["blk.0.ffn_exps_tier.weight"] == "I32"
    if target == "Q5_K_S":
        assert types["blk.3.ffn_down_exps.1.weight"] == "Q5_0" and types["blk.3.ffn_up_exps.1.weight"] == "Q5_K"
    source = GgufFile(path)
    for key in source.keys():
        if key not in ("general.file_type", "general.quantization_version"):
            assert result.value(key) == source.value(key), key
    assert result.value("general.file_type") == TARGETS[target].file_type
    assert result.value("general.quantization_version") == 2
    assert done.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert sha256(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_tiered_files_take_the_imatrix_of_what_was_kept(
    tiered: tuple[Path, tuple[LayerPlan, ...]], base_gguf: Path, runtime: Any, tmp_path: Path
) -> None:
    path, kept = tiered
    stats, tool = stats_for(base_gguf), QuantizeTool(runtime.tool("llama-quantize"))
    quantize(path, "IQ3_XXS", tmp_path / "out.gguf", tools=tool, imatrix=stats)
    result = GgufFile(tmp_path / "out.gguf")
    assert result.value("quantize.imatrix.entries_count") == len(imatrix_entries(stats, kept, result.tensors))
    assert result.value("quantize.imatrix.file") == "gguftool.imatrix.gguf"
    quantize(path, "Q4_K_S", tmp_path / "with.gguf", tools=tool, imatrix=stats)
    quantize(path, "Q4_K_S", tmp_path / "without.gguf", tools=tool)
    name = "blk.3.ffn_down_exps.1.weight"
    data = [GgufFile(tmp_path / f"{which}.gguf") for which in ("with", "without")]
    specs = [next(spec for spec in file.tensors if spec.name == name) for file in data]
    assert specs[0].type == specs[1].type == "IQ4_NL"
    assert not np.array_equal(data[0].raw(specs[0]), data[1].raw(specs[1]))


# --- stock files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["Q4_K_M", "Q3_K_M", "Q8_0", "BF16", "MXFP4_MOE"])
def test_stock_files_equal_llama_quantize_byte_for_byte(
    target: str, base_gguf: Path, runtime: Any, tmp_path: Path
) -> None:
    tool = runtime.tool("llama-quantize")
    quantize(base_gguf, target, tmp_path / "ours.gguf", tools=QuantizeTool(tool, threads=2))
    command = [str(tool), str(base_gguf), str(tmp_path / "theirs.gguf"), target]
    subprocess.run(command, capture_output=True, check=True)
    assert sha256(tmp_path / "ours.gguf") == sha256(tmp_path / "theirs.gguf")


def stats_from_llama_imatrix(path: Path, shape: CalibrationStats) -> CalibrationStats:
    """Stats that hold what llama-imatrix measured."""
    file = GgufFile(path)
    arrays = {spec.name: file.raw(spec).view("<f4") for spec in file.tensors}
    layers = shape.model.moe_layers
    count = np.stack([arrays[f"blk.{i}.ffn_down_exps.weight.counts"][:, 0] for i in layers])
    return replace(
        shape,
        experts={**shape.experts, "count": count[None].astype(np.float64)},
        neurons={
            **shape.neurons,
            "h_sq": np.stack([arrays[f"blk.{i}.ffn_down_exps.weight.in_sum2"] for i in layers]).astype(np.float64),
        },
        expert_inputs=np.stack([arrays[f"blk.{i}.ffn_up_exps.weight.in_sum2"] for i in layers]).astype(np.float64),
        linears={
            name.removesuffix(".in_sum2"): values.reshape(-1).astype(np.float64)
            for name, values in arrays.items()
            if name.endswith(".in_sum2") and "_exps" not in name
        },
        linear_tokens=int(arrays["blk.0.attn_q.weight.counts"].flat[0]),
    )


def test_our_imatrix_is_that_of_llama_imatrix(base_gguf: Path, eval_text: Path, runtime: Any, tmp_path: Path) -> None:
    tool = runtime.tool("llama-imatrix")
    theirs = tmp_path / "theirs.gguf"
    command = [str(tool), "-m", str(base_gguf), "-f", str(eval_text), "-o", str(theirs), "--chunks", "2", "-c", "256"]
    subprocess.run(command, capture_output=True, check=True)
    stats = stats_from_llama_imatrix(theirs, stats_for(base_gguf))
    write_imatrix(imatrix_entries(stats, (), GgufFile(base_gguf).tensors), stats, tmp_path / "ours.gguf")
    want, got = GgufFile(theirs), GgufFile(tmp_path / "ours.gguf")
    routers = {spec.name for spec in want.tensors if "ffn_gate_inp" in spec.name}  # never quantized: no entry of ours
    wanted = {spec.name: spec for spec in want.tensors if spec.name not in routers}
    assert sorted(wanted) == sorted(spec.name for spec in got.tensors)
    for spec in got.tensors:
        np.testing.assert_array_equal(got.raw(spec).ravel(), want.raw(wanted[spec.name]).ravel(), spec.name)
    quantize(
        base_gguf, "Q4_K_M", tmp_path / "a.gguf", tools=QuantizeTool(runtime.tool("llama-quantize")), imatrix=stats
    )
    options = ["--imatrix", str(theirs), str(base_gguf), str(tmp_path / "b.gguf"), "Q4_K_M"]
    subprocess.run([str(runtime.tool("llama-quantize")), *options], capture_output=True, check=True)
    ours, reference = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert ours.tensors == reference.tensors
    for spec in ours.tensors:
        np.testing.assert_array_equal(ours.raw(spec), reference.raw(spec), spec.name)


# --- refusals ----------------------------------------------------------------------------------------------------


def fake_tool(path: Path, script: str) -> QuantizeTool:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return QuantizeTool(path)


def test_refusals_before_the_work(base_gguf: Path, runtime: Any, tmp_path: Path) -> None:
    tools, out = QuantizeTool(runtime.tool("llama-quantize")), tmp_path / "out.gguf"
    with pytest.raises(GgufToolError, match="Q4_K_M"):
        quantize(base_gguf, "Q4_KM", out, tools=tools)
    with pytest.raises(GgufToolError, match="needs an importance matrix"):
        quantize(base_gguf, "IQ2_XS", out, tools=tools)
    with pytest.raises(GgufToolError, match="is an input"):
        quantize(base_gguf, "Q8_0", base_gguf, tools=tools, force=True)
    with pytest.raises(GgufToolError, match="build the runtime"):
        quantize(base_gguf, "Q8_0", out, tools=QuantizeTool(tmp_path / "nothing"))
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(GgufToolError, match="exists"):
        quantize(base_gguf, "Q8_0", out, tools=tools)
    assert out.read_text() == "mine"
    quantize(base_gguf, "Q8_0", out, tools=tools, force=True)
    with pytest.raises(GgufToolError, match="quantized already.*BF16 file instead, or, .* --allow-requantize$"):
        quantize(out, "Q4_K_M", tmp_path / "again.gguf", tools=tools)
    command = ["quantize", str(out), "Q4_K_M", "-o", str(tmp_path / "again.gguf"), "--allow-requantize", "--quiet"]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    assert GgufFile(tmp_path / "again.gguf").value("general.file_type") == TARGETS["Q4_K_M"].file_type


def test_a_failing_binary_leaves_nothing(base_gguf: Path, tmp_path: Path) -> None:
    tools = fake_tool(tmp_path / "tool", "echo 'no such thing'; exit 3")
    with pytest.raises(GgufToolError, match="exit code 3.*no such thing"):
        quantize(base_gguf, "Q8_0", tmp_path / "out.gguf", tools=tools)
    assert [path.name for path in tmp_path.iterdir()] == ["tool"]


def test_a_binary_that_chooses_otherwise_is_caught(base_gguf: Path, tmp_path: Path) -> None:
    tools = fake_tool(tmp_path / "tool", 'cp "$3" "$4"')  # copies where it should quantize
    with pytest.raises(GgufToolError, match="was asked for, llama-quantize wrote: BF16"):
        quantize(base_gguf, "Q8_0", tmp_path / "out.gguf", tools=tools)
    assert [path.name for path in tmp_path.iterdir()] == ["tool"]


def test_progress_counts_tensors(base_gguf: Path, runtime: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    tools = QuantizeTool(runtime.tool("llama-quantize"), progress=lambda *now: seen.append(now))
    quantize(base_gguf, "Q8_0", tmp_path / "out.gguf", tools=tools)
    total = len(GgufFile(base_gguf).tensors)
    assert [now[:2] for now in seen] == [(i + 1, total) for i in range(total)]
    assert {now[2] for now in seen} == {spec.name for spec in GgufFile(base_gguf).tensors}


# --- conversion --------------------------------------------------------------------------------------------------


def test_conversion_shows_how_far_it_is(checkpoint_dir: Path, runtime: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    convert(checkpoint_dir, tmp_path / "a.gguf", runtime, pre_tokenizer="qwen2", progress=lambda *now: seen.append(now))
    assert seen and seen[-1] == (100, 100, "converting") and seen == sorted(set(seen))


def test_conversion_to_an_unknown_type_is_refused_before_it_starts(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(GgufToolError, match="outtype 'q4_k': the converter writes auto, f32, f16, bf16, q8_0"):
        convert(checkpoint_dir, tmp_path / "a.gguf", None, outtype="q4_k")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
