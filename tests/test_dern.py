"""DERN: its three steps by hand, what must come out on copies, and the file against torch."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gguf_models import floats
from gguftool.checkpoint import open_checkpoint
from gguftool.corpus import load_domain
from gguftool.dern import MATCHES, dern, find_homes, merge, segments
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.inventory import model_facts
from gguftool.methods import method
from gguftool.pipeline import build
from gguftool.plan import LayerPlan, PrunePlan, keep_all
from gguftool.planner import make_plan
from gguftool.prepare import Job, Prepared
from gguftool.recipe import Recipe
from gguftool.surgery import mask_model
from gguftool.workspace import Workspace
from gguftool.writer import prune
from models import tiny_checkpoint, tiny_model
from synthetic import make_stats
from test_cli import gguftool
from test_oracles import BOUND, difference, logits

ALL = slice(None)


def plan_of(n_expert: int, n_ff: int, top_k: int, importance, fingerprint: str = "f", **router) -> PrunePlan:
    """A plan of the method dern: `layer0=(0, 2)` keeps these experts of layer 0."""
    every = np.arange(n_ff, dtype=np.int64)
    layers = tuple(
        LayerPlan(int(name.removeprefix("layer")), kept, (every,) * len(kept), tuple(importance))
        for name, kept in router.items()
    )
    recipe = Recipe("dern", 0.5)
    return PrunePlan(recipe, "by hand", "stub", fingerprint, "qwen3moe", None, (), n_expert, top_k, n_ff, layers)


# Two experts of two neurons in a model of width 1: a segment is (gate, up, down).
A = torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
B = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])


def stub(*experts: torch.Tensor) -> SimpleNamespace:
    """A checkpoint of one layer with these experts' segments, the model's width 1."""

    def expert(_layer: int, index: int) -> dict[str, torch.Tensor]:
        own = experts[index]
        return {"gate": own[:, :1], "up": own[:, 1:2], "down": own[:, 2:].T}

    row = SimpleNamespace(expert_bias=False)
    return SimpleNamespace(fingerprint="f", name="stub", n_embd=1, expert=expert, architecture=row)


def test_the_method_keeps_the_experts_of_largest_mean_weight():
    stats = make_stats(n_layer=1, n_expert=4, tokens=100)
    stats.experts["gate"][:] = [[[10.0, 40.0, 20.0, 30.0]]]
    stats = replace(stats, model=replace(stats.model, norm_topk=True))
    plan = make_plan(stats, Recipe("dern", 0.5, guard=False))
    assert plan.layers[0].router == (1, 3) and plan.layers[0].importance == (0.1, 0.4, 0.2, 0.3)
    assert method("dern").stock and plan.uniform and not any("add up to 1" in note for note in plan.notes)
    for norm, text in ((False, "does not make"), (None, "may not make")):
        other = replace(stats, model=replace(stats.model, norm_topk=norm))
        assert any(f"the model {text} a token's weights add up to 1" in n for n in make_plan(other, plan.recipe).notes)
    stats.experts["count"][:] = [[[50.0, 40.0, 60.0, 50.0]]]
    by = make_plan(stats, Recipe("dern", 0.5, guard=False, criterion="frequency"))
    assert by.layers[0].router in ((0, 2), (2, 3)) and by.layers[0].importance == plan.layers[0].importance
    assert by.formula.startswith("kept by frequency")


def test_importance_survives_the_disk_and_is_checked(tmp_path):
    plan = plan_of(2, 2, 1, (2 / 3, 1 / 3), layer0=(0,))
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json").layers[0].importance == (2 / 3, 1 / 3)
    text = (tmp_path / "plan.json").read_text()
    for wrong in ("[1.0]", "[1.0, -1.0]", "[1.0, Infinity]"):
        (tmp_path / "bad.json").write_text(text.replace(json.dumps([2 / 3, 1 / 3]), wrong))
        with pytest.raises(GgufToolError, match="layer 0: the importance is not 2|Infinity is no number"):
            PrunePlan.load(tmp_path / "bad.json")


def test_a_segment_goes_to_its_nearest_or_is_lost():
    """b0 has cosine 0.6 to a0 and 0.8 to a1; b1 is at right angles to both."""
    (((source, rows),),) = find_homes([A, B].__getitem__, [1], [0], ALL, 0.5).values()
    assert source == 1 and rows.tolist() == [0]
    assert find_homes([A, B].__getitem__, [1], [0], ALL, 0.81) == {}
    assert find_homes([A, B].__getitem__, [1], [0], ALL, 0.79)[0][0][1].tolist() == [0]


def test_the_nearest_of_several_experts_and_the_first_of_equals():
    c = torch.tensor([[3.0, 4.0, 1.0], [0.0, 0.0, 1.0]])
    homes = find_homes([A, B, c].__getitem__, [1], [0, 2], ALL, 0.5)
    assert {expert: [(s, r.tolist()) for s, r in came] for expert, came in homes.items()} == {2: [(1, [0, 1])]}
    homes = find_homes([B, B, B].__getitem__, [1], [0, 2], ALL, 0.5)
    assert list(homes) == [0] and homes[0][0][1].tolist() == [0, 1]


def test_cosines_without_the_gate():
    """(up, down) of b is that of a, whatever their gates are."""
    a, b = torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[-1.0, 2.0, 1.0]])
    assert find_homes([a, b].__getitem__, [1], [0], slice(1, 3), 0.99)[0][0][1].tolist() == [0]
    assert find_homes([a, b].__getitem__, [1], [0], ALL, 0.7) == {}


def test_the_merge_by_hand(tmp_path):
    """Centres start at a0 and b0, the largest gates; a1 joins b0 (0.8 against 0), with twice its importance:

    u = 2 (0, 1, 0) + 1 (0.6, 0.8, 0) = (0.6, 2.8, 0), |u|^2 = 8.2, norm (2 x 3 + 1 x 5) / 3 = 11 / 3.
    """
    plan = plan_of(2, 2, 1, (2 / 3, 1 / 3), layer0=(0,))
    made = dern(stub(A, B), plan, tmp_path / "w.safetensors", threshold=0.5)
    want = 11 / 3 / sqrt(8.2) * np.array([0.6, 2.8, 0.0])
    gate, up, down = (made.weights.get(0, 0, role) for role in ("gate", "up", "down"))
    assert np.allclose(gate, [[4.0], [want[0]]], atol=1e-6) and gate[0, 0] == 4.0
    assert np.allclose(up, [[0.0], [want[1]]], atol=1e-6)
    assert np.allclose(down, [[0.0, want[2]]], atol=1e-6) and down.shape == (1, 2)
    assert vars(made.layers[0]) == {"layer": 0, "dropped": 2, "found": 1, "experts": 1}
    assert made.weights.origin.notes == (
        "1 of 2 neurons of dropped experts found a home above cosine 0.5, by layer 0: 1",
    )
    assert made.weights.origin.made_by == "dern" and len(made.weights) == 3
    nothing = dern(stub(A, B), plan, tmp_path / "none.safetensors", threshold=0.9)
    assert len(nothing.weights) == 0 and nothing.layers[0].found == 0
    assert not list(tmp_path.glob("*.partial"))


def test_the_weight_is_the_importance_and_not_the_norm():
    a, b = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 10.0, 0.0]])
    merged = merge(torch.cat([a, b]), torch.tensor([1.0, 1.0]), 1, ALL)
    assert torch.allclose(merged, torch.tensor([[5.5, 5.5, 0.0]]) / sqrt(2))
    # An expert that was never chosen counts for nothing beside one that was; two such count the same.
    assert torch.allclose(merge(torch.cat([a, b]), torch.tensor([1.0, 0.0]), 1, ALL), a)
    assert torch.allclose(merge(torch.cat([a, b]), torch.tensor([0.0, 0.0]), 1, ALL), merged)


@pytest.mark.parametrize("match", MATCHES)
def test_a_copy_changes_nothing(match, tmp_path):
    """A dropped expert that is a kept one with its neurons in another order: every neuron keeps its place and weights.

    The largest gates come in pairs, so that half of the first centres are copies of the others.
    """
    rng = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 16, 3 * 4, generator=rng)
    experts = [own, other, own[torch.randperm(16, generator=rng)]]
    columns = ALL if match == "gate-up-down" else slice(4, 12)
    homes = find_homes(experts.__getitem__, [2], [0, 1], columns, 0.5)
    assert list(homes) == [0] and homes[0][0][1].tolist() == list(range(16))
    for weights in ((0.9, 0.1), (0.1, 0.9), (0.0, 0.0)):
        both = torch.tensor(weights).repeat_interleave(16)
        assert torch.allclose(merge(torch.cat([own, experts[2]]), both, 16, columns), own, atol=1e-6)


def test_own_segments_that_are_equal_all_keep_their_place():
    """Merging two equal neurons of one expert would halve what they add: while there is room they stay two."""
    own = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    came = torch.tensor([[0.0, 1.0, 0.0]])
    merged = merge(torch.cat([own, came]), torch.ones(5), 4, ALL)
    assert torch.allclose(merged, own)


def test_every_cluster_has_a_segment_and_none_is_lost():
    rng = torch.Generator().manual_seed(3)
    for _ in range(20):
        own = torch.randint(-1, 2, (8, 6), generator=rng).float()
        came = torch.randint(-1, 2, (11, 6), generator=rng).float()
        points, weights = torch.cat([own, came]), torch.rand(19, generator=rng)
        merged = merge(points, weights, 8, ALL)
        assert merged.shape == own.shape and torch.isfinite(merged).all()
        assert torch.equal(merged, merge(points, weights, 8, ALL))


def test_one_cluster_is_the_plain_formula():
    rng = torch.Generator().manual_seed(5)
    points, weights = torch.randn(7, 9, generator=rng), torch.rand(7, generator=rng)
    norms = points.norm(dim=1)
    u = (weights[:, None] * points / norms[:, None]).sum(0)
    want = u / u.norm() * (weights * norms).sum() / weights.sum()
    assert torch.allclose(merge(points, weights, 1, ALL)[0], want, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return [open_checkpoint(tiny_checkpoint(folder / str(stacked), stacked=stacked)) for stacked in (False, True)]


def test_stacked_and_single_experts_are_the_same(tiny, tmp_path):
    model = tiny_model("qwen3_moe", vocab_size=tiny[0].n_vocab).to(torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    found = []
    for number, checkpoint in enumerate(tiny):
        own = segments(checkpoint, 1, 4)
        assert torch.equal(
            own[:, :64], experts.gate_up_proj[4].float().reshape(2, 32, 32).transpose(0, 1).reshape(32, 64)
        )
        assert torch.equal(own[:, 64:], experts.down_proj[4].float().T)
        plan = plan_of(6, 32, 2, range(1, 7), checkpoint.fingerprint, layer0=(0, 1, 3), layer2=(1, 2, 3, 4, 5))
        found.append(dern(checkpoint, plan, tmp_path / f"{number}.safetensors", threshold=0.2))
    one, two = found
    assert list(one.weights.keys()) == list(two.weights.keys()) and one.layers == two.layers
    assert all(np.array_equal(one.weights.get(*key), two.weights.get(*key)) for key in one.weights.keys())
    assert [(m.layer, m.dropped) for m in one.layers] == [(0, 96), (2, 32)] and all(m.found > 0 for m in one.layers)


def test_what_cannot_be_recombined_is_refused_and_leaves_nothing(tiny, tmp_path):
    checkpoint, out = tiny[0], tmp_path / "w.safetensors"
    good = plan_of(6, 32, 2, range(6), checkpoint.fingerprint, layer0=(0, 1, 3))
    own = good.layers[0]
    narrow = replace(own, retained=(np.arange(8), *own.retained[1:]))
    for plan, options, message in (
        (replace(good, model_fingerprint="another"), {}, "not for the checkpoint"),
        (replace(good, layers=(replace(own, importance=()),)), {}, "plan with --method dern"),
        (replace(good, layers=(narrow,)), {}, "expert 0 is narrowed"),
        (replace(good, layers=keep_all([0], 6, 32)), {}, "drops no expert"),
        (good, {"threshold": 1.0}, "--threshold 1.0"),
        (good, {"threshold": float("nan")}, "--threshold nan"),
        (good, {"match": "down"}, "--match 'down' is not one of"),
    ):
        with pytest.raises(GgufToolError, match=message):
            dern(checkpoint, plan, out, **options)
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def recombined(stats, checkpoint_dir, tmp_path_factory):
    """The built-in model without a quarter of its experts; the threshold is low, so that much finds a home."""
    plan = make_plan(stats, Recipe("dern", 0.25))
    out = tmp_path_factory.mktemp("dern") / "w.safetensors"
    return plan, dern(open_checkpoint(checkpoint_dir), plan, out, threshold=0.15)


@torch.no_grad()
def torch_logits(checkpoint_dir, plan: PrunePlan, weights, tokens) -> np.ndarray:
    """Logits of the torch model with the plan's experts gone and the new weights put in."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    every = np.arange(plan.n_ff_exp)
    mask_model(
        model,
        {layer.index: [every] * plan.n_expert for layer in plan.layers},
        {layer.index: layer.router for layer in plan.layers},
    )
    for layer, expert, role in weights.keys():
        row = next(p for p in plan.layers if p.index == layer).router.index(expert)
        experts = model.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj[row].chunk(2)
        {"gate": gate, "up": up, "down": experts.down_proj[row]}[role].copy_(
            torch.from_numpy(weights.get(layer, expert, role))
        )
    return model(torch.tensor(tokens[None])).logits[0].numpy()


