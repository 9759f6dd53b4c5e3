"""A GGUF as the only input: its statistics against those of torch, its refit, and all of it in a row."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFValueType as V
from safetensors import safe_open

from gguf_models import write_random
from gguftool import builtin
from gguftool.checkpoint import open_checkpoint
from gguftool.cli import cli
from gguftool.corpus import load_domain
from gguftool.errors import GgufToolError
from gguftool.ggml_nodes import ggml_path
from gguftool.gguf_calibrate import calibrate_gguf
from gguftool.gguf_file import GgufFile, KeyValue, copied_entries, write_gguf
from gguftool.gguf_model import open_gguf
from gguftool.gguf_pass import Corpus, groups
from gguftool.gguf_refit import refit_gguf
from gguftool.gguf_tokenizer import GgufTokenizer
from gguftool.llama_observer import LlamaRun, Routed, _Watcher
from gguftool.perplexity import open_session
from gguftool.pipeline import produce
from gguftool.planner import make_plan
from gguftool.quantize import QuantizeTool, imatrix_entries, quantize
from gguftool.recipe import Recipe
from gguftool.recipe_file import RunRecipe
from gguftool.refit import refit
from gguftool.requant import dequantize_rows, quantize_rows
from gguftool.runs import Ears, carry_out, job_of
from gguftool.sources import Source
from gguftool.stats import CalibrationStats, Domain
from gguftool.tensors import TensorSpec
from gguftool.writer import prune
from test_oracles import difference, logits
from test_shapes import with_predictor
from tiny_archs import ARCHS, tiny_ggufs, tiny_model

# Tiny models without a row in `architectures`, or not like the built-in one: biases, merged gate and up, a number for each
# expert, dense layers, shared experts, a router whose weights do not add up to 1.
TINY = ("gpt-oss", "granite-swa", "gemma4", "glm4moe", "olmoe")
N_CTX = 24


def near(got: np.ndarray, want: np.ndarray, rel: float = 1e-3) -> bool:
    """Equal within `rel` of the largest value of each row."""
    scale = np.abs(want).max(axis=-1, keepdims=True)
    return bool((np.abs(got - want) <= rel * scale + 1e-12).all())


@pytest.fixture(scope="module")
def code(llama, base_f32):
    return load_domain(builtin.texts()["calib_code"], GgufTokenizer(llama, base_f32), 512, 8)


@pytest.fixture(scope="module")
def measured(llama, base_f32, code, tmp_path_factory) -> CalibrationStats:
    """The stats of the built-in model's F32 GGUF."""
    return calibrate_gguf(open_gguf(base_f32), [code], tmp_path_factory.mktemp("work"), llama=llama)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, runtime):
    """GGUFs of several architectures; each one's checkpoint is the folder beside it."""
    return tiny_ggufs(tmp_path_factory.mktemp("tiny"), TINY, runtime)


@pytest.fixture(scope="module")
def q4(tmp_path_factory, base_gguf, runtime):
    out = tmp_path_factory.mktemp("q4") / "builtin-Q4_K_M.gguf"
    quantize(base_gguf, "Q4_K_M", out, tools=QuantizeTool(runtime.tool("llama-quantize")))
    return out


def domains(seed: int = 0) -> list[tuple[Domain, np.ndarray]]:
    rng = np.random.default_rng(seed)
    parts = [rng.integers(1, 300, (count, N_CTX)) for count in (3, 2)]
    return [(Domain(f"text{i}", str(i), part.size), part) for i, part in enumerate(parts)]


def test_the_vocabulary_cuts_the_same_windows_as_the_checkpoint(llama, base_gguf, checkpoint_dir, tmp_path):
    ours, theirs = GgufTokenizer(llama, base_gguf), open_checkpoint(checkpoint_dir).tokenizer()
    documents = [
        json.dumps({"text": text}) for text in ("def f(x):\n    return x", "naïve 语言 <|endoftext|> again", "ü" * 99)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(documents))
    calls = [
        (builtin.texts()["calib_prose"], 512, None, 0), (builtin.texts()["calib_code"], 300, 5, 3),
        (tmp_path / "chat.jsonl", 16, None, 0),
    ]  # fmt: skip
    for path, n_ctx, count, seed in calls:
        (domain, windows), (want, expected) = (load_domain(path, t, n_ctx, count, seed) for t in (ours, theirs))
        assert domain == want and np.array_equal(windows, expected)


