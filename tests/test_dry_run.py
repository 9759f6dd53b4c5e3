"""--dry-run: nothing is written, and what is said is what then comes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import gguftool
from gguftool import builtin
from gguftool.asked import Asked
from gguftool.checkpoint import open_checkpoint
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.expand import expand
from gguftool.gguf_file import GgufFile, check_output
from gguftool.gguf_model import open_gguf
from gguftool.inventory import model_facts
from gguftool.overrides import Overrides
from gguftool.plan import PrunePlan
from gguftool.planner import make_plan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe import Recipe
from gguftool.refitting import checked, kind_of
from gguftool.sources import Source
from gguftool.stats import CalibrationStats
from gguftool.writer import prune
from models import sample_text, tiny_checkpoint


@pytest.fixture
def ask(capsys):
    def run(*arguments):
        capsys.readouterr()  # what a real run may have said before
        cli.main([*map(str, arguments), "--dry-run", "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(tmp_path):
    """A command that is refused for what `words` say, with --dry-run as without, and leaves nothing behind."""

    def check(words, *arguments):
        for dry in (["--dry-run"], []):
            with pytest.raises(GgufToolError, match=words):
                cli.main([*map(str, arguments), *dry, "--quiet"], standalone_mode=False)
            assert not list(tmp_path.iterdir())

    return check


@pytest.fixture(scope="module")
def files(tmp_path_factory, stats, base_gguf, runtime):
    """A plan, its stats and its tiered file; further plans, of the GGUF too."""
    folder = tmp_path_factory.mktemp("dry")
    stats.save(folder / "stats.safetensors")
    plan = make_plan(stats, Recipe("global", 0.4))
    plan.save(folder / "plan.json")
    prune(base_gguf, plan, folder / "pruned.gguf", ggml=runtime.ggml)
    make_plan(stats, Recipe("global", 0.0)).save(folder / "all.json")
    make_plan(stats, Recipe("reap", 0.25)).save(folder / "drop.json")
    blank = CalibrationStats.blank(open_gguf(base_gguf).facts())
    make_plan(blank, Recipe("auto", 0.4)).save(folder / "gguf.json")
    make_plan(blank, Recipe("reap", 0.25)).save(folder / "gguf-drop.json")
    return folder


def tensors(path):
    return [(spec.name, spec.type) for spec in GgufFile(path).tensors]


def test_quantize(ask, files, tmp_path, runtime):
    arguments = ("quantize", files / "pruned.gguf", "Q4_K_M", "--imatrix", files / "stats.safetensors", "-o")
    said = ask(*arguments, tmp_path / "q.gguf")
    assert not list(tmp_path.iterdir()) and said["written"] is False
    quantize(files / "pruned.gguf", "Q4_K_M", tmp_path / "q.gguf", tools=QuantizeTool(runtime.tool("llama-quantize")))
    # llama-quantize writes the tensors in an order of its own.
    assert sorted((one["name"], one["type"]) for one in said["tensors"]) == sorted(tensors(tmp_path / "q.gguf"))
    assert said["tensor_bytes"] == sum(spec.padded_bytes for spec in GgufFile(tmp_path / "q.gguf").tensors)
    with pytest.raises(GgufToolError, match="known are"):
        ask("quantize", files / "pruned.gguf", "Q9_X", "-o", tmp_path / "x.gguf")
    with pytest.raises(GgufToolError, match="importance matrix"):
        ask("quantize", files / "pruned.gguf", "IQ2_XS", "-o", tmp_path / "x.gguf")


def test_expand(ask, files, tmp_path):
    said = ask("expand", files / "pruned.gguf", "-o", tmp_path / "stock.gguf")
    assert not list(tmp_path.iterdir())
    expand(files / "pruned.gguf", tmp_path / "stock.gguf")
    assert [(one["name"], one["type"]) for one in said["tensors"]] == tensors(tmp_path / "stock.gguf")


def test_convert(ask, checkpoint_dir, base_gguf, tmp_path):
    said = ask("convert", checkpoint_dir, "--pre-tokenizer", "qwen2", "-o", tmp_path / "base.gguf")
    assert not list(tmp_path.iterdir())
    assert sorted((one["name"], one["type"]) for one in said["tensors"]) == sorted(tensors(base_gguf))
    with pytest.raises(GgufToolError, match="--outtype f16"):
        ask("convert", checkpoint_dir, "--outtype", "f16", "-o", tmp_path / "base.gguf")


def test_convert_of_a_model_that_only_the_converter_knows(ask, tmp_path, runtime):
    model = tiny_checkpoint(tmp_path / "model", "qwen3")
    arguments = ("convert", model, "--pre-tokenizer", "qwen2", "-o", tmp_path / "x.gguf")
    said = ask(*arguments)
    assert (
        said["written"] is False and said["tensors"] is None and "no MoE architecture 'qwen3' is known" in said["why"]
    )
    assert list(tmp_path.iterdir()) == [model]
    cli.main([*map(str, arguments), "--quiet"], standalone_mode=False)
    assert tensors(tmp_path / "x.gguf")


def test_convert_is_refused_for_a_pre_tokenizer_that_is_missing_or_unknown(refused, checkpoint_dir, tmp_path, runtime):
    convert = ("convert", checkpoint_dir, "-o", tmp_path / "base.gguf")
    refused("does not know this vocabulary's pre-tokenizer", *convert)
    refused("knows no pre-tokenizer 'qwen22'; near are qwen2", *convert, "--pre-tokenizer", "qwen22")


def run(*arguments):
    cli.main([*map(str, arguments), "--quiet"], standalone_mode=False)


def test_an_output_that_is_an_input_is_refused(files, checkpoint_dir, base_gguf, tmp_path, llama):
    here, model, odd, base = (tmp_path / name for name in ("files", "model", "odd", "base.gguf"))
    shutil.copytree(files, here)
    shutil.copytree(checkpoint_dir, model)
    shutil.copyfile(base_gguf, base)
    (here / "link.gguf").symlink_to(base)
    (here / "text.txt").write_text("a text")
    (here / "weights.safetensors").write_text("weights")
    odd.mkdir()  # an index may call a shard as it likes
    (odd / "model.safetensors.index.json").write_text('{"weight_map": {"a": "weights.safetensors"}}')
    (odd / "weights.safetensors").write_text("a shard")
    (odd / "rows.jsonl").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    pruned, stats, plan, weights, text = (
        here / name for name in ("pruned.gguf", "stats.safetensors", "plan.json", "weights.safetensors", "text.txt")
    )
    data = ("--data", text, "--windows", 1)
    dry = [
        ("quantize", pruned, "Q8_0", "-o", pruned),
        ("quantize", pruned, "Q8_0", "--imatrix", stats, "-o", stats),
        ("expand", pruned, "-o", pruned),
        ("prune", base, "--plan", plan, "-o", base),
        ("prune", base, "--plan", plan, "-o", plan),
        ("prune", base, "--plan", plan, "--weights", weights, "-o", weights),
        ("prune", here / "link.gguf", "--plan", plan, "-o", base),
        ("convert", model, "-o", model / "model.safetensors"),
        ("convert", model, "-o", model / "tokenizer.json"),
        ("calibrate", model, *data, "-o", text),
        ("calibrate", model, *data, "-o", model / "model.safetensors"),
        ("calibrate", odd, *data, "-o", odd / "weights.safetensors"),
        ("calibrate", model, "--data", f"hf:{odd}", "-o", odd / "rows.jsonl"),
        ("calibrate", base, *data, "-o", base),
        ("calibrate", base, *data, "-o", here / "link.gguf"),
        ("refit", model, "--plan", plan, *data, "-o", plan),
        ("refit", model, "--plan", plan, *data, "-o", model / "config.json"),
        ("refit", base, "--plan", plan, *data, "-o", base),
    ]
    others = [
        ("dern", model, "--plan", plan, "-o", model / "model.safetensors"),
        ("plan", stats, "--ratio", 0.4, "-o", stats),
        ("stats", "merge", stats, stats, "-o", stats),
        ("sensitivity", base, "--stats", stats, "--data", text, "-o", text),
    ]
    for command in (
        *((*command, "--dry-run") for command in dry),
        *((*command, "--force") for command in dry + others),
    ):
        with pytest.raises(GgufToolError, match="is an input"):
            run(*command)
    for refused in (
        lambda: gguftool.prune(base, plan=plan, out=plan, force=True),
        lambda: gguftool.prune(base, plan=plan, weights=weights, out=weights, force=True),
        lambda: gguftool.quantize(pruned, "Q8_0", imatrix=stats, out=stats, force=True),
        lambda: gguftool.plan(stats, ratio=0.4, out=stats, force=True),
    ):
        with pytest.raises(GgufToolError, match="is an input"):
            refused()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


def test_what_else_lies_in_a_models_folder_is_no_input(checkpoint_dir, tmp_path):
    """Whoever keeps stats and GGUF files there can make them again."""
    model = shutil.copytree(checkpoint_dir, tmp_path / "model")
    for name in ("stats.safetensors", "base.gguf", "stats"):
        (model / name).write_text("of an earlier run")
        check_output(model / name, True, model)
        with pytest.raises(GgufToolError, match="--force replaces it"):
            check_output(model / name, False, model)


def test_an_output_that_is_a_folder_is_refused_at_once(tmp_path, monkeypatch, llama):
    """Before anything is read: nothing else of what is named holds what is wanted."""
    none, folder = tmp_path / "none", tmp_path / "folder"
    folder.mkdir()
    none.touch()
    monkeypatch.chdir(folder)
    for out in (folder, "."):
        for command in (
            ("calibrate", none, "--data", none),
            ("refit", none, "--plan", none, "--data", none),
            ("dern", none, "--plan", none),
            ("prune", none, "--plan", none),
            ("quantize", none, "Q8_0"),
            ("expand", none),
            ("convert", none),
            ("sensitivity", none, "--stats", none, "--data", none),
            ("plan", none, "--ratio", 0.4),
            ("stats", "merge", none),
        ):
            for more in ([], ["--force"]):
                with pytest.raises(GgufToolError, match="a folder, and the output is a file"):
                    run(*command, "-o", out, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "none"] and not list(folder.iterdir())


def test_calibrate(ask, checkpoint_dir, base_gguf, files, tmp_path, llama):
    text = builtin.texts()["calib_code"]
    for model in (checkpoint_dir, base_gguf):
        said = ask("calibrate", model, "--data", text, "--windows", 8, "-o", tmp_path / "s.safetensors")
        assert said["texts"] == [{"name": "calib_code.txt", "tokens": 4096, "windows": 8}] and said["layers"] == 4
        # The sums over other matrices, 10 % of this small model's file, are not counted.
        size = (files / "stats.safetensors").stat().st_size
        assert 0.85 * size < said["bytes"] < size
    limited = ask("calibrate", base_gguf, "--data", text, "--memory", "1GiB", "-o", tmp_path / "s")["how"]
    assert limited.endswith("types; second moments stay below 1.00 GiB, the model itself comes on top")
    assert "by estimate" in ask("calibrate", checkpoint_dir, "--data", text, "-o", tmp_path / "s")["how"]
    with pytest.raises(GgufToolError, match="at least"):
        ask("calibrate", checkpoint_dir, "--data", text, "--memory", "1MiB", "-o", tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_refit(ask, checkpoint_dir, base_gguf, files, tmp_path):
    text = builtin.texts()["calib_code"]
    arguments = ("refit", checkpoint_dir, "--plan", files / "plan.json", "--data", text, "--windows", 1, "-o")
    said = ask(*arguments, tmp_path / "w.safetensors")
    assert said["how"].startswith("plain: float32") and not list(tmp_path.iterdir())
    own = ask("refit", base_gguf, "--plan", files / "gguf.json", *arguments[4:], tmp_path / "w.safetensors")
    assert own["how"] == "plain, by llama.cpp on the CPU" and own["experts"] > 0
    limited = ask("refit", base_gguf, "--plan", files / "gguf.json", *arguments[4:], tmp_path / "w", "--memory", "1GiB")
    assert limited["how"] == f"{own['how']}; second moments stay below 1.00 GiB, the model itself comes on top"
    cli.main([*map(str, arguments), str(tmp_path / "w.safetensors"), "--quiet"], standalone_mode=False)
    assert len(Overrides.load(tmp_path / "w.safetensors")) == said["experts"]
    assert said["bytes"] < (tmp_path / "w.safetensors").stat().st_size < said["bytes"] + 100_000
    # One after the other all experts are fitted, the whole ones too.
    arguments = (*arguments, tmp_path / "s.safetensors", "--how", "sequential")
    said = ask(*arguments)
    cli.main([*map(str, arguments), "--quiet"], standalone_mode=False)
    assert len(Overrides.load(tmp_path / "s.safetensors")) == said["experts"]
    assert said["bytes"] < (tmp_path / "s.safetensors").stat().st_size < said["bytes"] + 100_000


def test_calibrate_is_refused_as_the_run_is(refused, checkpoint_dir, base_gguf, tmp_path, llama):
    text = builtin.texts()["calib_code"]
    rest = ("--data", text, "--windows", 1, "-o", tmp_path / "s.safetensors")
    for model in (checkpoint_dir, base_gguf):
        refused("a context of 1025 tokens is more than the model's 1024", "calibrate", model, *rest, "--ctx", 1025)
        refused("--part '3/2': it takes I/N", "calibrate", model, *rest, "--part", "3/2")
    refused("at least", "calibrate", checkpoint_dir, *rest, "--memory", "1MiB")
    refused(
        "second moments of one layer take .*, or stats without OBS", "calibrate", base_gguf, *rest, "--memory", "100KiB"
    )
    refused("in its own types", "calibrate", base_gguf, *rest, "--dtype", "bfloat16")
    refused("on the CPU; leave it out", "calibrate", base_gguf, *rest, "--device", "cuda")


def test_refit_is_refused_as_the_run_is(refused, checkpoint_dir, base_gguf, files, tmp_path, llama):
    text = builtin.texts()["calib_code"]
    rest = ("--data", text, "--windows", 1, "-o", tmp_path / "w.safetensors")

    def refit(model, plan, words, *more):
        refused(words, "refit", model, "--plan", files / plan, *rest, *more)

    refit(base_gguf, "plan.json", "refit the model that was calibrated")
    refit(base_gguf, "gguf-drop.json", "nothing to refit")
    refit(base_gguf, "gguf.json", "needs the checkpoint.*; refit it plainly", "--how", "sequential")
    refit(base_gguf, "gguf.json", "in its own types", "--dtype", "bfloat16")
    refit(base_gguf, "gguf.json", "on the CPU; leave it out", "--device", "cuda")
    refit(base_gguf, "gguf.json", "no such text file", "--data", tmp_path / "missing.txt")
    refit(base_gguf, "gguf.json", "more than the model's 1024", "--ctx", 1025)
    refit(
        base_gguf,
        "gguf.json",
        r"second moments of one layer take .* helps: a limit of \S+ or more$",
        "--memory",
        "1KiB",
    )
    refit(checkpoint_dir, "gguf.json", "not for the checkpoint")
    refit(checkpoint_dir, "all.json", "nothing to refit")
    refit(checkpoint_dir, "drop.json", "drops experts from the router", "--how", "sequential")
    refit(checkpoint_dir, "plan.json", "more than the model's 1024", "--ctx", 1025)


@pytest.mark.parametrize("command", ["calibrate", "refit", "compress"])
def test_weights_that_do_not_fill_the_model_are_refused(command, tmp_path, llama):
    """By a dry run as by a real one, and before the checkpoint is converted."""
    model, text, out = tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(sample_text(200))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    blank = CalibrationStats.blank(model_facts(open_checkpoint(model)))
    make_plan(blank, Recipe("global", 0.4, align=8)).save(tmp_path / "plan.json")
    own = {
        "calibrate": (),
        "refit": ("--plan", tmp_path / "plan.json"),
        "compress": ("--ratio", 0.4, "--eval", text, "--backend", "cpu", "--pre-tokenizer", "qwen2"),
    }[command]
    for dry in ([], ["--dry-run"]):
        with pytest.raises(GgufToolError, match="lacks tensor model.norm.weight"):
            run(command, model, "--data", text, "--ctx", 32, *own, "-o", out, *dry)
    assert not out.is_file() and not (out / "base.gguf").exists()


def test_a_refit_is_plain_where_the_sequential_one_cannot_be(checkpoint_dir, stats, tmp_path, ask):
    """By default, with a note; asked for by name it is refused, by every command that takes it."""
    text = builtin.texts()["calib_code"]
    weak = stats.neurons["obs"].copy()
    weak[0, :3] *= 1e-9  # three experts lose every neuron
    less = replace(stats, neurons={**stats.neurons, "obs": weak})
    cut = make_plan(less, Recipe("auto", 0.4, cut_router=True))
    assert cut.drops_experts
    asked = Asked(checkpoint_dir, [Source(str(text))], tmp_path / "w.safetensors", 64, 1)
    with checked(asked, cut, dry_run=True) as found:
        assert found.kind == "plain" and "needs the original's routes" in found.notes[0]
    with checked(asked, make_plan(stats, Recipe("auto", 0.4)), dry_run=True) as found:
        assert found.kind == "sequential" and not found.notes
    words = "drops experts from the router, and a sequential refit needs the original's routes; refit it plainly"
    with pytest.raises(GgufToolError, match=words), checked(asked, cut, how="sequential", dry_run=True):
        pass
    for options in (("--cut-router",), ("--method", "reap")):
        with pytest.raises(GgufToolError, match=words):
            ask(*compressing(checkpoint_dir, tmp_path), "--refit", "sequential", *options)
    assert not list(tmp_path.iterdir())


def test_how_a_plan_is_refitted(checkpoint_dir, base_gguf, files):
    checkpoint, model = open_checkpoint(checkpoint_dir), open_gguf(base_gguf)
    sliced, dropped, auto = (PrunePlan.load(files / f"{name}.json") for name in ("plan", "drop", "gguf"))
    assert kind_of(checkpoint, sliced) == kind_of(checkpoint, dropped) == ("", ())
    assert kind_of(checkpoint, sliced, "plain") == kind_of(checkpoint, dropped, "plain") == ("plain", ())
    assert kind_of(checkpoint, sliced, "sequential") == kind_of(checkpoint, auto) == ("sequential", ())
    kind, notes = kind_of(model, auto)
    assert kind == "plain" and "needs the checkpoint" in notes[0]
    assert kind_of(model, auto, "plain") == ("plain", ())
    with pytest.raises(GgufToolError, match="needs the checkpoint"):
        kind_of(model, auto, "sequential")


def test_compress_refuses_a_refit_before_the_first_dear_step(checkpoint_dir, tmp_path, ask, llama, monkeypatch):
    arguments = (*compressing(checkpoint_dir, tmp_path), "--method", "global", "--refit", "plain")

    def too_little(*_args, **_options):
        raise GgufToolError("a refit takes more")

    with monkeypatch.context() as patch:
        patch.setattr("gguftool.prepare.refit_memory", too_little)
        with pytest.raises(GgufToolError, match="a refit takes more"):
            ask(*arguments)
        ask(*arguments[:-2])  # the method itself goes without a refit
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(GgufToolError, match="it solves in float64"):
        ask(*arguments, "--device", "mps")
    assert not list(tmp_path.iterdir())


def compressing(model, folder):
    texts = builtin.texts()
    return (
        "compress", model, "--ratio", "0.25", "--data", texts["calib_code"], "--windows", 1, "--eval", texts["eval_code"],
        "--backend", "cpu", "--pre-tokenizer", "qwen2", "-o", folder / "out",
    )  # fmt: skip


def test_compress(ask, checkpoint_dir, tmp_path, llama):
    texts = builtin.texts()
    arguments = (
        "compress", checkpoint_dir, "--ratio", "0.4", "--quant", "Q4_K_M", "--data", texts["calib_code"], "--windows", 1,
        "--eval", texts["eval_code"], "--backend", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(GgufToolError, match="does not know this vocabulary's pre-tokenizer"):
        ask(*arguments)
    with pytest.raises(GgufToolError, match="near are qwen2"):
        ask(*arguments, "--pre-tokenizer", "qwen22")
    arguments = (*arguments, "--pre-tokenizer", "qwen2")
    said = ask(*arguments)
    assert not list(tmp_path.iterdir())
    assert [step["name"].removeprefix("model-") for step in said["steps"]] == [
        "base.gguf", "stats.safetensors", "AUTO40-Q4_K_M.plan.json", "AUTO40.refit-sequential.safetensors",
        "AUTO40RS-BF16.gguf", "AUTO40RS-Q4_K_M.gguf", "Q4_K_M.gguf",
    ]  # fmt: skip
    assert not any(step["there"] for step in said["steps"])
    sizes = [step["bytes"] for step in said["steps"] if step["name"].endswith(".gguf")]
    # base, pruned by 40 % of its experts, that and the base quantized: what the README's table has, headers apart.
    assert all(abs(size - 1e6 * known) < 0.5e6 for size, known in zip(sizes, (14.80, 9.75, 3.33, 5.02), strict=True))

    def to(kind):
        return [kind if part == "Q4_K_M" else part for part in arguments]

    assert ask(*to("q4_k"))["steps"] == said["steps"]
    # A float type is not quantized: nothing unpruned stands beside it.
    as_it_is = ask(*to("bf16"))["steps"]
    assert [step["name"] for step in as_it_is] == [
        step["name"].replace("Q4_K_M.plan", "BF16.plan") for step in said["steps"][:5]
    ]
    with pytest.raises(GgufToolError, match="routed per token"):
        ask(*arguments, "--method", "reap", "--ratio", "0.9")
