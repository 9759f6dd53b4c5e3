"""Calibration: sums by hand, against a naive loop, and through interruptions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gguftool.calibrate import LayerStream, calibrate
from gguftool.checkpoint import open_checkpoint
from gguftool.errors import GgufToolError
from gguftool.grams import Grams, ObsPlan
from gguftool.inventory import gguf_name
from gguftool.obs import RIDGE, costs
from gguftool.recorders import ExpertRecorder, check_layout, recording
from gguftool.stats import EXPERT_SUMS, CalibrationStats, Domain
from gguftool.stored import pieces
from models import MODEL_TYPES, tiny_checkpoint, tiny_model

N_CTX = 12


def domain(name, windows, seed):
    ids = np.random.default_rng(seed).integers(0, 320, (windows, N_CTX))
    return Domain(name, f"sha of {name}", ids.size), ids


DOMAINS = [domain("code", 5, 1), domain("math", 3, 2)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """model type -> opened tiny checkpoint."""
    root = tmp_path_factory.mktemp("models")
    return {kind: open_checkpoint(tiny_checkpoint(root / kind, kind, shard="60KB")) for kind in MODEL_TYPES}


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):
    """The stats of the tiny Qwen3 model in one go."""
    return calibrate(checkpoints["qwen3_moe"], DOMAINS, tmp_path_factory.mktemp("work"), batch=2)


class ToyExperts(nn.Module):
    """4 experts with 2 neurons and d = 2. Every gate and up is the identity and act(x) = x, so that h = x * x."""

    def __init__(self):
        super().__init__()
        eye = torch.eye(2)
        self.gate_up_proj = nn.Parameter(torch.cat([eye, eye]).repeat(4, 1, 1))
        down = [[[3, 0], [4, 1]], [[1, -1], [0, 0]], [[0, 0], [0, 0]], [[7, 7], [7, 7]]]
        self.down_proj = nn.Parameter(torch.tensor(down, dtype=torch.float32))
        self.act_fn = nn.Identity()


def test_sums_worked_out_by_hand():
    """Domain 0: x = (1, 0) to expert 0 with g = 1/2, (2, 1) to expert 1 and (3, 0) to expert 2 with g = 1.
    Domain 1: (0, 2) to expert 0 with g = 1. Expert 3 sees nothing, expert 2 puts out nothing.
    """
    recorder = ExpertRecorder(ToyExperts(), 2, (4, 2, 2), layer=0)
    x = torch.tensor([[1.0, 0], [2, 1], [3, 0]])
    out = recorder(x, torch.tensor([[0], [1], [2]]), torch.tensor([[0.5], [1], [1]]))
    # h = (1, 0): f = (3, 4). h = (4, 1): f = (3, 0). h = (9, 0): f = 0.
    assert out.tolist() == [[1.5, 2], [3, 0], [0, 0]]
    recorder.domain = 1
    # h = (0, 4): f = (0, 4), which points where x does.
    assert recorder(torch.tensor([[0.0, 2]]), torch.tensor([[0]]), torch.tensor([[1.0]])).tolist() == [[0, 4]]
    want = {
        "count": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "gate": [[0.5, 1, 1, 0], [1, 0, 0, 0]],
        "gate_sq": [[0.25, 1, 1, 0], [1, 0, 0, 0]],
        "norm": [[5, 3, 0, 0], [4, 0, 0, 0]],
        "norm_sq": [[25, 9, 0, 0], [16, 0, 0, 0]],
        "gate_norm": [[2.5, 3, 0, 0], [4, 0, 0, 0]],
        "gate_sq_norm_sq": [[6.25, 9, 0, 0], [16, 0, 0, 0]],
        # cos((1, 0), (3, 4)) = 3/5 and cos((2, 1), (3, 0)) = 2/sqrt(5)
        "turn": [[1, 3 * (1 - 2 / math.sqrt(5)), 0, 0], [0, 0, 0, 0]],
        "max_out": [[4, 3, 0, 0], [4, 0, 0, 0]],
    }
    assert want.keys() == EXPERT_SUMS.keys()
    for name, value in want.items():
        assert recorder.experts[name].numpy() == pytest.approx(np.array(value), rel=1e-6, abs=1e-6), name
    neurons = {name: value.tolist() for name, value in recorder.neurons.items()}
    assert neurons == {
        "h_sq": [[1, 16], [16, 1], [81, 0], [0, 0]],
        "gate_sq_h_sq": [[0.25, 16], [16, 1], [81, 0], [0, 0]],
        # expert 0: 1 * (3*3 + 4*4) / 5 = 5, then 4 * (1*4) / 4 = 4. expert 1: 4 * 3 / 3 = 4 and 1 * -3 / 3 = -1.
        "proj": [[5, 4], [4, -1], [0, 0], [0, 0]],
        "proj_abs": [[5, 4], [4, 1], [0, 0], [0, 0]],
        "down_norm_sq": [[25, 1], [1, 1], [0, 0], [98, 98]],
    }
    assert recorder.inputs.tolist() == [[1, 4], [4, 1], [9, 0], [0, 0]]


def test_second_moments_are_gated_and_lead_to_the_costs():
    """Expert 0: h = (1, 0) with g = 1/2, then (0, 4) with g = 1: C = diag(1/4, 16). Expert 1: h = (4, 1): C = h h^T."""
    module = ToyExperts()
    grams = Grams(module, ObsPlan())
    recorder = ExpertRecorder(module, 1, (4, 2, 2), 0, grams)
    recorder(torch.tensor([[1.0, 0], [2, 1]]), torch.tensor([[0], [1]]), torch.tensor([[0.5], [1]]))
    recorder(torch.tensor([[0.0, 2]]), torch.tensor([[0]]), torch.tensor([[1.0]]))
    moments = grams.moments
    assert moments.tolist() == [[[0.25, 0], [0, 16]], [[16, 4], [4, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    found = recorder.arrays()["neuron.obs"]
    own = costs(moments, module.down_proj, torch.tensor([2, 1, 0, 0]))
    assert np.array_equal(found, own.detach().numpy())
    # Two tokens of the 2K = 4 that would do: halfway between the refit's cost and that of the column alone.
    ridge = RIDGE * (0.25 + 16) / 2
    assert found[0] == pytest.approx([25 * (0.25 + ridge / 2), 16 + ridge / 2])
    assert found[2].tolist() == [0, 0]


def test_the_residual_stream_is_measured_behind_each_layer(checkpoints, whole):
    """Against transformers' own hidden states: mean over the tokens of 1 / squared length."""
    checkpoint = checkpoints["qwen3_moe"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    seen: dict[int, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):

        def keep(_module, _args, out, index=index):
            seen.setdefault(index, []).append(out[0] if isinstance(out, tuple) else out)

        layer.register_forward_hook(keep)
    with torch.inference_mode():
        for _, windows in DOMAINS:
            model(torch.from_numpy(windows))
    want = [sum(float((1 / out.square().sum(-1)).sum()) for out in seen[layer]) for layer in checkpoint.moe_layers]
    assert whole.residual_inverse == pytest.approx(want, rel=1e-4)
    assert max(want) > 1.1 * min(want)


def test_recording_is_for_a_while():
    module = ToyExperts()
    with recording(module, ExpertRecorder(module, 1, (4, 2, 2), 0)):
        assert module(torch.ones(1, 2), torch.tensor([[0]]), torch.ones(1, 1)).tolist() == [[3, 5]]
    with pytest.raises(NotImplementedError):
        module(torch.ones(1, 2))


def test_experts_of_another_shape_are_refused():
    module = ToyExperts()
    with pytest.raises(GgufToolError, match="layer 5: the experts are laid out as"):
        check_layout(module, (4, 3, 2), 5)
    module.is_transposed = True
    with pytest.raises(GgufToolError, match="layer 5: experts with is_transposed are not supported"):
        check_layout(module, (4, 2, 2), 5)
    module.is_transposed = False
    module.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(GgufToolError, match="laid out as"):
        check_layout(module, (4, 2, 2), 5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_recorder_puts_out_what_the_experts_do(model_type):
    experts = tiny_model(model_type).model.layers[0].mlp.experts
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    chosen = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:2] for t in range(50)])
    weights = torch.rand(50, 2, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        want = experts(x, chosen, weights)
        got = ExpertRecorder(experts, 1, (6, 32, 32), 0)(x, chosen, weights)
    assert torch.allclose(got, want, atol=1e-5)


class Naive:
    """Sums over a whole transformers model, token by token in float64, from what its modules were called with."""

    def __init__(self, checkpoint):
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        self.experts, self.linears = {}, {}
        for name, module in self.model.named_modules():
            weight = module._parameters.get("weight")
            if name.endswith("mlp.experts"):
                layer = int(name.split(".")[2])
                module.register_forward_pre_hook(lambda m, args, layer=layer: self.add_experts(layer, m, *args))
            elif weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                key = gguf_name(checkpoint, name + ".weight")
                module.register_forward_pre_hook(lambda _, args, key=key: self.add_linear(key, args[0]))

    def add_linear(self, key, x):
        x = x.detach().double().numpy().reshape(-1, x.shape[-1])
        self.linears[key] = self.linears.get(key, 0) + (x * x).sum(0)

    def add_experts(self, layer, module, hidden, chosen, weights):
        hidden, weights = hidden.detach().double().numpy(), weights.detach().double().numpy()
        gate_up = module.gate_up_proj.detach().double().numpy()
        down = module.down_proj.detach().double().numpy()
        for token, experts in enumerate(chosen.tolist()):
            for slot, expert in enumerate(experts):
                x, g, w = hidden[token], weights[token, slot], down[expert]
                a, up = np.split(gate_up[expert] @ x, 2)
                h = a / (1 + np.exp(-a)) * up
                f = w @ h
                n = np.sqrt(f @ f)
                p = h * (w.T @ f) / n
                turn = g * n * (1 - x @ f / n / np.sqrt(x @ x))
                sums = [1, g, g * g, n, n * n, g * n, g * g * n * n, turn, h * h, g * g * h * h, p, abs(p), x * x]
                kept = self.experts.setdefault((layer, self.domain, expert), [0.0] * (len(sums) + 1))
                for index, value in enumerate(sums):
                    kept[index] = kept[index] + value
                kept[-1] = max(kept[-1], abs(f).max())

    @torch.no_grad()
    def run(self, domains):
        for self.domain, (_, windows) in enumerate(domains):
            self.model(torch.from_numpy(windows))
        return self


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_calibration_is_a_naive_loop_over_the_whole_model(checkpoints, model_type, tmp_path):
    checkpoint = checkpoints[model_type]
    stats = calibrate(checkpoint, DOMAINS, tmp_path / "work", batch=2)
    naive = Naive(checkpoint).run(DOMAINS)
    names = ["count", "gate", "gate_sq", "norm", "norm_sq", "gate_norm", "gate_sq_norm_sq", "turn"]
    neurons = ["h_sq", "gate_sq_h_sq", "proj", "proj_abs"]
    near = {"rel": 1e-4, "abs": 1e-6}
    for layer in range(3):
        for expert in range(6):
            found = [naive.experts.get((layer, d, expert)) or [0.0] * 14 for d in range(2)]
            for d in range(2):
                for index, name in enumerate(names):
                    assert stats.experts[name][d, layer, expert] == pytest.approx(found[d][index], **near), name
                assert stats.experts["max_out"][d, layer, expert] == pytest.approx(found[d][-1], **near)
            for index, name in enumerate(neurons, start=len(names)):
                want = found[0][index] + found[1][index]
                assert stats.neurons[name][layer, expert] == pytest.approx(want, rel=1e-4, abs=1e-4), name
            assert stats.expert_inputs[layer, expert] == pytest.approx(found[0][12] + found[1][12], **near)
        down = naive.model.model.layers[layer].mlp.experts.down_proj.detach().double()
        assert stats.neurons["down_norm_sq"][layer] == pytest.approx(down.square().sum(1).numpy())
    assert stats.linears.keys() == naive.linears.keys()
    for name, value in naive.linears.items():
        assert stats.linears[name] == pytest.approx(value, **near), name
    assert stats.linear_tokens == stats.tokens == 8 * N_CTX
    assert not (tmp_path / "work").exists()


def test_every_matrix_of_the_gguf_has_its_sums(checkpoints, tmp_path):
    """imatrix data for all of a model with shared experts; the token embedding is looked up, not multiplied."""
    stats = calibrate(checkpoints["qwen2_moe"], DOMAINS, tmp_path / "work")
    matrices = {t.name: t.ne[0] for t in stats.model.tensors if len(t.ne) == 2 and t.name != "token_embd.weight"}
    assert {name: len(value) for name, value in stats.linears.items()} == matrices


def test_a_tied_output_is_kept_under_the_tensor_that_is_multiplied(tmp_path):
    directory = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=1, tie_word_embeddings=True)
    stats = calibrate(open_checkpoint(directory), DOMAINS, tmp_path / "work")
    assert "token_embd.weight" in stats.linears
    assert "output.weight" not in stats.linears


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        *((model_type, {}) for model_type in MODEL_TYPES),
        ("qwen2_moe", SLIDING),
        ("mixtral", {"sliding_window": 5}),
        ("qwen3_moe", {"rope_parameters": YARN, "attention_bias": True, "tie_word_embeddings": True}),
        ("olmoe", {"output_router_logits": True, "clip_qkv": 0.5}),
    ],
    ids=str,
)
def test_layer_by_layer_is_the_forward_pass_of_transformers(tmp_path, model_type, sizes):
    directory = tiny_checkpoint(tmp_path / "tiny", model_type, **sizes)
    stream = LayerStream(open_checkpoint(directory))
    for path in [*stream.outer_modules(), "lm_head"]:
        stream.loader.materialise(path)
    windows = DOMAINS[0][1]
    hidden = stream.embed(windows)
    for layer in range(3):
        hidden = stream.layer(stream.loader.materialise_layer(layer), layer, hidden)
        stream.loader.release_layer(layer)
    with torch.inference_mode():
        logits = stream.loader.model.lm_head(stream.finish(hidden))
        want = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(torch.from_numpy(windows)).logits
    assert float((logits - want).abs().max() / want.abs().max()) < 1e-4
    assert not isinstance(stream.loader.model.model.layers[0], nn.Identity)
    assert len(list(stream.loader.model.model.layers[0].named_parameters())) > 3