def test_conversations_go_through_the_template_in_the_file(llama, base_gguf, checkpoint_dir, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    entries, specs, file = entries_of(base_gguf, **{"tokenizer.chat_template": KeyValue(template, V.STRING)})
    write_gguf(tmp_path / "chats.gguf", file.arch, entries, specs, file.raw)
    theirs = open_checkpoint(checkpoint_dir).tokenizer()
    theirs.chat_template = template
    spoken = [{"messages": [{"role": "user", "content": f"what is {i}?"}]} for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, spoken)))
    (domain, windows), (want, expected) = (
        load_domain(tmp_path / "chat.jsonl", tokenizer, 32, 4)
        for tokenizer in (GgufTokenizer(llama, tmp_path / "chats.gguf"), theirs)
    )
    assert domain == want and domain.template and np.array_equal(windows, expected)
    with pytest.raises(GgufToolError, match="no chat template"):
        load_domain(tmp_path / "chat.jsonl", GgufTokenizer(llama, base_gguf), 32, 4)


def test_sums_are_those_of_torch(measured, stats):
    assert np.array_equal(measured.experts["count"], stats.experts["count"])
    for name, want in stats.experts.items():
        assert near(measured.experts[name], want), name
    for name, want in stats.neurons.items():
        assert near(measured.neurons[name], want), name
    assert "obs" in measured.neurons
    assert near(measured.expert_inputs, stats.expert_inputs)
    assert near(measured.residual_inverse, stats.residual_inverse)
    assert measured.linears.keys() == stats.linears.keys() and measured.linear_tokens == stats.linear_tokens
    assert all(near(measured.linears[name], want) for name, want in stats.linears.items())
    facts = {"name", "fingerprint", "tensors", "model_type", "tied"}
    # What a GGUF ties to the experts' width by its keys, and the family does not know, it does not have.
    assert not [
        spec.name for spec in stats.model.tensors if spec.name.endswith((*measured.model.tied, *stats.model.tied))
    ]
    known, own = vars(stats.model), vars(measured.model)
    assert {k: v for k, v in own.items() if k not in facts} == {k: v for k, v in known.items() if k not in facts}
    assert measured.domains == stats.domains and measured.n_ctx == stats.n_ctx


def test_the_imatrix_is_that_of_torch(measured, stats, base_gguf):
    specs = GgufFile(base_gguf).tensors
    got, want = imatrix_entries(measured, (), specs), imatrix_entries(stats, (), specs)
    assert got.keys() == want.keys() and len(got) > 20
    for name, (sums, counts) in want.items():
        assert near(got[name][0], sums) and np.array_equal(got[name][1], counts)


def seen_by_transformers(arch, windows: np.ndarray) -> dict[str, list]:
    """Module -> what it was called with (experts) or what it gave (decoder layers), for one call of the model."""
    model, seen = tiny_model(arch), {}

    def experts(name, _, args, kwargs):
        seen[name] = [*args, *kwargs.values()]

    def layer(name, _, __, out):
        seen[name] = [out[0] if isinstance(out, tuple) else out]

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(partial(experts, name), with_kwargs=True)
        elif name.startswith("model.layers.") and name.count(".") == 2:
            module.register_forward_hook(partial(layer, name))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    return seen


@pytest.mark.parametrize("name", TINY)
def test_any_architecture_that_llama_cpp_knows(name, tiny, llama, tmp_path):
    """Routes, their weights, what goes into the experts and the residual stream: as in transformers' own forward pass."""
    model = open_gguf(tiny[name])
    found = calibrate_gguf(model, domains(), tmp_path / "work", llama=llama, batch=2, obs=False)
    assert found.model.norm_topk is (name != "olmoe") and found.model.moe_layers == tuple(ARCHS[name].layers)
    for index, (_, windows) in enumerate(domains()):
        seen = seen_by_transformers(ARCHS[name], windows)
        for place, layer in enumerate(model.moe_layers):
            x, chosen, weights = next(v for k, v in seen.items() if f".{layer}." in k and k.endswith("experts"))
            places = torch.nn.functional.one_hot(chosen, model.n_expert).double()
            gates = (places * weights[..., None]).sum(dim=(0, 1)).numpy()
            got = {key: values[index, place] for key, values in found.experts.items()}
            assert np.array_equal(got["count"], places.sum(dim=(0, 1)).numpy())
            assert near(got["gate"], gates)
    both = seen_by_transformers(ARCHS[name], np.concatenate([windows for _, windows in domains()]))
    for place, layer in enumerate(model.moe_layers):
        x, chosen, _ = next(v for k, v in both.items() if f".{layer}." in k and k.endswith("experts"))
        places = torch.nn.functional.one_hot(chosen, model.n_expert).sum(dim=1).double()
        assert near(found.expert_inputs[place], (places.T @ x.reshape(-1, x.shape[-1]).double().square()).numpy())
        out = both[f"model.layers.{layer}"][0]
        assert found.residual_inverse[place] == pytest.approx(float((1 / out.square().sum(-1)).sum()), rel=1e-3)