def test_the_file_is_the_torch_model_with_the_new_weights(
    recombined, checkpoint_dir, base_f32, eval_text, runtime, plain_runtime, tmp_path
):
    plan, made = recombined
    assert sum(m.found for m in made.layers) > 20
    tokens = load_domain(eval_text, open_checkpoint(checkpoint_dir).tokenizer(), 256, 1)[1][0]
    prune(base_f32, plan, tmp_path / "plain.gguf")
    report = prune(base_f32, plan, tmp_path / "dern.gguf", overrides=made.weights)
    new, old = GgufFile(tmp_path / "dern.gguf"), GgufFile(tmp_path / "plain.gguf")
    assert report.layout == "stock" and new.value("gguftool.weights") == "dern" and check(inspect(new)) == []
    for layer in plan.layers:
        for role in ("gate", "up", "down"):
            name = f"blk.{layer.index}.ffn_{role}_exps.weight"
            stack, before = floats(new, name), floats(old, name)
            for row, expert in enumerate(layer.router):
                want = made.weights.get(layer.index, expert, role)
                assert np.array_equal(stack[row], before[row] if want is None else want)
    want = torch_logits(checkpoint_dir, plan, made.weights, tokens)
    for engine in (runtime, plain_runtime):
        (have,) = logits(engine, tokens, tmp_path, tmp_path / "dern.gguf")
        assert difference(have, want) < BOUND
    assert difference(logits(runtime, tokens, tmp_path, tmp_path / "plain.gguf")[0], want) > BOUND


