"""llama.cpp's own programs on a tiered file: imatrix, quantize, bench, split, and where its tensors are put."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gguftool import builtin, cut
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.gguf_file import GgufFile
from gguftool.inspection import inspect
from gguftool.layout import parse, tier_name
from gguftool.perplexity import measure
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.quantize import planned_types
from gguftool.recipe import Recipe
from gguftool.writer import prune
from llama_tools import perplexity, run

N_CTX, CHUNKS = 128, 8
WINDOWS = ("-c", N_CTX, "--chunks", CHUNKS)


@pytest.fixture(scope="module")
def plan(stats) -> PrunePlan:
    made = make_plan(stats, Recipe("global", 0.4))
    assert all(len(layer.tiers()) > 1 for layer in made.layers)
    return made


@pytest.fixture(scope="module")
def tiered(tmp_path_factory, base_gguf, plan) -> Path:
    """The built-in model, BF16, pruned by 40 %."""
    out = tmp_path_factory.mktemp("toolset") / "tiered.gguf"
    prune(base_gguf, plan, out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory, eval_text) -> Path:
    """A little of the evaluation text."""
    out = tmp_path_factory.mktemp("text") / "text.txt"
    out.write_text(eval_text.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def source_ppl(runtime, tiered, text) -> float:
    """Perplexity of the tiered BF16 file."""
    return perplexity(runtime, tiered, text, *WINDOWS)


# --- imatrix ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imatrix_of(runtime, tmp_path_factory) -> Callable[[Path], Path]:
    """Runs llama-imatrix on a file and gives what it wrote."""

    def collect(model: Path) -> Path:
        out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
        options = ("-m", model, "-f", builtin.texts()["calib_code"], *WINDOWS, "-o", out, "-t", 2, "--no-ppl")
        code, output = run(runtime, "llama-imatrix", *options)
        assert code == 0, output[-2000:]
        return out

    return collect


@pytest.fixture(scope="module")
def imatrix(imatrix_of, tiered) -> Path:
    return imatrix_of(tiered)


def entries(path: Path) -> dict[str, np.ndarray]:
    """An imatrix file's arrays: `*.in_sum2` [matrices, columns], `*.counts` [matrices]."""
    file = GgufFile(path)
    return {
        spec.name: file.raw(spec).view(np.float32).reshape(-1, spec.ne[0] if spec.name.endswith("in_sum2") else 1)
        for spec in file.tensors
    }


def test_imatrix_has_the_sums_of_every_tier(tiered, imatrix, imatrix_of, plan, tmp_path):
    """Entry by entry those that the padded twin has for the same experts."""
    expand(tiered, tmp_path / "stock.gguf")
    ours, theirs = entries(imatrix), entries(imatrix_of(tmp_path / "stock.gguf"))
    compared = 0
    for layer in plan.layers:
        tier_map = cut.read_tier_map(GgufFile(tiered), layer.index)
        for role in ("gate", "up", "down"):
            stock = f"blk.{layer.index}.ffn_{role}_exps.weight"
            routed = theirs[f"{stock}.counts"].sum()
            assert routed == N_CTX * CHUNKS * plan.n_expert_used
            for tier, row in enumerate(tier_map):
                experts = np.nonzero(row >= 0)[0]
                own, name = row[experts], tier_name(layer.index, role, tier)
                sums, counts = ours[f"{name}.in_sum2"], ours[f"{name}.counts"]
                width = sums.shape[1]
                assert width == (layer.tiers()[tier].width if role == "down" else theirs[f"{stock}.in_sum2"].shape[1])
                np.testing.assert_array_equal(counts[own], theirs[f"{stock}.counts"][experts])
                # In the first layer every sum is the same to the bit. Behind it the tiers' outputs were added in another
                # order, and roundings grow with depth: up to 1.8e-3 of a sum over few tokens in the last layer.
                rounding = 0.0 if layer.index == 0 else 2**-8
                want = theirs[f"{stock}.in_sum2"][experts, :width]
                np.testing.assert_allclose(sums[own], want, rtol=rounding, atol=1e-6 if rounding else 0)
                assert (sums[counts[:, 0] > 0] > 0).any(axis=1).all() and counts.any()
                routed -= counts.sum()
                compared += 1
            empty = [row for row, width in enumerate(layer.widths) if width == 0]
            assert routed == theirs[f"{stock}.counts"][empty].sum()
    assert compared == 3 * sum(len(layer.tiers()) for layer in plan.layers)
    assert not [name for name in ours if "ffn_exps_tier" in name]


# --- quantize -----------------------------------------------------------------------------------------------------

# How much larger the perplexity may be: seen were 1.004, 1.009, 1.001, 1.002, 1.019, 1.002 and 1.055.
QUANTS = {
    "Q6_K": 1.015, "Q4_K_M": 1.03, "IQ4_XS": 1.03, "IQ4_NL": 1.03, "MXFP4_MOE": 1.05, "IQ3_S": 1.05, "IQ2_S": 1.15,
}  # fmt: skip