@pytest.mark.parametrize("name", ["granite-swa", "gemma4", "glm4moe"])
def test_neurons_outputs_and_weights_belong_together(name, tiny, llama, tmp_path):
    """Without biases sum g^2 ||f||^2 = sum over k, l of C_kl (W^T W)_kl, C taken in another pass that sees no outputs."""
    from gguftool.gguf_calibrate import _Moments

    model = open_gguf(tiny[name])
    found = calibrate_gguf(model, domains(), tmp_path / "work", llama=llama, obs=False)
    moments, ggml = _Moments(model, ggml_path(llama), model.moe_layers), ggml_path(llama)
    with open_session(llama) as session, LlamaRun(session, model.path, N_CTX, 2) as run:
        for _, part in Corpus.of(model, domains(), 2).batches:
            run.run(np.concatenate([w for _, w in domains()])[part], moments)
    for place, layer in enumerate(model.moe_layers):
        grams = moments._grams[layer]
        want = [
            float((gram * (down.T @ down)).sum())
            for gram, down in zip(grams, (model.down(layer, e, ggml) for e in range(model.n_expert)), strict=True)
        ]
        assert near(found.expert("gate_sq_norm_sq")[place], np.array(want))
        assert near(found.neurons["gate_sq_h_sq"][place], grams.diagonal(dim1=1, dim2=2).numpy())


@pytest.mark.parametrize("method", ["global", "gated-sum"])
def test_layers_that_predict_further_tokens_are_left_alone(method, tiny, llama, runtime, tmp_path):
    """From a GGUF that has one to a quantized file: no forward pass runs it, no plan knows it."""
    base = with_predictor(tiny["glm4moe"], tmp_path / "base.gguf")
    found = calibrate_gguf(open_gguf(base), domains(), tmp_path / "work", llama=llama, obs=False)
    assert (found.model.block_count, found.model.n_predict, found.model.moe_layers) == (4, 1, (1, 2))
    plan = make_plan(found, Recipe(method, 0.34, target="Q4_K_M"))
    report = prune(base, plan, tmp_path / "pruned.gguf")
    assert report.layout == plan.layout == "tiered" and report.notes == []
    tools = QuantizeTool(runtime.tool("llama-quantize"))
    made = quantize(tmp_path / "pruned.gguf", "Q4_K_M", tmp_path / "out.gguf", imatrix=found, tools=tools)
    assert [(spec.name, spec.type) for spec in made.tensors] == [(spec.name, spec.type) for spec in plan.encoded]
    experts = [spec for spec in made.tensors if spec.name.startswith("blk.3.ffn_") and "_exps" in spec.name]
    assert [spec.ne[2] for spec in experts] == [6, 6, 6]
    tokens = np.arange(1, 97)
    ours, whole = logits(runtime, tokens, tmp_path, tmp_path / "out.gguf", base, n_batch=40)
    assert np.isfinite(ours).all() and difference(ours, whole) > 0.05


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values.reshape(-1)))