def same(a: CalibrationStats, b: CalibrationStats) -> bool:
    """Bit for bit."""
    groups = [(a.experts, b.experts), (a.neurons, b.neurons), (a.linears, b.linears)]
    return np.array_equal(a.expert_inputs, b.expert_inputs) and all(
        left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
        for left, right in groups
    )


class Stop:
    """Progress that interrupts when so much is done, and remembers what it was told."""

    def __init__(self, at=None):
        self.at, self.seen = at, []

    def __call__(self, done, total, text):
        self.seen.append((done, total, text))
        if self.at is not None and done >= self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("windows", [1, 8, 9, 14, 24])
def test_a_stopped_run_goes_on_and_ends_the_same(checkpoints, whole, tmp_path, windows):
    checkpoint, work = checkpoints["qwen3_moe"], tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, DOMAINS, work, batch=2, progress=Stop(windows))
    again = Stop()
    assert same(calibrate(checkpoint, DOMAINS, work, batch=2, progress=again), whole)
    finished = (windows - 1) // 8
    assert again.seen[0] == (8 * finished + 2, 24, f"layer {finished + 1} of 3")
    assert (24, 24, "layer 3 of 3") in again.seen
    assert again.seen[-1] == (24, 24, "layer 3 of 3, OBS of expert 6 of 6")
    assert not work.exists()


