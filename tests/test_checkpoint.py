"""Checkpoints on disk, their models without weights, and the list of their GGUF tensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gguftool.checkpoint import open_checkpoint
from gguftool.convert import convert
from gguftool.errors import GgufToolError
from gguftool.inventory import gguf_tensors, model_facts
from gguftool.loader import LayerLoader
from models import MODEL_TYPES, tiny_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def original_shards(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", shard="60KB")


@pytest.fixture
def single(original, tmp_path):
    """A checkpoint in one file, to damage."""
    return shutil.copytree(original, tmp_path / "tiny")


@pytest.fixture
def shards(original_shards, tmp_path):
    """A checkpoint in several files, to damage."""
    return shutil.copytree(original_shards, tmp_path / "shards")


def edit_tensors(directory, change):
    """Rewrites the only shard after `change` has worked on the dictionary of its tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(directory, load=False):
    """The message with which the checkpoint is refused: on opening, or when its model is built."""
    with pytest.raises(GgufToolError) as caught:
        checkpoint = open_checkpoint(directory)
        assert load, "the checkpoint was opened"
        LayerLoader(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kwargs", [{"shard": "60KB"}, {"stacked": True}, {"tie_word_embeddings": True}], ids=str)
def test_every_parameter_is_loaded_as_transformers_loads_it(tmp_path, model_type, kwargs):
    directory = tiny_checkpoint(tmp_path / "tiny", model_type, num_hidden_layers=2, **kwargs)
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.n_expert, checkpoint.n_expert_used, checkpoint.n_ff_exp) == (6, 2, 32)
    assert (checkpoint.moe_layers, checkpoint.n_embd, checkpoint.n_vocab) == ((0, 1), 32, 320)
    loader = LayerLoader(checkpoint)
    assert all(parameter.is_meta for parameter in loader.model.parameters())
    for path in ("model.embed_tokens", "model.norm", "lm_head", "model.layers.0", "model.layers.1"):
        loader.materialise(path)
    full = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = dict(full.named_parameters(remove_duplicate=False))
    ours = dict(loader.model.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    buffers = dict(loader.model.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in full.named_buffers())


def test_one_layer_at_a_time(original):
    loader = LayerLoader(open_checkpoint(original), dtype=torch.bfloat16)
    layer = loader.materialise_layer(1)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    loaded = [name for name, parameter in loader.model.named_parameters() if not parameter.is_meta]
    assert loaded
    assert all(name.startswith("model.layers.1.") for name in loaded)
    loader.release_layer(1)
    assert all(parameter.is_meta for parameter in loader.model.parameters())


def test_the_fingerprint_is_that_of_config_and_weights(original, original_shards, single):
    before = open_checkpoint(original).fingerprint
    assert open_checkpoint(original_shards).fingerprint == before
    assert open_checkpoint(single).fingerprint == before
    edit_tensors(single, lambda tensors: tensors["model.layers.1.mlp.gate.weight"][0].add_(1))
    changed = open_checkpoint(single).fingerprint
    assert changed != before
    edit_config(single, rms_norm_eps=1e-5)
    assert open_checkpoint(single).fingerprint not in (before, changed)


def test_a_truncated_shard(shards):
    shard = sorted(shards.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 9, 3, 0):
        shard.write_bytes(whole[:kept])
        message = refusal(shards)
        assert shard.name in message
        assert "truncated" in message


def test_a_damaged_header(single):
    file = single / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    assert "damaged safetensors header" in refusal(single)


def test_a_missing_shard(shards):
    shard = sorted(shards.glob("*.safetensors"))[2]
    shard.unlink()
    assert f"{shard.name}: the shard is missing" in refusal(shards)


@pytest.mark.parametrize(
    "name", ["../elsewhere/model.safetensors", "elsewhere/model.safetensors", "absolute", "model.bin"]
)
def test_an_index_names_shards_beside_it_only(name, single, tmp_path):
    """Refused by its name, though what it names is there and sound."""
    for folder in (tmp_path / "elsewhere", single / "elsewhere"):
        folder.mkdir()
        shutil.copy(single / "model.safetensors", folder)
    shutil.copy(single / "model.safetensors", single / "model.bin")
    name = str(tmp_path / "elsewhere" / "model.safetensors") if name == "absolute" else name
    assert (single / name).is_file()
    map_ = dict.fromkeys(load_file(single / "model.safetensors"), name)
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    assert f"the shard {name[:80]!r} is no name of a .safetensors file" in refusal(single)


def test_an_index_that_promises_more_than_there_is(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.input_layernorm.weight"] = sorted(set(index["weight_map"].values()))[0]
    path.write_text(json.dumps(index))
    assert "lacks model.layers.7.input_layernorm.weight" in refusal(shards)
    path.write_text("{}")
    assert "not a safetensors index" in refusal(shards)


def test_a_tensor_in_another_shard_than_the_index_says(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, own = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = next(shard for shard in index["weight_map"].values() if shard != own)
    path.write_text(json.dumps(index))
    assert f"{own}: {name} is not there according to {path.name}" in refusal(shards)


def test_a_missing_expert_is_found_on_opening(single):
    edit_tensors(single, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    assert "lacks tensor model.layers.1.mlp.experts.3.up_proj.weight" in refusal(single)


def test_a_missing_matrix_is_found_before_any_layer_is_run(single):
    edit_tensors(single, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    assert "lacks tensor model.layers.1.self_attn.k_proj.weight" in refusal(single, load=True)


def test_a_tensor_without_a_place_is_refused(single):
    edit_tensors(single, lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": torch.zeros(2)}))
    assert "model.layers.1.mlp.extra.weight" in refusal(single, load=True)


def test_old_rotary_tensors_are_passed_over(single):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(single, lambda tensors: tensors.update({name: torch.zeros(4)}))
    checkpoint = open_checkpoint(single)
    LayerLoader(checkpoint)
    assert len(gguf_tensors(checkpoint)) == 39


@pytest.mark.parametrize("value", ["32", None, 32.5, 0])
def test_a_size_that_is_no_count(original, value):
    """However much of config.json transformers lets pass."""
    checkpoint = replace(open_checkpoint(original), config=SimpleNamespace(hidden_size=value))
    with pytest.raises(GgufToolError, match=f"hidden_size = {value!r}, not a count"):
        _ = checkpoint.n_embd


def test_a_dense_checkpoint_is_refused_on_opening(tmp_path):
    directory = tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=1, mlp_only_layers=[0])
    assert "no tensor is that of a routed expert" in refusal(directory)


@pytest.mark.parametrize("inner", [False, True])
def test_a_dense_model_of_a_family_without_a_row_is_called_dense(inner, tmp_path):
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    path.write_text(json.dumps({"model_type": "llama"} | ({"text_config": sizes} if inner else sizes)))
    assert "config.json (llama) names no experts, so this is a dense model" in refusal(tmp_path)
    sizes["num_experts"] = 4
    path.write_text(json.dumps({"model_type": "llama"} | ({"text_config": sizes} if inner else sizes)))
    assert "no MoE architecture 'llama' is known" in refusal(tmp_path)


def test_config_and_weights_that_disagree(single):
    edit_config(single, num_experts=7, num_local_experts=7)
    assert "lacks tensor model.layers.0.mlp.experts.6.gate_proj.weight" in refusal(single)
    edit_config(single, num_experts=5, num_local_experts=5)
    assert "layer 0 has more experts than config.json's 5" in refusal(single)
    edit_config(single, num_experts=6, num_local_experts=6, moe_intermediate_size=16)
    assert "has shape [32, 32], config.json says [16, 32]" in refusal(single)
    edit_config(single, moe_intermediate_size=32, num_experts_per_tok=9)
    assert "9 of 6 experts" in refusal(single)
    edit_config(single, num_experts_per_tok=2, vocab_size=400)
    assert "says [400, 32]" in refusal(single, load=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_moa"}, "did you mean qwen3_moe"),
        ({"model_type": "gpt2"}, "no MoE architecture 'gpt2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_checkpoints_that_are_not_ours(single, fields, message):
    edit_config(single, **fields)
    assert message in refusal(single)


def test_other_number_formats_are_named(single):
    edit_tensors(single, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double()}))
    assert "lm_head.weight is F64" in refusal(single)


def test_directories_that_are_no_checkpoint(tmp_path, single):
    assert "no config.json" in refusal(tmp_path)
    assert "no such checkpoint directory" in refusal(tmp_path / "nowhere")
    assert "a file, and a checkpoint's directory is wanted here" in refusal(single / "config.json")
    (single / "model.safetensors").unlink()
    assert "no model*.safetensors" in refusal(single)
    (single / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(single)


def test_a_hub_id_is_fetched(monkeypatch, original):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(original))
    assert open_checkpoint("someone/A-Model").name == "A-Model"
    assert asked == ["someone/A-Model"]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(name, **_):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert "someone/A-Model: no such directory, and the hub does not give it (no route)" in refusal("someone/A-Model")


def test_the_tokenizer(original, tmp_path):
    assert open_checkpoint(original).tokenizer().eos_token_id == 0
    bare = shutil.copytree(original, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(GgufToolError, match="tokenizer cannot be loaded"):
        open_checkpoint(bare).tokenizer()


def test_the_tensors_of_a_gguf_by_hand(tmp_path):
    directory = tiny_checkpoint(tmp_path / "tiny", "qwen2_moe", num_hidden_layers=1, tie_word_embeddings=True)
    specs = {spec.name: (spec.ne, spec.type) for spec in gguf_tensors(open_checkpoint(directory))}
    assert specs == {
        "token_embd.weight": ((32, 320), "BF16"),
        "output_norm.weight": ((32,), "F32"),
        "blk.0.attn_norm.weight": ((32,), "F32"),
        "blk.0.ffn_norm.weight": ((32,), "F32"),
        "blk.0.attn_q.weight": ((32, 32), "BF16"),
        "blk.0.attn_q.bias": ((32,), "F32"),
        "blk.0.attn_k.weight": ((32, 16), "BF16"),
        "blk.0.attn_k.bias": ((16,), "F32"),
        "blk.0.attn_v.weight": ((32, 16), "BF16"),
        "blk.0.attn_v.bias": ((16,), "F32"),
        "blk.0.attn_output.weight": ((32, 32), "BF16"),
        "blk.0.ffn_gate_inp.weight": ((32, 6), "F32"),
        "blk.0.ffn_gate_inp_shexp.weight": ((32, 1), "F32"),
        "blk.0.ffn_gate_shexp.weight": ((32, 24), "BF16"),
        "blk.0.ffn_up_shexp.weight": ((32, 24), "BF16"),
        "blk.0.ffn_down_shexp.weight": ((24, 32), "BF16"),
        "blk.0.ffn_gate_exps.weight": ((32, 32, 6), "BF16"),
        "blk.0.ffn_up_exps.weight": ((32, 32, 6), "BF16"),
        "blk.0.ffn_down_exps.weight": ((32, 32, 6), "BF16"),
    }


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        *((model_type, {"shard": "60KB"}) for model_type in ("qwen2_moe", "olmoe", "mixtral")),
        ("qwen3_moe", {"dtype": "float32", "num_hidden_layers": 11, "shard": "200KB"}),
        ("qwen3_moe", {"stacked": True, "dtype": "float16", "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_the_converter_writes_what_the_inventory_says(tmp_path, plain_runtime, model_type, kwargs):
    if model_type == "mixtral":
        pytest.importorskip("sentencepiece", reason="llama.cpp's converter of Llama vocabularies imports it")
    directory = tiny_checkpoint(tmp_path / "tiny", model_type, **kwargs)
    convert(directory, tmp_path / "out.gguf", plain_runtime, pre_tokenizer="qwen2")
    written = [
        (tensor.name, tuple(int(n) for n in tensor.shape), tensor.tensor_type.name, int(tensor.n_bytes))
        for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    ]
    assert [(t.name, t.ne, t.type, t.nbytes) for t in gguf_tensors(open_checkpoint(directory))] == written


def test_a_model_of_the_hub_is_converted(monkeypatch, original, tmp_path, plain_runtime):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(original))
    convert(Path("someone/A-Model"), tmp_path / "hub.gguf", plain_runtime, pre_tokenizer="qwen2")
    convert(original, tmp_path / "here.gguf", plain_runtime, pre_tokenizer="qwen2")
    assert (tmp_path / "hub.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()


def test_the_facts_of_a_model(original):
    checkpoint = open_checkpoint(original)
    facts = model_facts(checkpoint)
    assert (facts.name, facts.model_type, facts.gguf_arch) == ("tiny", "qwen3_moe", "qwen3moe")
    assert (facts.block_count, facts.moe_layers, facts.n_expert, facts.n_expert_used) == (3, (0, 1, 2), 6, 2)
    assert (facts.n_ff_exp, facts.n_embd, facts.n_vocab) == (32, 32, 320)
    assert facts.tensors == gguf_tensors(checkpoint)
    assert facts.fingerprint == checkpoint.fingerprint


def test_layers_that_llama_cpp_cannot_run_are_refused(tmp_path):
    """llama.cpp's qwen3moe has no dense layers."""
    directory = tiny_checkpoint(tmp_path / "tiny", mlp_only_layers=[0])
    checkpoint = open_checkpoint(directory)
    assert checkpoint.moe_layers == (1, 2)
    with pytest.raises(GgufToolError, match=r"no name for model.layers.0.mlp.down_proj.weight in qwen3moe"):
        gguf_tensors(checkpoint)
