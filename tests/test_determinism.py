"""Same inputs, same bytes: across runs, thread counts, hash seeds, working directories and locales."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gguftool.convert import convert
from gguftool.refit import solve
from gguftool.stats import CalibrationStats
from models import sample_text, tiny_checkpoint

# The whole line on the tiny model, in a process of its own.
LINE = """
import sys
from pathlib import Path
import torch
threads, model, base, text, tool, out = int(sys.argv[1]), *map(Path, sys.argv[2:])
torch.set_num_threads(threads)
from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.corpus import load_domain
from gguftool.overrides import Overrides
from gguftool.planner import make_plan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe import Recipe
from gguftool.refit import refit
from gguftool.stats import CalibrationStats
from gguftool.writer import prune
checkpoint = open_checkpoint(model)
domains = [load_domain(text, checkpoint.tokenizer(), 64, 6)]
calibrate(checkpoint, domains, out / "work", out=out / "stats.safetensors")
stats = CalibrationStats.load(out / "stats.safetensors")
plan = make_plan(stats, Recipe("auto", 0.4, align=8))
plan.save(out / "plan.json")
refit(checkpoint, plan, domains, out / "work").save(out / "weights.safetensors")
prune(base, plan, out / "pruned.gguf", overrides=Overrides.load(out / "weights.safetensors"))
quantize(base, "Q8_0", out / "q8.gguf", tools=QuantizeTool(tool, threads=threads), imatrix=stats)
"""
WAYS = {
    "first": (1, {}),
    "again": (1, {}),
    "another hash seed": (1, {"PYTHONHASHSEED": "7"}),
    "another locale": (1, {"LC_ALL": "C", "LANG": "de_DE.UTF-8", "TZ": "Asia/Tokyo"}),
    "two threads": (2, {"OMP_NUM_THREADS": "2"}),
}
FILES = ("stats.safetensors", "plan.json", "weights.safetensors", "pruned.gguf", "q8.gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory, runtime) -> dict[str, Path]:
    """The folder of each way. Each is called otherwise and is the working directory of its run."""
    root = tmp_path_factory.mktemp("made")
    model = tiny_checkpoint(root / "model", hidden_size=64, moe_intermediate_size=64)
    (root / "calib.txt").write_text(sample_text(600, 1))
    convert(model, root / "base.gguf", runtime, pre_tokenizer="qwen2")
    tool, folders = runtime.tool("llama-quantize"), {}
    for name, (threads, environment) in WAYS.items():
        folder = folders[name] = root / name
        folder.mkdir()
        arguments = [threads, model, root / "base.gguf", root / "calib.txt", tool, folder]
        done = subprocess.run(
            [sys.executable, "-c", LINE, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
            env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", **os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folders


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", list(WAYS)[1:4])
def test_the_same_bytes(name, way, made):
    assert digest(made[way] / name) == digest(made["first"] / name)


@pytest.mark.parametrize("name", FILES)
def test_nothing_says_where_or_when_it_was_made(name, made):
    data = (made["first"] / name).read_bytes()
    for text in (str(made["first"]), str(made["first"].parent), os.uname().nodename, "202"):
        if text != "202" or name == "plan.json":  # a year; by chance in binary files
            assert text.encode() not in data, text


def test_other_thread_counts_change_sums_by_rounding_only(made):
    """The promise across thread counts: the same plan, sums that agree to float32's rounding."""
    one, two = (CalibrationStats.load(made[way] / "stats.safetensors") for way in ("first", "two threads"))
    for name in one.experts:
        np.testing.assert_allclose(two.experts[name], one.experts[name], rtol=1e-4, atol=1e-9, err_msg=name)
    for name in one.neurons:
        np.testing.assert_allclose(two.neurons[name], one.neurons[name], rtol=1e-3, atol=1e-9, err_msg=name)
    kept = [(made[way] / "plan.json").read_text().split('"layers"')[1] for way in ("first", "two threads")]
    assert kept[0] == kept[1]


def test_the_quantizers_threads_change_nothing(made, runtime, tmp_path):
    from gguftool.quantize import QuantizeTool, quantize

    stats = CalibrationStats.load(made["first"] / "stats.safetensors")
    for threads in (1, 2, 3):
        tools = QuantizeTool(runtime.tool("llama-quantize"), threads=threads)
        quantize(made["first"].parent / "base.gguf", "Q8_0", tmp_path / f"{threads}.gguf", tools=tools, imatrix=stats)
    assert len({digest(path) for path in tmp_path.glob("*.gguf")}) == 1
    assert digest(tmp_path / "1.gguf") == digest(made["first"] / "q8.gguf")


def test_refitted_columns_across_thread_counts():
    """LAPACK takes a matrix of 256 apart otherwise for two threads than for one: rounding of float64, far below what is kept."""
    rng = np.random.default_rng(0)
    width = 256
    h = torch.from_numpy(np.abs(rng.standard_normal((2 * width, width))))
    down = torch.from_numpy(rng.standard_normal((64, width))).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(solve(down, (h.T @ h).float(), np.arange(0, width, 2), 10 * width))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)
