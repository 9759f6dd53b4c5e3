"""gguftool from Python: the dozen lines of the README, and that importing it loads nothing."""

from __future__ import annotations

import ast
import inspect as python_inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gguftool
from gguftool import builtin
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.recipe_file import RunRecipe
from gguftool.sources import Source
from gguftool.stats import CalibrationStats
from models import sample_text, tiny_checkpoint
from test_durable import HOLDER

COMMANDS = set(gguftool.__all__) - {"GgufToolError", "__version__"}


def test_importing_it_loads_nothing():
    code = (
        "import sys, gguftool; before = set(sys.modules); gguftool.compress; after = set(sys.modules)\n"
        "print(*before, '|', *after)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (set(part.split()) for part in done.stdout.split("|"))
    assert not {"torch", "numpy", "rich", "click", "gguftool.api"} & before
    assert "gguftool.api" in after and not {"torch", "numpy", "rich", "click"} & after


def test_functions_are_named_as_commands_and_their_options_as_options():
    from gguftool import api

    assert set(cli.commands) >= COMMANDS
    keys = {*api.CompressOptions.__annotations__, "model"}
    assert keys == set(RunRecipe.__dataclass_fields__) - {"about", "made"}
    for name in COMMANDS - {"compress"}:
        options = {option.name for option in cli.commands[name].params}
        options |= {text.lstrip("-").replace("-", "_") for option in cli.commands[name].params for text in option.opts}
        parameters = python_inspect.signature(getattr(gguftool, name)).parameters
        own = set(parameters) - {"progress", "options"}
        assert own <= options, (name, own - options)
        assert getattr(gguftool, name).__doc__


def test_a_module_of_the_same_name_does_not_take_the_functions_place():
    import gguftool.calibrate
    import gguftool.plan
    import gguftool.tiers
    from gguftool.plan import PrunePlan

    assert python_inspect.isfunction(gguftool.plan) and python_inspect.isfunction(gguftool.calibrate)
    assert PrunePlan.__module__ == "gguftool.plan" and gguftool.tiers.__name__ == "gguftool.tiers"
    assert {"compress", "plan"} <= set(dir(gguftool))
    with pytest.raises(AttributeError, match="no attribute 'comprss'"):
        _ = gguftool.comprss
    assert gguftool.GgufToolError is GgufToolError


def lines_of_the_readme() -> str:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    return block


def test_the_lines_of_the_readme_run(checkpoint_dir, base_gguf, tmp_path, monkeypatch, runtime):
    block = lines_of_the_readme()
    assert len(block.splitlines()) <= 13
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL_DIR").symlink_to(checkpoint_dir)
    texts = builtin.texts()
    for name, text in (("code.txt", "calib_code"), ("wiki.txt", "eval_prose")):
        (tmp_path / name).write_text(texts[text].read_text(encoding="utf-8")[:6000], encoding="utf-8")
    found: dict = {}
    # The built-in model's vocabulary is one that llama.cpp's converter has to be told.
    block = block.replace('out="base.gguf"', 'out="base.gguf", pre_tokenizer="qwen2"')
    exec(compile(ast.parse(block), "README.md", "exec"), found)
    assert (tmp_path / "pruned-Q4_K_M.gguf").is_file()
    assert found["plan"].recipe.target == "Q4_K_M" and found["found"].divergence.kld.mean > 0
    assert gguftool.inspect("pruned-Q4_K_M.gguf", check=True).layout == "tiered"
    again = gguftool.plan(CalibrationStats.load(Path("stats.safetensors")), method="auto", ratio=0.4, target="Q4_K_M")
    assert again.kept_hash == found["plan"].kept_hash
    report = gguftool.compress(
        "base.gguf", out="out", recipe="code", data=["code.txt"], eval=["wiki.txt"], method="global", quant="q8_0",
        windows=2, eval_windows=1, backend="cpu", no_extras=True,
    )  # fmt: skip
    assert "speed" not in report.facts and "provenance" in report.facts
    assert report.failures == () and gguftool.verify("out", fast=True) == []
    with open(next((tmp_path / "out").glob("*GLOBAL40-Q8_0.gguf")), "ab") as file:
        file.write(b"x")
    assert len(gguftool.verify("out", fast=True)) == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert len(gguftool.verify("out")) == 1
    assert {path.name for path in tmp_path.iterdir()} == left


def test_what_the_report_has_besides_is_the_callers(tmp_path, monkeypatch):
    from gguftool import runs
    from gguftool.extras import ALL, Extras

    seen = []

    def carry_out(recipe, out, ears, extras):
        seen.append(extras)
        raise GgufToolError("enough")

    monkeypatch.setattr(runs, "carry_out", carry_out)
    for given in ({}, {"prompts": ["Hello", "def f("]}, {"no_extras": True}):
        with pytest.raises(GgufToolError, match="enough"):
            gguftool.compress("x", out=tmp_path, data=["a"], eval=["b"], ratio=0.4, **given)
    assert seen == [ALL, Extras(True, ("Hello", "def f(")), Extras(False)]
    options = {option.name for option in cli.commands["compress"].params}
    own = {"prompts", "no_extras", "out"}
    assert own <= set(python_inspect.signature(gguftool.compress).parameters) & options


def test_what_is_wrong_is_said_as_by_the_command(tmp_path):
    with pytest.raises(GgufToolError, match=r"write data=\['code.txt'\]"):
        gguftool.calibrate("x", data="code.txt", out=tmp_path / "s")
    with pytest.raises(GgufToolError, match=r"write prompts=\['Hello'\]"):
        gguftool.compress("x", out=tmp_path / "o", data=["a"], eval=["b"], ratio=0.4, prompts="Hello")
    with pytest.raises(GgufToolError, match="--no-extras runs no model"):
        gguftool.compress("x", out=tmp_path / "o", data=["a"], eval=["b"], ratio=0.4, prompts=["Hello"], no_extras=True)
    with pytest.raises(GgufToolError, match="no such stats file"):
        gguftool.plan(tmp_path / "none", ratio=0.4)
    with pytest.raises(GgufToolError, match="--eval FILE"):
        gguftool.compress("x", out=tmp_path / "o", data=[Source("a")], ratio=0.4)
    (tmp_path / "p.json").touch()
    with pytest.raises(GgufToolError, match="--force"):
        gguftool.plan(tmp_path / "none", ratio=0.4, out=tmp_path / "p.json")
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny checkpoint, and a text beside it."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text(sample_text(300))
    return tiny_checkpoint(folder / "model")


@pytest.mark.parametrize("gguf", [False, True], ids=["checkpoint", "GGUF"])
@pytest.mark.parametrize("name", ["calibrate", "refit"])
def test_a_second_run_on_one_output_is_sent_away(name, gguf, tiny, tmp_path):
    """Whatever it was asked for: it would clear the state of the first one."""
    out, state = tmp_path / "out.safetensors", tmp_path / "out.safetensors.work" / "state.json"
    state.parent.mkdir()
    state.write_text("of the first")
    model = tmp_path / "x.gguf" if gguf else tiny
    run = getattr(gguftool, name)
    more = {"plan": tmp_path / "plan.json"} if name == "refit" else {}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(state.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "here\n"
        with pytest.raises(GgufToolError, match=f"out.safetensors.work: process {other.pid} on .* is writing it"):
            run(model, data=[tiny.parent / "text.txt"], out=out, ctx=32, **more)
        assert state.read_text() == "of the first"
        other.kill()


def test_the_functions_refuse_what_the_commands_refuse(tiny, tmp_path):
    text, out = tiny.parent / "text.txt", tmp_path / "out.safetensors"
    missing = tmp_path / "missing.txt"
    with pytest.raises(GgufToolError, match="device 'abacus' cannot be used"):
        gguftool.calibrate(tiny, data=[missing], out=out, device="abacus")  # before any text is read
    with pytest.raises(GgufToolError, match="--part '3/2'"):
        gguftool.calibrate(tiny, data=[text], out=out, part="3/2")
    with pytest.raises(GgufToolError, match="a refit is plain or sequential, not 'twice'"):
        gguftool.refit(tiny, plan=tmp_path / "plan.json", data=[text], out=out, how="twice")
    with pytest.raises(GgufToolError, match="text.txt/out.work: cannot be written"):
        gguftool.calibrate(tiny, data=[text], out=text / "out")
    assert not list(tmp_path.iterdir())
    gguftool.calibrate(tiny, data=[text], out=out, ctx=32, part="1/2")
    command = ["calibrate", tiny, "--data", text, "--ctx", 32, "--part", "1/2", "-o", tmp_path / "own", "--quiet"]
    cli.main([str(part) for part in command], standalone_mode=False)
    assert out.read_bytes() == (tmp_path / "own").read_bytes()
    assert (
        gguftool.calibrate(tiny, data=[text], out=out, ctx=32, force=True).tokens
        > CalibrationStats.load(tmp_path / "own").tokens
    )