def test_a_quantized_file_ranks_experts_as_the_original_does(measured, q4, llama, code, tmp_path):
    found = calibrate_gguf(open_gguf(q4), [code], tmp_path / "work", llama=llama, obs=False)
    for name in ("gate_norm", "norm", "count"):
        rho = np.corrcoef(ranks(found.expert(name)), ranks(measured.expert(name)))[0, 1]
        assert rho > 0.95, (name, rho)
    assert near(found.neurons["down_norm_sq"], measured.neurons["down_norm_sq"], 0.1)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_stopped_run_goes_on_and_ends_with_the_same_file(base_f32, llama, tmp_path, at):
    """3 batches a pass, 2 passes: stopped in the first, at its end, and in the second."""
    run = partial(
        calibrate_gguf, open_gguf(base_f32), domains(), llama=llama, batch=2, obs=True, save_seconds=0,
        memory=2 * 4 * 16 * 128**2,
    )  # fmt: skip
    whole, seen, again = tmp_path / "whole.safetensors", [], []
    stats = run(tmp_path / "whole", out=whole, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(d + 5 * stage, 10) for stage in range(2) for d in (2, 3, 5)] and not (tmp_path / "whole").exists()

    def stop(done: int, total: int, text: str) -> None:
        again.append(done)
        if len(again) == at:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "work", out=tmp_path / "out.safetensors", progress=stop)
    rest: list[int] = []
    run(tmp_path / "work", out=tmp_path / "out.safetensors", progress=lambda done, *_: rest.append(done))
    # The batch in whose report it was stopped was not saved yet.
    assert len(rest) == 6 - at + 1
    assert (tmp_path / "out.safetensors").read_bytes() == whole.read_bytes()
    assert stats.neurons["obs"].min() >= 0


class Watched:
    """A sink that wants everything, and remembers what it was given."""

    layers, whole = (3,), True

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def experts(self, layer: int, seen: Routed) -> None:
        raise AssertionError("no experts ran")

    matrix = experts

    def residual(self, layer: int, out: torch.Tensor) -> None:
        self.seen.append((layer, tuple(out.shape)))


def test_nodes_that_ggml_derives_from_a_named_one_are_not_that_one():
    """What ggml makes of a node has the node's name and what was done: "l_out-3 (reshaped)" is no layer's output."""
    sink = Watched()
    stub = SimpleNamespace(op=lambda name: len(name), read=lambda _: np.ones((1, 1, 5, 8), dtype=np.float32))
    watcher = _Watcher(stub, sink)

    def node(name: str) -> SimpleNamespace:
        return SimpleNamespace(op=99, name=name.encode(), src=[])

    for kind in ("reshaped", "view", "permuted", "transposed", "cont", "copy"):
        assert not watcher.wants(node(f"l_out-3 ({kind})"))
        assert not watcher.wants(node(f"ffn_moe_weights_norm-3 ({kind})")) and not watcher.norm_topk
    for name in ("l_out", "l_out-", "l_out-3b", "l_out-last", "xl_out-3", "l_out-3 "):
        assert not watcher.wants(node(name)), name
    assert watcher.wants(node("l_out-3")) and watcher.wants(node("l_out-12"))
    assert watcher.take(SimpleNamespace(contents=node("l_out-12"))) and sink.seen == [(12, (5, 8))]
    for name in ("ffn_moe_weights_norm-3", "ffn_moe_weights_softmax-0"):
        watcher.norm_topk = False
        assert not watcher.wants(node(name)) and watcher.norm_topk


def test_what_is_raised_while_llama_cpp_runs_comes_out(tiny, llama):
    """Ctrl-C arrives in the callback, from where nothing may be thrown through llama.cpp."""

    class Stopped:
        layers, whole = (0,), True

        def matrix(self, name: str, x: torch.Tensor) -> None:
            raise KeyboardInterrupt

    with (
        open_session(llama) as session,
        LlamaRun(session, tiny["olmoe"], N_CTX, 1) as run,
        pytest.raises(KeyboardInterrupt),
    ):
        run.run(np.ones((1, N_CTX), dtype=np.int64), Stopped())


def test_ctrl_c_waits_for_llama_cpp_and_is_not_lost(tiny, llama):
    """Raised between llama.cpp and the callback's first line it would be swallowed, and a node with it."""
    # A shell that runs this in the background has it ignore Ctrl-C.
    outside, seen = signal.signal(signal.SIGINT, signal.default_int_handler), []

    class Pressed:
        layers, whole = (0,), True

        def matrix(self, name: str, x: torch.Tensor) -> None:
            signal.raise_signal(signal.SIGINT)
            seen.append(name)

    try:
        with open_session(llama) as session, LlamaRun(session, tiny["olmoe"], N_CTX, 1) as run:
            with pytest.raises(KeyboardInterrupt):
                run.run(np.ones((1, N_CTX), dtype=np.int64), Pressed())
            assert len(seen) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


def test_layers_are_grouped_by_memory():
    assert groups((1, 2, 3, 4, 5), 10, 25) == [(1, 2), (3, 4), (5,)]
    assert groups((1, 2, 3), 10, 100) == groups((1, 2, 3), 10, None) == [(1, 2, 3)]
    assert groups((4, 7), 10, 10) == [(4,), (7,)]


