"""Every row of the table, from a checkpoint with the hub's names to the logits of a pruned file."""

from __future__ import annotations

import json
import re
import shutil
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import docfacts
from archs import N_FF, TINY, tiny_checkpoint
from gguftool import surgery
from gguftool.architectures import ARCHITECTURES, for_model_type
from gguftool.calibrate import calibrate
from gguftool.checkpoint import Checkpoint, open_checkpoint
from gguftool.cli import cli
from gguftool.convert import convert
from gguftool.corpus import load_domain
from gguftool.dern import dern
from gguftool.encoding import MixFacts
from gguftool.errors import GgufToolError
from gguftool.experts import canonical
from gguftool.fit_solve import Solver, targets_for
from gguftool.forward import LayerStream
from gguftool.gguf_file import GgufFile
from gguftool.gguf_model import open_gguf
from gguftool.inspection import check, inspect
from gguftool.inventory import gguf_tensors, model_facts
from gguftool.memory import needs_of
from gguftool.outline import Base
from gguftool.overrides import Overrides
from gguftool.pipeline import produce
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.prepare import Job, Prepared
from gguftool.quantize import QuantizeTool, imatrix_entries, mix_facts, quantize
from gguftool.recipe import Recipe
from gguftool.refit import refit
from gguftool.sequential import refit_sequentially
from gguftool.stats import CalibrationStats, Domain
from gguftool.workspace import Workspace
from gguftool.writer import prune
from llama_tools import run as llama
from models import sample_text
from synthetic import make_plan as plan_of
from test_oracles import BOUND, difference, logits
from tiny_archs import run_converter

F32_CACHE = ("-ctk", "f32", "-ctv", "f32", "-t", 2, "-fa", "off")
TOKENS = np.random.default_rng(5).integers(1, 300, 64)
WINDOWS = np.random.default_rng(6).integers(1, 300, (6, 48))
DOMAINS = [(Domain("tiny", "0" * 64, WINDOWS.size), WINDOWS)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny_checkpoint(folder / name, name) for name in TINY}


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory, runtime) -> dict[str, tuple[Path, Path, Path]]:
    """By llama.cpp's own converter: every checkpoint as F32 GGUF; one in BF16, and that with --outtype auto."""
    folder = tmp_path_factory.mktemp("written")
    out, jobs = {}, []
    for name in TINY:
        half = tiny_checkpoint(folder / name, name, torch.bfloat16)
        out[name] = (folder / f"{name}-f32.gguf", half, folder / f"{name}.gguf")
        jobs += [str(checkpoints[name]), str(out[name][0]), "f32", str(half), str(out[name][2]), "auto"]
    run_converter(jobs, runtime)
    return out


@pytest.fixture(scope="module")
def bases(written) -> dict[str, Path]:
    return {name: base for name, (base, _, _) in written.items()}


def test_every_row_has_a_tiny_model():
    assert {row.model_type for row in ARCHITECTURES} == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_names_are_those_of_the_hub_and_all_of_them_have_a_place(name, checkpoints):
    """The forward pass, layer by layer, is that of transformers."""
    checkpoint = open_checkpoint(checkpoints[name])
    assert set(TINY[name].stored) <= set(checkpoint.tensors)
    stream = LayerStream(checkpoint)
    for path in [*stream.outer_modules(), "lm_head"]:
        stream.loader.materialise(path)
    hidden = stream.embed(WINDOWS[:2])
    for layer in range(checkpoint.n_layers):
        hidden = stream.layer(stream.loader.materialise_layer(layer), layer, hidden)
        stream.loader.release_layer(layer)
    with torch.inference_mode():
        ours = stream.loader.model.lm_head(stream.finish(hidden)) / getattr(checkpoint.config, "logits_scaling", 1)
        theirs = loaded(checkpoint)(torch.from_numpy(WINDOWS[:2])).logits
    assert difference(ours.numpy(), theirs.numpy()) < 1e-4


