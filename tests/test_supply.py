"""What is let in: pinned sources, no code out of checkpoints, no pickles, chat templates in a sandbox, licences that are kept."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from gguftool import chat, runtime, runtime_build
from gguftool.chat import ChatTemplate
from gguftool.checkpoint import open_checkpoint
from gguftool.convert import convert
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.loader import LayerLoader
from models import tiny_checkpoint

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gguftool"
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}
PICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    """Calls of anything that is called one of `names`, as a function or as a method."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in names
    ]


def keywords(call: ast.Call) -> dict[str, object]:
    return {word.arg or "**": getattr(word.value, "value", None) for word in call.keywords}


@pytest.mark.parametrize("name", TREES)
def test_no_module_trusts_code_or_pickles(name):
    tree = TREES[name]
    for call in calls(tree, "from_pretrained", "from_config"):
        assert keywords(call).get("trust_remote_code") is False, f"{name}, line {call.lineno}"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert getattr(node.value, "value", None) is False, f"{name}, line {node.value.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not PICKLES & {each.split(".")[0] for each in found}, f"{name}, line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", "") == "torch":
            # The one place that mentions it takes it away.
            assert name == "hf_to_gguf" and isinstance(node.ctx, ast.Store), f"{name}, line {node.lineno}"
    for call in calls(tree, "load", "memmap", "fromfile"):
        assert "allow_pickle" not in keywords(call), f"{name}, line {call.lineno}"  # numpy refuses pickles by itself
    # model.eval() is none of these.
    assert not [call for call in calls(tree, "eval", "exec", "import_module") if isinstance(call.func, ast.Name)], name


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """A checkpoint whose configuration, model and tokenizer are code beside it, which leaves a file when it is run."""
    folder, sprung = tiny_checkpoint(tmp_path / "model"), tmp_path / "sprung"
    code = f"""
open({str(sprung)!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PretrainedConfig): model_type = "trap"
class Model(PreTrainedModel): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
    (folder / "trap.py").write_text(code)
    autos = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    for name, own in (("config", autos), ("tokenizer_config", {"AutoTokenizer": [None, "trap.Tokenizer"]})):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": own}))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return folder, sprung


def test_the_trap_is_one(trapped):
    folder, sprung = trapped
    code = "import sys; from transformers import AutoTokenizer as A; A.from_pretrained(sys.argv[1], trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
    assert sprung.exists()


def test_code_in_a_checkpoint_is_not_run(trapped):
    folder, sprung = trapped
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer().encode("the expert", add_special_tokens=False)
    LayerLoader(checkpoint).materialise_layer(0)
    assert not sprung.exists()


def test_code_in_a_checkpoint_is_not_run_by_the_converter(trapped, tmp_path, runtime):
    folder, sprung = trapped
    convert(folder, tmp_path / "out.gguf", runtime, pre_tokenizer="qwen2")
    assert not sprung.exists() and GgufFile(tmp_path / "out.gguf").tensors


def test_what_the_converter_trusts_is_not_run(trapped, tmp_path, runtime):
    """A converter that loads the tokenizer as llama.cpp's does for some families: with trust_remote_code."""
    folder, sprung = trapped
    own = tmp_path / "runtime" / "convert"
    (own / "conversion").mkdir(parents=True)
    (own / "conversion" / "base.py").write_text("class ModelBase: set_type = None\nclass TextModel(ModelBase): pass\n")
    (own / "convert_hf_to_gguf.py").write_text(
        "import sys\nfrom transformers import AutoTokenizer\n"
        "def main(): sys.exit(str(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)))\n"
    )
    trusting = (runtime.convert_dir / "conversion" / "deepseek.py").read_text()
    assert "trust_remote_code=True" in trusting  # else this test, and the guard, are needed no more
    with pytest.raises(GgufToolError):
        convert(folder, tmp_path / "out.gguf", replace(runtime, path=own.parent))
    assert not sprung.exists() and not (tmp_path / "out.gguf").exists()


def test_a_checkpoint_that_cannot_do_without_its_code_is_refused(trapped, tmp_path, runtime):
    """A tokenizer that transformers has no class for: llama.cpp's converter would run the checkpoint's own."""
    folder, sprung = trapped
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Tokenizer"}))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(GgufToolError, match="tokenizer cannot be loaded"):
        open_checkpoint(folder).tokenizer()
    with pytest.raises(GgufToolError) as error:
        convert(folder, tmp_path / "out.gguf", runtime, pre_tokenizer="qwen2")
    assert "\n" not in str(error.value) and not sprung.exists() and not (tmp_path / "out.gguf").exists()


