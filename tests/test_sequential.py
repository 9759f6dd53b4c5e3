"""Sequential refit: by hand on a toy layer, against brute force, and what it brings on the built-in model."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gguftool import builtin, sequential
from gguftool.checkpoint import open_checkpoint
from gguftool.corpus import load_domain
from gguftool.errors import GgufToolError
from gguftool.evaluate import compare_many
from gguftool.forward import LayerStream
from gguftool.overrides import Overrides
from gguftool.pipeline import build, what_to_know
from gguftool.plan import LayerPlan
from gguftool.planner import make_plan
from gguftool.prepare import Job, Prepared
from gguftool.recipe import Recipe
from gguftool.refit import refit
from gguftool.sequential import JOINT_RIDGE, LayerFit, Routes, refit_sequentially
from gguftool.stats import Domain
from gguftool.surgery import mask_model
from gguftool.workspace import Workspace
from gguftool.writer import prune
from models import tiny_checkpoint
from synthetic import make_plan as plan_of


class ToyExperts(nn.Module):
    """Two experts whose neurons are given: the up projection is the identity, the activation gives 1."""

    def __init__(self, down: torch.Tensor) -> None:
        super().__init__()
        width = down.shape[2]
        self.gate_up_proj = nn.Parameter(torch.cat([torch.zeros(width, width), torch.eye(width)]).repeat(2, 1, 1))
        self.down_proj = nn.Parameter(down)

    def act_fn(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def test_one_expert_takes_over_what_another_left_undone():
    """Every token goes to both experts with weight 1 and has x = (1, 0); expert 0 loses neuron 0, the only one that speaks.

    On their own, neither can do anything about it: expert 0 is silent and expert 1 is whole. Together, expert 1's neuron 0
    takes over R = 3 up to the ridge: C_SS = N, ridge = 0.5 x N / 2, so 3 / (1 + 0.25) = 2.4 is added to its column.
    """
    down = torch.tensor([[[3.0, 0.0]], [[5.0, 0.0]]])
    n = 40
    chosen = torch.tensor([[0, 1]]).repeat(n, 1)
    rest = torch.zeros(n, 1)
    routes = Routes(torch.tensor([[1.0, 0.0]]).repeat(n, 1), chosen, torch.ones(n, 2))
    plan = LayerPlan(0, (0, 1), (np.array([1]), np.array([0, 1])))
    fitted = LayerFit(ToyExperts(down), routes, rest, torch.ones(len(rest))).solve(plan)
    assert JOINT_RIDGE == 0.5
    assert fitted[0].tolist() == [[0.0]]
    assert fitted[1].tolist() == [[pytest.approx(5 + 3 / 1.25), 0.0]]
    assert rest.flatten().tolist() == [pytest.approx(3 - 2.4)] * n


def test_what_the_layers_before_did_wrong_is_made_good_too():
    """R starts at -2 for a layer that loses nothing: the column goes down by 2 / 1.25."""
    down = torch.tensor([[[3.0, 0.0]], [[5.0, 0.0]]])
    routes = Routes(torch.tensor([[1.0, 0.0]]).repeat(40, 1), torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1))
    rest = torch.full((40, 1), -2.0)
    plan = LayerPlan(0, (0, 1), (np.arange(2), np.arange(2)))
    fitted = LayerFit(ToyExperts(down), routes, rest, torch.ones(len(rest))).solve(plan)
    assert fitted[0].tolist() == [[pytest.approx(3 - 2 / 1.25), 0.0]]
    assert 1 not in fitted  # it saw no token
    few = LayerFit(
        ToyExperts(down), replace(routes, **_first(routes, 2)), torch.full((2, 1), -2.0), torch.ones(2)
    ).solve(plan)
    assert few[0].tolist() == [[pytest.approx(3 - 2 / 1.25 * 2 / 4), 0.0]]  # N / 2K of the way


def _first(routes: Routes, n: int) -> dict[str, torch.Tensor]:
    return {name: getattr(routes, name)[:n] for name in ("inputs", "chosen", "weights")}


def test_the_joint_step_is_ridge_regression_on_what_is_left(monkeypatch):
    """Random experts, in chunks of tokens: the first expert's step solved again from all tokens at once."""
    monkeypatch.setattr(sequential, "CHUNK", 7)
    rng = np.random.default_rng(0)
    x, down = rng.standard_normal((60, 6)), rng.standard_normal((2, 6, 6))
    chosen = np.stack([rng.permutation(2) for _ in range(60)])
    weights = rng.uniform(0.2, 1, (60, 2))
    start = rng.standard_normal((60, 6))
    kept = np.array([0, 2, 5])
    plan = LayerPlan(0, (0, 1), (kept, np.arange(6)))
    rest = torch.tensor(start, dtype=torch.float32)
    routes = Routes(
        *(torch.tensor(a, dtype=t) for a, t in ((x, torch.float32), (chosen, torch.int64), (weights, torch.float32)))
    )
    fitted = LayerFit(ToyExperts(torch.tensor(down, dtype=torch.float32)), routes, rest, torch.ones(len(rest))).solve(
        plan
    )
    h = [x * (weights * (chosen == e)).sum(axis=1, keepdims=True) for e in range(2)]
    gram = h[0].T @ h[0]
    ridge = sequential.RIDGE * np.diag(gram).mean()
    gone = [1, 3, 4]
    inner = gram[np.ix_(kept, kept)] + ridge * np.eye(3)
    alone = down[0][:, kept] + np.linalg.solve(inner, gram[np.ix_(kept, gone)] @ down[0][:, gone].T).T
    left = start + h[0] @ down[0].T - h[0][:, kept] @ alone.T
    ridge = JOINT_RIDGE * np.diag(gram).mean()
    step = np.linalg.solve(gram[np.ix_(kept, kept)] + ridge * np.eye(3), h[0][:, kept].T @ left).T
    assert np.allclose(fitted[0], alone + step, atol=1e-4)
    outputs = h[0][:, kept] @ fitted[0].T + h[1] @ fitted[1].T
    assert np.allclose(rest.numpy(), start + h[0] @ down[0].T + h[1] @ down[1].T - outputs, atol=1e-4)


