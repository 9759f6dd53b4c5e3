"""Hostile and broken inputs through the command line: each is one clear line and exit 1, and nothing else happens.

The sound files are made by `hostile`, the hostile GGUF files by `hostile_gguf`, all others here. At the end the number of
inputs that were refused is printed (pytest -s shows it; scripts/hostile runs just this).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hostile_gguf
from gguftool import cli
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.methods import slice_criterion
from gguftool.overrides import Origin, Overrides, writing
from gguftool.plan import PrunePlan
from gguftool.printable import one_line
from gguftool.recipe import Recipe
from gguftool.sensitivity import Conditions, LayerCost, Sensitivity
from gguftool.stats import CalibrationStats
from gguftool.stored import stored_tensors
from hostile import DEEP, edited, reheader, safetensors, tiny_gguf
from models import tiny_checkpoint
from synthetic import make_plan, make_stats

GIB = 1 << 30
tried: list[str] = []
refused: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    print(f"\nrefused {len(refused)} of {len(tried)} hostile inputs", file=sys.__stdout__)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with one sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_gguf(folder / "base.gguf", tiered=False)
    tiny_gguf(folder / "tiered.gguf")
    stats = make_stats(2, 6, 32, 32)
    stats.save(folder / "stats.safetensors")
    plan = make_plan([[32, 16, 16, 32, 8, 16]] * 2, 32, 2)
    plan.save(folder / "plan.json")
    known = Conditions(
        stats.model.name, stats.model.fingerprint, "0", base_bytes=1, moe_layers=(0, 1), ratio=0.5,
        criterion=slice_criterion(stats, Recipe("global", 0.5)), align=8, max_tiers=4, text="t", text_sha256="0",
        n_ctx=8, windows=None, backend="cpu",
    )  # fmt: skip
    Sensitivity(known, (LayerCost(0, 0.1, 0.01, 2.0), LayerCost(1, 0.2, 0.01, 3.0))).save(folder / "layers.json")
    with writing(folder / "weights.safetensors", Origin("refit", plan.kept_hash), [((0, 1, "down"), (32, 16))]) as out:
        out.add((0, 1, "down"), np.ones((32, 16), np.float32))
    tiny_checkpoint(folder / "model", num_hidden_layers=2)
    (folder / "text.txt").write_text("the expert routes a token to its narrow tier " * 40, encoding="utf-8")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {}
    for path in files:
        with os.fdopen(os.open(path, os.O_RDONLY), "rb") as file:  # test_paths replaces `open` by name
            digests[str(path)] = hashlib.sha256(file.read()).hexdigest()
    return digests


class TooLong(BaseException):
    pass


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code. An error that is not stated, more than a minute and more than a GiB of further memory are failures."""

    def stop(*_args: object) -> None:
        raise TooLong(arguments)

    monkeypatch.setattr(sys, "argv", ["gguftool", *arguments])
    monkeypatch.setenv("GGUFTOOL_TRACEBACK", "1")
    monkeypatch.setattr("gguftool.runtime.find", lambda *_args: None)  # what this project's own code says
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 1 << 50
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, before[1]))
    try:
        return cli.run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def refuses(name: str, arguments: list[str | Path], inputs: Path, monkeypatch, capsys) -> str:
    """Runs a command that must fail with one clear line; OUT in an argument is where its output would go."""
    tried.append(name)
    out = inputs / "out"
    out.mkdir(exist_ok=True)
    before = hashes(inputs)
    code = run([str(argument).replace("OUT", str(out)) for argument in arguments], monkeypatch)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 1, (code, said)
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and said[-1] == errors[0], said
    assert errors[0].isprintable() and 20 < len(errors[0]) < 1100, errors
    assert not any(
        word in errors[0] for word in ("Traceback", "MemoryError", "Unable to allocate", "GGUFTOOL_TRACEBACK")
    )
    # What calibrate would go on from may stay, but no output and no part of one.
    left = {path.name for path in out.iterdir()} - {"x.work"}
    assert not left and {path: text for path, text in hashes(inputs).items() if "x.work" not in path} == before
    refused.append(name)
    return errors[0]


GGUF = [*hostile_gguf.HEADERS, *hostile_gguf.STRUCTURE, *hostile_gguf.STRICTER]


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name, sound, tmp_path, monkeypatch, capsys):
    bad = hostile_gguf.write(name, sound / "tiered.gguf", tmp_path / "bad.gguf")
    said = refuses(name, ["inspect", "--check", bad], tmp_path, monkeypatch, capsys)
    assert hostile_gguf.SAYS.get(name, "") in said


@pytest.mark.parametrize("name", [*hostile_gguf.HEADERS, "a tier map of more tiers", "tiers without a map"])
def test_gguf_that_is_to_be_written_anew(name, sound, tmp_path, monkeypatch, capsys):
    bad = hostile_gguf.write(name, sound / "tiered.gguf", tmp_path / "bad.gguf")
    refuses(name, ["expand", bad, "-o", "OUT/x.gguf"], tmp_path, monkeypatch, capsys)
    refuses(name, ["prune", bad, "--plan", sound / "plan.json", "-o", "OUT/x.gguf"], tmp_path, monkeypatch, capsys)