def test_a_failed_save_loses_nothing(checkpoints, whole, tmp_path):
    checkpoint, work, out = checkpoints["qwen3_moe"], tmp_path / "work", tmp_path / "stats.safetensors"
    (tmp_path / "file").touch()
    with pytest.raises(GgufToolError, match="cannot be written"):
        calibrate(checkpoint, DOMAINS, work, batch=2, out=tmp_path / "file" / "stats.safetensors")
    (tmp_path / "file").unlink()
    again = Stop()
    stats = calibrate(checkpoint, DOMAINS, work, batch=2, progress=again, out=out)
    assert again.seen == []  # no layer ran again
    assert same(stats, whole) and same(CalibrationStats.load(out), whole)
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 1.0])
def test_the_fingerprint_sees_all_over_a_tensor(tmp_path, at):
    """Ten pieces of 4 KiB, from the first to the last byte; and a tensor that is no longer than that in full."""
    directory = tiny_checkpoint(tmp_path / "tiny")
    before = open_checkpoint(directory)
    stored = max(before.tensors.values(), key=lambda tensor: tensor.nbytes)
    place = stored.offset + int(at * (stored.nbytes - 1))
    with stored.file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
    assert open_checkpoint(directory).fingerprint != before.fingerprint


def test_the_pieces_of_a_large_tensor():
    found = pieces(10**9)
    assert len(found) == 10 and found[0] == (0, 4096) and found[-1] == (10**9 - 4096, 10**9)
    assert {end - start for start, end in found} == {4096}
    assert len({b[0] - a[0] for a, b in pairwise(found)}) <= 2
    assert pieces(40960) == [(0, 40960)]


