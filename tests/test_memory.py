"""Limits of memory: what they pick, what they refuse, and that what they pick changes no number beyond rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import PreTrainedModel

import gguftool
from gguftool.bench_calibrate import BARS, QUICK, Memory, measure
from gguftool.calibrate import calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.loader import usable_device
from gguftool.memory import PROCESS, SOLVE, Needs, gib, needs_of, parse_bytes, parse_dtype, plan_memory
from gguftool.refit import refit, refit_memory
from gguftool.refit_needs import solve_bytes
from gguftool.routes import neurons_bytes
from gguftool.sequential import refit_sequentially
from gguftool.stats import CalibrationStats, Domain
from killed import domains, plan_for
from models import sample_text, tiny_checkpoint
from synthetic import make_plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("memory") / "model"))


@pytest.fixture
def no_whole_model(monkeypatch):
    """Loading a whole model raises."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a whole model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 << 30),
        ("0.5 GiB", 1 << 29),
        ("800MiB", 800 << 20),
        ("1.5gb", 1_500_000_000),
        ("64 kB", 64_000),
        ("7B", 7),
        ("1048576", 1 << 20),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


def test_what_is_no_size_says_why():
    cases = {
        "12G": "did you mean 12GiB or 12GB",
        "big": "'big' is no size",
        "-3GiB": "no size",
        "0MiB": "less than one byte",
        "12": "did you mean 12GiB",
        "2.5": "did you mean 2.5GiB",
        "500000": "has no unit, and is too little as bytes; give one, as 500MB or 12GiB",
        "": "''",
    }
    for text, message in cases.items():
        with pytest.raises(GgufToolError, match=message):
            parse_bytes(text)
    with pytest.raises(GgufToolError, match="no type 'int4'; known are auto"):
        parse_dtype("int4")


def test_a_device_that_is_absent_is_named():
    for device, name in {"cuda": "NVIDIA GPU", "cuda:1": "NVIDIA GPU", "mps": "Apple GPU"}.items():
        there = torch.backends.mps.is_available() if device == "mps" else torch.cuda.is_available()
        if not there:
            with pytest.raises(GgufToolError, match=f"device '{device}' cannot be used: torch .* sees no {name} here"):
                usable_device(device)
    assert usable_device("cpu", solves=True).type == "cpu"


def test_the_peak_by_hand():
    needs = Needs(
        layer=1000,
        embedding=300,
        statistics=10,
        all_statistics=60,
        moment=7,
        n_expert=4,
        solve=50,
        window=100,
        hidden=500,
    )
    assert needs.peak(2, 4, 3, False) == PROCESS + 1000 + 10 + 4 * 7 + max(2 * 100, 3 * 50)
    assert needs.peak(1, 1, 3, True) == PROCESS + 500 + 1000 + 10 + 7 + 3 * 50
    assert needs.peak(1, 0, 3, False) == PROCESS + 1000 + 10 + 100
    assert replace(needs, embedding=5000).peak(1, 0, 1, False) == PROCESS + 5000 + 100
    assert replace(needs, all_statistics=9000).peak(1, 0, 1, False) == PROCESS + 9000
    more = replace(needs, columns=2000, routes=3, again=90)
    assert more.peak(2, 4, 3, False) == PROCESS + 1000 + 10 + 4 * 7 + 2000 + 3 * 50
    assert more.peak(1, 1, 1, False) == PROCESS + 1000 + 10 + 7 + 3 + 2000 + 90


def test_needs_are_those_of_the_headers(checkpoint):
    needs = needs_of(checkpoint, 10, 64, torch.float32, None, 2)
    layer = [t for name, t in checkpoint.tensors.items() if name.startswith("model.layers.0.")]
    assert needs.layer == 4 * sum(int(np.prod(t.shape)) for t in layer)
    assert needs.hidden == 10 * 64 * 32 * 4 and needs.moment == 4 * 32 * 32 and needs.n_expert == 6
    assert needs.solve == 8 * (SOLVE * 32 * 32 + 32 * 32)
    assert needs_of(checkpoint, 10, 64, torch.bfloat16, 0, 2).layer == needs.layer // 2


