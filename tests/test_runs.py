"""A run by a recipe file: what it leaves behind, that the same comes of it again, and that damage is found."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import gguftool
from gguf_models import write_random
from gguftool import builtin, gguf_file, pipeline, runs
from gguftool.crosscheck import CrossCheck
from gguftool.divergence import Estimate, KlStatistics
from gguftool.errors import GgufToolError
from gguftool.extras import Extras
from gguftool.journal import Journal
from gguftool.recipe import Recipe
from gguftool.recipe_file import load, save
from gguftool.report_files import load as load_report
from gguftool.runs import Ears, carry_out, job_of
from gguftool.tensors import TensorSpec
from gguftool.verification import Expected, Verified, check_sound, differences, failures, sha256
from gguftool.workspace import Workspace
from typed import typed

RECIPE = """
model = "model"
data = ["calib.txt"]
eval = ["eval.txt"]
method = "global"
ratio = 0.25
quant = "Q8_0"
windows = 2
eval_windows = 1
pre_tokenizer = "qwen2"
backend = "cpu"
"""
PRUNED = "model-GLOBAL40-Q8_0.gguf"
HOST = "the-host-of-this-run"


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint_dir, llama):
    """A folder with a recipe, its texts, and the output `out`, for which 0.4 on the command line went before 0.25."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copyfile(builtin.texts()["calib_code"], folder / "calib.txt")
    shutil.copyfile(builtin.texts()["eval_code"], folder / "eval.txt")
    (folder / "model").symlink_to(checkpoint_dir)
    (folder / "r.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: HOST)
        said = typed("compress", "--recipe", folder / "r.toml", "--ratio", 0.4, "-o", folder / "out", "--json")
    assert json.loads(said)["failures"] == []
    return folder


def test_the_used_recipe_lies_beside_the_output(place, checkpoint_dir):
    found = load(place / "out" / "recipe.toml")
    assert (found.ratio, found.quant, found.method, found.windows) == (0.4, "Q8_0", "global", 2)
    assert found.model == place / "model" and found.eval == (place / "eval.txt",)
    assert found.made.inputs == {str(place / name): sha256(place / name) for name in ("calib.txt", "eval.txt")}
    record = Verified.load(place / "out")
    assert set(record.files) == {path.name for path in (place / "out").glob("*.*") if path.suffix in (
        ".gguf", ".safetensors")} | {path.name for path in (place / "out").glob("*.plan.json")}  # fmt: skip
    assert record.files[PRUNED] == sha256(place / "out" / PRUNED) and not record.failures


def test_the_recipe_makes_the_same_bytes_again(place):
    assert "byte for byte the same" in typed("verify", place / "out")
    assert not (place / "out.verify").exists()
    before = (place / "eval.txt").read_bytes()
    (place / "eval.txt").write_bytes(before + b"!")
    try:
        said = typed("verify", place / "out", code=1)
        assert "cannot be made again" in said and "eval.txt is not what it was: another sha256" in said
        assert not (place / "out.verify").exists()
    finally:
        (place / "eval.txt").write_bytes(before)


def test_damage_is_found_with_its_name_and_both_hashes(place, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    assert "as they were made" in typed("verify", copy, "--fast")
    was = sha256(copy / PRUNED)
    with open(copy / PRUNED, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    for way in (["--fast"], ["--scratch", tmp_path / "again"]):
        said = typed("verify", copy, *way, code=1)
        assert f"{PRUNED}: sha256 was {was}, and is {sha256(copy / PRUNED)}" in said and ": 1 difference: " in said
    (copy / PRUNED).unlink()
    said = typed("verify", copy, "--fast", "--json", code=1)
    assert f"{PRUNED}: sha256 was {was}, and it is missing" in said
    shutil.copyfile(place / "out" / PRUNED, copy / PRUNED)
    record = Verified.load(copy)
    # As if it had been made otherwise: what is made again differs from the record.
    Verified({**record.files, PRUNED: "0" * 64}).save(copy)
    said = typed("verify", copy, "--scratch", tmp_path / "again", code=1)
    assert f"sha256 was {'0' * 64}, and made again is {was}" in said and f"sha256 was {'0' * 64}, and is {was}" in said
    Verified(record.files, ["KL divergence of 9"]).save(copy)
    assert "that run was not done: KL divergence of 9" in typed("verify", copy, "--fast", code=1)


def test_the_same_command_puts_right_what_was_damaged(place, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    was = sha256(copy / PRUNED)
    with open(copy / PRUNED, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    typed("compress", "--recipe", place / "r.toml", "--ratio", 0.4, "-o", copy, "--no-extras", "--json")
    assert sha256(copy / PRUNED) == was == Verified.load(copy).files[PRUNED]


def test_which_files_say_where_and_when(place):
    """As docs/trust.md has it. The command names the recipe and the folder by their paths."""
    files = {path.name: path.read_bytes() for path in (place / "out").glob("[!.]*") if path.is_file()}
    assert {"README.md", "report.md", "verified.json", "state.json", "stats.safetensors", PRUNED} < set(files)
    placed = {n for n, data in files.items() if str(place).encode() in data}
    assert placed == {"report.json", "report.html", "recipe.toml"}
    assert {n for n, data in files.items() if re.search(rb"20\d\d-\d\d-\d\dT\d\d:\d\d", data)} == {"report.json"}
    assert b"gguftool compress --recipe r.toml --ratio 0.4 -o out --json" in files["README.md"]
    assert not [n for n, data in files.items() if HOST.encode() in data]


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_run_is_not_taken_for_the_one_before_it(place, tmp_path, monkeypatch):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    (copy / "fit.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "judge", interrupt)
        carry_out(load(place / "r.toml"), copy)  # a ratio of 0.25
    assert load(copy / "recipe.toml").ratio == 0.25 and (copy / PRUNED).is_file()
    stopped = "has not come to its end: Interrupted at 'perplexity and KL divergence'"
    for way in (["--fast"], ["--scratch", tmp_path / "again"]):
        assert stopped in typed("verify", copy, *way, code=1)
    with pytest.raises(GgufToolError, match=stopped):
        gguftool.verify(copy, fast=True)
    assert not (copy / "verified.json").exists() and not (copy / "fit.json").exists()


def test_a_run_that_is_stopped_behind_its_record_is_not_done(place, tmp_path, monkeypatch):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    recipe = replace(load(copy / "recipe.toml"), made=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "add_extras", interrupt)
        carry_out(recipe, copy)
    said = typed("verify", copy, "--fast", code=1)
    assert "the files are what was made, but that run was not done: Interrupted at 'checks of what was" in said
    assert len(gguftool.verify(copy, fast=True)) == 1
    (copy / "report.json").unlink()  # taken elsewhere without it, the files are still those that were recorded
    assert "as they were made" in typed("verify", copy, "--fast") and gguftool.verify(copy, fast=True) == []


def test_a_folder_in_which_nothing_would_be_made_again_is_refused(place, tmp_path):
    (tmp_path / "link").symlink_to(place / "out")
    for scratch in (place / "out", place / "out" / ".." / "out", tmp_path / "link"):
        assert "nothing would be made again" in typed("verify", place / "out", "--scratch", scratch, code=1)
    before = {path: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    shutil.copytree(place / "out", place / "out.verify")  # the place where it is made by default, and removed
    for folder in (["--scratch", place / "out.verify"], []):
        assert "holds a run of its own (recipe.toml)" in typed("verify", place / "out", *folder, code=1)
    with pytest.raises(GgufToolError, match="holds a run of its own"):
        gguftool.verify(place / "out", scratch=place / "out.verify")
    assert (place / "out.verify" / PRUNED).is_file()
    assert before == {path: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    shutil.rmtree(place / "out.verify")


def test_a_folder_without_a_run_is_none(tmp_path, place):
    assert "gguftool compress" in typed("verify", tmp_path, code=1)
    (tmp_path / "verified.json").write_text("{}")
    assert "not a record" in typed("verify", tmp_path, code=1)
    (tmp_path / "verified.json").write_text(
        '{"format": "gguftool.verified", "version": 1, "files": [], "failures": []}'
    )
    assert "verified.json: damaged" in typed("verify", tmp_path, code=1)
    (place / "out.verify").mkdir()
    (place / "out.verify" / "mine.txt").write_text("dear")
    assert "--scratch" in typed("verify", place / "out", code=1)
    assert (place / "out.verify" / "mine.txt").read_text() == "dear"
    shutil.rmtree(place / "out.verify")


def test_a_file_that_another_command_makes_anew_is_damage_of_nobody(place, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    (copy / "fit.json").write_text("{}")
    work = Workspace(copy, lambda _: None)
    # What the record does not speak of is no concern of it, and what is there already is not made.
    work.step("other", {"in": 1}, lambda path: path.write_text("x"))
    assert "as they were made" in typed("verify", copy, "--fast")
    record = Verified.load(copy)

    def stopped(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.step("stats.safetensors", {"texts": "others"}, stopped)
    assert not (copy / "verified.json").exists() and not (copy / "fit.json").exists()
    why = "stats.safetensors was made anew in this folder by another command"
    for way in (["--fast"], ["--scratch", tmp_path / "again"]):
        assert f"has not come to its end: Failed: {why}" in typed("verify", copy, *way, code=1)
    assert why in load_report(copy).status.message
    assert why in (copy / "report.html").read_text() and why in (copy / "report.md").read_text()
    # A report that says already how its run ended is left to say it.
    record.save(copy)
    before = (copy / "report.json").read_bytes()
    work.step("base.gguf", {"model": "another"}, lambda path: path.write_bytes(b"x"))
    assert (copy / "report.json").read_bytes() == before and not (copy / "verified.json").exists()


def test_what_cannot_be_made_again_says_why(place, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    recipe = load(copy / "recipe.toml")
    (place / "eval.txt").rename(place / "elsewhere.txt")
    try:
        assert "eval.txt is not what it was: it is missing" in typed("verify", copy, code=1)
    finally:
        (place / "elsewhere.txt").rename(place / "eval.txt")
    save(replace(recipe, made=replace(recipe.made, model="0" * 64)), copy / "recipe.toml", "by hand")
    assert "is not the model that it was: " in typed("verify", copy, code=1)
    save(replace(recipe, made=None), copy / "recipe.toml", "by hand")
    assert "has no table [made], so a run did not leave it" in typed("verify", copy, code=1)
    assert not (tmp_path / "out.verify").exists()


def test_what_was_made_again_stays_where_it_was_asked_for_or_differs(place, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "replay", lambda folder, scratch, _: scratch.mkdir() or [])
    assert "byte for byte the same" in typed("verify", place / "out", "--scratch", tmp_path / "again")
    assert (tmp_path / "again").is_dir()
    monkeypatch.setattr(runs, "replay", lambda folder, scratch, _: scratch.mkdir() or ["a: differs"])
    assert "1 difference: a: differs" in typed("verify", place / "out", code=1)
    (place / "out.verify").rmdir()


def test_the_folder_that_one_stands_in_can_be_verified(place, monkeypatch):
    seen = []

    def made_again(folder, scratch, _):
        seen.append(scratch)
        scratch.mkdir()
        return []

    monkeypatch.setattr(runs, "replay", made_again)
    monkeypatch.chdir(place / "out")
    (place / "out" / "inside").mkdir()
    for name in (".", "inside/..", "../out"):
        assert "byte for byte the same" in typed("verify", name)
    assert seen == 3 * [place / "out.verify"] and not (place / "out.verify").exists()
    (place / "out" / "inside").rmdir()


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "state.json.partial"]])
def test_a_verify_that_was_stopped_at_once_does_not_block_the_next_one(left, place, monkeypatch):
    def stopped(folder, scratch, _):
        scratch.mkdir()
        for name in left:  # what is there before the state is: `.lock` of a killed one
            (scratch / name).touch()
        raise GgufToolError("stopped")

    monkeypatch.setattr(runs, "replay", stopped)
    assert "stopped" in typed("verify", place / "out", code=1)
    assert (place / "out.verify").is_dir()
    monkeypatch.setattr(runs, "replay", lambda *_: [])
    assert "byte for byte the same" in typed("verify", place / "out")
    assert not (place / "out.verify").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--recipe", "coed"], 1, "did you mean code"),
        (["--recipe", "code"], 2, "give MODEL"),
        (["model", "--recipe", "code", "--ratio", "0.4", "--keep", "0.6"], 2, "either --ratio or --keep"),
        (["model", "--ratio", "0.4", "--eval", "x"], 2, "give --data"),
        (["model", "--ratio", "0.4", "--data", "x"], 2, "give --eval"),
        (["model", "--data", "x", "--eval", "x"], 2, "give --ratio or --keep"),
        (["model", "--recipe", "code", "--depth", "1"], 2, "FIRST:LAST"),
        (["model", "--recipe", "code", "--memory", "much"], 1, "memory: 'much' is no size"),
        (
            ["model", "--recipe", "code", "--quant", "Q8_0", "--quant", "Q4_K"],
            2,
            "--quant takes one type here, not Q8_0 and Q4_K",
        ),
        (["model", "--recipe", "code", "--fit-ctx", "64"], 1, "--fit-ctx) is the context of a budget"),
        (["model", "--recipe", "code", "--no-extras", "--prompt", "Hi"], 1, "leave one of the two out"),
        (["model", "--recipe", "code", "--no-extras", "--prompt", "Hi", "--dry-run"], 1, "leave one of the two out"),
        (
            ["model", "--recipe", "code", "--eval", "a/x.txt", "--eval", "b/x.txt"],
            1,
            "two evaluation texts are called 'x'",
        ),
    ],
)
def test_what_a_recipe_and_options_lack_together(arguments, code, said, tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "a", "b"):
        (tmp_path / folder).mkdir()
    for text in ("x", "a/x.txt", "b/x.txt"):
        (tmp_path / text).write_text("text")
    assert said in typed("compress", *arguments, "-o", tmp_path / "out", code=code)
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed_and_printed():
    assert {row["name"] for row in json.loads(typed("recipes", "--json"))["recipes"]} == {
        "code",
        "general",
        "smallest",
    }
    assert 'quant = "Q4_K_M"' in typed("recipes", "code")


@pytest.fixture(scope="module")
def made(place, llama):
    job = job_of(load(place / "out" / "recipe.toml"), Ears())
    return job, pipeline.produce(job, place / "out", load(place / "out" / "recipe.toml").pruning, lambda _: None)


def test_a_file_in_the_originals_own_type_is_the_pruned_one(made, tmp_path):
    job, source = made[0], made[1].source
    assert [source.has_encoding(name) for name in ("bf16", "F16", "F32", "Q8_0")] == [True, False, False, False]
    work = Workspace(tmp_path, lambda _: None)
    recipes = [Recipe("global", 0.5, target=target) for target in (None, "BF16")]
    own, named = (pipeline.build(job, work, source, recipe) for recipe in recipes)
    assert named.path == own.path == tmp_path / "model-GLOBAL50-BF16.gguf" and own.path.is_file()
    assert (named.label, named.encoding) == ("global 50 % BF16", "BF16")


def test_room_for_all_that_is_to_be_made_is_looked_for_first(place, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000_000))
    said = typed("compress", "--recipe", place / "r.toml", "-o", tmp_path / "out", code=1)
    # base 14.8 MB, stats 1, pruned 11.7, that as Q8_0 6.2 and the unpruned one as Q8_0 7.9
    assert re.search(r"out: needs 0\.04 GB, the disk has 0\.03 GB free", said)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".gguf", ".safetensors")]
    # What is there needs no room, and what is replaced goes first.
    job = job_of(load(place / "out" / "recipe.toml"), Ears())
    made = pipeline.produce(job, place / "out", Recipe("global", 0.5), print, dry=True)
    assert 5_000_000 < pipeline.room(made) < 15_000_000


def test_room_by_hand(tmp_path, monkeypatch):
    (tmp_path / "b.gguf").write_bytes(b"xx")
    made = SimpleNamespace(files=["a.safetensors", "there.gguf", "b.gguf", "c.gguf"])
    made.work = SimpleNamespace(missing=["a.safetensors", "b.gguf", "c.gguf"], folder=tmp_path)
    for last, most in ((1, 20), (8, 21)):  # a twice while it is saved; a, b in place of 2 bytes, and c
        sizes = {"a.safetensors": 10, "there.gguf": 100, "b.gguf": 5, "c.gguf": last}
        monkeypatch.setattr(pipeline, "sizes", lambda _, sizes=sizes: sizes)
        assert pipeline.room(made) == most


def test_a_dataset_without_a_limit_is_read_as_far_as_it_is_needed(place, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    copy = shutil.copytree(place / "out", tmp_path / "out")
    parts, taken = (place / "calib.txt").read_text().split("\n\n"), []

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split, streaming) == (str(tmp_path / "set"), None, "train", True)
        taken.append(0)
        for part in itertools.cycle(parts):
            taken[-1] += len(part)
            yield {"text": part}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    typed("compress", "--recipe", place / "r.toml", "--data", f"hf:{tmp_path / 'set'}", "-o", copy, "--no-extras")
    assert load_report(copy).status.done
    # Two windows are calibrated on; four are checked, and of so many tokens none is as long as that on average.
    enough = pipeline.CHECKED_WINDOWS * 512 * pipeline.SPELLED
    assert len(taken) == 2 and taken[0] < enough <= taken[1] < enough + max(map(len, parts)) + 1


def assessed(made):
    job, produced = made
    with Journal(produced.work.folder, "model") as journal:
        journal.begin()
        return pipeline.assess(job, produced, journal, Extras(measure=False))


def test_a_model_farther_off_than_its_plan_explains_is_a_failure(made, place, monkeypatch):
    assert pipeline.far_from_plan(*made) == []
    monkeypatch.setattr(pipeline, "noise", lambda *_: 0.0)
    report = assessed(made)
    # Q8_0 of the unpruned model costs next to nothing, so what was pruned stands alone.
    (said,) = report.failures
    assert "calib.txt (calibration): KL divergence 0.0" in said and "noise 0" in said
    assert json.loads((place / "out" / "report.json").read_text())["failures"] == [said]
    assert "Not done" in (place / "out" / "report.md").read_text()
    assert Verified.load(place / "out").failures == (said,)
    assert (place / "out" / PRUNED).is_file()
    monkeypatch.undo()
    assert assessed(made).failures == () and Verified.load(place / "out").failures == ()


def test_the_calibration_texts_that_a_plan_is_held_against(made, monkeypatch):
    """All models on every text; but a text of one window, which read as one text may not fill it, is left out."""
    job, produced = made
    seen = []
    monkeypatch.setattr(pipeline, "failures", lambda texts, expected, _: seen.append((texts, expected)) or [])
    pipeline.far_from_plan(job, produced)
    ((texts, expected),) = seen
    assert [(one.label, one.noise is None) for one in expected] == [
        ("global 40 % Q8_0", False),
        ("unpruned Q8_0", True),
    ]
    assert list(texts) == ["calib.txt (calibration)"] and [len(rows) for rows in texts.values()] == [2]
    short = [(domain, windows[:1]) for domain, windows in produced.source.domains]
    monkeypatch.setattr(pipeline, "_compared", lambda *_: pytest.fail("compared"))
    assert pipeline.far_from_plan(job, replace(produced, source=replace(produced.source, domains=short))) == []


def test_backends_that_disagree_are_a_failure(made, place, monkeypatch):
    asked = []

    def crosscheck(backends, base, pruned, data, **options):
        asked.append((backends, options["max_windows"]))
        return CrossCheck({}, 0.5, 0.1)

    monkeypatch.setattr(pipeline, "crosscheck", crosscheck)
    assert pipeline.backends_apart(*made) == [] and not asked
    monkeypatch.setattr(pipeline, "built_runtime", lambda name: name in ("cpu", "vulkan"))
    (said,) = pipeline.backends_apart(*made)
    assert "vulkan and cpu differ by 0.50000 in ln(perplexity), more than 0.10000" in said
    assert asked == [(["vulkan", "cpu"], 4)]
    report = assessed(made)
    assert report.failures == (said,) and Verified.load(place / "out").failures == (said,)
    assert "Not done" in (place / "out" / "report.md").read_text()
    monkeypatch.setattr(pipeline, "crosscheck", lambda *_, **__: CrossCheck({}, 0.05, 0.1))
    assert pipeline.backends_apart(*made) == []
    assert assessed(made).failures == () and Verified.load(place / "out").failures == ()


def test_a_perplexity_that_is_not_finite_ends_the_run_with_a_report_that_says_why(place, tmp_path, monkeypatch):
    copy = tmp_path / "out"
    shutil.copytree(place / "out", copy)
    compare, lost = pipeline.compare_many, Estimate(math.inf, math.nan)

    def broken(*arguments, **options):
        return [
            replace(one, divergence=replace(
                one.divergence, ppl=lost, ln_ppl_ratio=lost,
                kld=KlStatistics(*[math.nan] * 8, histogram=one.divergence.kld.histogram),
            )) for one in compare(*arguments, **options)
        ]  # fmt: skip

    monkeypatch.setattr(pipeline, "compare_many", broken)
    said = typed("compress", "--recipe", copy / "recipe.toml", "-o", copy, "--no-extras", "--quiet", code=1)
    fault = "global 40 % Q8_0 on eval: perplexity inf (original "
    assert said.count("error: ") == 1 and "not done, the files are kept: " in said and fault in said
    status = json.loads((copy / "report.json").read_text())["status"]
    assert status["state"] == "failed" and fault in status["message"] and "not finite" in status["message"]
    assert fault in (copy / "report.html").read_text() and fault in (copy / "report.md").read_text()
    assert "not finite" in typed("verify", copy, "--fast", code=1)


def row(kld, err=0.0, ppl=12.0, base=10.0, largest=1.0):
    return {"base": {"ppl": base}, "pruned": {"ppl": ppl}, "kld": {"mean": kld, "err": err, "max": largest}}


def test_what_cannot_be_right_by_hand():
    def said(one, want=Expected("a", 0.01, {"t": 0.1})):  # noqa: B008
        return list(failures({"t": [one]}, [want], 1000))

    # 50 x 0.01 + 3 x 0.1 + 0.005 = 0.805 nats; ln(1000 / 10) = 4.6 where nothing is known of a plan.
    assert said(row(0.8)) == [] and said(row(0.83, err=0.01)) == []
    assert "at most 0.80500" in said(row(0.84, err=0.01))[0]
    assert said(row(4.5), Expected("a", None)) == []
    assert "at most 4.60517" in said(row(4.7), Expected("a", None))[0]
    for broken in (row(math.nan), row(0.1, ppl=math.inf), row(0.1, base=math.nan), row(0.1, largest=math.inf)):
        assert "not finite" in said(broken)[0]


def test_differences_name_what_is_missing_changed_and_new():
    lines = differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert lines == [
        "b: sha256 was 2, and is 9", "c: sha256 was 3, and it is missing", "d: was not there, and has sha256 4",
    ]  # fmt: skip


def test_a_file_is_read_after_it_was_written(tmp_path, made, monkeypatch):
    specs = [
        TensorSpec("blk.0.ffn_gate_inp.weight", (32, 4), "F32"),
        *(TensorSpec(f"blk.0.ffn_{role}_exps.weight", (32, 32, 4), "F32") for role in ("gate", "up", "down")),
    ]
    path = write_random(tmp_path / "x.gguf", specs, n_expert=4, top_k=2, n_ff=32)
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(GgufToolError, match="not finite"):
        check_sound(path)
    # What finds it in a run: every GGUF goes through, right behind its writing.
    seen = []
    for module in (pipeline, __import__("gguftool.prepare", fromlist=["prepare"])):
        monkeypatch.setattr(module, "check_sound", lambda path: seen.append(path.name))
    job, produced = made
    pipeline.produce(replace(job), tmp_path / "new", produced.built.plan.recipe, lambda _: None)
    assert seen == ["base.gguf", "model-GLOBAL40-BF16.gguf", PRUNED, "model-Q8_0.gguf"]