def largest_layer(checkpoint: Checkpoint) -> int:
    """Weights of the largest decoder layer, as transformers has it in memory."""
    layers = LayerStream(checkpoint).loader.model.get_submodule(checkpoint.architecture.layers)
    return max(sum(value.numel() for value in layer.state_dict().values()) for layer in layers.children())


@pytest.mark.parametrize("name", TINY)
def test_a_layer_is_estimated_as_it_is_loaded(name, checkpoints):
    checkpoint = open_checkpoint(checkpoints[name])
    for kind in (torch.float32, torch.bfloat16):
        assert needs_of(checkpoint, 1, 16, kind, 0, 1).layer == kind.itemsize * largest_layer(checkpoint)


def test_a_layer_in_mxfp4_is_estimated_as_it_is_loaded(checkpoints, tmp_path):
    """By hand, its experts: six of 3 x 64 x 64 weights, whose blocks have half as many bytes."""
    checkpoint = open_checkpoint(in_mxfp4(checkpoints["gpt_oss"], tmp_path / "model"))
    needs = needs_of(checkpoint, 1, 16, torch.float32, 0, 1)
    assert needs.layer == 4 * largest_layer(checkpoint) > 4 * 6 * 3 * 64 * 64
    assert needs == needs_of(open_checkpoint(checkpoints["gpt_oss"]), 1, 16, torch.float32, 0, 1)


@pytest.mark.parametrize("name", TINY)
def test_the_inventory_is_what_the_converter_writes(name, written):
    """Names, shapes, types and order, layers of multi-token prediction included."""
    _, checkpoint, gguf = written[name]
    expected = [(spec.name, spec.ne, spec.type) for spec in gguf_tensors(open_checkpoint(checkpoint))]
    assert [(spec.name, spec.ne, spec.type) for spec in GgufFile(gguf).tensors] == expected


@pytest.mark.parametrize("name", TINY)
def test_the_facts_of_a_checkpoint_are_those_of_its_gguf(name, written):
    """What plans are made from: layers, heads, and what llama.cpp sizes by the experts' width."""
    _, directory, base = written[name]
    ours, theirs = model_facts(open_checkpoint(directory)), open_gguf(base).facts()
    other = {"name", "fingerprint", "model_type", "norm_topk", "tied"}
    known, found = ({k: v for k, v in vars(facts).items() if k not in other} for facts in (ours, theirs))
    assert known == found
    tied = [[t.name for t in facts.tensors if t.name.endswith(facts.tied)] for facts in (ours, theirs)]
    assert tied[0] == tied[1] and bool(tied[0]) == (name in SHARED)
    assert MixFacts.of_model(ours) == mix_facts(GgufFile(base))