def _more(**values):
    return lambda plan: plan.update(values)


def _recipe(**values):
    return lambda plan: plan["recipe"].update(values)


def _row(**values):
    return lambda plan: plan["layers"][0]["experts"][1].update(values)


def _tensor(**values):
    return lambda plan: plan["tensors"].append({"name": "x", "ne": [32], "type": "F32", **values})


PLANS: dict[str, Callable[[dict], object]] = {
    "another version": _more(version=9),
    "another format": _more(format="x"),
    "no layers": _more(layers=[]),
    "layers that are a number": _more(layers=3),
    "layers that are text": _more(layers="abc"),
    "a layer twice": lambda plan: plan["layers"].append(plan["layers"][0]),
    "a layer of another model": lambda plan: plan["layers"][1].update(layer=7),
    "a layer of -1": lambda plan: plan["layers"][1].update(layer=-1),
    "a layer of 2^80": lambda plan: plan["layers"][1].update(layer=2**80),
    "2^40 neurons": _more(n_ff_exp=2**40),
    "2^63 neurons": _more(n_ff_exp=2**63),
    "-1 neurons": _more(n_ff_exp=-1),
    "neurons as text": _more(n_ff_exp="32"),
    "neurons as a fraction": _more(n_ff_exp=32.5),
    "other neurons": _more(n_ff_exp=40),
    "2^50 experts": _more(n_expert=2**50),
    "experts of another model": _more(n_expert=8),
    "true for experts": _more(n_expert=True),
    "more used than kept": _more(n_expert_used=7),
    "fewer used than by the model": _more(n_expert_used=1),
    "an architecture as a number": _more(gguf_arch=4),
    "another architecture": _more(gguf_arch="mixtral"),
    "half a surrogate pair": _more(model_name="\ud800"),
    "an expert twice": _row(expert=0),
    "an expert that is not there": _row(expert=6),
    "an expert of -1": _row(expert=-1),
    "an expert as text": _row(expert="1"),
    "another width than the mask": _row(width=3),
    "a mask that is no hexadecimal": _row(neurons="zz"),
    "a mask that is too long": _row(neurons="ff" * 5),
    "a mask that is a number": _row(neurons=5),
    "an expert without neurons": lambda plan: plan["layers"][0]["experts"][1].pop("neurons"),
    "an expert that is a list": lambda plan: plan["layers"][0]["experts"].__setitem__(1, [1, 2]),
    "importance of too few": lambda plan: plan["layers"][0].update(importance=[1.0]),
    "a ratio of 2": _recipe(ratio=2),
    "a ratio as text": _recipe(ratio="0.5"),
    "a method that is a list": _recipe(method=["a"]),
    "a field of a recipe that there is not": _recipe(**{"a\nb": 1}),
    "a depth of one number": _recipe(depth=[1]),
    "a depth of none": _recipe(depth=[]),
    "a recipe that is a list": _more(recipe=[1]),
    "a tensor of 2^70 weights": _tensor(ne=[2**70]),
    "a tensor of -1 weights": _tensor(ne=[-1]),
    "a tensor without dimensions": _tensor(ne=[]),
    "a tensor of 1000 dimensions": _tensor(ne=[1] * 1000),
    "a tensor of no type": _tensor(type="Q9_Z"),
    "a tensor of half a block": _tensor(type="Q8_0", ne=[16]),
    "a tensor twice": lambda plan: (_tensor()(plan), _tensor()(plan)),
    "a dataset that is no pair": _more(dataset=[["a"]]),
    "a note that is a number": _more(notes=[1]),
    "no expert used": _more(n_expert_used=0),
    "neurons of another model": lambda plan: (
        plan.update(n_ff_exp=40),
        [row.update(width=40) for layer in plan["layers"] for row in layer["experts"] if row["neurons"] == "all"],
        [
            row.update(neurons=row["neurons"] + "00")
            for layer in plan["layers"]
            for row in layer["experts"]
            if row["neurons"] not in ("all", "none")
        ],
    ),
    "no neuron in a layer": lambda plan: [row.update(width=0, neurons="none") for row in plan["layers"][0]["experts"]],
}
# What a refusal says where a later guard would refuse the plan too, but not with these words.
PLANS_SAY = {
    "a name twice": "is there twice",
    "NaN": "no number of JSON",
    "nested 100000 deep": "nested too deeply",
    "another version": "plan version 9, this gguftool reads 1",
    "no layers": "the plan has no layers",
    "a layer twice": "the plan has layer 0 twice",
    "a layer of another model": "the plan has no layer 1; it was made for another model",
    "a layer of -1": "layer: -1 is no whole number",
    "a layer of 2^80": "layer: 1208925819614629174706176 is no whole number",
    "2^40 neurons": "is no whole number from 1 to 1048576",
    "-1 neurons": "n_ff_exp: -1 is no whole number",
    "2^50 experts": "is no whole number from 1 to 65536",
    "experts of another model": "has 6 experts, the plan 8",
    "true for experts": "n_expert: True is no whole number",
    "more used than kept": "6 experts would remain but 7 are routed per token",
    "fewer used than by the model": "has expert_used_count 2, the plan 1",
    "no expert used": "n_expert_used: 0 is no whole number from 1 to 65536",
    "neurons of another model": "has experts of width 32, the plan 40",
    "no neuron in a layer": "layer 0: no neuron would remain",
    "an architecture as a number": "gguf_arch: 4 is no string",
    "half a surrogate pair": "the plan lacks or garbles 'utf-8' codec",
    "an expert twice": "are not ascending ids below 6",
    "an expert that is not there": "are not ascending ids below 6",
    "an expert of -1": "expert: -1 is no whole number",
    "an expert as text": "expert: 1 is no whole number",
    "another width than the mask": "width 3, mask of 16",
    "a mask that is too long": "a mask of 5 bytes for 32 neurons",
}
PLAN_TEXTS = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number of 5000 digits": b"1" * 5000,
    "not UTF-8": b"\xff\xfe{}",
    "nested 100000 deep": DEEP.encode(),
    "an object nested 100000 deep": b'{"a":' * 100_000,
    "NaN": b'{"format": NaN}',
    "a name twice": b'{"format": "gguftool.plan", "format": "gguftool.plan"}',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("name", [*PLANS, *PLAN_TEXTS])