def real() -> Needs:
    """About Qwen3-30B-A3B's layer in float32, 256 windows of 512 tokens."""
    return Needs(
        layer=2_492_000_000, embedding=1_244_000_000, statistics=7_000_000, all_statistics=672_000_000, moment=2_359_296,
        n_expert=128, solve=36_000_000, window=90_000_000, hidden=1_073_741_824,
    )  # fmt: skip


def test_more_memory_is_used_and_less_is_enough(monkeypatch, checkpoint):
    monkeypatch.setattr("gguftool.memory.needs_of", lambda *_: real())

    def plan(limit, **options):
        return plan_memory(checkpoint, 256, 512, torch.float32, parse_bytes(limit), threads=2, **options)

    wide, middle, narrow = plan("12GiB"), plan("3.75GiB"), plan("3250MiB")
    assert (wide.batch, wide.group, wide.resident) == (16, 0, True)
    assert (middle.group, middle.resident) == (0, False) and 1 <= middle.batch < 16
    assert 0 < narrow.group < 128 and not narrow.resident and narrow.batch >= 1
    for found, limit in ((wide, "12GiB"), (middle, "3.75GiB"), (narrow, "3250MiB")):
        group = found.group or 128
        assert found.peak == real().peak(found.batch, group, found.threads, found.resident) <= parse_bytes(limit)
    with pytest.raises(GgufToolError) as refused:
        plan("1GiB")
    text = str(refused.value)
    for number in (
        "a limit of 1.00 GiB",
        "2.32 GiB",
        "6.7 MiB",
        "85.8 MiB",
        "2.2 MiB an expert",
        "1.00 GiB) would lie in a file",
    ):
        assert number in text, text
    assert "computing in bfloat16" in text and "a limit of 3.04GiB or more" in text and "--no-obs" not in text


def test_without_costs_more_fits(monkeypatch, checkpoint):
    """Mixtral-sized experts: a moment takes 0.8 GB and its solve 9 GB."""
    monkeypatch.setattr(
        "gguftool.memory.needs_of",
        lambda *args: replace(real(), moment=822_083_584, solve=9_000_000_000, n_expert=0 if args[4] == 0 else 8),
    )
    with pytest.raises(GgufToolError, match="--no-obs"):
        plan_memory(checkpoint, 1, 512, torch.float32, parse_bytes("8GiB"), threads=1)
    assert plan_memory(checkpoint, 1, 512, torch.float32, parse_bytes("8GiB"), moments=0, threads=1).batch > 1
    with_costs = plan_memory(checkpoint, 1, 512, torch.float32, parse_bytes("16GiB"), threads=4)
    assert 1 <= with_costs.group < 8 and with_costs.threads == 1
    unlimited = plan_memory(checkpoint, 1, 512, torch.float32, None)
    assert unlimited.group == 1  # 6.6 GB of moments are not taken unasked


def test_auto_takes_bfloat16_where_float32_does_not_fit(checkpoint):
    least = [needs_of(checkpoint, 8, 12, kind, 0, 2).peak(1, 0, 1, False) for kind in (torch.bfloat16, torch.float32)]
    assert least[0] < least[1]
    picked = [plan_memory(checkpoint, 8, 12, None, limit, moments=0, n_domains=2).dtype for limit in least]
    assert picked == [torch.bfloat16, torch.float32]
    with pytest.raises(GgufToolError, match="float32 or bfloat16"):
        plan_memory(checkpoint, 8, 12, None, least[0] - 1, moments=0, n_domains=2)


class Told:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.done: list[int] = []

    def __call__(self, done: int, _total: int, text: str) -> None:
        self.texts.append(text)
        self.done.append(done)


