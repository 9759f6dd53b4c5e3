"""Guards by the one input that nothing else refuses: without the guard, each of these would pass unseen."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFValueType as V
from safetensors.numpy import save_file

import gguftool
from gguf_models import write_random
from gguftool import (
    durable,
    gguf_calibrate,
    gguf_file,
    inspection,
    prepare,
    probe,
    runs,
    runtime_build,
    sequential,
    sweep,
    workdir,
    workspace,
)
from gguftool.calibrate import calibrate
from gguftool.checkpoint import checkpoint_directory, open_checkpoint
from gguftool.checkpoint_config import check_counts
from gguftool.cli import cli
from gguftool.convert import convert
from gguftool.crosscheck import judge
from gguftool.cut import read as read_cut
from gguftool.encoding import TARGETS
from gguftool.errors import GgufToolError
from gguftool.evaluate import measure
from gguftool.expand import expand
from gguftool.forward import LayerStream
from gguftool.gguf_calibrate import calibrate_gguf
from gguftool.gguf_file import GgufFile, KeyValue, check_output, copied_entries, write_gguf
from gguftool.gguf_model import open_gguf
from gguftool.gguf_pass import StageDir
from gguftool.inspection import check, inspect
from gguftool.measurements import Store
from gguftool.outline import Base
from gguftool.overrides import Overrides
from gguftool.parts import merge
from gguftool.quantize import QuantizeTool, planned_types, quantize
from gguftool.recipe import Recipe
from gguftool.recorders import ExpertRecorder
from gguftool.report import Report
from gguftool.sensitivity import conditions
from gguftool.stats import Domain
from gguftool.tensors import TensorSpec, row_bytes
from gguftool.verification import Verified, recheck, sha256
from gguftool.workdir import WorkDir, own_work_dir
from gguftool.workspace import Workspace
from gguftool.writer import prune
from hostile import Tensors, rebuild, resized, tiny_gguf
from models import tiny_checkpoint
from synthetic import make_plan, make_stats, tensors
from test_sensitivity import MEASURED_ON

E, K, D, TOP = 4, 64, 64, 2


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_random(tmp_path / "plain.gguf", tensors(2, E, K, D), n_expert=E, top_k=TOP, n_ff=K)


def changed(source: Path, out: Path, **entries: KeyValue) -> Path:
    """A GGUF with other metadata; the names stand without their architecture."""
    file = GgufFile(source)
    own = {f"{file.arch}.{name}" if "." not in name else name: value for name, value in entries.items()}
    write_gguf(out, file.arch, copied_entries(file)[0] | own, file.tensors, file.raw)
    return out


# --- what is written is what was meant --------------------------------------------------------------------------------


def test_other_bytes_than_were_announced_are_not_written(plain, tmp_path):
    file = GgufFile(plain)
    for by in (-1, 1):
        with pytest.raises(GgufToolError, match=r"attn_q.weight: \d+ bytes were made, \d+ announced"):
            write_gguf(
                tmp_path / "out.gguf", file.arch, copied_entries(file)[0], file.tensors,
                lambda spec, by=by: np.zeros(spec.nbytes + by * ("attn_q" in spec.name), np.uint8),
            )  # fmt: skip
        assert os.listdir(tmp_path) == ["plain.gguf"]


def test_half_a_file_of_a_converter_that_ends_well_gets_no_name(
    checkpoint_dir, base_gguf, runtime, tmp_path, monkeypatch
):
    half, worker = tmp_path / "half", tmp_path / "worker"
    half.write_bytes(base_gguf.read_bytes()[:-100])
    worker.write_text(f'#!/bin/sh\ncp "{half}" "$5"\n')
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(GgufToolError, match="lies outside the file"):
        convert(checkpoint_dir, tmp_path / "out.gguf", runtime, pre_tokenizer="qwen2")
    assert sorted(os.listdir(tmp_path)) == ["half", "worker"]


def _drop(entries: dict[str, KeyValue], made: Tensors) -> None:
    del made["output_norm.weight"]


def _add(entries: dict[str, KeyValue], made: Tensors) -> None:
    spec, raw = made["output_norm.weight"]
    made["more"] = replace(spec, name="more"), raw


def _turn(entries: dict[str, KeyValue], made: Tensors) -> None:
    name = "blk.0.ffn_up_exps.weight"
    spec, raw = made[name]
    made[name] = replace(spec, ne=(spec.ne[0], spec.ne[2], spec.ne[1])), raw


def _type(entries: dict[str, KeyValue], made: Tensors) -> None:
    name = "blk.0.ffn_up_exps.weight"
    spec, raw = made[name]
    made[name] = replace(spec, type="BF16"), raw


def _kind(entries: dict[str, KeyValue], made: Tensors) -> None:
    entries["general.file_type"] = KeyValue(7, V.UINT32)


def _lose(entries: dict[str, KeyValue], made: Tensors) -> None:
    del entries["general.name"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "output_norm.weight: F32 .* was asked for, llama-quantize wrote: missing"),
        (_add, "wrote a tensor that the source does not have: more"),
        (_turn, r"ffn_up_exps.weight: F16 \(32, 32, 6\) was asked for, llama-quantize wrote: F16 \(32, 6, 32\)"),
        (_type, "ffn_up_exps.weight: F16 .* was asked for, llama-quantize wrote: BF16"),
        (_kind, "wrote general.file_type 7 for F16"),
        (_lose, "lost metadata: general.name"),
    ],
)
def test_what_llama_quantize_wrote_is_held_against_what_was_asked_for(change, said, tmp_path):
    """A tool that writes a file of zeros with one thing wrong, and one with nothing wrong."""
    source = tiny_gguf(tmp_path / "source.gguf", tiered=False)
    file, right, wrong = GgufFile(source), tmp_path / "right.gguf", tmp_path / "wrong.gguf"
    entries = copied_entries(file)[0] | {"general.file_type": KeyValue(TARGETS["F16"].file_type, V.UINT32)}
    write_gguf(right, file.arch, entries, planned_types(file, "F16"), lambda spec: np.zeros(spec.nbytes, np.uint8))
    rebuild(right, wrong, change)
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\ncp "{wrong}" "$4"\n')
    tool.chmod(0o755)
    with pytest.raises(GgufToolError, match=said):
        quantize(source, "F16", tmp_path / "out.gguf", tools=QuantizeTool(tool))
    assert not (tmp_path / "out.gguf").exists()
    tool.write_text(f'#!/bin/sh\ncp "{right}" "$4"\n')
    quantize(source, "F16", tmp_path / "out.gguf", tools=QuantizeTool(tool))


def test_a_file_that_was_recorded_with_its_fault_is_found_out(plain, tmp_path):
    """Same bytes as recorded, and yet no sound file: the hash alone says nothing."""
    data = bytearray(plain.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(data)
    (said,) = recheck(folder, Verified({"x.gguf": sha256(folder / "x.gguf")}))
    assert "not finite" in said and "x.gguf" in said


# Bytes that are NaN in a row of each type; of Q8_0 it is the scale of the first block.
NAN = {"F32": np.float32(np.nan).tobytes(), "BF16": b"\xc0\x7f", "F16": b"\x00\x7e", "Q8_0": b"\x00\x7e"}


@pytest.mark.parametrize("kind", NAN)
@pytest.mark.parametrize("row", [0, -1])
def test_a_nan_is_found_in_every_type_and_row(kind, row, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_CHUNK", 4 * K)  # a few rows at a time
    path = write_random(tmp_path / "x.gguf", tensors(2, E, K, D, kind), n_expert=E, top_k=TOP, n_ff=K)
    file, name = GgufFile(path), "blk.1.ffn_down_exps.weight"
    assert check(inspect(file)) == []
    spec = next(spec for spec in file.tensors if spec.name == name)
    rows = file.raw(spec).reshape(E * D, -1).copy()
    rows[row, : len(NAN[kind])] = np.frombuffer(NAN[kind], np.uint8)
    write_gguf(
        tmp_path / "nan.gguf", file.arch, copied_entries(file)[0], file.tensors,
        lambda one: rows if one.name == name else file.raw(one),
    )  # fmt: skip
    assert check(inspect(GgufFile(tmp_path / "nan.gguf"))) == [f"{name}: holds values that are not finite"]


# --- what a file says of itself ----------------------------------------------------------------------------------------


def lines(source: Path, out: Path, change) -> list[str]:
    """What `inspect --check` finds in a changed file."""
    return check(inspect(GgufFile(rebuild(source, out, change))))


def _number(**values: int):
    def change(entries: dict[str, KeyValue], made: Tensors) -> None:
        entries.update({f"qwen3moe.{name}": KeyValue(value, V.UINT32) for name, value in values.items()})

    return change


def _copied(name: str, new: str):
    def change(entries: dict[str, KeyValue], made: Tensors) -> None:
        spec, raw = made[name]
        made[new] = replace(spec, name=new), raw

    return change


def _signed(entries: dict[str, KeyValue], made: Tensors) -> None:
    entries["qwen3moe.expert_count"] = KeyValue(E, V.INT32)


def _without_experts(entries: dict[str, KeyValue], made: Tensors) -> None:
    for name in [name for name in made if name.startswith("blk.1.ffn_")]:
        del made[name]


def _narrower(entries: dict[str, KeyValue], made: Tensors) -> None:
    for role, ne in (("up", (D, 32, E)), ("gate", (D, 32, E)), ("down", (32, D, E))):
        name = f"blk.1.ffn_{role}_exps.weight"
        made[name] = resized(*made[name], ne)


# Layer 0 has two experts and layer 1 four, of which two are used.
FAULTS = {
    "layer 0: 2 experts, but 3 are routed per token": _number(expert_used_count=3),
    "layer 0: 2 experts do not divide into 2 groups of two or more": _number(
        expert_group_count=2, expert_group_used_count=1
    ),
    "qwen3moe.expert_count is of type int32, not uint32": _signed,
    "the metadata says 0 blocks, and 2 have tensors": _number(block_count=0),
    "block 1 has tensors, and the metadata says 1 blocks": _number(block_count=1),
    "blk.1.ffn_exps_tier.bias is no tier map of a layer": _copied("output_norm.weight", "blk.1.ffn_exps_tier.bias"),
    "the metadata says 5 of 4 experts are used": _number(expert_used_count=5),
    "the metadata says 0 of 4 experts are used": _number(expert_used_count=0),
    "the metadata says 1 of 3 groups of 4 experts are used": _number(expert_group_count=3, expert_group_used_count=1),
    "the metadata says 2 of 2 groups of 4 experts are used": _number(expert_group_count=2, expert_group_used_count=2),
    "layer 1: pruned by its metadata, but it has no experts": _without_experts,
    "layer 1: the widths of its tensors are not those of its metadata": _narrower,
}


@pytest.fixture
def cut_file(plain, tmp_path) -> Path:
    plan = make_plan([[64, 32], [64] * 4], K, TOP, router=[[0, 2], [0, 1, 2, 3]], n_expert=E)
    prune(plain, plan, tmp_path / "cut.gguf")
    return tmp_path / "cut.gguf"


@pytest.mark.parametrize("line", FAULTS)
def test_check_says_each_fault_in_its_own_line(line, cut_file, tmp_path):
    assert lines(cut_file, tmp_path / "same.gguf", lambda *_: None) == []
    assert line in lines(cut_file, tmp_path / "bad.gguf", FAULTS[line])


def test_a_stack_of_stacks_is_no_stack(plain, tmp_path):
    def change(entries: dict[str, KeyValue], made: Tensors) -> None:
        name = "blk.0.ffn_down_exps.weight"
        made[name] = resized(*made[name], (K, D, 2, 2))

    with pytest.raises(GgufToolError, match="blk.0.ffn_down_exps.weight is missing or not a stack of matrices"):
        lines(plain, tmp_path / "bad.gguf", change)


@pytest.mark.parametrize(
    ("key", "at", "value", "said"),
    [
        ("widths", 1, 16, "widths and masks differ"),
        ("router", 0, E, "an expert's id is not below 4"),
        ("router_counts", 0, 3, r"7 experts, 6 ids, 6 widths, \d+ mask bytes"),
    ],
)
def test_what_a_pruned_file_says_of_its_cut_is_compared(key, at, value, said, cut_file, tmp_path):
    values = list(GgufFile(cut_file).value(f"gguftool.{key}"))
    values[at] = value
    bad = changed(cut_file, tmp_path / "bad.gguf", **{f"gguftool.{key}": KeyValue(values, V.ARRAY, V.UINT32)})
    with pytest.raises(GgufToolError, match=f"contradict each other: {said}"):
        read_cut(GgufFile(bad))


def _more_tiers(entries: dict[str, KeyValue], made: Tensors) -> None:
    name = "blk.0.ffn_exps_tier.weight"
    made[name] = resized(*made[name], (2, 4))
    made[name] = made[name][0], np.array([[0, -1], [-1, 0], [-1, -1], [-1, -1]], np.int32).view(np.uint8)


def _no_map(entries: dict[str, KeyValue], made: Tensors) -> None:
    del made["blk.0.ffn_exps_tier.weight"]


@pytest.mark.parametrize("change", [_more_tiers, _no_map])
def test_tiers_are_expanded_by_their_own_map_only(change, plain, tmp_path):
    plan = make_plan([[64, 32], [64, 16]], K, TOP, router=[[0, 2], [1, 3]], n_expert=E)
    prune(plain, plan, tmp_path / "tiered.gguf")
    bad = rebuild(tmp_path / "tiered.gguf", tmp_path / "bad.gguf", change)
    with pytest.raises(GgufToolError, match="layer 0 has no tier map that goes with blk.0.ffn_gate_exps.0.weight"):
        expand(bad, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b"", "not a GGUF file"), (b"GGU", "not a GGUF file"), (b"GGUF\3\0\0\0", "truncated: 8 bytes")],
)
def test_what_is_too_short_for_a_header_is_called_by_what_it_is(raw, said, tmp_path):
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(GgufToolError, match=f"x.gguf: {said}"):
        GgufFile(tmp_path / "x.gguf")


def test_another_magic_is_no_gguf(plain, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML" + plain.read_bytes()[4:])
    with pytest.raises(GgufToolError, match="x.gguf: not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")


def test_a_type_that_cannot_be_counted():
    with pytest.raises(GgufToolError, match="x: type Q9_Z is not one that gguftool can count"):
        row_bytes("Q9_Z", 32, "x")


# --- files of one model, plans that cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["prune", "expand", "quantize", "calibrate", "inspect", "fit"])
def test_one_shard_of_a_split_model_is_no_model(work, plain, tmp_path):
    plan = make_plan([[64, 32, 0, 32], [64, 64, 64, 64]], K, TOP)
    prune(plain, plan, tmp_path / "tiered.gguf")
    source = tmp_path / "tiered.gguf" if work == "expand" else plain
    shard = changed(source, tmp_path / "shard.gguf", **{"split.count": KeyValue(3, V.UINT16)})
    out = tmp_path / "out.gguf"
    runs_ = {
        "prune": lambda: prune(shard, plan, out),
        "expand": lambda: expand(shard, out),
        "quantize": lambda: quantize(shard, "Q8_0", out, tools=QuantizeTool(Path(sys.executable))),
        "calibrate": lambda: open_gguf(shard),
        "inspect": lambda: inspect(GgufFile(shard)),
        "fit": lambda: Base.open(shard),
    }
    with pytest.raises(GgufToolError, match="one shard of a split model; join it with llama-gguf-split --merge"):
        runs_[work]()
    assert not out.exists()


def test_a_base_whose_metadata_count_other_experts_is_refused(plain, tmp_path):
    """The tensors are those of the plan; what llama.cpp goes by is not."""
    base = changed(plain, tmp_path / "base.gguf", expert_count=KeyValue(E + 1, V.UINT32))
    with pytest.raises(GgufToolError, match=f"has expert_count {E + 1}, the plan {E}: it was made for another model"):
        prune(base, make_plan([[64, 32, 0, 32], [64, 64, 64, 64]], K, TOP), tmp_path / "out.gguf")


def _layer(**changes: object):
    return lambda plan: replace(plan, layers=(replace(plan.layers[0], **changes), *plan.layers[1:]))


ALL = np.arange(K)
IMPOSSIBLE = {
    "the plan has no layers": lambda plan: replace(plan, layers=()),
    "the plan has layer 1 twice": lambda plan: replace(plan, layers=(*plan.layers, plan.layers[1])),
    "4 experts in the router, neurons for 3": _layer(retained=(ALL,) * 3),
    "the router's experts are not ascending ids below 4": _layer(router=(0, 2, 1, 3)),
    "the router's experts are not ascending ids": _layer(router=(0, 1, 2, 4)),
    "1 experts would remain but 2 are routed per token": _layer(router=(0,), retained=(ALL,)),
    "the neurons of expert 1 are not ascending below 64": _layer(retained=(ALL, ALL[[3, 2, 5]], ALL, ALL)),
    "the neurons of expert 2 are not ascending": _layer(retained=(ALL, ALL, ALL[[2, 2, 5]], ALL)),
    "the neurons of expert 3 are not ascending": _layer(retained=(ALL, ALL, ALL, np.array([1, 64]))),
    "the neurons of expert 0 are not ascending": _layer(retained=(np.array([-1, 2]), ALL, ALL, ALL)),
    "layer 0: no neuron would remain": _layer(retained=(ALL[:0],) * 4),
    "the importance is not 4 finite numbers": _layer(importance=(1.0, 1.0, float("nan"), 1.0)),
    "the importance is not 4 finite": _layer(importance=(1.0, 1.0, 1.0)),
    "says that its file is stock, but its experts have different": lambda plan: replace(plan, layout="stock"),
}


@pytest.mark.parametrize("said", IMPOSSIBLE)
def test_a_plan_that_was_never_a_file_is_checked_before_anything_is_written(said, plain, tmp_path):
    """`load` has not seen it: the writer must."""
    plan = IMPOSSIBLE[said](make_plan([[64, 32, 0, 32], [64, 64, 64, 64]], K, TOP))
    with pytest.raises(GgufToolError, match=said):
        prune(plain, plan, tmp_path / "sub" / "out.gguf")
    assert not (tmp_path / "sub").exists()


def test_stats_of_other_experts_than_the_file_was_cut_from(cut_file, runtime, tmp_path):
    """A file that does not say from which checkpoint it was cut, but from how many experts of how many neurons."""
    file = GgufFile(cut_file)
    entries = {k: v for k, v in copied_entries(file)[0].items() if k != "gguftool.base.fingerprint"}
    write_gguf(tmp_path / "x.gguf", file.arch, entries, file.tensors, file.raw)
    tools = QuantizeTool(runtime.tool("llama-quantize"))
    for stats in (make_stats(2, E + 1, K, D, TOP), make_stats(2, E, 2 * K, D, TOP)):
        with pytest.raises(GgufToolError, match=f"was cut from {E} experts of {K} neurons, the stats are of"):
            quantize(tmp_path / "x.gguf", "Q4_0", tmp_path / "out.gguf", tools=tools, imatrix=stats)


def test_one_matrix_under_two_names_is_refused(tmp_path):
    facts = '{"format": "gguftool.weights", "version": 2, "made_by": "x", "kept_hash": "", "dataset": [], "notes": []}'
    arrays = {name: np.ones((2, 2), np.float32) for name in ("0.1.down", "0.01.down")}
    save_file(arrays, tmp_path / "w", {"gguftool": facts})
    with pytest.raises(GgufToolError, match="the same matrix twice"):
        Overrides.load(tmp_path / "w")


# --- measurements ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(base_gguf, tmp_path_factory) -> Path:
    """The built-in model with one NaN in its last norm, which llama.cpp loads and runs."""
    file, path = GgufFile(base_gguf), tmp_path_factory.mktemp("broken") / "nan.gguf"

    def produce(spec: TensorSpec) -> np.ndarray:
        raw = file.raw(spec).copy()
        if spec.name == "output_norm.weight":
            raw.reshape(-1).view(np.float32)[0] = np.nan
        return raw

    write_gguf(path, file.arch, copied_entries(file)[0], file.tensors, produce)
    return path


def test_logits_that_are_not_finite_are_no_perplexity(broken, llama, eval_text):
    with pytest.raises(GgufToolError, match="nan.gguf: its logits are not finite"):
        measure(broken, eval_text.read_text(), llama=llama, max_windows=1, n_ctx=64)


def test_sums_that_are_not_finite_are_not_kept(base_gguf, llama, tmp_path):
    """A pass of a GGUF with a NaN in an expert."""
    file, path = GgufFile(base_gguf), tmp_path / "nan.gguf"

    def produce(spec: TensorSpec) -> np.ndarray:
        raw = file.raw(spec).copy()
        if spec.name == "blk.0.attn_v.weight":
            raw.reshape(-1).view(np.uint16)[:] = 0x7FC0
        return raw

    write_gguf(path, file.arch, copied_entries(file)[0], file.tensors, produce)
    ids = np.random.default_rng(0).integers(0, 300, (1, 16))
    with pytest.raises(GgufToolError, match=r"nan.gguf: the sum .* is not finite"):
        calibrate_gguf(open_gguf(path), [(Domain("a", "", 16), ids)], tmp_path / "work", llama=llama, obs=False)
    assert not list((tmp_path / "work").glob("stage-*"))


def _lost(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums in which one routed token is missing."""
    name = next(name for name in arrays if name.endswith("expert.count"))
    arrays[name].flat[np.flatnonzero(arrays[name])[0]] -= 1
    return arrays


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def windows_of(count: int = 4, n_ctx: int = 16) -> list[tuple[Domain, np.ndarray]]:
    ids = np.random.default_rng(1).integers(0, 300, (count, n_ctx))
    return [(Domain("code", "sha", ids.size), ids)]


