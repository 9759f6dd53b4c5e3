"""Recipe files: what they hold, how they are read, and that nothing wrong in one goes through."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguftool.errors import GgufToolError
from gguftool.recipe_file import Found, Made, RunRecipe, dumps, find, load, loads, save, shipped, start
from gguftool.sources import Source, parse_source, spell

WHOLE = RunRecipe(
    about='one "line" with \\ and \t and \x7f and ü',
    model=Path("/models/x"),
    data=(Source("/texts/a.txt"), Source("/texts/chat.jsonl", "messages", 2000, 2.5), Source("a/b", "text", 7, 1.0, True)),
    eval=(Path("/texts/eval.txt"),),
    ratio=0.4, quant="Q4_K_M", refit="plain", method="tenp", criterion="enp", align=64, max_tiers=3, whole=0.125,
    schedule="reverse", depth=(2.0, 1.0), mix=(2.0, 1.0), calibration="general", relative=True, cut_router=True,
    guard=False, seed=3, ctx=1024, windows=32, eval_windows=16, pre_tokenizer="qwen2", dtype="bfloat16", memory="12GiB",
    backend="cpu", made=Made("0.2.0", "0.3.36", "runtime-cpu-1", 2, "ab", {'/texts/"a".txt': "cd"}),
)  # fmt: skip


def test_what_is_written_is_read_again():
    assert loads(dumps(WHOLE), Path("/elsewhere")) == WHOLE
    assert loads(dumps(RunRecipe()), Path("/elsewhere")) == RunRecipe()
    for found in (Found("Q4_K_M", 0.31400000000000006, ("Q4_K_M", "Q2_K")), Found("Q8_0")):
        fitted = replace(WHOLE, ratio=None, fit="12GiB", fit_ctx=4096, made=replace(WHOLE.made, found=found))
        assert loads(dumps(fitted), Path("/elsewhere")) == fitted


def test_a_ratio_and_a_budget_take_each_others_place():
    asked = RunRecipe(fit="1GiB", fit_ctx=64)
    assert asked.changed({"ratio": 0.4}) == RunRecipe(ratio=0.4)
    assert asked.changed({"quant": "Q8_0"}) == replace(asked, quant="Q8_0")
    assert RunRecipe(ratio=0.4).changed({"fit": "1GiB"}) == RunRecipe(fit="1GiB")
    assert asked.changed({"fit": None, "ratio": 0.4}).fit is None
    with pytest.raises(GgufToolError, match=r"fit_ctx \(--fit-ctx\) is the context of a budget"):
        RunRecipe(ratio=0.4).changed({"fit_ctx": 64})
    with pytest.raises(GgufToolError, match=r"fit_ctx \(--fit-ctx\) is the context of a budget"):
        asked.changed({"ratio": 0.4, "fit_ctx": 64})
    # The type of a recipe with a ratio belongs to the ratio; that of a recipe with a budget, or one given, is asked for.
    code = RunRecipe(ratio=0.4, quant="Q4_K_M")
    assert code.changed({"fit": "1GiB"}) == RunRecipe(fit="1GiB")
    assert code.changed({"fit": "1GiB", "quant": "q6_k"}) == RunRecipe(fit="1GiB", quant="Q6_K")
    narrow = replace(asked, quant="Q6_K")
    assert narrow.changed({"fit": "2GiB"}) == replace(narrow, fit="2GiB")
    with pytest.raises(GgufToolError, match="fit finds the ratio"):
        asked.changed({"fit": "2GiB", "ratio": 0.4})


@pytest.mark.parametrize(
    ("written", "name"),
    [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), (" q8_0 ", "Q8_0"), ("bf16", "BF16"), ("Q2_K", "Q2_K")],
)
def test_a_type_is_called_by_its_own_name_however_it_is_written(written, name):
    assert RunRecipe(quant=written).quant == RunRecipe().changed({"quant": written}).quant == name
    recipe = loads(f'quant = "{written}"\nratio = 0.4', Path("/"))
    assert recipe == RunRecipe(ratio=0.4, quant=name) and recipe.pruning.target == name
    assert f'quant = "{name}"' in dumps(recipe)


def test_every_value_differs_from_its_default_above():
    same = {one.name for one in fields(RunRecipe) if getattr(WHOLE, one.name) == getattr(RunRecipe(), one.name)}
    assert same == {"fit", "fit_ctx", "layout", "device"}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 0.99), st.integers(4, 2**40))
def test_any_text_and_number_comes_back(text, ratio, ctx):
    recipe = RunRecipe(about=text, ratio=ratio, ctx=ctx)
    assert loads(dumps(recipe), Path("/")) == recipe


def test_a_model_of_the_hub_stays_one_unless_a_folder_of_its_name_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loads('model = "owner/A-Model"', tmp_path).model == Path("owner/A-Model")
    assert 'model = "owner/A-Model"' in dumps(RunRecipe(model=Path("owner/A-Model")))
    for path in ("./owner/A-Model", "../owner", "/owner/A-Model", "A-Model", "a/b/c"):
        assert loads(f'model = "{path}"', tmp_path).model == tmp_path / path
    (tmp_path / "owner" / "A-Model").mkdir(parents=True)
    assert loads('model = "owner/A-Model"', tmp_path).model == tmp_path / "owner" / "A-Model"
    assert f'model = "{tmp_path}/owner/A-Model"' in dumps(RunRecipe(model=Path("owner/A-Model")))


def test_relative_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "a:b@2").mkdir()
    folder = tmp_path / "a:b@2"
    (folder / "code.txt").write_text("x")
    (folder / "set").mkdir()
    (folder / "r.toml").write_text(
        'model = "m"\ndata = ["code.txt", "code.txt:field:5@2", "hf:set:test", "hf:own/er:train:text", "/abs.txt"]\n'
        'eval = ["e.txt"]\nratio = 0.4\n'
    )
    monkeypatch.chdir(tmp_path)
    found = load(Path("a:b@2/r.toml"))
    assert found.model == folder / "m" and found.eval == (folder / "e.txt",)
    assert found.data == (
        Source(str(folder / "code.txt")),
        Source(str(folder / "code.txt"), "field", 5, 2.0),
        Source(str(folder / "set"), None, None, 1.0, True, None, "test"),
        Source("own/er", "text", None, 1.0, True),
        Source("/abs.txt"),
    )
    save(found, tmp_path / "copy.toml", "what it is\nin two lines")
    assert load(tmp_path / "copy.toml") == found
    assert (tmp_path / "copy.toml").read_text().startswith("# what it is\n# in two lines\n")
    assert not list(tmp_path.glob("*.partial"))
    # A link's own name is the name of a model and of a text, and stands in the outputs.
    (tmp_path / "link.txt").symlink_to(folder / "code.txt")
    linked = RunRecipe(model=tmp_path / "link.txt", data=(Source("link.txt"),), eval=(Path("link.txt"),))
    assert dumps(linked).count(f'"{tmp_path}/link.txt"') == 3


@pytest.mark.parametrize(
    "text",
    [
        "a.txt",
        "a.jsonl:messages:20@2.0",
        "a.jsonl:20",
        "hf:o/n/c:test:text:5@0.5",
        "hf:o/n:train",
        "C:\\x\\a.txt",
        "a:b.c",
    ],
)
def test_a_source_is_spelled_as_it_is_parsed(text):
    assert parse_source(spell(parse_source(text))) == parse_source(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ratoi = 0.4", "no key 'ratoi'; did you mean ratio?"),
        ("keep = 0.6", "did you mean ratio (1 - keep)?"),
        ("nothing_like_it = 1", "known are about, align"),
        ('ratio = "0.4"', 'ratio = "0.4" has to be a number'),
        ("ratio = true", "ratio = true has to be a number"),
        ("windows = 3.0", "windows = 3.0 has to be a whole number"),
        ("windows = true", "windows = true has to be a whole number"),
        ("guard = 1", "guard = 1 has to be true or false"),
        ("quant = 4", "quant = 4 has to be a text in quotes"),
        ('quant = "Q4_KM"', "no encoding 'Q4_KM' is known (did you mean Q4_K_M"),
        ('data = "a.txt"', "data = \"a.txt\" has to be a list of texts"),
        ("data = [1]", "data = [1] has to be a list of texts"),
        ('data = ["a.txt@x1"]', "e.txt"),
        ('data = ["a.txt@0"]', "data: --data"),
        ("depth = [1, 2, 3]", "depth = [1, 2, 3] has to be two numbers"),
        ("mix = [1, \"2\"]", "a number for each text"),
        ("ratio = 1.5", "--ratio 1.5"),
        ("whole = 0.7\nratio = 0.4", "--whole 0.7"),
        ('schedule = "up"', "--schedule 'up'"),
        ('refit = "wild"', "refit 'wild' is not one of plain, sequential"),
        ('dtype = "int8"', "dtype 'int8' is not one of auto, float32"),
        ('backend = "gpu"', "backend 'gpu' is not one of auto, cpu"),
        ("ctx = 3", "ctx 3 is less than 4"),
        ("windows = 0", "windows 0 is less than 1"),
        ("seed = -1", "--seed -1 is less than 0"),
        ("ratio = 0.4\nratio = 0.5", "not TOML"),
        ("[made]\ngguftool = \"1\"", "made = "),
        ("made = 3", "the table that compress writes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text, said, tmp_path):
    if said == "e.txt":  # a place that merely looks odd is a place: whether it is there is asked when it is read
        assert loads(text, tmp_path).data[0].place.endswith("a.txt@x1")
        return
    with pytest.raises(GgufToolError, match=re.escape(said)) as caught:
        loads(text, tmp_path, "r.toml")
    assert str(caught.value).startswith("r.toml: ") and "\n" not in str(caught.value).replace("\\n", "")


@pytest.mark.parametrize("change", [{"threads": "2"}, {"threads": True}, {"inputs": {"a": 1}}, {"model": 3}])
def test_a_table_of_another_hand_is_refused(change):
    made = Made("1", "2", "r", 2, "ab", {"/a.txt": "cd"})
    assert loads(dumps(RunRecipe(made=made)), Path("/")).made == made
    with pytest.raises(GgufToolError, match="compress writes"):
        loads(dumps(RunRecipe(made=replace(made, **change))), Path("/"))


@pytest.mark.parametrize(
    "text",
    [
        "found = 3",
        "[made.found]\nbeside = []",
        "[made.found]\nquant = 4\nbeside = []",
        '[made.found]\nquant = "Q8_0"\nbeside = [8]',
        '[made.found]\nquant = "Q8_0"\nbeside = []\nratio = "0.4"',
        '[made.found]\nquant = "Q8_0"\nbeside = []\nmethod = "auto"',
    ],
)
def test_what_was_found_is_refused_from_another_hand(text):
    made = dumps(RunRecipe(made=Made("1", "2", "r", 2, "ab"))).replace("\n[made.inputs]\n", f"{text}\n[made.inputs]\n")
    with pytest.raises(GgufToolError, match="compress writes, and its found"):
        loads(made, Path("/"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(GgufToolError, match="not a recipe file"):
        load(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'about = "\xfc"')
    with pytest.raises(GgufToolError, match="not a recipe file"):
        load(tmp_path / "latin.toml")
    with pytest.raises(GgufToolError, match="did you mean code"):
        find("coed")
    with pytest.raises(GgufToolError, match="UTF-8"):
        save(replace(WHOLE, model=Path("/\udcff")), tmp_path / "x.toml")
    assert not list(tmp_path.glob("x.toml*"))


def test_a_ratio_has_to_be_named_in_the_end():
    with pytest.raises(GgufToolError, match="--ratio or --keep"):
        _ = RunRecipe().pruning
    recipe = WHOLE.pruning
    assert (recipe.method, recipe.ratio, recipe.target, recipe.depth) == ("tenp", 0.4, "Q4_K_M", (2.0, 1.0))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_whole_but_for_the_model(name):
    found = load(find(name))
    assert found.about and found.ratio and found.quant and found.model is None and found.made is None
    for path in (*(Path(source.place) for source in found.data), *found.eval):
        assert path.resolve().is_file()
    assert not {Path(source.place).resolve() for source in found.data} & {path.resolve() for path in found.eval}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_that_was_printed_into_a_file_finds_its_texts(name, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(start(name))
    found, was = load(mine), load(find(name))
    assert [Path(source.place) for source in found.data] == [Path(source.place).resolve() for source in was.data]
    assert list(found.eval) == [path.resolve() for path in was.eval]
    assert replace(found, data=was.data, eval=was.eval) == was
    assert start(str(mine)) == mine.read_text()


def test_three_are_shipped():
    assert set(shipped()) == {"general", "code", "smallest"}
