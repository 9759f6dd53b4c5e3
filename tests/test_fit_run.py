"""compress --fit: a budget as a run like any other, with its report, its recipe and files that can be made again."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gguftool import builtin, fit_measure, fit_run, pipeline, runs
from gguftool.budget import JITTER, measure
from gguftool.errors import GgufToolError
from gguftool.extras import Extras
from gguftool.fit_report import CHOSEN, FitReport, Weighed, goal_here
from gguftool.pipeline import Built, far_from_plan
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe_file import FIT_CTX, Found, RunRecipe, load
from gguftool.report_files import load as load_report
from gguftool.runs import Ears, carry_out
from gguftool.verification import Verified, sha256
from gguftool.workspace import BEING_MADE
from typed import typed

CTX = 64  # short: the buffers of a batch would take more than this small model
# What tiers take in buffers beside so small a file, and some.
ROOM = 600_000


@pytest.fixture(scope="module")
def beside(base_gguf, runtime) -> int:
    """Bytes that any of these files takes in memory beside itself."""
    return measure(runtime, base_gguf, CTX).beside + JITTER + ROOM


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint_dir, llama) -> Path:
    """A model and its texts."""
    folder = tmp_path_factory.mktemp("fit_run")
    for name in ("calib_code", "eval_code"):
        shutil.copyfile(builtin.texts()[name], folder / f"{name}.txt")
    (folder / "model").symlink_to(checkpoint_dir)
    return folder


def asked(folder: Path, model: str = "model") -> list[object]:
    own = ["--windows", 4] if model.endswith(".gguf") else ["--windows", 20, "--pre-tokenizer", "qwen2"]
    return [
        "compress", folder / model, "--data", folder / "calib_code.txt", "--eval", folder / "eval_code.txt", "--ctx", 256,
        "--eval-windows", 2, "--method", "global", "--fit-ctx", CTX, "--backend", "cpu", *own,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pruned(folder, beside) -> Path:
    """Unpruned Q8_0 (7.9 MB) does not fit into 6.5 MB, unpruned Q2_K (3.3 MB) does and is worse than a pruned Q8_0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "TARGETS", ("Q8_0", "Q2_K"))
        said = typed(*asked(folder), "--fit", beside + 6_500_000, "-o", folder / "out", "--prompt", "def f(", "--json")
    found = json.loads(said)
    assert found["failures"] == [] and found["status"]["state"] == "done" and found["budget"]
    return folder / "out"