def test_a_token_that_was_lost_on_the_way_makes_no_stats(tiny, base_gguf, llama, tmp_path, monkeypatch):
    """Of a checkpoint, of a GGUF, and of parts that are added up: nothing is saved."""
    sums, load = WorkDir.sums, StageDir.load
    monkeypatch.setattr(WorkDir, "sums", lambda self, layer: _lost(sums(self, layer)))
    monkeypatch.setattr(StageDir, "load", lambda self, stage: _lost(load(self, stage)))
    with pytest.raises(GgufToolError, match="routed tokens were counted, not tokens x top-k"):
        calibrate(open_checkpoint(tiny), windows_of(), tmp_path / "one", out=tmp_path / "out")
    how = {"llama": llama, "threads": 1, "obs": False, "out": tmp_path / "out"}
    with pytest.raises(GgufToolError, match="routed tokens were counted, not tokens x top-k"):
        calibrate_gguf(open_gguf(base_gguf), windows_of(1), tmp_path / "two", **how)
    one, other = make_stats(), make_stats(seed=1)
    other = replace(other, domains=(replace(other.domains[0], sha256="1" * 64),))
    other.neurons["down_norm_sq"][:] = one.neurons["down_norm_sq"]
    assert merge([one, other])[0].tokens == 800
    _lost({"expert.count": other.experts["count"]})
    with pytest.raises(GgufToolError, match="routed tokens were counted, not tokens x top-k"):
        merge([one, other])
    assert not (tmp_path / "out").exists()