@pytest.mark.parametrize("target", ["Q2_K", "IQ4_XS"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_linear_attention_gets_the_types_that_were_planned(name, target, written, runtime, tmp_path):
    """The first layer has none of the heads by which these types go, and the metadata says how many there are."""
    _, directory, base = written[name]
    tools = QuantizeTool(runtime.tool("llama-quantize"))
    for facts in (model_facts(open_checkpoint(directory)), open_gguf(base).facts()):
        assert facts.n_gqa == 4
        recipe = Recipe("enp", 0.5, target=target, align=32, imatrix=False)
        plan = make_plan(CalibrationStats.blank(facts), recipe)
        prune(base, plan, tmp_path / "pruned.gguf", force=True)
        made = quantize(tmp_path / "pruned.gguf", target, tmp_path / "out.gguf", tools=tools, force=True)
        types = {spec.name: spec.type for spec in GgufFile(made.path).tensors}
        assert types == {spec.name: spec.type for spec in plan.encoded}
        assert types["blk.0.attn_qkv.weight"] == {"Q2_K": "Q5_0", "IQ4_XS": "Q5_1"}[target]


@pytest.mark.parametrize("name", TINY)
def test_from_checkpoint_to_pruned_file(name, checkpoints, bases, runtime, tmp_path):
    """Calibrated, planned by neurons and by whole experts, pruned: the runtime's logits are those of masked torch."""
    checkpoint, base = open_checkpoint(checkpoints[name]), bases[name]
    stats = calibrate(checkpoint, DOMAINS, tmp_path / "work")
    assert (stats.expert("count").sum(axis=1) == WINDOWS.size * checkpoint.n_expert_used).all()
    tiers = make_plan(stats, Recipe("global", 0.4, align=8))
    assert not tiers.uniform and tiers.kept_share < 0.7
    drop = dropped(checkpoint)
    files = {"whole": base}
    for label, plan in (("tiers", tiers), ("drop", drop)):
        files[label] = tmp_path / f"{label}.gguf"
        prune(base, plan, files[label])
        assert check(inspect(GgufFile(files[label]))) == []
    found = dict(zip(files, logits(runtime, TOKENS, tmp_path, *files.values()), strict=True))
    model = loaded(checkpoint)
    assert difference(found["whole"], run(model)) < BOUND
    assert difference(found["tiers"], masked(checkpoint, tiers)) < BOUND
    assert difference(found["drop"], masked(checkpoint, drop)) < BOUND
    assert min(difference(found[label], found["whole"]) for label in ("tiers", "drop")) > 20 * BOUND


@pytest.mark.parametrize("name", TINY)
def test_the_plan_says_what_the_file_will_be(name, written, tmp_path):
    """Layout and every tensor, of a plan from the checkpoint alone; `fit` knows the bytes of what is written from it."""
    _, directory, base = written[name]
    checkpoint = open_checkpoint(directory)
    stats = CalibrationStats.blank(model_facts(checkpoint))
    source = Prepared(checkpoint, base, stats, ())
    work = Workspace(tmp_path / "work", lambda _: None)
    for method, ratio in (("enp", 0.5), ("gated-sum", 0.34), ("gated-sum", 0.0)):
        recipe = Recipe(method, ratio, target="Q8_0", align=32)
        plan = make_plan(stats, recipe)
        made = prune(base, plan, tmp_path / f"{method}{ratio}.gguf")
        file = GgufFile(tmp_path / f"{method}{ratio}.gguf")
        assert made.layout == plan.layout == str(file.value("gguftool.layout", "stock")) and made.notes == []
        assert made.layout == ("tiered" if (name, method) in TIED and ratio else "stock")
        choice = Solver(SimpleNamespace(), work, source, 1 << 40, 64, recipe).cut("Q8_0", ratio)
        assert [spec.name for spec in choice.outline.specs] == [spec.name for spec in file.tensors]


# Experts that go are still in a layer which predicts further tokens; narrower ones would make the shared expert narrower.
SHARED = ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")
TIED = {(name, "enp") for name in SHARED}
TIED |= {(name, how) for name in ("glm4_moe", "qwen3_next", "qwen3_5_moe") for how in ("enp", "gated-sum")}


def test_the_page_names_the_families_that_need_tiers():
    every, narrowed = (set(re.findall(r"`(\w+)`", row.split("|")[3])) for row in docfacts.KINDS["layouts"]("")[2:])
    assert every == {name for name, how in TIED if how == "gated-sum"}
    assert every | narrowed == {name for name, _ in TIED}
    said = CliRunner().invoke(cli, ["methods"]).output
    assert "stock: runs on any llama.cpp, where the family allows" in said


def loaded(checkpoint: Checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


@torch.no_grad()
def run(model, tokens=TOKENS[None]) -> np.ndarray:
    return model(torch.tensor(tokens)).logits.flatten(0, 1).float().numpy()


def dropped(checkpoint: Checkpoint) -> PrunePlan:
    """Whole experts gone from the router, as many from every group, and some of the rest narrowed."""
    gone = dict(zip(checkpoint.moe_layers, cycle(TINY[checkpoint.architecture.model_type].gone), strict=False))
    router = [[e for e in range(checkpoint.n_expert) if e not in gone[layer]] for layer in checkpoint.moe_layers]
    widths = [[(N_FF, 24, N_FF, 0)[e % 4] for e in kept] for kept in router]
    return plan_of(
        widths, N_FF, checkpoint.n_expert_used, arch=checkpoint.architecture.gguf_arch, layers=checkpoint.moe_layers,
        router=router, n_expert=checkpoint.n_expert,
    )  # fmt: skip


def masked(checkpoint: Checkpoint, plan: PrunePlan) -> np.ndarray:
    return run(mask(checkpoint, plan))


@torch.no_grad()
def mask(checkpoint: Checkpoint, plan: PrunePlan, weights: Overrides | None = None):
    """The torch model with everything masked that the plan prunes, and with refitted down columns."""
    model, retained = loaded(checkpoint), {}
    for layer in plan.layers:
        rows = dict(zip(layer.router, layer.retained, strict=True))
        retained[layer.index] = [rows.get(e, np.arange(0)) for e in range(plan.n_expert)]
        module = model.get_submodule(
            f"{checkpoint.architecture.layers}.{layer.index}.{checkpoint.architecture.experts}"
        )
        down = canonical(module).get_parameter("down_proj")
        for expert, neurons in rows.items() if weights is not None else ():
            if (columns := weights.get(layer.index, expert, "down")) is not None:
                down[expert][:, neurons] = torch.from_numpy(np.array(columns))
    surgery.mask_model(model, retained, {layer.index: layer.router for layer in plan.layers})
    return model


@pytest.mark.parametrize("name", TINY)
def test_the_imatrix_is_that_of_llama_imatrix(name, checkpoints, bases, runtime, tmp_path):
    """Every entry, and no fewer; llama-quantize takes it."""
    checkpoint, base = open_checkpoint(checkpoints[name]), bases[name]
    text = tmp_path / "text.txt"
    text.write_text(sample_text(400))
    domain = load_domain(text, checkpoint.tokenizer(), 64, 4)
    stats = calibrate(checkpoint, [domain], tmp_path / "work", obs=False)
    options = ["-m", base, "-f", text, "-o", tmp_path / "theirs.gguf", "--chunks", 4, "-c", 64]
    code, output = llama(runtime, "llama-imatrix", *options, *F32_CACHE)
    assert code == 0, output[-2000:]
    file = GgufFile(tmp_path / "theirs.gguf")
    theirs = {spec.name: file.raw(spec).view("<f4") for spec in file.tensors}
    ours = imatrix_entries(stats, (), GgufFile(base).tensors)
    names = {name.removesuffix(".in_sum2") for name in theirs if name.endswith(".in_sum2")}
    # Never quantized, and the absorbed key projection of latent attention, whose input is the query.
    unseen = {name for name in names if "ffn_gate_inp" in name or "attn_k_b" in name}
    assert set(ours) == names - unseen
    for entry, (sums, counts) in ours.items():
        # llama-imatrix keeps one count for the matrices of all heads.
        assert (counts == theirs[f"{entry}.counts"].ravel()).all(), entry
        want = theirs[f"{entry}.in_sum2"].reshape(sums.shape)
        if "attn_v_b" not in entry:  # we see what the attention takes the mean of
            assert np.linalg.norm(sums - want) < 1e-2 * np.linalg.norm(want), entry
    tools = QuantizeTool(runtime.tool("llama-quantize"))
    quantize(base, "IQ4_NL", tmp_path / "out.gguf", imatrix=stats, tools=tools)


@pytest.mark.parametrize("name", ("qwen3_next", "qwen3_5_moe"))
def test_a_checkpoint_without_its_predictors_is_converted_without_them(name, checkpoints, runtime, tmp_path):
    directory = shutil.copytree(checkpoints[name], tmp_path / "model")
    assert open_checkpoint(directory).n_predict == 1
    tensors = load_file(directory / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.startswith("mtp.")}
    assert len(kept) < len(tensors)
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    convert(directory, tmp_path / "out.gguf", runtime, pre_tokenizer="qwen2")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.n_predict == 0
    assert [(t.name, t.ne) for t in GgufFile(tmp_path / "out.gguf").tensors] == [
        (t.name, t.ne) for t in gguf_tensors(checkpoint)
    ]


@pytest.mark.parametrize("name", [row.model_type for row in ARCHITECTURES if not row.expert_bias])
def test_dropped_experts_are_recombined(name, checkpoints, bases, tmp_path):
    checkpoint = open_checkpoint(checkpoints[name])
    stats = calibrate(checkpoint, DOMAINS, tmp_path / "work", obs=False)
    plan = make_plan(stats, Recipe("dern", 0.34))
    made = dern(checkpoint, plan, tmp_path / "w.safetensors", threshold=0.0)
    assert sum(layer.found for layer in made.layers) > 0
    prune(bases[name], plan, tmp_path / "pruned.gguf", overrides=made.weights)
    assert check(inspect(GgufFile(tmp_path / "pruned.gguf"))) == []


@pytest.mark.parametrize("how", [refit, refit_sequentially])
@pytest.mark.parametrize("name", TINY)
def test_refits_bring_the_pruned_model_nearer(name, how, checkpoints, bases, tmp_path):
    """The masked model with the refitted columns, on the calibration text: nearer to the original than without."""
    checkpoint = open_checkpoint(checkpoints[name])
    plan = make_plan(calibrate(checkpoint, DOMAINS, tmp_path / "work"), Recipe("global", 0.3, align=8))
    weights = how(checkpoint, plan, DOMAINS, tmp_path / "refit")
    prune(bases[name], plan, tmp_path / "pruned.gguf", overrides=weights)
    want = run(loaded(checkpoint), WINDOWS)
    apart = [float(np.square(run(mask(checkpoint, plan, new), WINDOWS) - want).mean()) for new in (None, weights)]
    assert apart[1] < 0.95 * apart[0]


def test_experts_with_biases_are_not_recombined(checkpoints, tmp_path):
    checkpoint = open_checkpoint(checkpoints["gpt_oss"])
    plan = make_plan(calibrate(checkpoint, DOMAINS, tmp_path / "work", obs=False), Recipe("dern", 0.34))
    with pytest.raises(GgufToolError, match="gpt_oss: its experts have biases"):
        dern(checkpoint, plan, tmp_path / "w.safetensors")


def test_experts_in_mxfp4_are_read_as_llama_cpp_reads_them(checkpoints, runtime, tmp_path):
    """gpt-oss as it is on the hub: 4-bit blocks and scales, the rest in BF16; converted, calibrated and pruned."""
    directory, base = in_mxfp4(checkpoints["gpt_oss"], tmp_path / "model"), tmp_path / "base.gguf"
    run_converter([str(directory), str(base), "auto"], runtime)
    checkpoint, file = open_checkpoint(directory), GgufFile(base)
    written = [(spec.name, spec.ne, spec.type) for spec in file.tensors]
    assert [(spec.name, spec.ne, spec.type) for spec in gguf_tensors(checkpoint)] == written
    stacks = {spec.name: spec for spec in file.tensors if spec.type == "MXFP4"}
    assert len(stacks) == 9
    module = canonical(LayerStream(checkpoint).loader.materialise_layer(1).get_submodule("mlp.experts"))
    for role, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2)), ("down", slice(None))):
        values = dequantize(file.raw(stacks[f"blk.1.ffn_{role}_exps.weight"]), GGMLQuantizationType.MXFP4)
        ours = module.get_parameter("down_proj" if role == "down" else "gate_up_proj")[:, rows]
        assert np.array_equal(ours.float().numpy(), values)
        for expert in range(6):
            assert np.array_equal(checkpoint.expert(1, expert)[role].numpy(), values[expert])
    plan = make_plan(calibrate(checkpoint, DOMAINS, tmp_path / "work"), Recipe("global", 0.4))
    prune(base, plan, tmp_path / "pruned.gguf", ggml=runtime.library("ggml-base"))
    assert check(inspect(GgufFile(tmp_path / "pruned.gguf"))) == []
    whole, ours = logits(runtime, TOKENS, tmp_path, base, tmp_path / "pruned.gguf")
    assert np.isfinite(ours).all() and difference(ours, whole) > 0.05