@pytest.mark.parametrize(("batch", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 5, 8]), (16, [5, 8])])
def test_the_batch_of_a_plan_is_that_of_the_pass(checkpoint, tmp_path, batch, steps):
    """Windows of the first layer that are done after each batch: five of one text, three of the other."""
    how, told = replace(plan_memory(checkpoint, 8, 12, torch.float32, None, moments=0), batch=batch), Told()
    found = calibrate(checkpoint, domains(), tmp_path / "a", how=how, obs=False, progress=told)
    assert [done for done in told.done if done <= 8] == steps
    told = Told()
    alike = calibrate(checkpoint, domains(), tmp_path / "b", batch=batch, obs=False, progress=told)
    assert [done for done in told.done if done <= 8] == steps
    assert all(np.array_equal(alike.neurons[name], value) for name, value in found.neurons.items())
    usual = calibrate(checkpoint, domains(), tmp_path / "c", obs=False)
    for name, value in found.experts.items():
        assert usual.experts[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    for name, value in found.linears.items():
        assert usual.linears[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_the_estimate_is_that_of_the_batch(checkpoint):
    for batch in (1, 8):
        plan = plan_memory(checkpoint, 8, 12, torch.float32, None, moments=0, threads=1, batch=batch)
        assert plan.batch == batch and plan.peak == plan.needs.peak(batch, 0, 1, False)


def test_groups_and_resident_states_change_nothing_but_rounding(checkpoint, tmp_path, no_whole_model):
    plan = plan_memory(checkpoint, 8, 12, torch.float32, None)
    plan = replace(plan, batch=2)
    whole = calibrate(checkpoint, domains(), tmp_path / "a", how=plan)
    resident = calibrate(checkpoint, domains(), tmp_path / "b", how=replace(plan, resident=True))
    for name, value in whole.neurons.items():
        assert np.array_equal(resident.neurons[name], value), name
    for group in (1, 4):
        how, told = replace(plan, group=group, threads=2), Told()
        grouped = calibrate(checkpoint, domains(), tmp_path / "c", how=how, progress=told)
        assert grouped.neurons["obs"] == pytest.approx(whole.neurons["obs"], rel=1e-3)
        assert np.array_equal(grouped.neurons["h_sq"], whole.neurons["h_sq"])
        assert told.texts.count("layer 2 of 3, OBS of expert 3 of 6") == 1
        assert not (tmp_path / "c").exists()


def test_a_refit_in_groups_is_the_same(checkpoint, tmp_path, no_whole_model):
    plan = plan_for(checkpoint)
    how = refit_memory(checkpoint, plan, domains(), torch.float32, None)
    whole = refit(checkpoint, plan, domains(), tmp_path / "a", how=how)
    grouped = refit(checkpoint, plan, domains(), tmp_path / "b", how=replace(how, group=1, resident=True))
    assert whole.keys() == grouped.keys() and len(whole) > 10
    for key in whole.keys():
        assert grouped.get(*key) == pytest.approx(whole.get(*key), rel=1e-3, abs=1e-4)
    assert not (tmp_path / "b" / "inputs.partial").exists()
    assert len(refit_sequentially(checkpoint, plan, domains(), tmp_path / "c", how=how)) >= len(whole)


QWEN = SimpleNamespace(n_embd=2048, n_ff_exp=768, n_expert=128, n_expert_used=8)


@pytest.fixture
def planned(monkeypatch):
    """How to refit a layer of Qwen3-30B-A3B on 256 windows of 512 tokens, below a limit or without one."""
    tokens = 256 * 512

    def needs(*args):
        found = replace(
            real(), n_expert=args[4], routes=12 * 8 * tokens, again=neurons_bytes(tokens, 2048, 768, args[3])
        )
        return found if args[4] else replace(found, moment=0)

    monkeypatch.setattr("gguftool.refit_needs.needs_of", needs)
    windows = [(Domain("text", "", tokens), np.zeros((256, 512), dtype=np.int64))]

    def plan(widths, limit=None, *, norm_topk=True, router=None, sequential=False):
        cut = make_plan([widths], 768, 8, n_expert=128, router=router)
        model = SimpleNamespace(**(vars(QWEN) | {"norm_topk": norm_topk}))
        size = limit if limit is None else parse_bytes(limit)
        return refit_memory(model, cut, windows, torch.float32, size, sequential=sequential)

    return plan


def test_a_refit_needs_its_columns_and_its_own_equations(planned):
    """By hand: 460 of 768 neurons of 128 experts stay. And where whole experts go, those whose weights grow."""
    needs = planned([460] * 128).needs
    columns, solve = 4 * 2048 * 460 * (128 + 1), 16 * 460 * 460 + 16 * 2048 * 460
    assert (needs.columns, needs.solve, needs.statistics, needs.all_statistics) == (columns, solve, 0, 0)
    held = PROCESS + needs.layer + columns
    assert needs.peak(1, 128, 1, False) == held + 128 * needs.moment + solve
    assert needs.peak(1, 1, 1, False) == held + needs.moment + needs.routes + max(solve, needs.again)
    assert planned([768] * 96, router=[list(range(96))], norm_topk=False).needs.columns == 4 * 2048 * 768 * 97
    assert planned([768] * 96 + [0] * 31 + [100]).needs.columns == 2 * 4 * 2048 * 100
    # An expert of Mixtral at 40 %, of which calibrate's elimination takes 8.7 GB.
    assert 1.7e9 < solve_bytes(4096, 14336, 8602, torch.float32) < 1.8e9


def test_a_refit_says_what_it_does(planned):
    """C of all experts or of one; the hidden states of a sequential one's two streams lie in files, whatever the limit."""
    wide, narrow = planned([460] * 128, "12GiB"), planned([460] * 128, "3700MiB")
    assert (wide.group, wide.resident, narrow.group, narrow.resident) == (0, True, 1, False)
    assert "(1.00 GiB) in memory: " in str(wide)
    assert "(1.00 GiB) in a mapped file, moments of 1 expert at a time: " in str(narrow)
    found = [planned([460] * 128, f"{limit}MiB").group for limit in range(3650, 6000, 50)]
    assert set(found) == {0, 1}
    two = planned([460] * 128, "12GiB", sequential=True)
    assert not two.resident and two.batch == 16 and two.needs.columns == 0
    assert "hidden states (2.00 GiB) of both streams in mapped files, moments of 1 expert at a time: " in str(two)
    with pytest.raises(
        GgufToolError, match=r"its new weights 463\.. MiB, one window .* to take and solve them"
    ) as refused:
        planned([460] * 128, "2GiB")
    assert f"a limit of {gib(narrow.needs.least, up=True).replace(' ', '')} or more" in str(refused.value)
    assert "--no-obs" not in str(refused.value) and "statistics" not in str(refused.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what memory is a process' own")
def test_a_refit_takes_no_more_than_planned(tmp_path):
    """At sizes where each term is the most of it: see tests/peaks.py."""
    command = [sys.executable, str(Path(__file__).with_name("peaks.py")), str(tmp_path)]
    # Every array that counts is a mapping of its own, and goes when it is freed.
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=exact)
    for case, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["peak"] <= found["planned"], case
        # Beside what every process takes.
        own, counted = found["peak"] - found["start"], found["planned"] - PROCESS
        assert 0.85 * counted < own < counted + (48 << 20), case


def test_the_command_says_what_it_picked_or_refuses(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(sample_text(200))
    out = tmp_path / "stats.safetensors"
    command = ["calibrate", str(checkpoint.path), "--data", str(tmp_path / "text.txt"), "--ctx", "32", "-o", str(out)]
    done = CliRunner().invoke(cli, [*command, "--memory", "2GiB"], catch_exceptions=False)
    assert "float32, 16 windows at a time, hidden states" in done.output and "in memory" in done.output
    for options, message in (
        (["--memory", "600MiB"], "a limit of 600.0 MiB does not hold what one layer takes in float32 or bfloat16"),
        (["--memory", "lots"], "'lots' is no size"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ):
        done = CliRunner().invoke(cli, [*command, "--force", *options])
        assert isinstance(done.exception, GgufToolError) and message in str(done.exception)
    assert CalibrationStats.load(out).tokens > 0


@pytest.fixture
def batches(monkeypatch):
    """How many windows at once the calibrations of a test run with."""
    module, seen = sys.modules["gguftool.calibrate"], []
    plain = module.LayeredPass

    def spied(*args, batch, **options):
        seen.append(batch)
        return plain(*args, batch=batch, **options)

    monkeypatch.setattr(module, "LayeredPass", spied)
    return seen


def test_the_command_runs_as_it_says(checkpoint, tmp_path, batches):
    """Type, windows at once and limit are those of the plan, for the command as for the function."""
    text = tmp_path / "text.txt"
    text.write_text(sample_text(200))
    command = ["calibrate", str(checkpoint.path), "--data", str(text), "--ctx", "32"]
    found = {}
    for kind in ("float32", "bfloat16"):
        out, own = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-own.safetensors"
        CliRunner().invoke(cli, [*command, "--dtype", kind, "-o", str(out)], catch_exceptions=False)
        gguftool.calibrate(checkpoint.path, data=[text], ctx=32, dtype=kind, out=own)
        assert out.read_bytes() == own.read_bytes()
        found[kind] = CalibrationStats.load(out)
    one, other = (stats.neurons["h_sq"] for stats in found.values())
    assert not np.array_equal(one, other) and one.sum() == pytest.approx(other.sum(), rel=0.1)
    assert batches == [4] * 4  # without a limit
    windows = found["float32"].tokens // 32
    least = needs_of(checkpoint, windows, 32, torch.float32, None, 1).least
    for limit, batch in ((f"{least}B", 1), ("2GiB", 16)):
        batches.clear()
        options = ["--memory", limit, "-o", str(tmp_path / f"{batch}.safetensors")]
        done = CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)
        assert f"float32, {batch} windows at a time" in done.output and batches == [batch]
        limited = CalibrationStats.load(tmp_path / f"{batch}.safetensors")
        assert limited.neurons["h_sq"] == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_the_benchmark_from_end_to_end(tmp_path):
    result = measure("qwen3-30b-a3b", QUICK, tmp_path, quick=True)
    assert [one.n_layers for one in result.memory] == [2, 3] and not list(tmp_path.iterdir())
    assert set(BARS) <= set(result.ratios) and result.missed() == []
    assert all(ratio.value > 0 for ratio in result.ratios.values())
    assert result.whole["layers"] == 48 and result.whole["disk_bytes"] > 2 * 131072 * 64 * 4
    # The layer's bytes by hand: attention, norms, router, experts.
    assert result.layer_bytes == 4 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 64 + 2 * 16 + 8 * 64 + 8 * 3 * 64 * 32)
    assert result.layer_bytes == result.memory[0].facts["layer_bytes"]
    judged = replace(result, judged=True, ratios={name: replace(r, value=0.5) for name, r in result.ratios.items()})
    assert judged.missed() == [
        "qwen3-30b-a3b: speed 0.500, the bar is at least 0.8",
        "qwen3-30b-a3b: observer 0.500, the bar is at least 2.0",
    ]
    assert isinstance(result.memory[0], Memory)
    with pytest.raises(GgufToolError, match="two depths, the smaller one first"):
        measure("qwen3-30b-a3b", replace(QUICK, layers=(3, 2)), tmp_path, quick=True)
    with pytest.raises(GgufToolError, match="no model 'gpt5'"):
        measure("gpt5", QUICK, tmp_path, quick=True)