def test_a_sum_that_overflows_is_not_kept(tiny, tmp_path, monkeypatch):
    """Every output is finite, and what was added up of them is not."""
    arrays = ExpertRecorder.arrays
    infinite = {"expert.norm_sq": np.full((1, 6), np.inf)}
    monkeypatch.setattr(ExpertRecorder, "arrays", lambda self: arrays(self) | infinite)
    with pytest.raises(GgufToolError, match="layer 0: the sum expert.norm_sq is not finite"):
        calibrate(open_checkpoint(tiny), windows_of(), tmp_path / "work")
    assert not list((tmp_path / "work").glob("layer-*"))


def test_a_pruned_stream_that_is_not_finite_is_said(tiny, tmp_path, monkeypatch):
    """The original's is finite; what was fitted before made the other one overflow."""
    checkpoint = open_checkpoint(tiny)
    plan = replace(make_plan([[8, 32, 16, 8, 32, 8]] * 3, 32, TOP), model_fingerprint=checkpoint.fingerprint)
    solve = sequential.LayerFit.solve

    def overflowing(self, layer):
        found = solve(self, layer)
        self.rest.fill_(torch.inf)
        return found

    monkeypatch.setattr(sequential.LayerFit, "solve", overflowing)
    with pytest.raises(GgufToolError, match="layer 1: its output is not finite on the pruned stream"):
        sequential.refit_sequentially(checkpoint, plan, windows_of(), tmp_path / "work")