def test_compress_makes_the_weights_of_a_dern_recipe(stats, checkpoint_dir, base_gguf, runtime, llama, tmp_path):
    said: list[str] = []
    work = Workspace(tmp_path, said.append)
    job = Job(checkpoint_dir, [], [], runtime, llama, lambda done, total, text: None)
    source = Prepared(open_checkpoint(checkpoint_dir), base_gguf, stats, [])
    built = build(job, work, source, Recipe("dern", 0.25))
    assert built.label == "dern 25 %" and "DERN25" in built.path.name and "found a home" in built.notes[0]
    (weights,) = tmp_path.glob("*.safetensors")
    assert weights.name == f"{stats.model.name}-DERN25.dern.safetensors"
    assert build(job, work, source, Recipe("dern", 0.25)).path == built.path
    assert f"{weights.name}: already there" in said and f"{built.path.name}: already there" in said
    assert build(job, work, source, Recipe("dern", 0.0)).notes == ()
    with pytest.raises(GgufToolError, match="dern makes new weights of its own"):
        build(job, work, source, Recipe("dern", 0.25), refit="plain")


def test_the_command(stats, checkpoint_dir, base_gguf, tmp_path):
    plan, out = make_plan(stats, Recipe("dern", 0.25)), tmp_path / "w.safetensors"
    plan.save(tmp_path / "plan.json")
    command = ["dern", checkpoint_dir, "--plan", tmp_path / "plan.json", "-o", out, "--threshold", 0.15]
    found = json.loads(gguftool(*command, "--json"))
    assert found["threshold"] == 0.15 and {"layer", "dropped", "found", "experts"} == found["layers"][0].keys()
    assert "neurons of dropped experts found a home" in gguftool(*command, "--match", "up-down", "--force")
    assert "--force" in gguftool(*command, code=1)
    gguftool("prune", base_gguf, "--plan", tmp_path / "plan.json", "--weights", out, "-o", tmp_path / "x.gguf")
    assert "weights by dern" in gguftool("inspect", tmp_path / "x.gguf", "--check")
    assert model_facts(open_checkpoint(checkpoint_dir)).norm_topk is True