def test_too_little_memory_is_refused(tiny, llama, tmp_path):
    with pytest.raises(GgufToolError, match=r"one layer take 13\.5 MiB, and 1\.0 MiB are allowed"):
        calibrate_gguf(open_gguf(tiny["olmoe"]), domains(), tmp_path / "work", llama=llama, obs=True, memory=1 << 20)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_rows_are_read_as_gguf_py_reads_them(kind, runtime):
    import gguf

    rows = quantize_rows(np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32), kind, runtime.ggml)
    want = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.allclose(dequantize_rows(rows, kind, runtime.ggml), want, rtol=1e-6, atol=1e-7)


def test_refitted_columns_are_those_of_the_checkpoint(measured, stats, base_f32, checkpoint_dir, code, llama, tmp_path):
    model = open_gguf(base_f32)
    plan = make_plan(measured, Recipe("auto", 0.4))
    memory = 4 * 128**2 * 16
    got = refit_gguf(model, plan, [code], tmp_path / "gguf", llama=llama, memory=memory)
    checkpoint = open_checkpoint(checkpoint_dir)
    own = replace(plan, model_fingerprint=checkpoint.fingerprint)
    want = refit(checkpoint, own, [code], tmp_path / "checkpoint")
    assert got.keys() == want.keys() and len(got) > 30 and got.origin == want.origin
    assert all(near(got.get(*key), want.get(*key)) for key in want.keys())
    got.save(tmp_path / "weights.safetensors")
    assert not (tmp_path / "gguf").exists()
    assert prune(base_f32, plan, tmp_path / "pruned.gguf", overrides=got).layout == "tiered"
    other = make_plan(stats, Recipe("auto", 0.4))
    assert [layer.widths for layer in other.layers] == [layer.widths for layer in plan.layers]
    with pytest.raises(GgufToolError, match="refit the model that was calibrated"):
        refit_gguf(model, other, [code], tmp_path / "gguf", llama=llama)


def test_dropped_experts_are_made_good_as_from_the_checkpoint(tiny, llama, tmp_path):
    """OLMoE's weights grow where experts are dropped; the number that takes it back is folded into whole experts."""
    model, checkpoint = open_gguf(tiny["olmoe"]), open_checkpoint(tiny["olmoe"].with_suffix(""))
    found = calibrate_gguf(model, domains(), tmp_path / "work", llama=llama, obs=False)
    plan = make_plan(found, Recipe("reap", 0.34))
    assert len(plan.layers[0].router) == 4
    got = refit_gguf(model, plan, domains(), tmp_path / "gguf", llama=llama)
    want = refit(
        checkpoint, replace(plan, model_fingerprint=checkpoint.fingerprint), domains(), tmp_path / "checkpoint"
    )
    assert got.keys() == want.keys() and len(got) > 0
    assert all(near(got.get(*key), want.get(*key)) for key in want.keys())


def entries_of(path, **changes) -> tuple[dict[str, KeyValue], tuple[TensorSpec, ...], GgufFile]:
    file = GgufFile(path)
    return copied_entries(file)[0] | changes, file.tensors, file


def test_what_cannot_be_measured_is_refused_in_one_line(tiny, measured, base_f32, llama, tmp_path):
    prune(base_f32, make_plan(measured, Recipe("auto", 0.4)), tmp_path / "tiered.gguf")
    entries, specs, file = entries_of(tiny["olmoe"])
    names = {spec.name for spec in specs if "_exps" in spec.name or "gate_inp" in spec.name}
    write_gguf(tmp_path / "dense.gguf", "olmoe", entries, [s for s in specs if s.name not in names], file.raw)
    shard = entries | {"split.count": KeyValue(2, V.UINT16)}
    write_gguf(tmp_path / "split.gguf", "olmoe", shard, specs, file.raw)
    for name, words in (("tiered", "different widths already"), ("dense", "dense model"), ("split", "--merge")):
        with pytest.raises(GgufToolError, match=words):
            open_gguf(tmp_path / f"{name}.gguf")
    spec = [TensorSpec(f"blk.{i}.ffn_down_exps.weight", (32 + 32 * i, 8, 4), "F32") for i in range(2)]
    write_random(tmp_path / "uneven.gguf", spec, n_expert=4, top_k=2, n_ff=32)
    with pytest.raises(GgufToolError, match=r"layer 1 has 4 experts of 64 neurons, layer 0 4 of 32"):
        open_gguf(tmp_path / "uneven.gguf")
    with pytest.raises(GgufToolError, match="more than the model's 512"):
        Corpus.of(open_gguf(tiny["olmoe"]), [(Domain("a", "", 600), np.ones((1, 600), dtype=np.int64))], 1)