@pytest.fixture(scope="module")
def whole(folder, beside) -> Path:
    """Unpruned Q4_K_M (5.0 MB) fits, and is better than a Q8_0 of which so much goes that it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "TARGETS", ("Q8_0", "Q4_K_M"))
        typed(*asked(folder), "--fit", beside + 5_400_000, "-o", folder / "whole", "--no-extras")
    return folder / "whole"


# --- what is left behind -------------------------------------------------------------------------------------------


def test_the_recipe_has_what_was_asked_and_what_was_found(pruned, beside) -> None:
    recipe = load(pruned / "recipe.toml")
    assert (recipe.fit, recipe.fit_ctx) == (str(beside + 6_500_000), CTX)
    assert recipe.ratio is None and recipe.quant is None and recipe.made is not None
    found = recipe.made.found
    assert found is not None and found.quant == "Q8_0" and found.beside == ("Q8_0", "Q2_K")
    assert found.ratio is not None and 0.1 < found.ratio < 0.5


def test_the_record_has_every_file_and_nothing_is_left_of_the_search(pruned) -> None:
    (chosen,) = pruned.glob("*GLOBAL*.gguf")
    record = Verified.load(pruned)
    assert not record.failures and set(record.files) == {
        "base.gguf", "stats.safetensors", chosen.name, f"{chosen.stem}.plan.json", "model-Q8_0.gguf", "model-Q2_K.gguf",
    }  # fmt: skip
    assert all(record.files[name] == sha256(pruned / name) for name in record.files)
    assert not (pruned / "fit.work").exists()
    fit = json.loads((pruned / "fit.json").read_text())
    assert fit["path"] == str(chosen) and fit["candidates"][0]["status"] == CHOSEN


def test_the_report_shows_what_was_weighed_by_which_budget(pruned, beside) -> None:
    report = load_report(pruned)
    chosen, *others = report.candidates
    assert chosen.chosen and not any(one.chosen for one in others)
    assert {one.label for one in others} == {"unpruned Q8_0", "unpruned Q2_K"}
    assert [row.label for row in report.rows] == [chosen.label, "unpruned Q8_0", "unpruned Q2_K"]
    # The row is the candidate, measured again by the same protocol.
    assert (report.rows[0].bytes, report.main) == (chosen.bytes, report.rows[0])
    kld = report.rows[0].texts["eval_code"]["kld"]
    assert chosen.texts["eval_code"] == {"mean": pytest.approx(kld["mean"]), "err": pytest.approx(kld["err"])}
    assert chosen.need is not None and chosen.need <= beside + 6_500_000 - JITTER
    too_large = next(one for one in others if one.label == "unpruned Q8_0")
    assert too_large.why.startswith("too large: ") and not too_large.texts
    size = f"{beside + 6_500_000:,} bytes), with a context of {CTX} tokens"
    for name in ("report.html", "report.md", "README.md"):
        text = (pruned / name).read_text()
        assert size in text and chosen.label in text, name
    page = (pruned / "report.html").read_text()
    assert 'id="candidates"' in page and "too large: " in page and 'id="experts"' in page and 'id="speed"' in page
    assert "def f(" in page
    assert "too large: " in (pruned / "report.md").read_text()
    files = {file["name"] for file in report.facts["provenance"]["files"]}
    assert {"fit.json", "recipe.toml", "verified.json", Path(report.rows[0].path).name} <= files


# --- made again ----------------------------------------------------------------------------------------------------


def test_the_same_is_made_again_without_weighing(pruned, monkeypatch) -> None:
    for name in ("start", "decide"):
        monkeypatch.setattr(fit_run, name, lambda *_: pytest.fail("weighed"))
    monkeypatch.setattr(fit_measure, "compare_many", lambda *_, **__: pytest.fail("measured"))
    assert "6 files made again, byte for byte the same" in typed("verify", pruned)


def test_what_is_not_the_same_is_named(pruned, tmp_path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(pruned, copy)
    (chosen,) = copy.glob("*GLOBAL*.gguf")
    was = sha256(chosen)
    with open(chosen, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    scratch = tmp_path / "again"
    for way in (["--fast"], ["--scratch", scratch]):
        said = typed("verify", copy, *way, code=1)
        assert f"{chosen.name}: sha256 was {was}, and is {sha256(chosen)}" in said and ": 1 difference: " in said
    # Another choice is another file.
    text = (copy / "recipe.toml").read_text()
    ratio = load(copy / "recipe.toml").made.found.ratio
    (copy / "recipe.toml").write_text(text.replace(f"ratio = {ratio!r}", f"ratio = {ratio + 0.2!r}"))
    said = typed("verify", copy, "--scratch", scratch, code=1)
    assert f"{chosen.name}: sha256 was {was}, and it is missing" in said
    head, _, tail = text.partition("\n[made.found]\n")
    (copy / "recipe.toml").write_text(head + "\n[made.inputs]" + tail.partition("[made.inputs]")[2])
    assert "belong together; run compress again" in typed("verify", copy, "--scratch", scratch, code=1)


def test_a_recipe_asks_anew(pruned, folder, tmp_path, monkeypatch) -> None:
    seen = []

    def ask(job, out, ask, say, journal):
        seen.append(ask)
        raise GgufToolError("enough")

    monkeypatch.setattr(runs, "produce_fitting", ask)
    typed("compress", "--recipe", pruned / "recipe.toml", "-o", tmp_path / "again", code=1)
    typed("compress", "--recipe", pruned / "recipe.toml", "--quant", "Q6_K", "-o", tmp_path / "again", code=1)
    assert [one.targets for one in seen] == [runs.TARGETS, ("Q6_K",)] and {one.ctx for one in seen} == {CTX}
    # A budget takes the place of a recipe's ratio and of the type beside it.
    for given in ([], ["--quant", "q5_k"]):
        named = ("--recipe", "code", "--fit", "1GiB", *given)
        typed("compress", folder / "model", *named, "-o", tmp_path / "again", code=1)
    assert [one.targets for one in seen[2:]] == [runs.TARGETS, ("Q5_K_M",)]
    # A ratio takes the budget's place.
    monkeypatch.setattr(runs, "produce", lambda job, out, pruning, *_, **__: seen.append(pruning) or ask(*[None] * 5))
    typed("compress", "--recipe", pruned / "recipe.toml", "--ratio", 0.3, "-o", tmp_path / "again", code=1)
    assert seen[4].ratio == 0.3


def test_a_context_that_was_not_named_is_written_out(pruned, tmp_path, monkeypatch) -> None:
    recipe = replace(load(pruned / "recipe.toml"), fit_ctx=None)
    made, found = recipe.made, Found("Q8_0", 0.25)
    asked = []
    monkeypatch.setattr(runs, "produce_fitting", lambda job, out, ask, *_: asked.append(ask) or (None, found))
    monkeypatch.setattr(runs, "what_it_met", lambda recipe, job, _, found: replace(made, found=found))
    monkeypatch.setattr(runs, "assess", lambda *_: None)
    carry_out(recipe, tmp_path)
    assert asked[0].ctx == load(tmp_path / "recipe.toml").fit_ctx == FIT_CTX
    assert load(tmp_path / "recipe.toml").made.found == found


def test_stopped_it_goes_on_where_it_was(pruned, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "out"
    shutil.copytree(pruned, copy)
    for name in ("verified.json", "fit.json", "recipe.toml"):
        (copy / name).unlink()
    monkeypatch.setattr(runs, "TARGETS", ("Q8_0", "Q2_K"))
    monkeypatch.setattr(fit_measure, "compare_many", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(fit_measure, "build", lambda *_, **__: pytest.fail("built again"))
    recipe = replace(load(pruned / "recipe.toml"), made=None)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "judge", stop)
        carry_out(recipe, copy, Ears(), Extras(measure=False))
    stopped = load_report(copy)
    assert stopped.status.state == "interrupted" and len(stopped.candidates) == 3 and stopped.budget
    assert not (copy / "verified.json").exists()
    report = carry_out(recipe, copy, Ears(), Extras(measure=False))
    assert report.status.done and report.candidates == stopped.candidates
    assert Verified.load(copy) == Verified.load(pruned)
    assert load(copy / "recipe.toml").made.found == load(pruned / "recipe.toml").made.found


def test_killed_while_the_file_gets_its_name_it_ends_the_same(pruned, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "out"
    shutil.copytree(pruned, copy)
    (chosen,) = copy.glob("*GLOBAL*.gguf")
    chosen.unlink()
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {chosen.name: BEING_MADE}))
    monkeypatch.setattr(runs, "TARGETS", ("Q8_0", "Q2_K"))
    monkeypatch.setattr(fit_measure, "compare_many", lambda *_, **__: pytest.fail("measured again"))
    carry_out(load(pruned / "recipe.toml"), copy, Ears(), Extras(measure=False))
    assert Verified.load(copy) == Verified.load(pruned)


# --- nothing pruned ------------------------------------------------------------------------------------------------


def test_an_unpruned_file_may_be_the_best(whole) -> None:
    report = load_report(whole)
    assert [row.label for row in report.rows] == ["unpruned Q4_K_M"] and report.main is report.rows[0]
    assert load(whole / "recipe.toml").made.found == Found("Q4_K_M")
    assert set(Verified.load(whole).files) == {"base.gguf", "stats.safetensors", "model-Q4_K_M.gguf"}
    page, card = (whole / "report.html").read_text(), (whole / "README.md").read_text()
    assert "Nothing was pruned: unpruned Q4_K_M is the best that fits" in page and 'class="tiles"' in page
    assert 'id="experts"' not in page and 'id="spread"' in page and "global" in page.partition('id="candidates"')[2]
    assert "quantized to Q4_K_M by gguftool, nothing pruned: 5.02 MB" in card and "expert-pruning" not in card
    assert "A stock file" in card and "What was removed" not in card
    assert "byte for byte the same" in typed("verify", whole)


def test_the_original_itself_may_be_the_best(folder, beside, runtime, stats, base_gguf) -> None:
    tools = QuantizeTool(runtime.tool("llama-quantize"))
    quantize(base_gguf, "Q4_K_M", folder / "q4.gguf", imatrix=stats, tools=tools)
    before = sha256(folder / "q4.gguf")
    typed(*asked(folder, "q4.gguf"), "--fit", beside + 8_000_000, "-o", folder / "own", "--quiet")
    report = load_report(folder / "own")
    (row,) = report.rows
    assert row.path == str(folder / "q4.gguf") and row.bytes == report.base_bytes and report.candidates[0].chosen
    assert row.texts["eval_code"]["kld"]["mean"] == pytest.approx(0, abs=1e-6)
    assert [model["label"] for model in report.facts["speed"]["models"]] == ["original"]
    assert set(Verified.load(folder / "own").files) == {"stats.safetensors"}
    assert not (folder / "own" / "README.md").exists() and not list((folder / "own").glob("*.gguf"))
    assert "byte for byte the same" in typed("verify", folder / "own")
    assert sha256(folder / "q4.gguf") == before


# --- its parts -----------------------------------------------------------------------------------------------------


def test_a_dry_run_weighs_by_bytes_alone(folder, beside, tmp_path) -> None:
    out = tmp_path / "out"
    said = json.loads(
        typed(*asked(folder), "--fit", beside + 6_500_000, "--quant", "Q8_0", "-o", out, "--dry-run", "--json")
    )
    assert [(one["status"], one["texts"]) for one in said["candidates"]] == [("fits", {}), ("too large", {})]
    assert not [path.name for path in out.iterdir() if path.suffix in (".toml", ".html", ".safetensors", ".md")]


def test_the_unpruned_files_beside_a_pruned_one() -> None:
    def rows(*found: tuple[str, float, float, str]) -> list[Weighed]:
        return [
            Weighed(target, target, ratio, 1, texts={"t": {"kld": kl, "kld_err": 0.0}} if kl else {}, status=status)
            for target, ratio, kl, status in found
        ]

    class Source:
        def has_encoding(self, target: str) -> bool:
            return target == "Q6_K"

    class Choice:
        plan, target = object(), "Q8_0"

    found = rows(
        ("Q8_0", 0.3, 0.1, "chosen"), ("Q3_K_M", 0.0, 0.3, "measured"), ("Q4_K_M", 0.0, 0.2, "measured"),
        ("Q5_K_M", 0.4, 0.15, "measured"), ("Q5_K_M", 0.0, 0.05, "too large"),
    )  # fmt: skip
    assert fit_run._beside(Source(), Choice(), found) == ("Q8_0", "Q4_K_M")
    Choice.target = "Q4_K_M"
    assert fit_run._beside(Source(), Choice(), found) == ("Q4_K_M",)
    Choice.target = "Q6_K"  # cut from an original of that type: nothing was quantized
    assert fit_run._beside(Source(), Choice(), found[:1]) == ()
    Choice.plan = None
    assert fit_run._beside(Source(), Choice(), found) == ()


def test_what_is_to_be_known_of_a_file_outlives_its_making(pruned, tmp_path, monkeypatch) -> None:
    recipe = load(pruned / "recipe.toml")
    job, found = runs.job_of(recipe, Ears()), recipe.made.found

    def build(job, work, source, recipe, *, refit):
        (work.folder / "made.gguf").write_bytes(b"x")
        return Built("global", None, "Q8_0", work.folder / "made.gguf", ("refitted by hand",))

    for name in ("base.gguf", "stats.safetensors", "state.json", "model-Q8_0.gguf", "model-Q2_K.gguf"):
        shutil.copyfile(pruned / name, tmp_path / name)
    monkeypatch.setattr(fit_measure, "build", build)
    for _ in range(2):
        made = fit_run.produce_found(job, tmp_path, runs.ask_of(recipe), found, lambda _: None)
        assert made.built.notes == ("refitted by hand",) and "refitted by hand" in made.notes
        assert made.built.path == tmp_path / "made.gguf" and (tmp_path / "made.plan.json").is_file()
        monkeypatch.setattr(fit_measure, "build", lambda *_, **__: pytest.fail("made again"))


def test_what_quantizing_costs_is_that_of_the_same_type(pruned, monkeypatch) -> None:
    """What the plan explains is added to the KL of the unpruned file of the same type, and of no other one."""
    recipe = load(pruned / "recipe.toml")
    job = runs.job_of(recipe, Ears())
    made = fit_run.produce_found(job, pruned, runs.ask_of(recipe), recipe.made.found, lambda _: None)
    assert [item.encoding for item in (made.built, *made.rivals)] == ["Q8_0", "Q8_0", "Q2_K"]
    assert made.notes[0] == made.built.plan.formula
    expected = []
    monkeypatch.setattr(pipeline, "failures", lambda texts, wanted, _: expected.append(wanted) or [])
    own = {"Q8_0": 0.25, "Q2_K": 7.0}

    class Compared:
        def __init__(self, kl: float) -> None:
            self.kl = kl

        def as_dict(self) -> dict:
            return {"kld": {"mean": self.kl}}

    monkeypatch.setattr(
        pipeline, "_compared", lambda job, base, models, *_: [Compared(own[item.encoding]) for item in models]
    )
    for rivals, quantized in ((made.rivals, [0.25]), (made.rivals[::-1], [0.25]), (made.rivals[1:], []), ([], [])):
        far_from_plan(job, replace(made, rivals=rivals))
        assert list(expected.pop()[0].quantized.values()) == quantized
    assert far_from_plan(job, replace(made, built=Built("unpruned Q8_0", None, "Q8_0", made.built.path))) == []
    assert not expected


def test_a_search_as_a_report_shows_it() -> None:
    rows = [
        Weighed("a", "Q8_0", 0.25, 90, 150, 100, {"t": {"kld": 0.5, "kld_err": 0.01, "ppl": 9.0}}, CHOSEN),
        Weighed("b", "Q2_K", 0.0, 80, status="left out", why="because"),
    ]
    report = FitReport("m", 1000, 1 << 20, 32, rows, None, Path("x/a.gguf"), "a is best", "by hand")
    one, other = report.candidates()
    assert (one.bytes, one.need, one.chosen, one.why) == (100, 150, True, "chosen")
    assert one.texts == {"t": {"mean": 0.5, "err": 0.01}}
    assert (other.bytes, other.need, other.chosen, other.why) == (80, None, False, "left out: because")
    goal = report.goal()
    assert goal["budget"] == "1.0 MiB of memory (1,048,576 bytes), with a context of 32 tokens"
    assert goal["to run it within the budget"].startswith("gguftool run a.gguf -c 32 ")
    assert goal["choice"] == "a is best"


def test_the_command_that_runs_it_can_be_pasted() -> None:
    report = FitReport("m", 1000, 1 << 20, 32, [], None, Path("my models/a b.gguf"), "a is best", "by hand")
    assert shlex.split(report.command)[:5] == ["gguftool", "run", "my models/a b.gguf", "-c", "32"]
    goal = report.goal()
    assert "my models" not in str(goal)
    assert goal["to run it within the budget"].startswith("gguftool run 'a b.gguf' -c 32 ")
    here = goal_here(goal, "my models/a b.gguf")
    assert here == goal | {"to run it within the budget": report.command}


def test_the_terminal_says_where_the_file_is_and_the_pages_do_not(pruned, folder, monkeypatch) -> None:
    report = load_report(pruned)
    monkeypatch.setattr(runs, "carry_out", lambda *_: report)
    said = typed(*asked(folder), "--fit", "1GiB", "-o", pruned)
    path = Path(report.rows[0].path)
    assert path.parent == pruned
    line = f"to run it within the budget: gguftool run {path} -c {CTX} "
    assert [text for text in said.splitlines() if text.startswith(line)]
    for name in ("report.html", "report.md", "README.md"):
        assert f"gguftool run {path.name} -c {CTX} " in (pruned / name).read_text(), name


def test_a_budget_that_is_none_is_refused_before_anything(folder, tmp_path) -> None:
    said = typed(*asked(folder), "--fit", "much", "-o", tmp_path / "out", code=1)
    assert "the budget: 'much' is no size" in said and not (tmp_path / "out").exists()
    said = typed(*asked(folder), "--fit", "1MiB", "-o", tmp_path / "out", code=1)
    assert "is too small" in said
    assert load_report(tmp_path / "out").status.state == "failed"
    with pytest.raises(GgufToolError, match="fit finds the ratio"):
        RunRecipe(fit="1GiB", ratio=0.4)