def test_either_file_may_be_the_one_on_which_backends_differ():
    def measured(base: float, pruned: float) -> dict:
        return {"base": {"ppl": base}, "pruned": {"ppl": pruned}, "tokens": 6120}

    right = measured(10.0, 12.0)
    assert judge({"a": right, "b": right}).ok
    for base, pruned in ((11.0, 12.0), (10.0, 13.0), (float("nan"), 12.0), (float("inf"), 12.0)):
        assert not judge({"a": right, "b": measured(base, pruned)}).ok


def test_the_function_compress_raises_what_cannot_be_right(tmp_path, monkeypatch):
    report = replace(Report("m", 10, {}, [], "p"), failures=("KL divergence of 9",))
    monkeypatch.setattr(runs, "carry_out", lambda *_: report)
    with pytest.raises(GgufToolError, match="out: not done, the files are kept: KL divergence of 9"):
        gguftool.compress("x", out=tmp_path / "out", data=["a"], eval=["b"], ratio=0.4)


# --- inputs that change ------------------------------------------------------------------------------------------------


def touched(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(1, 1))


@pytest.fixture
def own(tiny, tmp_path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_checkpoint_that_changes_while_it_is_embedded_leaves_no_state(own, tmp_path, monkeypatch):
    """A run that goes on would not read the embedding again."""
    embed = LayerStream.embed

    def spoiled(self, windows):
        touched(own / "model.safetensors")
        return embed(self, windows)

    monkeypatch.setattr(LayerStream, "embed", spoiled)
    with pytest.raises(GgufToolError, match="model.safetensors was changed while it was read"):
        calibrate(open_checkpoint(own), windows_of(), tmp_path / "work")
    assert not (tmp_path / "work" / "state.json").exists()


def test_a_checkpoint_that_changes_while_a_layer_is_fitted_keeps_no_layer(own, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(own)
    plan = replace(make_plan([[8, 32, 16, 8, 32, 8]] * 3, 32, TOP), model_fingerprint=checkpoint.fingerprint)
    solve = sequential.LayerFit.solve

    def spoiled(self, layer):
        if layer.index == 2:  # behind it no layer is read that would find it out
            touched(own / "model.safetensors")
        return solve(self, layer)

    monkeypatch.setattr(sequential.LayerFit, "solve", spoiled)
    with pytest.raises(GgufToolError, match="model.safetensors was changed while it was read"):
        sequential.refit_sequentially(checkpoint, plan, windows_of(), tmp_path / "work")
    assert not list((tmp_path / "work" / "pruned").glob("layer-002*"))


@pytest.mark.parametrize("when", ["in a pass", "behind its last sums"])
def test_a_gguf_that_changes_in_a_pass_leaves_no_sums(when, base_gguf, llama, tmp_path, monkeypatch):
    path, arrays = tmp_path / "own.gguf", []
    shutil.copyfile(base_gguf, path)
    real = gguf_calibrate._Sums.arrays

    def spoiled(self):
        arrays.append(1)
        touched(path)
        return real(self)

    if when != "in a pass":
        monkeypatch.setattr(gguf_calibrate._Sums, "arrays", spoiled)
    with pytest.raises(GgufToolError, match="own.gguf was changed while it was read"):
        calibrate_gguf(
            open_gguf(path), windows_of(1), tmp_path / "work", llama=llama, threads=1, obs=False, save_seconds=0,
            progress=lambda *_: touched(path) if when == "in a pass" else None,
        )  # fmt: skip
    assert bool(arrays) is (when != "in a pass")
    kept = {file.name for file in (tmp_path / "work").iterdir()}
    assert kept == (set() if when == "in a pass" else {"running.safetensors"})


def test_a_file_that_changes_while_it_is_inspected_is_not_shown(plain, monkeypatch, capsys):
    check_all = inspection.check
    monkeypatch.setattr(inspection, "check", lambda view: [check_all(view), touched(plain)][0])
    monkeypatch.setattr("gguftool.runtime.find", lambda *_: None)
    with pytest.raises(GgufToolError, match="plain.gguf was changed while it was read"):
        cli.main(["inspect", "--check", str(plain)], standalone_mode=False)
    assert not capsys.readouterr().out


def test_a_base_and_stats_are_made_anew_for_another_checkpoint_tokenizer_or_text(own, tmp_path, monkeypatch):
    """As `compress` and the like do it, whose steps are remembered by what they were made from."""
    made: list[str] = []
    monkeypatch.setattr(prepare, "convert_soundly", lambda job, checkpoint, path: made.append(path.write_text("x")))
    job = SimpleNamespace(runtime=SimpleNamespace(path=Path("r")), pre_tokenizer=None, limit=None, seed=0, n_ctx=16)
    job.progress = None

    def run(texts: list[tuple[Domain, np.ndarray]]) -> list[str]:
        made.clear()
        work = Workspace(tmp_path / "out", lambda _: None)
        known = SimpleNamespace(
            checkpoint=open_checkpoint(own), domains=texts, memory=SimpleNamespace(dtype="float32"),
            run=lambda _work, path, _progress: made.append(make_stats().save(path) or "stats"),
        )  # fmt: skip
        prepare.prepare(job, work, [], known)
        del work
        return made

    one, other = windows_of()[0], np.random.default_rng(2).integers(0, 300, (4, 16))
    assert run([one]) == [1, "stats"] and run([one]) == []
    assert run([(one[0], other)]) == ["stats"]  # the same text, cut by another tokenizer's rules
    assert run([(replace(one[0], sha256="other"), other)]) == ["stats"]
    config = own / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    assert run([(replace(one[0], sha256="other"), other)]) == [1, "stats"]
    touched(own / "model.safetensors")
    assert run([(replace(one[0], sha256="other"), other)]) == [1, "stats"]


# --- files and locks ---------------------------------------------------------------------------------------------------


def test_a_block_begins_without_the_partial_file_of_a_run_that_was_killed(tmp_path):
    """A program that it had started may still write to that one."""
    (tmp_path / "out.partial").write_text("half of another run")
    with durable.replacing(tmp_path / "out") as partial:
        assert not partial.exists()
        partial.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole" and os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_what_numpy_only_counts_the_system_is_asked_about():
    """numpy says how many of the bytes it could write, and not why; then it would be no full disk."""
    with open("/dev/full", "wb", buffering=0) as full:
        writer = SimpleNamespace(write_tensor_data=lambda data: data.tofile(full), fout=[full])
        with pytest.raises(OSError, match="No space left") as error:
            gguf_file._write_data(writer, np.zeros(1 << 20, dtype=np.uint8))
    assert error.value.errno == errno.ENOSPC


def test_an_input_that_may_not_be_read_is_not_said_of_the_output(tmp_path):
    with pytest.raises(PermissionError), durable.replacing(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "input"))
    with pytest.raises(GgufToolError, match="out: cannot be written"), durable.replacing(tmp_path / "out") as partial:
        raise PermissionError(13, "Permission denied", str(partial))


@pytest.mark.parametrize("how", ["written to", "replaced", "cut off", "removed"])
def test_an_input_that_is_no_longer_the_same(how, tmp_path):
    path, other = tmp_path / "input", tmp_path / "other"
    path.write_text("what was read")
    before = durable.identity(path)
    time = path.stat().st_mtime_ns
    durable.check_unchanged({path: before})
    if how == "written to":
        path.write_text("what was READ")
        os.utime(path, ns=(time + 1, time + 1))
    elif how == "replaced":  # with the same size and time
        other.write_text("what was read")
        os.utime(other, ns=(time, time))
        os.replace(other, path)
    elif how == "cut off":
        os.truncate(path, 3)
        os.utime(path, ns=(time, time))
    else:
        path.unlink()
    with pytest.raises(GgufToolError, match="input was changed while it was read"):
        durable.check_unchanged({path: before})


@pytest.mark.parametrize("left", ["nothing", "the next one's"])
def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(left, tmp_path, monkeypatch):
    """Whoever held it has ended between our opening and our locking: what we locked is a file without a name."""
    lock, real, seen = tmp_path / ".out.lock", fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not seen:
            lock.unlink()
            if left != "nothing":
                lock.touch()
        seen.append(handle)
        real(handle, how)

    monkeypatch.setattr(durable.fcntl, "flock", flock)
    with durable.held(tmp_path / "out"):
        (handle,) = durable.held_handles()
        assert os.fstat(handle).st_ino == lock.stat().st_ino and len(seen) == 2
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_held_twice_stays_until_both_have_gone(tmp_path):
    with durable.held(tmp_path / "out"):
        with durable.held(tmp_path / "out"):
            pass
        assert durable.held_handles() and os.listdir(tmp_path) == [".out.lock"]
    assert not durable.held_handles()


def test_a_lock_file_goes_before_its_lock(tmp_path, monkeypatch):
    """The other way round it could be the next one's that is removed."""
    lock, real = tmp_path / ".out.lock", os.close
    with durable.held(tmp_path / "out"):
        gone = []
        monkeypatch.setattr(durable.os, "close", lambda one: (gone.append(not lock.exists()), real(one)))
    assert gone == [True]


# Fails, and names the locks that it was given.
NAMES_LOCKS = "#!/bin/sh\nreadlink /proc/$$/fd/* | grep lock >&2\nexit 3\n"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of handles are read from /proc")
def test_programs_that_write_in_our_place_are_given_the_lock(base_gguf, checkpoint_dir, runtime, tmp_path, monkeypatch):
    """Where we are killed and they are not, a second run must see them."""
    worker = tmp_path / "worker"
    worker.write_text(NAMES_LOCKS)
    worker.chmod(0o755)
    with pytest.raises(GgufToolError, match=r"exit code 3\): .*/\.out\.lock"):
        quantize(base_gguf, "Q8_0", tmp_path / "out", tools=QuantizeTool(worker))
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(GgufToolError, match=r"refused .*/\.out\.lock"):
        convert(checkpoint_dir, tmp_path / "out", runtime, pre_tokenizer="qwen2")


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print(*sys.argv[2:], end="", file=file, flush=True)
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("text", ["", "\u00b2 host", f"{10**40} {socket.gethostname()}"])
def test_a_lock_is_held_whatever_stands_in_it(text, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".out.lock"), text]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        with (
            pytest.raises(GgufToolError, match="out: another process is writing it"),
            durable.replacing(tmp_path / "out"),
        ):
            pass
        other.communicate("")


