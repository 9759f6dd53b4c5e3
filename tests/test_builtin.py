"""The built-in model: unpacks to a checkpoint that transformers loads whole, and has really learned its texts."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gguftool import builtin
from gguftool.errors import GgufToolError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOW = 512
# Measured losses are in builtin_data/training.json; a model that knows nothing has log(vocabulary), 7.3.
SLACK = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin.unpack(tmp_path_factory.mktemp("builtin") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[object]:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    yield loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> object:
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


def windows(tokenizer, name: str, count: int):  # type: ignore[no-untyped-def]
    """int64 [count, WINDOW], spread evenly over the text."""
    ids = tokenizer.encode(builtin.texts()[name].read_text(encoding="utf-8"), add_special_tokens=False)
    starts = np.linspace(0, len(ids) - WINDOW, count).astype(int)
    return torch.tensor([ids[start : start + WINDOW] for start in starts])


def test_all_of_it_stays_under_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in builtin.DATA.rglob("*") if path.is_file()) < 8_000_000


def test_no_tensor_is_lost_or_added(checkpoint: Path, model) -> None:  # type: ignore[no-untyped-def]
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
        first = file.get_tensor("model.layers.0.mlp.experts.0.up_proj.weight")
    config = model.config
    assert len(names) == 2 + config.num_hidden_layers * (9 + 3 * config.num_experts)
    width = config.moe_intermediate_size
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj[0, width:], first.float())
    assert first.shape == (width, config.hidden_size)


def test_weights_are_the_bfloat16_of_value_times_scale(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(builtin.DATA / builtin.WEIGHTS)
    unpacked = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(unpacked[name], (stored[name].float() * stored[name + ".scale"].float()[:, None]).bfloat16())
    norm = "model.norm.weight"
    assert torch.equal(unpacked[norm], stored[norm].bfloat16())


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # the last two lie half way, down to even and up to even
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(builtin._to_bf16(values), expected)


@pytest.mark.parametrize("text", ["def f(x):\n    return x + 1\n", "Grüße, 你好 🙂\t\n\n  end", ""])
def test_tokenizer_gives_the_text_back(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_is_the_one_of_its_file(checkpoint: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = builtin.texts()["eval_code"].read_text(encoding="utf-8")[:20000]
    assert tokenizer.encode(text) == plain.encode(text).ids
    assert tokenizer.eos_token_id == 0 and tokenizer.bos_token_id is None
    assert len(tokenizer) == json.loads((checkpoint / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("domain", ["code", "prose"])
def test_held_out_text_is_predicted_as_well_as_the_training_says(domain: str, model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    training = json.loads((builtin.DATA / "training.json").read_text())
    measured = training["held_out_loss_int8"][domain]
    batch = windows(tokenizer, f"eval_{domain}", 8)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert loss < measured + SLACK < 0.7 * math.log(model.config.vocab_size)
    assert loss > measured - 2 * SLACK


def test_every_expert_is_used(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    batch = torch.cat([windows(tokenizer, "eval_code", 4), windows(tokenizer, "eval_prose", 4)])
    with torch.no_grad():
        routers = model(input_ids=batch, output_router_logits=True).router_logits
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    assert len(routers) == model.config.num_hidden_layers
    for logits in routers:
        counts = torch.bincount(logits.topk(top_k, dim=-1).indices.flatten(), minlength=experts)
        assert counts.min() > 0.05 * counts.sum() / experts


def test_texts_are_as_large_as_their_use_needs(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert set(builtin.texts()) == {"calib_code", "eval_code", "calib_prose", "eval_prose"}
    for path in builtin.texts().values():
        text = path.read_text(encoding="utf-8")
        assert 60_000 < len(text.encode()) < 130_000
        assert len(tokenizer.encode(text)) > 40 * WINDOW


def test_unpacking_again_writes_nothing(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").stat()
    assert builtin.unpack(checkpoint) == checkpoint
    after = (checkpoint / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_damaged_copy_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    builtin.unpack(copy)
    assert (copy / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_somebodys_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GgufToolError, match="not an unpacked built-in model"):
        builtin.unpack(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "DATA", tmp_path)
    with pytest.raises(GgufToolError, match=r"config\.json is missing"):
        builtin.unpack(tmp_path / "model")
    with pytest.raises(GgufToolError, match="missing"):
        builtin.texts()


def test_importing_and_unpacking_need_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from gguftool import builtin; "
        "builtin.unpack(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)