@pytest.mark.parametrize("damage", ["state.json", "hidden-001.bin", "layer-000.safetensors"])
def test_a_damaged_state_is_not_gone_on_from(checkpoints, whole, tmp_path, damage):
    checkpoint, work = checkpoints["qwen3_moe"], tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, DOMAINS, work, batch=2, progress=Stop(12))
    file = work / damage
    file.write_bytes(file.read_bytes()[:-40])
    again = Stop()
    assert same(calibrate(checkpoint, DOMAINS, work, batch=2, progress=again), whole)
    assert again.seen[0][0] == 2


def test_other_inputs_start_anew(checkpoints, whole, tmp_path):
    checkpoint, work = checkpoints["qwen3_moe"], tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, [domain("code", 5, 9), DOMAINS[1]], work, batch=2, progress=Stop(20))
    (work / "notes.txt").write_text("somebody else's")
    again = Stop()
    assert same(calibrate(checkpoint, DOMAINS, work, batch=2, progress=again), whole)
    assert again.seen[0][0] == 2
    assert [file.name for file in work.iterdir()] == ["notes.txt"]


def test_another_batch_gives_the_same_numbers(checkpoints, whole, tmp_path):
    other = calibrate(checkpoints["qwen3_moe"], DOMAINS, tmp_path / "work", batch=8)
    for name, value in whole.experts.items():
        assert other.experts[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_16_bit_states_and_computation(checkpoints, whole, tmp_path):
    checkpoint = checkpoints["qwen3_moe"]
    half = calibrate(checkpoint, DOMAINS, tmp_path / "work", dtype=torch.bfloat16, hidden_dtype=torch.bfloat16)
    assert half.expert("norm").sum() == pytest.approx(whole.expert("norm").sum(), rel=0.05)


def test_saved_and_loaded(whole, tmp_path):
    whole.save(tmp_path / "stats.safetensors")
    loaded = CalibrationStats.load(tmp_path / "stats.safetensors")
    assert same(loaded, whole)
    assert loaded.model == whole.model
    assert loaded.domains == whole.domains


def test_routed_tokens_are_counted_and_uneven(whole):
    counts = whole.experts["count"]
    assert counts.sum(axis=2).tolist() == [[5 * N_CTX * 2] * 3, [3 * N_CTX * 2] * 3]
    assert counts.sum(axis=0).max() > 2 * counts.sum(axis=0).min()


def test_a_layer_that_overflows_is_named(tmp_path):
    directory = tiny_checkpoint(tmp_path / "tiny")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.inf
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(GgufToolError, match="layer 1: its output is not finite"):
        calibrate(open_checkpoint(directory), DOMAINS, tmp_path / "work")


def test_windows_that_do_not_fit_are_refused(checkpoints, tmp_path):
    checkpoint = checkpoints["qwen3_moe"]
    code, ids = DOMAINS[0]
    cases = {
        "no calibration text": [],
        "windows of different lengths: \\[6, 12\\]": [DOMAINS[0], (replace(code, tokens=30), ids[:, :6])],
        "token ids run from 0 to 320, the model knows 320": [(replace(code, tokens=24), np.array([[0, 320] * 12]))],
        "a context of 130 tokens is more than the model's 128": [(replace(code, tokens=130), np.zeros((1, 130), int))],
        "60 tokens in windows, 59 stated": [(replace(code, tokens=59), ids)],
    }
    for message, domains in cases.items():
        with pytest.raises(GgufToolError, match=message):
            calibrate(checkpoint, domains, tmp_path / "work")
    with pytest.raises(GgufToolError, match="batch of 0"):
        calibrate(checkpoint, DOMAINS, tmp_path / "work", batch=0)
    assert not (tmp_path / "work").exists()


def test_a_work_directory_that_cannot_be_made(checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GgufToolError, match="work directory cannot be written"):
        calibrate(checkpoints["qwen3_moe"], DOMAINS, tmp_path / "file" / "work")


def test_a_disk_that_is_too_full(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    need = 2 * 8 * N_CTX * 32 * 4
    with pytest.raises(GgufToolError, match=f"{need} bytes are needed for hidden states, 1000 are free"):
        calibrate(checkpoints["qwen3_moe"], DOMAINS, tmp_path / "work")


def test_a_device_that_is_not_there(checkpoints, tmp_path):
    with pytest.raises(GgufToolError, match="device 'abacus' cannot be used"):
        calibrate(checkpoints["qwen3_moe"], DOMAINS, tmp_path / "work", device="abacus")