def test_experts_in_mxfp4_are_quantized_again_and_the_run_says_so(checkpoints, runtime, llama, tmp_path):
    """gpt-oss's own checkpoint has no unquantized one behind it: every step, to another type and to its own."""
    text = tmp_path / "text.txt"
    text.write_text(sample_text(600))
    job = Job(
        in_mxfp4(checkpoints["gpt_oss"], tmp_path / "model"), [text], [text], runtime, llama, lambda *_: None, n_ctx=64,
        windows=4, eval_windows=2, pre_tokenizer="qwen2",
    )  # fmt: skip
    for target, twice in (("Q4_K_M", True), ("MXFP4_MOE", False)):
        made = produce(job, tmp_path / "out", Recipe("auto", 0.4, target=target), lambda _: None)
        assert any("MXFP4 experts, so these were quantized twice" in note for note in made.notes) == twice
        assert made.built.plan is not None and made.built.plan.layout == "tiered"
        for file, planned in ((made.built.path, made.built.plan.encoded), (made.rivals[0].path, None)):
            tensors = GgufFile(file).tensors
            assert ("MXFP4" in {spec.type for spec in tensors}) != twice
            assert planned is None or {(t.name, t.type) for t in tensors} == {(t.name, t.type) for t in planned}
    # To the type of all the rest: the name that goes with it is the final file's, and what was pruned is there too.
    plain = produce(job, tmp_path / "out", Recipe("auto", 0.4, target="BF16"), lambda _: None).built.path
    (pruned,) = (tmp_path / "out").glob("*40*-BF16-mixed.gguf")
    types = [{spec.type for spec in GgufFile(file).tensors} for file in (plain, pruned)]
    assert types == [{"BF16", "F32", "I32"}, {"BF16", "MXFP4", "F32", "I32"}]
    # `fit` tries the type that keeps the experts too, unless others were named, and none that takes more than the original.
    base = Base.open(made.source.base)
    for named, own in ((False, ["MXFP4_MOE"]), (True, [])):
        kept, notes = targets_for(made.source, ("BF16", "Q4_0"), base, named=named)
        assert kept == [*own, "Q4_0"] and notes[0].startswith("BF16: not tried")


