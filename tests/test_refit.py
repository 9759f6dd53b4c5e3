import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gguf_models import floats
from gguftool import builtin
from gguftool.checkpoint import open_checkpoint
from gguftool.corpus import load_domain
from gguftool.errors import GgufToolError
from gguftool.evaluate import compare_many
from gguftool.gguf_file import GgufFile
from gguftool.inspection import inspect
from gguftool.layout import tier_name
from gguftool.overrides import Overrides
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.refit import RIDGE, narrowed_experts, refit, solve
from gguftool.writer import prune


def test_a_neuron_that_is_a_copy_is_taken_over():
    """h_1 = 2 h_0 always: dropping neuron 1 adds twice its column to that of neuron 0, up to the ridge."""
    down = torch.tensor([[1.0, 3.0, 0.0], [0.0, 1.0, 5.0]])
    gram = 100 * torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    ridge = RIDGE * gram.diagonal().mean().item()
    fitted = solve(down, gram, np.array([0, 2]), tokens=1000)
    share = 200 / (100 + ridge)
    assert torch.allclose(fitted, torch.tensor([[1 + 3 * share, 0.0], [share, 5.0]]))


def test_solve_is_ridge_regression():
    rng = np.random.default_rng(0)
    h, down, kept = rng.standard_normal((200, 12)), rng.standard_normal((5, 12)), np.array([0, 3, 4, 7, 11])
    gram = h.T @ h
    fitted = solve(torch.tensor(down), torch.tensor(gram), kept, tokens=200).numpy()
    ridge = RIDGE * np.diag(gram).mean()
    # The same problem as one least-squares system: the ridge pulls towards the old columns.
    system = np.vstack([h[:, kept], np.sqrt(ridge) * np.eye(5)])
    goal = np.vstack([h @ down.T, np.sqrt(ridge) * down[:, kept].T])
    assert np.allclose(fitted, np.linalg.lstsq(system, goal, rcond=None)[0].T)


def test_few_tokens_correct_less_and_none_not_at_all():
    rng = np.random.default_rng(1)
    h, down, kept = rng.standard_normal((6, 8)), torch.tensor(rng.standard_normal((3, 8))), np.array([1, 5])
    gram = torch.tensor(h.T @ h)
    old = down[:, kept]
    full, half = (solve(down, gram, kept, tokens) - old for tokens in (16, 8))
    assert torch.allclose(half, full / 2)
    assert torch.equal(solve(down, gram, kept, 0), old)
    assert torch.equal(solve(down, torch.zeros(8, 8, dtype=torch.float64), kept, 9), old)


@pytest.fixture(scope="module")
def fitted(checkpoint_dir, stats, tmp_path_factory):
    checkpoint = open_checkpoint(checkpoint_dir)
    domains = [load_domain(builtin.texts()["calib_code"], checkpoint.tokenizer(), 512, 8)]
    plan = make_plan(stats, Recipe("global", 0.5))
    folder = tmp_path_factory.mktemp("refit")
    refit(checkpoint, plan, domains, folder / "work").save(folder / "refit.safetensors")
    return plan, Overrides.load(folder / "refit.safetensors")


def test_weights_stay_on_disk_and_outlive_a_failed_save(checkpoint_dir, stats, tmp_path):
    checkpoint, work, out = open_checkpoint(checkpoint_dir), tmp_path / "work", tmp_path / "refit.safetensors"
    domains = [load_domain(builtin.texts()["calib_code"], checkpoint.tokenizer(), 128, 2)]
    plan = make_plan(stats, Recipe("global", 0.5))
    weights = refit(checkpoint, plan, domains, work)
    (tmp_path / "file").touch()
    with pytest.raises(GgufToolError, match="cannot be written"):
        weights.save(tmp_path / "file" / "refit.safetensors")
    seen: list[str] = []
    weights = refit(checkpoint, plan, domains, work, progress=lambda done, total, text: seen.append(text))
    assert not seen  # nothing was computed again
    fitted = {key: weights.get(*key) for key in weights.keys()}
    weights.save(out)
    assert not work.exists()
    arrays = load_file(out)  # safetensors' own reader agrees with what we write
    loaded = Overrides.load(out)
    assert len(loaded) == len(weights) == len(fitted) == len(arrays) > 0
    for (layer, expert, role), want in fitted.items():
        assert role == "down" and (layer, expert, role) in loaded and want.dtype == np.float32
        for have in (
            loaded.get(layer, expert, role),
            weights.get(layer, expert, role),
            arrays[f"{layer}.{expert}.down"],
        ):
            assert np.array_equal(have, want)
    assert loaded.get(999, 0, "down") is None and (999, 0, "down") not in loaded
    assert loaded.origin == weights.origin and loaded.origin.made_by == "refit"
    loaded.check(plan, checkpoint.n_embd)


def test_refit_lowers_the_divergence_on_a_text_that_it_never_saw(fitted, base_gguf, eval_text, llama, tmp_path):
    plan, weights = fitted
    assert weights.experts == {(p.index, e) for p in plan.layers for e in narrowed_experts(plan, p.index)}
    prune(base_gguf, plan, tmp_path / "plain.gguf")
    prune(base_gguf, plan, tmp_path / "refit.gguf", overrides=weights)
    plain, refitted = compare_many(
        base_gguf, [tmp_path / "plain.gguf", tmp_path / "refit.gguf"], eval_text.read_text(), llama=llama, max_windows=4
    )
    assert refitted.as_dict()["kld"]["mean"] < 0.9 * plain.as_dict()["kld"]["mean"]
    assert (tmp_path / "plain.gguf").stat().st_size == pytest.approx((tmp_path / "refit.gguf").stat().st_size, abs=64)


def test_the_file_holds_the_refitted_columns(fitted, base_gguf, tmp_path):
    plan, weights = fitted
    prune(base_gguf, plan, tmp_path / "refit.gguf", overrides=weights)
    file, layer = GgufFile(tmp_path / "refit.gguf"), plan.layers[0]
    for index, tier in enumerate(layer.tiers()):
        stack = floats(file, tier_name(layer.index, "down", index))
        for place, row in enumerate(tier.rows):
            if (layer.index, row, "down") in weights:
                assert np.allclose(stack[place], weights.get(layer.index, row, "down"), rtol=2**-8)
    assert file.value("gguftool.weights") == inspect(file).as_dict()["weights"] == "refit"


def test_weights_of_another_plan_are_refused(fitted, stats, base_gguf, checkpoint_dir, tmp_path):
    _, weights = fitted
    other = make_plan(stats, Recipe("global", 0.25))
    with pytest.raises(GgufToolError, match="another plan"):
        prune(base_gguf, other, tmp_path / "x.gguf", overrides=weights)
    assert not (tmp_path / "x.gguf").exists()
    checkpoint = open_checkpoint(checkpoint_dir)
    domains = [load_domain(builtin.texts()["calib_code"], checkpoint.tokenizer(), 512, 1)]
    with pytest.raises(GgufToolError, match="nothing to refit"):
        refit(checkpoint, make_plan(stats, Recipe("reap", 0.25)), domains, tmp_path / "work")