@pytest.fixture(scope="module")
def case(checkpoint_dir, stats):
    checkpoint = open_checkpoint(checkpoint_dir)
    domains = [load_domain(builtin.texts()["calib_code"], checkpoint.tokenizer(), 512, 12)]
    return checkpoint, domains, make_plan(stats, Recipe("global", 0.5))


def test_it_beats_the_plain_refit_on_text_it_never_saw(case, base_gguf, eval_text, llama, tmp_path):
    checkpoint, domains, plan = case
    made = {"plain": refit(checkpoint, plan, domains, tmp_path / "a.work")}
    made["sequential"] = refit_sequentially(checkpoint, plan, domains, tmp_path / "b.work")
    paths = [tmp_path / "none.gguf", *(tmp_path / f"{name}.gguf" for name in made)]
    prune(base_gguf, plan, paths[0])
    for path, weights in zip(paths[1:], made.values(), strict=True):
        prune(base_gguf, plan, path, overrides=weights)
    found = compare_many(base_gguf, paths, eval_text.read_text(), llama=llama, max_windows=6)
    none, plain, sequentially = (one.as_dict()["kld"]["mean"] for one in found)
    assert sequentially < 0.97 * plain < 0.97 * none
    made["sequential"].save(tmp_path / "weights.safetensors")
    assert Overrides.load(tmp_path / "weights.safetensors").origin.notes == ("sequential refit",)
    assert not (tmp_path / "b.work").exists()