def in_mxfp4(source: Path, out: Path) -> Path:
    """A copy of a gpt-oss checkpoint in which experts are random MXFP4 and all else is BF16."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    random = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(121, 125, blocks.shape[:3], generator=random, dtype=torch.uint8)
    tensors = {name: v.bfloat16() if v.is_floating_point() else v for name, v in tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_other_quantized_checkpoints_are_refused_with_what_to_take(method, checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(GgufToolError, match=rf"quantized already \({method}\).*copy in BF16"):
        open_checkpoint(directory)


def test_a_variant_whose_routing_llama_cpp_does_not_have_is_refused(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["deepseek_v2"], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | {"topk_method": "group_limited_greedy"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(GgufToolError, match="group_limited_greedy.*scores the groups"):
        open_checkpoint(directory)


def test_an_architecture_without_a_row_is_refused_with_how_to_add_one():
    with pytest.raises(GgufToolError, match=r"'dbrx'.*known are .*qwen3_moe.*lacks a row in gguftool/architectures.py"):
        for_model_type("dbrx")


def test_a_family_that_was_left_out_says_why():
    with pytest.raises(GgufToolError, match="phimoe is left out: llama.cpp computes another function"):
        for_model_type("phimoe")


def test_the_command_lists_every_row():
    done = CliRunner().invoke(cli, ["architectures", "--json"])
    listed = json.loads(done.stdout)["architectures"]
    assert [one["model_type"][0] for one in listed] == [row.model_type for row in ARCHITECTURES]
    assert all(one["reference"].count("/") == 1 for one in listed)
    assert "openai/gpt-oss-20b" in CliRunner().invoke(cli, ["architectures"], env={"COLUMNS": "300"}).stdout