def test_a_second_measurement_of_layers_is_sent_away(tmp_path):
    """Both would go on from one partial file."""
    how = probe.Probe(tmp_path / "base.gguf", "text", None)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".layers.json.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        with pytest.raises(GgufToolError, match="layers.json: another process is writing it"):
            probe.measure_layers(how, None, None, tmp_path / "layers.json", say=print)
        other.communicate("")


def test_a_second_build_waits_for_the_first(tmp_path):
    entered = threading.Event()

    def build() -> None:
        with runtime_build._lock(tmp_path):
            entered.set()

    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        second = threading.Thread(target=build)
        second.start()
        assert not entered.wait(0.3)
        other.communicate("")
    second.join(10)
    assert entered.is_set()


def test_a_second_fetch_is_sent_away(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    monkeypatch.delenv(runtime_build.SDIST, raising=False)
    seen = []

    def download(base, room, path) -> None:
        seen.append([file.name for file in path.parent.glob(".*.lock")])
        raise GgufToolError("enough")

    monkeypatch.setattr(runtime_build, "_download", download)
    with pytest.raises(GgufToolError, match="enough"):
        runtime_build.fetch()
    assert seen == [[f".{runtime_build.read_base().stem}.tar.gz.lock"]]


def test_a_source_unpacks_into_its_folder_only(tmp_path):
    """Whatever a base.toml of another series pins."""
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x", "../../outside")
    with pytest.raises(tarfile.FilterError):
        runtime_build.prepare_source(tmp_path / "s.tar.gz", tmp_path / "deep" / "er" / "src", False)
    assert not list(tmp_path.rglob("outside"))


def test_a_runtime_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    for name in ("bin/libllama.so", "bin/llama-quantize", "src/convert_hf_to_gguf.py", "src/conversion/base.py",
                 "src/gguf-py/gguf.py"):  # fmt: skip
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("program")
    target, done = tmp_path / "runtime", []
    fsync, rename = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def named(old: Path, new: Path) -> None:
        wanted = {str(path) for path in Path(old).rglob("*")} | {str(old)}
        assert wanted <= set(done) and not Path(new).exists()
        done.append(f"renamed to {new}")
        rename(old, new)

    monkeypatch.setattr(runtime_build.os, "fsync", flushed)
    monkeypatch.setattr(runtime_build.os, "replace", named)
    runtime_build._install(tmp_path / "tree" / "src", tmp_path / "tree", target, {}, True)
    assert done[-2:] == [f"renamed to {target}", str(tmp_path)] and (target / "build.json").is_file()


# --- steps and state ---------------------------------------------------------------------------------------------------


def test_a_step_makes_its_file_anew_and_remembers_what_is_on_disk(tmp_path, monkeypatch):
    work, events = Workspace(tmp_path, lambda _: None), []
    fsync = os.fsync

    def make(path: Path) -> None:
        assert not path.exists()  # what was made from other inputs is no start
        path.write_text("x")

    def flushed(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(durable.os, "fsync", flushed)
    for inputs in (1, 2):
        work.step("f", {"in": inputs}, make)
        assert events.index("f") > events.index("state.json.partial")  # being made, then its bytes, then the key
        assert events[events.index("f") + 1 :][:1] == ["state.json.partial"]
        events.clear()
    monkeypatch.setattr(workspace, "__version__", "another")
    made = []
    work.step("f", {"in": 2}, lambda path: made.append(path.write_text("y")))
    assert made  # another gguftool may make it otherwise


def test_a_state_of_another_version_is_not_gone_on_from(tmp_path, monkeypatch):
    def opened() -> WorkDir:
        return WorkDir(tmp_path / "work", {"model": "m"}, (1, 2, 4), torch.float32)

    state = opened()
    with state.next_hidden() as append:
        append(torch.zeros(1, 2, 4))
    state.advance()
    assert opened().position == 0
    monkeypatch.setattr(workdir, "VERSION", workdir.VERSION + 1)
    assert opened().position is None and not list((tmp_path / "work").glob("hidden-*"))


def test_sums_of_another_stage_or_run_are_no_start(tmp_path):
    class Into:
        def restore(self, sums):
            given.append(float(sums["s"]))

    given: list[float] = []
    stages = StageDir(tmp_path / "work", {"model": "m"})
    stages.keep(1, 3, {"s": torch.tensor([2.0])})
    assert stages.resume(0, Into()) == 0 and not given
    assert stages.resume(1, Into()) == 3 and given == [2.0]
    assert StageDir(tmp_path / "work", {"model": "another"}).resume(1, Into()) == 0
    assert given == [2.0] and not list((tmp_path / "work").glob("*.safetensors"))


@pytest.mark.parametrize("part", ["format", "version", "key"])
def test_a_measurement_counts_under_its_own_key(part, tmp_path):
    store, key = Store(tmp_path), {"model": "m"}
    store.save(key, {"kl": 1.0})
    assert store.load(key) == {"kl": 1.0}
    found = json.loads(store.path(key).read_text())
    store.path(key).write_text(json.dumps(found | {part: {"model": "another"}}))
    assert store.load(key) is None


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model-00001-of-00002.safetensors",
        "named.safetensors",
        "texts/more/a.jsonl",
        "under-another-name",
    ],
)
def test_what_is_read_in_a_folder_is_no_output(name, tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "texts" / "more").mkdir(parents=True)
    for read in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "named.safetensors",
        "texts/more/a.jsonl",
        "pruned.gguf",
    ):
        (folder / read).write_text("dear")
    (folder / "own.safetensors").write_text("stats that lie there too")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "named.safetensors"}}')
    (folder / "under-another-name").hardlink_to(folder / "config.json")
    with pytest.raises(GgufToolError, match="is an input; choose another output"):
        check_output(folder / name, True, folder)
    for other in ("own.safetensors", "pruned.gguf", "new.json"):
        check_output(folder / other, True, folder)


