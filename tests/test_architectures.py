"""Every row of the table, from a checkpoint with the hub's names to the logits of a pruned file."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from archs import N_FF, TINY, tiny_checkpoint
from gguftool import surgery
from gguftool.architectures import ARCHITECTURES
from gguftool.calibrate import calibrate
from gguftool.checkpoint import Checkpoint, open_checkpoint
from gguftool.forward import LayerStream
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.inventory import gguf_tensors
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe import Recipe
from gguftool.stats import Domain
from gguftool.writer import prune
from synthetic import make_plan as plan_of
from test_oracles import BOUND, difference, logits
from tiny_archs import run_converter

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


@pytest.mark.parametrize("name", TINY)
def test_the_inventory_is_what_the_converter_writes(name, written):
    """Names, shapes, types and order, layers of multi-token prediction included."""
    _, checkpoint, gguf = written[name]
    expected = [(spec.name, spec.ne, spec.type) for spec in gguf_tensors(open_checkpoint(checkpoint))]
    assert [(spec.name, spec.ne, spec.type) for spec in GgufFile(gguf).tensors] == expected


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


def loaded(checkpoint: Checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


@torch.no_grad()
def run(model) -> np.ndarray:
    return model(torch.tensor(TOKENS[None])).logits[0].float().numpy()


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
    model, retained = loaded(checkpoint), {}
    for layer in plan.layers:
        rows = dict(zip(layer.router, layer.retained, strict=True))
        retained[layer.index] = [rows.get(e, np.arange(0)) for e in range(plan.n_expert)]
    surgery.mask_model(model, retained, {layer.index: layer.router for layer in plan.layers})
    return run(model)


@pytest.mark.parametrize("name", TINY)
def test_the_imatrix_is_taken_by_llama_quantize(name, checkpoints, bases, runtime, tmp_path):
    stats = calibrate(open_checkpoint(checkpoints[name]), DOMAINS, tmp_path / "work")
    tools = QuantizeTool(runtime.tool("llama-quantize"))
    quantize(bases[name], "IQ4_NL", tmp_path / "out.gguf", imatrix=stats, tools=tools)
    assert GgufFile(tmp_path / "out.gguf").path.stat().st_size < bases[name].stat().st_size / 2