def test_stopped_between_layers_it_ends_the_same(case, tmp_path):
    checkpoint, domains, plan = case
    domains = [(replace(domain, tokens=2 * 512), windows[:2]) for domain, windows in domains]
    whole = refit_sequentially(checkpoint, plan, domains, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at(layer: int):
        def tell(done: int, _total: int, text: str) -> None:
            if done == layer and text.startswith("layer"):
                raise Stop

        return tell

    for layer in (1, 3):
        with pytest.raises(Stop):
            refit_sequentially(checkpoint, plan, domains, tmp_path / "parts", progress=stop_at(layer))
    # The original's stream may be lost while the other is not: both start anew.
    shutil.copytree(tmp_path / "parts", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "original")
    for folder in ("parts", "lost"):
        seen: list[int] = []
        again = refit_sequentially(
            checkpoint,
            plan,
            domains,
            tmp_path / folder,
            progress=lambda done, _total, text, seen=seen: seen.append(done),
        )
        assert (0 in seen) == (folder == "lost")
        assert again.keys() == whole.keys()
        for key in whole.keys():
            assert np.array_equal(again.get(*key), whole.get(*key))


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("qwen2_moe", {"mlp_only_layers": [0]}), ("qwen3_moe", {}), ("mixtral", {})]
)
def test_the_pruned_stream_is_that_of_the_masked_model(model_type, sizes, tmp_path):
    """A dense layer, shared experts, widths from 0 to all: what the last layer gives is what torch gives with the new
    columns put in."""
    path = tiny_checkpoint(tmp_path / "model", model_type, dtype="float32", **sizes)
    checkpoint = open_checkpoint(path)
    windows = np.random.default_rng(1).integers(1, 300, (12, 64))
    widths = [[0, 8, 32, 16, 8, 16], [32, 32, 8, 8, 0, 0], [8, 8, 8, 8, 8, 8]][-len(checkpoint.moe_layers) :]
    plan = plan_of(widths, 32, 2, arch=checkpoint.architecture.gguf_arch, layers=checkpoint.moe_layers)
    plan = replace(plan, model_fingerprint=checkpoint.fingerprint)
    domains = [(Domain("random", "0" * 64, windows.size), windows)]
    run = sequential._Streams(LayerStream(checkpoint), plan, domains, tmp_path / "w", torch.float32, None)
    run.run()
    ours = run.pruned.hidden()
    weights = refit_sequentially(checkpoint, plan, domains, tmp_path / "w")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    hidden = []
    model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        whole = _last_hidden(model, hidden, windows)
        mask_model(model, {layer.index: layer.retained for layer in plan.layers})
        for layer, expert, _ in weights.keys():
            kept = plan.layers[list(checkpoint.moe_layers).index(layer)].retained[expert]
            model.model.layers[layer].mlp.experts.down_proj[expert][:, kept] = torch.from_numpy(
                weights.get(layer, expert, "down")
            )
        theirs = _last_hidden(model, hidden, windows)
    assert torch.allclose(ours, theirs, atol=2e-3 * float(theirs.abs().max()))
    # The fit brings it nearer to the original than it was, and it is not the original.
    with torch.no_grad():
        for layer in plan.layers:
            down = model.model.layers[layer.index].mlp.experts.down_proj
            for expert, kept in enumerate(layer.retained):
                down[expert][:, kept] = torch.from_numpy(_old_down(checkpoint, layer.index)[expert][:, kept])
        unfitted = _last_hidden(model, hidden, windows)
    assert 0 < (ours - whole).square().sum() < 0.95 * (unfitted - whole).square().sum()


def _last_hidden(model, hidden, windows):
    hidden.clear()
    model(torch.from_numpy(windows))
    return hidden[0]


def _old_down(checkpoint, layer):
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    return model.model.layers[layer].mlp.experts.down_proj.detach().numpy()


def test_what_it_cannot_refit_is_refused(case, stats, tmp_path):
    checkpoint, domains, plan = case
    with pytest.raises(GgufToolError, match="drops experts from the router"):
        refit_sequentially(checkpoint, make_plan(stats, Recipe("reap", 0.25)), domains, tmp_path / "w")
    with pytest.raises(GgufToolError, match="nothing to refit"):
        refit_sequentially(checkpoint, make_plan(stats, Recipe("global", 0.0)), domains, tmp_path / "w")
    with pytest.raises(GgufToolError, match="not for the checkpoint"):
        refit_sequentially(checkpoint, replace(plan, model_fingerprint="0" * 64), domains, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_compress_refits_plainly_where_experts_left_the_router(case, stats, base_gguf, runtime, llama, tmp_path):
    checkpoint, domains, _ = case
    domains = [(replace(domain, tokens=512), windows[:1]) for domain, windows in domains]
    weak = stats.neurons["obs"].copy()
    weak[0, :3] *= 1e-9  # three experts lose every neuron
    source = Prepared(checkpoint, base_gguf, replace(stats, neurons={**stats.neurons, "obs": weak}), domains)
    job = Job(checkpoint.path, [], [], runtime, llama, lambda *_: None)
    work, recipe = Workspace(tmp_path / "out", lambda _: None), Recipe("auto", 0.4, cut_router=True)
    built = build(job, work, source, recipe)
    assert built.label == "auto 40 % + refit" and built.path.name.endswith("AUTO40R-BF16.gguf")
    note = (
        "refitted plainly: the plan drops experts from the router, and a sequential refit needs the original's routes"
    )
    assert note in what_to_know(source, built)
    with pytest.raises(GgufToolError, match="the plan drops experts from the router.*; refit it plainly"):
        build(job, work, source, recipe, refit="sequential")