def test_whatever_else_asks_for_code_or_a_pickle_is_refused(trapped, tmp_path):
    """Behind `forbid_code` a class is asked for in the way that no argument guards, and a pickle is loaded."""
    folder, sprung = trapped
    (tmp_path / "weights.bin").write_bytes(pickle.dumps({"a": 1}))
    code = f"""
from gguftool.hf_to_gguf import forbid_code
forbid_code()
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
for auto in (AutoConfig, AutoTokenizer):
    auto.from_pretrained({str(folder)!r}, trust_remote_code=True)
for wrong in (
    lambda: get_class_from_dynamic_module("trap.Tokenizer", {str(folder)!r}),
    lambda: torch.load({str(tmp_path / "weights.bin")!r}),
):
    try:
        wrong()
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gguftool runs none" in done.stdout and "gguftool reads none" in done.stdout and not sprung.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_checkpoints_are_refused_unread(name, tmp_path, runtime):
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    for refuses in (lambda: open_checkpoint(folder), lambda: convert(folder, tmp_path / "out.gguf", runtime)):
        with pytest.raises(GgufToolError, match=f"{name} is a pickle"):
            refuses()


HOSTILE = {
    "{{ messages.__class__.__mro__ }}": "unsafe|undefined",
    "{{ ''.__class__.__base__.__subclasses__() }}": "unsafe|undefined",
    "{{ messages.append({}) }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe|undefined",
    "{% for i in range(10000000) %}{% endfor %}": "Range too big",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "recursion",
    "{% include '/etc/hostname' %}": "loader",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_chat_templates_stay_in_their_sandbox(source, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    with pytest.raises(GgufToolError, match=HOSTILE[source]) as error:
        print(ChatTemplate({"default": source}, {}).render([{"role": "user", "content": "hi"}], None, "chats, line 1"))
    assert str(error.value).startswith("chats, line 1: the chat template") and "\n" not in str(error.value)


def test_one_wrong_byte_of_the_source_is_refused(tmp_path, monkeypatch):
    """The real source distribution, one bit changed: from the cache, and given by hand, which is left where it is."""
    data = bytearray(runtime.fetch().read_bytes())
    data[len(data) // 2] ^= 1
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "sdist" / f"{runtime.read_base().stem}.tar.gz"
    cached.parent.mkdir(parents=True)
    given = tmp_path / "given.tar.gz"
    for path in (cached, given):
        path.write_bytes(data)
    with pytest.raises(GgufToolError, match="not the pinned"):
        runtime.fetch()
    assert not cached.exists()
    monkeypatch.setenv(runtime_build.SDIST, str(given))
    with pytest.raises(GgufToolError, match="not the pinned"):
        runtime.fetch()
    assert given.exists() and not cached.exists()


def test_pip_is_told_the_hash(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append((command, Path(command[command.index("-r") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(runtime_build.subprocess, "run", run)
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    monkeypatch.delenv(runtime_build.SDIST, raising=False)
    with pytest.raises(GgufToolError, match="pip could not fetch"):
        runtime.fetch()
    ((command, pin),), base = asked, runtime.read_base()
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert pin == f"{base.package}=={base.version} --hash=sha256:{base.sha256}\n"


def test_the_source_may_be_brought_by_hand(tmp_path, monkeypatch):
    source = runtime.fetch()
    given = tmp_path / "by-hand.tar.gz"
    shutil.copy(source, given)
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(runtime_build.SDIST, str(given))
    assert runtime.fetch() == given and not (tmp_path / "cache").exists()
    monkeypatch.setenv(runtime_build.SDIST, str(tmp_path / "none"))
    with pytest.raises(GgufToolError, match="no such file"):
        runtime.fetch()


def test_without_a_network_it_is_said_what_to_do(tmp_path, monkeypatch):
    """pip is real, its index is a port where nobody listens."""
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(GgufToolError, match="pip could not fetch llama-cpp-python") as error:
        runtime.fetch()
    base, text = runtime.read_base(), str(error.value)
    assert base.sha256 in text and str(tmp_path / "sdist" / f"{base.stem}.tar.gz") in text and "\n" not in text
    assert runtime_build.SDIST in text and [path.name for path in tmp_path.rglob("*")] == ["sdist"]


def test_versions_are_pinned_and_licences_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if "==" in line
    )
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {text.split(">")[0].split("=")[0].split("[")[0].lower().replace("_", "-") for text in named}
    assert names <= {name.lower().replace("_", "-") for name in pins}, "a dependency without a pinned version"
    assert runtime.read_base().version == pins["llama-cpp-python"] and len(runtime.read_base().sha256) == 64
    assert project["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text()
    told = (ROOT / "LICENSES" / "README.md").read_text()
    for name in project["license-files"]:
        assert list(ROOT.glob(name)), name
    for path in (ROOT / "LICENSES").glob("*.txt"):
        assert path.name in told and len(path.read_text()) > 500
    assert "ggml authors" in (ROOT / "LICENSES/llama.cpp-MIT.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (ROOT / "LICENSES/PSF-2.0.txt").read_text()