def test_the_fingerprint_is_that_of_the_contents(tiny, tmp_path):
    one = open_gguf(tiny["olmoe"])
    shutil.copyfile(one.path, tmp_path / "copy.gguf")
    assert open_gguf(tmp_path / "copy.gguf").fingerprint == one.fingerprint
    with open(tmp_path / "copy.gguf", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    assert open_gguf(tmp_path / "copy.gguf").fingerprint != one.fingerprint


@pytest.fixture
def asked(llama, eval_text) -> partial:
    """A run of compress by auto, 40 %, but for what a test names."""
    return partial(
        RunRecipe, data=(Source(str(builtin.texts()["calib_code"])),), eval=(eval_text,), ratio=0.4, windows=4, eval_windows=2,
        pre_tokenizer="qwen2", backend="cpu",
    )  # fmt: skip


def test_compress_from_a_gguf_loses_what_it_loses_from_the_checkpoint(asked, base_gguf, checkpoint_dir, tmp_path):
    said: list[str] = []
    reports = [
        carry_out(asked(model=model, refit=how), tmp_path / name, Ears(say=said.append))
        for name, model, how in (("gguf", base_gguf, None), ("checkpoint", checkpoint_dir, "plain"))
    ]
    (got, want) = (report.rows[0] for report in reports)
    assert got.bytes == pytest.approx(want.bytes, abs=64)
    kld = [row.texts["eval_code"]["kld"]["mean"] for row in (got, want)]
    assert kld[0] == pytest.approx(kld[1], rel=0.1)
    assert any("sequential refit needs the checkpoint" in note for note in reports[0].notes)
    carry_out(asked(model=base_gguf), tmp_path / "gguf", Ears(say=said.append))
    assert sum(line.endswith("already there") for line in said) == 4  # stats, plan, weights, file


def test_compress_keeps_the_types_of_a_quantized_gguf(asked, q4, tmp_path):
    report = carry_out(asked(model=q4, quant="Q4_K_M"), tmp_path / "out")
    (row,) = report.rows
    assert row.encoding == "Q4_K_M" and row.bytes < 0.75 * q4.stat().st_size
    assert row.texts["eval_code"]["kld"]["mean"] < 0.3
    kept = {spec.name: spec.type for spec in GgufFile(q4).tensors}
    for spec in GgufFile(next((tmp_path / "out").glob("*AUTO40R-Q4_K_M.gguf"))).tensors:
        assert spec.type == kept.get(spec.name, spec.type)
    assert any("the original here is Q4_K_M itself" in note for note in report.notes)


def test_a_quantized_gguf_is_quantized_again_and_says_so(asked, q4, tmp_path):
    report = carry_out(asked(model=q4, windows=2, method="gated-sum", ratio=0.25, quant="Q3_K_M"), tmp_path / "out")
    assert [row.encoding for row in report.rows] == ["Q3_K_M", "Q3_K_M"]
    assert any("quantized twice" in note for note in report.notes)
    pruned = GgufFile(next((tmp_path / "out").glob("*GATED-SUM25-Q3_K_M.gguf")))
    assert pruned.value("quantize.imatrix.entries_count") > 0


def test_a_stock_file_that_was_pruned_before_is_a_model_like_any_other(asked, tiny, llama, runtime, tmp_path):
    """Its own stats know nothing of what it was cut from: it, and what is cut from it, take their importance matrix."""
    once, tools = tmp_path / "once.gguf", QuantizeTool(runtime.tool("llama-quantize"))
    first = calibrate_gguf(open_gguf(tiny["olmoe"]), domains(), tmp_path / "work", llama=llama, obs=False)
    assert prune(tiny["olmoe"], make_plan(first, Recipe("reap", 0.34)), once).layout == "stock"
    recipe = Recipe("auto", 0.4, target="Q4_K_M")
    job = job_of(asked(model=once, windows=2), Ears())
    made = produce(job, tmp_path / "out", recipe, lambda _: None)
    again, whole = GgufFile(made.built.path), GgufFile(made.rivals[0].path)
    assert again.value("gguftool.base.fingerprint") == open_gguf(once).fingerprint
    assert again.value("gguftool.n_expert") == 4 and whole.arch_value("expert_count") == 4
    assert min(file.value("quantize.imatrix.entries_count") for file in (again, whole)) > 10
    # Where nothing goes, too.
    same = produce(job, tmp_path / "out", replace(recipe, ratio=0.0), lambda _: None).built.path
    assert GgufFile(same).value("gguftool.base.fingerprint") == open_gguf(once).fingerprint
    # Those of the model before are for the first cut only.
    quantize(once, "Q4_K_M", tmp_path / "of-first.gguf", imatrix=first, tools=tools)
    with pytest.raises(GgufToolError, match="was cut from .* they are of another model, or of another version"):
        quantize(
            next((tmp_path / "out").glob("*R-F32.gguf")), "Q4_K_M", tmp_path / "no.gguf", imatrix=first, tools=tools
        )


def test_the_types_of_a_file_that_was_pruned_before_are_planned_as_they_are_written(tiny, llama, runtime, tmp_path):
    """Rows of 480 are not for Q4_K: gguftool's own type in what it has cut, llama.cpp's in any other file."""
    narrow, tools = tmp_path / "narrow.gguf", QuantizeTool(runtime.tool("llama-quantize"))
    first = calibrate_gguf(open_gguf(tiny["olmoe"]), domains(), tmp_path / "work", llama=llama, obs=False)
    assert prune(tiny["olmoe"], make_plan(first, Recipe("enp", 0.375)), narrow).layout == "stock"
    stats = calibrate_gguf(open_gguf(narrow), domains(), tmp_path / "work", llama=llama, obs=False)
    assert (stats.model.n_ff_exp, stats.model.pruned, first.model.pruned) == (480, True, False)
    for ratio in (0.0, 0.34):
        plan, pruned, out = (
            make_plan(stats, Recipe("reap", ratio, target="Q4_K_M")), tmp_path / "pruned.gguf", tmp_path / "out.gguf"
        )  # fmt: skip
        prune(narrow, plan, pruned, force=True)
        quantize(pruned, "Q4_K_M", out, imatrix=stats, tools=tools, force=True)
        written = {spec.name: (spec.ne, spec.type) for spec in GgufFile(out).tensors}
        assert {spec.name: (spec.ne, spec.type) for spec in plan.encoded} == written
        assert written["blk.0.ffn_down_exps.weight"][1] in ("IQ4_NL", "Q8_0")
        assert plan.encoded_bytes == sum(spec.padded_bytes for spec in GgufFile(out).tensors)


def test_refusals_come_before_the_first_pass(asked, q4, tmp_path):
    for options, words in (
        ({"refit": "sequential"}, "refit it plainly"),
        ({"method": "dern", "ratio": 0.25}, "dern needs the checkpoint"),
        ({"device": "cuda"}, "on the CPU"),
        ({"dtype": "bfloat16"}, "in its own types"),
    ):
        with pytest.raises(GgufToolError, match=words):
            carry_out(asked(model=q4, **options), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_commands_take_a_gguf(q4, tmp_path, llama):
    from click.testing import CliRunner

    text = str(builtin.texts()["calib_code"])

    def call(*args: object) -> dict:
        done = CliRunner().invoke(cli, [*map(str, args), "--json", "--quiet"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    limits = ("--data", text, "--windows", 2, "--ctx", 128)
    stats, plan, weights = (tmp_path / name for name in ("s.safetensors", "plan.json", "w.safetensors"))
    assert call("calibrate", q4, *limits, "-o", stats)["tokens"] == 256
    call("plan", stats, "--method", "auto", "--ratio", 0.4, "-o", plan)
    assert call("refit", q4, "--plan", plan, *limits, "-o", weights)["experts"] > 0
    call("prune", q4, "--plan", plan, "--weights", weights, "-o", tmp_path / "pruned.gguf")
    with safe_open(weights, "numpy") as file:
        assert "refitted on builtin-Q4_K_M.gguf, Q4_K_M" in file.metadata()["gguftool"]
    with pytest.raises(GgufToolError, match="needs the checkpoint.*; refit it plainly"):
        CliRunner().invoke(
            cli, ["refit", str(q4), "--plan", str(plan), *map(str, limits), "-o", str(tmp_path / "x"), "--how", "sequential"],
            catch_exceptions=False,
        )  # fmt: skip