def test_plan(name, sound, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.json"
    if name in PLANS:
        edited(sound / "plan.json", bad, PLANS[name])
    else:
        bad.write_bytes(PLAN_TEXTS[name])
    command = ["prune", sound / "base.gguf", "--plan", bad, "-o", "OUT/x.gguf"]
    said = refuses(name, command, tmp_path, monkeypatch, capsys)
    assert PLANS_SAY.get(name, "") in said


def _facts(**values):
    return lambda facts: facts["model"].update(values)


def _domain(**values):
    return lambda facts: facts["domains"][0].update(values)


STATS: dict[str, Callable[[dict], object]] = {
    "another version": lambda facts: facts.update(version=9),
    "another format": lambda facts: facts.update(format="x"),
    "no model": lambda facts: facts.pop("model"),
    "a model that is a list": lambda facts: facts.update(model=[]),
    "2^60 experts": _facts(n_expert=2**60),
    "experts as text": _facts(n_expert="6"),
    "experts as a fraction": _facts(n_expert=6.5),
    "other experts": _facts(n_expert=5),
    "a vocabulary as text": _facts(n_vocab="100"),
    "a vocabulary of -1": _facts(n_vocab=-1),
    "fewer blocks than layers": _facts(block_count=1),
    "groups that do not divide": _facts(n_group=4, n_group_used=1),
    "more groups used than there are": _facts(n_group=2, n_group_used=3),
    "no layers": _facts(moe_layers=[]),
    "a layer twice": _facts(moe_layers=[1, 1]),
    "a layer of 2^70": _facts(moe_layers=[0, 2**70]),
    "layers that are text": _facts(moe_layers=["0", "1"]),
    "a fact that there is not": _facts(unknown=1),
    "tensors that are a number": _facts(tensors=5),
    "a tensor of 2^70 weights": _facts(tensors=[{"name": "x", "ne": [2**70], "type": "F32"}]),
    "a tensor of no type": _facts(tensors=[{"name": "x", "ne": [1], "type": "X"}]),
    "norm_topk as text": _facts(norm_topk="yes"),
    "no texts": lambda facts: facts.update(domains=[]),
    "texts that are a number": lambda facts: facts.update(domains=1),
    "tokens as text": _domain(tokens="9" * 50),
    "-1 tokens": _domain(tokens=-1),
    "2^62 tokens": _domain(tokens=2**62),
    "other tokens": _domain(tokens=7),
    "a text without a name": lambda facts: facts["domains"][0].pop("name"),
    "a weight of nothing": _domain(weight=-1),
    "a window of -1": _domain(windows=[-1]),
    "tokens in a window as text": lambda facts: facts.update(n_ctx="x"),
    "no tokens in a window": lambda facts: facts.update(n_ctx=0),
    "tokens of the matrices as text": lambda facts: facts.update(linear_tokens="x"),
    "a model's name as a number": _facts(name=3),
    "query heads as text": _facts(n_gqa="2"),
    "endings of names as numbers": _facts(tied=[1]),
    "pruned as text": _facts(pruned="yes"),
    "a text's name as a number": _domain(name=3),
    "a limit of no documents": _domain(limit=0),
}
# What a refusal says where a later guard would refuse the stats too, but not with these words.
STATS_SAY = {
    "other experts": "'count' has shape (1, 2, 6), not (1, 2, 5)",
    "-1 tokens": "a domain's tokens: -1 is no whole number",
    "tokens as text": "a domain's tokens: 999",
    "a text without a name": "'name'",
    "fewer than no tokens": "fewer than 0 tokens of an expert",
    "a sum missing": "the stats lack 'proj'",
}


def _header(change: Callable[[dict], object]) -> Callable[[dict], None]:
    """A change of the JSON that stands in a safetensors header."""

    def apply(header: dict) -> None:
        facts = json.loads(header["__metadata__"]["gguftool"])
        change(facts)
        header["__metadata__"]["gguftool"] = json.dumps(facts)

    return apply


def _metadata(text: str) -> Callable[[dict], None]:
    return lambda header: header["__metadata__"].update(gguftool=text)


# Changes of any safetensors file's header; TENSOR is one of its tensors.
HEADERS: dict[str, Callable[[dict, str], object]] = {
    "no word of gguftool": lambda header, _: header.pop("__metadata__"),
    "facts that are no JSON": lambda header, _: _metadata("{")(header),
    "facts that are a list": lambda header, _: _metadata("[]")(header),
    "facts nested 100000 deep": lambda header, _: _metadata(DEEP)(header),
    "facts with NaN": lambda header, _: _metadata('{"format": NaN}')(header),
    "an offset beyond the file": lambda header, name: header[name].update(data_offsets=[0, 2**40]),
    "an offset of 2^64": lambda header, name: header[name].update(data_offsets=[0, 2**64]),
    "an offset of -8": lambda header, name: header[name].update(data_offsets=[-8, 0]),
    "offsets in falling order": lambda header, name: header[name].update(data_offsets=[8, 0]),
    "a shape of 2^40": lambda header, name: header[name].update(shape=[2**40]),
    "a shape of -1 and -1": lambda header, name: header[name].update(shape=[-1, -1]),
    "a shape whose product overflows": lambda header, name: header[name].update(shape=[2**33, 2**33]),
    "a type that there is not": lambda header, name: header[name].update(dtype="F13"),
    "another type of the same size": lambda header, name: header[name].update(
        dtype="I64" if header[name]["dtype"] == "F64" else "I32"
    ),
    "a tensor missing": lambda header, name: header.pop(name),
    "a type of another size": lambda header, name: header[name].update(
        dtype="F16" if header[name]["dtype"] == "F32" else "F32"
    ),
    "a shape of fractions": lambda header, name: header[name].update(shape=[float(n) for n in header[name]["shape"]]),
    "offsets of fractions": lambda header, name: header[name].update(
        data_offsets=[float(n) for n in header[name]["data_offsets"]]
    ),
    "offsets before the data": lambda header, name: header[name].update(
        data_offsets=[n - header[name]["data_offsets"][1] for n in header[name]["data_offsets"]]
    ),
    "two tensors at one place": lambda header, name: header.update(twin=header[name]),
}
RAW = {
    "empty": (b"", None),
    "a length of 2^63": (b"{}", 2**63),
    "a length of 2^64 - 1": (b"{}", 2**64 - 1),
    "a length beyond the file": (b"{}", 1000),
    "a length of 2^40": (b"{}", 2**40),
    "a length of 0": (b"", 0),
    "a header that is a list": (b"[]", None),
    "a header that is no JSON": (b"{{{{", None),
    "a header nested 100000 deep": (DEEP.encode(), None),
    "a header not in UTF-8": (b"\xff\xff", None),
}


def _experts(name: str, *values: float) -> Callable[[CalibrationStats], CalibrationStats]:
    """The first sums of layer 0 replaced, the rest of the layer's total put on its last expert."""

    def apply(stats: CalibrationStats) -> CalibrationStats:
        row = stats.experts[name][0, 0]
        row[-1] += row[: len(values)].sum() - sum(values)
        row[: len(values)] = values
        return stats

    return apply


def _seven_used(stats: CalibrationStats) -> CalibrationStats:
    stats.experts["count"][:, :, 0] += 5 * stats.tokens  # as many as seven would be
    return replace(stats, model=replace(stats.model, n_expert_used=7))


# Stats that are saved as they are; nobody looks at them before they are loaded.
SAVED: dict[str, Callable[[CalibrationStats], CalibrationStats]] = {
    "NaN": _experts("gate", np.nan),
    "-Inf": _experts("gate", -np.inf),
    "fewer than no tokens": _experts("count", -1.0),
    "7 of 6 used": _seven_used,
    "inputs of another width": lambda stats: replace(stats, expert_inputs=stats.expert_inputs[..., :-1]),
    "a sum missing": lambda stats: replace(stats, neurons={k: v for k, v in stats.neurons.items() if k != "proj"}),
    "residuals of three layers": lambda stats: replace(stats, residual_inverse=np.ones(3)),
    "residuals of 0": lambda stats: replace(stats, residual_inverse=np.zeros(2)),
}


@pytest.mark.parametrize("name", [*STATS, *HEADERS, *RAW, *SAVED])
def test_stats(name, sound, tmp_path, monkeypatch, capsys):
    good, bad = sound / "stats.safetensors", tmp_path / "bad.safetensors"
    if name in STATS:
        reheader(good, bad, _header(STATS[name]))
    elif name in HEADERS:
        reheader(good, bad, lambda header: HEADERS[name](header, "expert_inputs"))
    elif name in RAW:
        safetensors(bad, RAW[name][0], length=RAW[name][1])
    else:
        SAVED[name](CalibrationStats.load(good)).save(bad)
    for command in (
        ["plan", bad, "--ratio", "0.5", "-o", "OUT/x"],
        ["stats", "show", bad],
        ["stats", "merge", bad, bad, "-o", "OUT/x"],
    ):
        assert STATS_SAY.get(name, "") in refuses(name, command, tmp_path, monkeypatch, capsys)


WEIGHTS: dict[str, Callable[[dict], object]] = {
    "another version": lambda facts: facts.update(version=1),
    "of another plan": lambda facts: facts.update(kept_hash="0" * 64),
    "made by a number": lambda facts: facts.update(made_by=3),
    "notes that are a number": lambda facts: facts.update(notes=3),
    "texts that are numbers": lambda facts: facts.update(dataset=[3]),
}
NAMES = ["0.1.side", "0.1", "x.1.down", "-1.1.down", "7.1.down", "0.99.down", "0.1.up", "٣.1.down"]


@pytest.mark.parametrize("name", [*WEIGHTS, *HEADERS, *RAW, *NAMES, "NaN", "another shape"])
def test_weights(name, sound, tmp_path, monkeypatch, capsys):
    if name == "a tensor missing":
        pytest.skip("weights may hold any part of the matrices")
    good, bad = sound / "weights.safetensors", tmp_path / "bad.safetensors"
    if name in WEIGHTS:
        reheader(good, bad, _header(WEIGHTS[name]))
    elif name in HEADERS:
        reheader(good, bad, lambda header: HEADERS[name](header, "0.1.down"))
    elif name in RAW:
        safetensors(bad, RAW[name][0], length=RAW[name][1])
    elif name == "NaN":
        reheader(good, bad, lambda _: None, lambda data: b"\xff" * 4 + data[4:])
    elif name == "another shape":
        reheader(good, bad, lambda header: header["0.1.down"].update(shape=[16, 32]))
    else:
        reheader(good, bad, lambda header: header.update({name: header.pop("0.1.down")}))
    command = ["prune", sound / "base.gguf", "--plan", sound / "plan.json", "--weights", bad, "-o", "OUT/x.gguf"]
    said = refuses(name, command, tmp_path, monkeypatch, capsys)
    assert "is no gate, up or down of an expert" in said or name not in ("0.1.side", "-1.1.down")


def _cost(**values):
    return lambda raw: raw["layers"][1].update(values)


LAYERS: dict[str, Callable[[dict], object]] = {
    "another version": _more(version=9),
    "another format": _more(format="x"),
    "of another model": _more(model_fingerprint="0" * 64),
    "no costs": _more(layers=[]),
    "costs that are a number": _more(layers=4),
    "costs that are text": _more(layers="ab"),
    "a cost of another layer": _cost(layer=9),
    "a layer twice": _cost(layer=0),
    "a layer as text": _cost(layer="1"),
    "a cost below 0": _cost(kld=-1.0),
    "a cost as text": _cost(kld="x"),
    "a cost of 10^400": _cost(lost=10**400),
    "a condition too many": _more(unknown=1),
    "a condition too few": lambda raw: raw.pop("criterion"),
    "a criterion that is a list": _more(criterion=["x"]),
    "model layers that are a number": _more(moe_layers=1),
    "a ratio as a list": _more(ratio=[1]),
}
LAYERS_SAY = {"a cost below 0": "are not costs of 0 or more", "a cost of 1e400": "are not costs of 0 or more"}


@pytest.mark.parametrize("name", [*LAYERS, *PLAN_TEXTS, "NaN costs", "a cost of 1e400"])
def test_layers(name, sound, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.json"
    if name in PLAN_TEXTS:
        bad.write_bytes(PLAN_TEXTS[name])
    elif name == "a cost of 1e400":  # which JSON has, and which is read as infinite
        bad.write_text((sound / "layers.json").read_text().replace('"kld": 0.2', '"kld": 1e400'))
    else:
        edited(sound / "layers.json", bad, LAYERS.get(name, _cost(kld=float("nan"))))
    said = refuses(
        name,
        ["plan", sound / "stats.safetensors", "--ratio", "0.5", "--layers", bad, "-o", "OUT/x"],
        tmp_path,
        monkeypatch,
        capsys,
    )
    assert LAYERS_SAY.get(name, "") in said


TEXTS: dict[str, tuple[str, bytes]] = {
    "an empty text": ("t.txt", b""),
    "blanks": ("t.txt", b" \n\n "),
    "binary": ("t.txt", b"abc\0def"),
    "not UTF-8": ("t.txt", b"abc\xff" * 9),
    "too short": ("t.txt", b"abc"),
    "a line that is no JSON": ("t.jsonl", b'{"text": "a"}\n{"text": \n'),
    "a line nested 100000 deep": ("t.jsonl", DEEP.encode()),
    "a line that is a list": ("t.jsonl", b"[1]"),
    "no field": ("t.jsonl", b'{"title": "a"}'),
    "a field with names that send codes": ("t.jsonl", b'{"\\u001b[2J\\n": "a"}'),
    "a text that is a number": ("t.jsonl", b'{"text": 5}'),
    "half a surrogate pair": ("t.jsonl", b'{"text": "\\ud800 and more"}'),
    "messages that are no list": ("t.jsonl", b'{"messages": 3}'),
    "messages without a role": ("t.jsonl", b'{"messages": [{"content": "a"}]}'),
    "an empty array": ("t.json", b"[]"),
    "half an array": ("t.json", b'[{"text": "a"}, '),
    "an array nested 100000 deep": ("t.json", DEEP.encode()),
    "half a packed text": ("t.txt.gz", gzip.compress(bytes(range(32, 127)) * 99)[:-20]),
    "a packed text with other bytes": ("t.txt.gz", b"\x1f\x8b\x08\x00" + bytes(range(64))),
    "no packed text": ("t.txt.gz", b"plain text"),
    "a packed text of 1000 times its size": ("t.txt.gz", gzip.compress(b"a" * (80 << 20))),
}
# What a refusal says where a later guard would refuse the text too, but not with these words.
TEXTS_SAY = {
    "an empty text": "the file is empty",
    "blanks": "the file is empty",
    "binary": "not text but binary",
    "a text that is a number": "is no string but int",
    "half a surrogate pair": "holds half of a surrogate pair",
    "messages that are no list": "is no list of messages",
    "an empty array": "the array is empty",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name, sound, tmp_path, monkeypatch, capsys):
    bad = tmp_path / TEXTS[name][0]
    bad.write_bytes(TEXTS[name][1])
    command = ["calibrate", sound / "model", "--data", bad, "--ctx", "16", "-o", "OUT/x"]
    assert TEXTS_SAY.get(name, "") in refuses(name, command, tmp_path, monkeypatch, capsys)


def _config(**values):
    return lambda folder: edited(folder / "config.json", folder / "config.json", lambda config: config.update(values))


def _bytes(name: str, raw: bytes):
    return lambda folder: (folder / name).write_bytes(raw)


def _index(**weight_map: object):
    def change(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def _shard(change: Callable[[dict, str], object]) -> Callable[[Path], object]:
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    return lambda folder: reheader(
        folder / "model.safetensors", folder / "model.safetensors", lambda header: change(header, name)
    )


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    **{
        f"config.json: {name}": _bytes("config.json", raw)
        for name, raw in PLAN_TEXTS.items()
        if "NaN" not in name and "twice" not in name
    },
    **{
        f"the shard: {name}": lambda folder, raw=raw: safetensors(folder / "model.safetensors", raw[0], length=raw[1])
        for name, raw in RAW.items()
    },
    **{
        f"the shard: {name}": _shard(change)
        for name, change in HEADERS.items()
        if "gguftool" not in name and "facts" not in name
    },
    "the shard: an expert at another's place": _shard(
        lambda header, name: header[name].update(header[name.replace("experts.0", "experts.1")])
    ),
    "an unknown family": _config(model_type="\x1b[31mx"),
    "2^40 layers": _config(num_hidden_layers=2**40),
    "1e300 layers": _config(num_hidden_layers=1e300),
    "layers as text": _config(num_hidden_layers="2"),
    "2^40 labels": _config(num_labels=2**40),
    "2^40 experts": _config(num_experts=2**40, num_local_experts=2**40),
    "-1 experts": _config(num_experts=-1, num_local_experts=-1),
    "experts as text": _config(num_experts="6", num_local_experts="6"),
    "no experts": _config(num_experts=0, num_local_experts=0),
    "experts that are a list": _config(num_experts=[6], num_local_experts=[6]),
    "other experts": _config(num_experts=5, num_local_experts=5),
    "more used than there are": _config(num_experts_per_tok=7),
    "no expert used": _config(num_experts_per_tok=0),
    "-1 experts used": _config(num_experts_per_tok=-1),
    "experts used as text": _config(num_experts_per_tok="2"),
    "no layers": _config(num_hidden_layers=0),
    "-1 layers": _config(num_hidden_layers=-1),
    "no attention heads": _config(num_attention_heads=0),
    "-1 attention heads": _config(num_attention_heads=-1),
    "2^40 attention heads": _config(num_attention_heads=2**40),
    "attention heads as text": _config(num_attention_heads="4"),
    "heads of no numbers": _config(head_dim=0),
    "no neurons": _config(moe_intermediate_size=0),
    "-1 neurons": _config(moe_intermediate_size=-1),
    "neurons as text": _config(moe_intermediate_size="32"),
    "a residual stream as text": _config(hidden_size="32"),
    "no tokens": _config(vocab_size=0),
    "tokens as text": _config(vocab_size="320"),
    "an activation that there is not": _config(hidden_act="x"),
    "an epsilon as text": _config(rms_norm_eps="x"),
    "2^40 neurons": _config(moe_intermediate_size=2**40),
    "another residual stream": _config(hidden_size=16),
    "0 for a residual stream": _config(hidden_size=0),
    "2^40 tokens": _config(vocab_size=2**40),
    "quantized already": _config(quantization_config={"quant_method": "gptq"}),
    "quantized somehow": _config(quantization_config=[1]),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "no shard": lambda folder: (folder / "model.safetensors").unlink(),
    "config.json is a folder": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "config.json is a link to itself": lambda folder: (
        (folder / "config.json").unlink(),
        (folder / "config.json").symlink_to("config.json"),
    ),
    "an index of no map": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
    "an index that is no JSON": lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
    "an index nested 100000 deep": lambda folder: (folder / "model.safetensors.index.json").write_text(DEEP),
    "an index of nothing": _index(),
    "an index that names itself": _index(a="model.safetensors.index.json"),
    "an index that names a file elsewhere": _index(a="../out/x.safetensors"),
    "an index that names an absolute path": _index(a="/etc/passwd"),
    "an index that names a folder": _index(a="."),
    "an index that names a number": _index(a=1),
    "an index that names a shard that is missing": _index(a="model-00001-of-00002.safetensors"),
    "an index that names a tensor that is missing": _index(a="model.safetensors"),
    "a shard that is a link to itself": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").symlink_to("model.safetensors"),
    ),
    "two shards that are links to each other": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").symlink_to("model-2.safetensors"),
        (folder / "model-2.safetensors").symlink_to("model.safetensors"),
    ),
    "the same shard twice": lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a tokenizer that is no JSON": _bytes("tokenizer.json", b"{"),
    "a tokenizer that is another thing": _bytes("tokenizer.json", b'{"model": {"type": "BPE", "vocab": 5}}'),
    "a tokenizer nested 100000 deep": _bytes("tokenizer.json", DEEP.encode()),
    "a tokenizer that is empty": _bytes("tokenizer.json", b""),
    "a tokenizer's settings that are a list": _bytes("tokenizer_config.json", b"[]"),
    "NaN in a weight": lambda folder: reheader(
        folder / "model.safetensors",
        folder / "model.safetensors",
        lambda _: None,
        lambda data: b"\xff\x7f" * (len(data) // 2),
    ),
}

# What a refusal says where a later guard would refuse the checkpoint too, but not with these words.
CHECKPOINTS_SAY = {
    "the shard: two tensors at one place": "overlap",
    "the shard: a type of another size": "bytes, which is not",
    "the shard: a shape of -1 and -1": "is no whole number",
    "the shard: offsets before the data": "is no whole number",
    "the shard: a length beyond the file": "truncated",
    "no experts": " = 0, not a count",
    "-1 experts": " = -1, not a count",
    "no expert used": "num_experts_per_tok = 0, not a count",
    "no neurons": "moe_intermediate_size = 0, not a count",
    "no tokens": "vocab_size = 0, not a count",
    "no layers": "num_hidden_layers = 0, not a count",
    "no shard": "no model*.safetensors",
    "an index of nothing": "no model*.safetensors",
    "a shard that is a link to itself": "damaged safetensors header",
    "two shards that are links to each other": "damaged safetensors header",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, sound, tmp_path, monkeypatch, capsys):
    shutil.copytree(sound / "model", tmp_path / "model")
    CHECKPOINTS[name](tmp_path / "model")
    command = [
        "calibrate",
        tmp_path / "model",
        "--data",
        sound / "text.txt",
        "--ctx",
        "16",
        "--windows",
        "1",
        "-o",
        "OUT/x",
    ]
    said = refuses(name, command, tmp_path, monkeypatch, capsys)
    assert CHECKPOINTS_SAY.get(name, "") in said


def test_truncated_at_every_byte(sound, tmp_path):
    """In-process, but through the same loaders; a GGUF at every byte of its header and at every 97th of its data."""
    loaders: dict[str, Callable[[Path], object]] = {
        "tiered.gguf": lambda path: check(inspect(GgufFile(path))),
        "plan.json": PrunePlan.load,
        "layers.json": Sensitivity.load,
        "stats.safetensors": CalibrationStats.load,
        "weights.safetensors": Overrides.load,
        "model/model.safetensors": lambda path: stored_tensors(path.parent),
    }
    for name, load in loaders.items():
        raw = (sound / name).read_bytes()
        head = GgufFile(sound / name).data_start if name.endswith(".gguf") else int.from_bytes(raw[:8], "little") + 8
        most = len(raw) if name.endswith(".json") else min(head, len(raw))
        bad = tmp_path / Path(name).name
        for size in (*range(0, most - name.endswith(".json"), 1 if most < 12_000 else 7), *range(most, len(raw), 997)):
            bad.write_bytes(raw[:size])
            tried.append(name)
            with pytest.raises(GgufToolError) as caught:
                load(bad)
            assert len(one_line(str(caught.value))) > 20
            refused.append(name)
        load(sound / name)


@pytest.mark.parametrize(
    "kind", ["missing", "a folder", "a link to itself", "a link to nothing", "a pipe", "unreadable"]
)
def test_paths(kind, sound, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad"
    if kind == "a folder":
        bad.mkdir()
    elif kind.startswith("a link"):
        bad.symlink_to("bad" if kind.endswith("itself") else "nowhere")
    elif kind == "a pipe":
        os.mkfifo(bad)
    elif kind == "unreadable":
        bad.write_bytes(b"GGUF" + bytes(100))
        bad.chmod(0)
        if os.access(bad, os.R_OK):
            monkeypatch.setattr("builtins.open", _refusing(open))
            monkeypatch.setattr("io.open", _refusing(open))
    stats, base = sound / "stats.safetensors", sound / "base.gguf"
    for command in (
        ["inspect", "--check", bad],
        ["expand", bad, "-o", "OUT/x"],
        ["prune", base, "--plan", bad, "-o", "OUT/x"],
        ["prune", base, "--plan", sound / "plan.json", "--weights", bad, "-o", "OUT/x"],
        ["stats", "show", bad],
        ["plan", bad, "--ratio", "0.5", "-o", "OUT/x"],
        ["plan", stats, "--ratio", "0.5", "--layers", bad, "-o", "OUT/x"],
    ):
        refuses(kind, command, tmp_path, monkeypatch, capsys)


def _refusing(true_open):
    def fake(file, *args, **kwargs):
        if str(file).endswith("bad"):
            raise PermissionError(13, "Permission denied", str(file))
        return true_open(file, *args, **kwargs)

    return fake


def test_a_device_is_no_text(sound, tmp_path, monkeypatch, capsys):
    command = ["calibrate", sound / "model", "--data", "/dev/zero", "--ctx", "16", "-o", "OUT/x"]
    assert "device" in refuses("/dev/zero", command, tmp_path, monkeypatch, capsys)


def test_the_code_of_a_checkpoint_is_not_run(sound, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(sound / "model", tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    _config(auto_map={"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]})(folder)
    edited(
        folder / "tokenizer_config.json", folder / "tokenizer_config.json",
        lambda raw: raw.update(tokenizer_class="C", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]}),
    )  # fmt: skip
    run(
        [
            "calibrate",
            str(folder),
            "--data",
            str(sound / "text.txt"),
            "--ctx",
            "16",
            "--windows",
            "1",
            "-o",
            str(tmp_path / "s"),
        ],
        monkeypatch,
    )
    assert not (tmp_path / "ran").exists() and "wish to run" not in capsys.readouterr().out


def test_names_with_blanks_and_letters_of_all_kinds_work(sound, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "Modelle (größe) 语言 [b]"
    shutil.copytree(sound, folder)
    out = folder / "aus gabe [/b].gguf"
    for command in (
        [
            "prune",
            folder / "base.gguf",
            "--plan",
            folder / "plan.json",
            "--weights",
            folder / "weights.safetensors",
            "-o",
            out,
        ],
        ["inspect", "--check", out],
        ["expand", out, "-o", folder / "é.gguf"],
        ["stats", "show", folder / "stats.safetensors"],
        [
            "plan",
            folder / "stats.safetensors",
            "--ratio",
            "0.5",
            "--layers",
            folder / "layers.json",
            "-o",
            folder / "ß.json",
        ],
        [
            "calibrate",
            folder / "model",
            "--data",
            folder / "text.txt",
            "--ctx",
            "16",
            "--windows",
            "1",
            "-o",
            folder / "ü.safetensors",
        ],
    ):
        assert run([str(part) for part in command], monkeypatch) == 0, capsys.readouterr().err


def test_a_link_to_a_file_is_followed_and_stays(sound, tmp_path, monkeypatch, capsys):
    (tmp_path / "link.gguf").symlink_to(sound / "tiered.gguf")
    assert run(["inspect", "--check", str(tmp_path / "link.gguf")], monkeypatch) == 0
    said = refuses("an output that is its input", ["expand", sound / "tiered.gguf", "-o", tmp_path / "link.gguf", "--force"],
                   tmp_path, monkeypatch, capsys)  # fmt: skip
    assert "is an input" in said and (tmp_path / "link.gguf").is_symlink()