def test_a_folder_or_a_device_is_no_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in ((".", "a folder"), ("pipe", "no plain file")):
        with pytest.raises(GgufToolError, match=f"{said}, and the output is a file"):
            durable.check_place(tmp_path / name)
    (tmp_path / "out").mkdir()
    with pytest.raises(GgufToolError, match="a folder, and the output"), own_work_dir(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipe"]


def test_hidden_states_that_lack_windows_are_no_input(tmp_path):
    state = WorkDir(tmp_path / "work", {}, (3, 2, 4), torch.float32)
    with pytest.raises(GgufToolError, match="64 bytes were written, not 96"), state.next_hidden() as append:
        append(torch.zeros(2, 2, 4))
    assert not list((tmp_path / "work").glob("hidden-*"))


@pytest.mark.parametrize("value", [1001, 10**30, 1e300, float("inf"), float("nan")])
@pytest.mark.parametrize("inside", [False, True])
def test_counts_that_no_checkpoint_has_are_refused(value, inside, tmp_path):
    fields = {"num_labels": value}
    with pytest.raises(GgufToolError, match="config.json says num_labels = .*; there are 12 tensors"):
        check_counts(tmp_path, {"text_config": fields} if inside else fields, 12)
    check_counts(tmp_path, {"num_labels": 1000}, 12)


def test_the_hub_is_asked_for_no_code_and_no_pickle(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _name, **more: asked.append(more) or str(tmp_path))
    checkpoint_directory("someone/A-Model")
    endings = {Path(pattern).suffix for pattern in asked[0]["allow_patterns"]}
    assert endings == {".json", ".safetensors", ".model", ".txt", ".jinja"}


# --- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))


def test_programs_are_not_started_where_their_output_has_no_room(full, base_gguf, checkpoint_dir, runtime, tmp_path):
    tools = QuantizeTool(tmp_path / "tool")
    (tmp_path / "tool").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(GgufToolError, match="out: needs 0.01 GB, the disk has 0.00 GB free"):
        quantize(base_gguf, "Q8_0", tmp_path / "out", tools=tools)
    with pytest.raises(GgufToolError, match="out: needs 0.01 GB, the disk has 0.00 GB free"):
        convert(checkpoint_dir, tmp_path / "out", runtime, pre_tokenizer="qwen2")


def test_layers_are_not_measured_where_their_files_have_no_room(plain, full, tmp_path):
    stats, base = make_stats(2, E, K, D, TOP), tmp_path / "plain.gguf"
    where = conditions(stats, Recipe("global", 0.4, align=8), **MEASURED_ON)
    with pytest.raises(GgufToolError, match="layers.json: needs 0.00 GB, the disk has 0.00 GB free"):
        probe.measure_layers(probe.Probe(base, "text", None), stats, where, tmp_path / "layers.json", say=print)
    assert os.listdir(tmp_path) == ["plain.gguf"]


def test_nothing_is_built_where_there_is_no_room(full, tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime_build, "check_toolchain", lambda *_: SimpleNamespace(notes=()))
    monkeypatch.setattr(runtime_build, "fetch", lambda _: pytest.fail("fetched"))
    with pytest.raises(GgufToolError, match="work-cpu: building needs 3 GB free"):
        runtime_build.build("cpu")


def test_a_sweep_measures_what_it_has_before_the_disk_is_full(tmp_path, monkeypatch):
    (tmp_path / "base").write_bytes(bytes(100))
    source, work = SimpleNamespace(base=tmp_path / "base"), SimpleNamespace(folder=tmp_path)
    bench = SimpleNamespace(source=source, work=work)
    for free, short in ((499, True), (500, False)):  # three files, a pruned one and a refit
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert sweep._Bench._is_disk_short(bench, 3) is short