@pytest.mark.parametrize("target", QUANTS)
def test_llama_quantize_with_its_own_imatrix(target, tiered, imatrix, source_ppl, text, runtime, tmp_path):
    out = tmp_path / f"{target}.gguf"
    code, output = run(runtime, "llama-quantize", "--imatrix", imatrix, tiered, out, target, 2)
    assert code == 0, output[-2000:]
    blind = re.findall(r"did not find weights for (\S+)", output)
    assert set(blind) <= {"token_embd.weight", "output.weight"} and "is different from" not in output, blind
    before, after = GgufFile(tiered), GgufFile(out)
    types = {spec.name: spec.type for spec in after.tensors}
    experts = [s.name for s in before.tensors if (n := parse(s.name)) and n.tier is not None]
    assert len(experts) > 20 and all(types[name] not in ("F32", "F16", "BF16") for name in experts)
    assert set(types) == {spec.name for spec in before.tensors}
    for spec in before.tensors:
        if spec.name.endswith("ffn_exps_tier.weight"):
            assert types[spec.name] == "I32" and np.array_equal(after.raw(spec), before.raw(spec))
    found = perplexity(runtime, out, text, *WINDOWS)
    assert 0.98 < found / source_ppl < QUANTS[target]


def test_the_imatrix_is_used_for_tiers(tiered, imatrix, runtime, tmp_path):
    paths = [tmp_path / "with.gguf", tmp_path / "without.gguf"]
    for path, options in zip(paths, (("--imatrix", imatrix), ()), strict=True):
        assert run(runtime, "llama-quantize", *options, tiered, path, "IQ4_NL", 2)[0] == 0
    files = [GgufFile(path) for path in paths]
    names = [s for s in files[0].tensors if (n := parse(s.name)) and n.tier is not None and n.suffix == "weight"]
    assert all(not np.array_equal(files[0].raw(spec), files[1].raw(spec)) for spec in names)


# --- running ------------------------------------------------------------------------------------------------------


def test_llama_perplexity_agrees_with_ours(tiered, source_ppl, text, llama):
    ours = measure(tiered, text.read_text(encoding="utf-8"), llama=llama, n_ctx=N_CTX, max_windows=CHUNKS)
    assert ours.ppl.value == pytest.approx(source_ppl, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ("-ot", r"ffn_.*_exps=CPU"), ("--n-cpu-moe", 2), ("--cpu-moe",), ("-lm", "none"), ("-lm", "mmap"),
        ("-ub", 7), ("-fa", "on"), ("--no-repack",),
    ],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
def test_options_of_loading_and_running_change_nothing(options, tiered, source_ppl, text, runtime):
    assert perplexity(runtime, tiered, text, *WINDOWS, *options) == pytest.approx(source_ppl, rel=2e-3)


def test_options_that_place_experts_find_the_tiers(tiered, text, runtime):
    """Of the first two layers, every tensor of every tier."""
    options = ("-m", tiered, "-f", text, "-c", N_CTX, "--chunks", 1, "-t", 2, "-v", "--n-cpu-moe", 2)
    output = run(runtime, "llama-perplexity", *options)[1]
    placed = set(re.findall(r"tensor (\S+) \(.*buffer type overridden to CPU", output))
    tiers = {s.name for s in GgufFile(tiered).tensors if (n := parse(s.name)) and n.tier is not None and n.layer < 2}
    assert placed == tiers and len(placed) > 10


def test_llama_bench_runs(tiered, runtime):
    code, output = run(runtime, "llama-bench", "-m", tiered, "-p", 32, "-n", 4, "-r", 1, "-t", 2, "-o", "json")
    assert code == 0, output[-2000:]
    rows = json.loads(output[output.index("[\n") :])
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(32, 0), (0, 4)]
    assert all(row["avg_ts"] > 0 and row["model_size"] > 1e6 for row in rows)


def test_a_build_without_rpc_says_so(tiered, text, runtime):
    """No remote backend can get ops that it does not know: there is none."""
    code, output = run(runtime, "llama-perplexity", "-m", tiered, "-f", text, "--rpc", "127.0.0.1:1")
    assert code == 1 and "RPC not supported in this build" in output


# --- split --------------------------------------------------------------------------------------------------------


def test_split_and_merge(tiered, source_ppl, text, runtime, plan, tmp_path):
    code, output = run(runtime, "llama-gguf-split", "--split", "--split-max-tensors", 25, tiered, tmp_path / "part")
    assert code == 0, output[-2000:]
    shards = sorted(tmp_path.glob("part-*.gguf"))
    assert len(shards) > 2
    assert perplexity(runtime, shards[0], text, *WINDOWS) == pytest.approx(source_ppl, rel=1e-4)
    assert run(runtime, "llama-gguf-split", "--merge", shards[0], tmp_path / "merged.gguf")[0] == 0
    before, after = GgufFile(tiered), GgufFile(tmp_path / "merged.gguf")
    assert before.tensors == after.tensors
    assert all(np.array_equal(before.raw(spec), after.raw(spec)) for spec in before.tensors)
    keys = [key for key in after.keys() if not key.startswith("split.")]
    assert keys == list(before.keys()) and all(before.entry(key) == after.entry(key) for key in keys)
    assert inspect(after).as_dict()["layers"] == inspect(before).as_dict()["layers"]
    for shard in (shards[0], shards[-1]):
        for refuse in (
            lambda path: expand(path, tmp_path / "no.gguf"),
            lambda path: inspect(GgufFile(path)),
            lambda path: prune(path, plan, tmp_path / "no.gguf"),
            lambda path: planned_types(GgufFile(path), "Q4_K_M"),
        ):
            with pytest.raises(GgufToolError, match="one shard of a split model; join it with llama-gguf-split"):
                refuse(shard)
