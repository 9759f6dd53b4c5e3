"""The commands as a person meets them: the whole line on the built-in model, and every way to go wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gguftool import builtin
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.plan import PrunePlan
from gguftool.verification import Verified, sha256
from gguftool.workspace import Workspace


def gguftool(*arguments, code=0):
    """Runs a command; returns stdout. A failure is one line on stderr, never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "gguftool", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def line(tmp_path_factory, checkpoint_dir, base_gguf, stats, runtime):
    """Files of the whole line, made by the commands."""
    folder = tmp_path_factory.mktemp("line")
    stats.save(folder / "stats.safetensors")
    gguftool("plan", folder / "stats.safetensors", "--method", "tenp", "--ratio", "0.4", "--target", "Q4_K_M",
             "-o", folder / "plan.json")  # fmt: skip
    gguftool("prune", base_gguf, "--plan", folder / "plan.json", "-o", folder / "pruned.gguf")
    gguftool("quantize", folder / "pruned.gguf", "Q4_K_M", "-o", folder / "q4.gguf",
             "--imatrix", folder / "stats.safetensors")  # fmt: skip
    return folder


def test_plan_counts_the_bytes_of_every_file(line):
    plan = json.loads((line / "plan.json").read_text())
    for name, key in (("pruned.gguf", "tensor_bytes"), ("q4.gguf", "encoded_bytes")):
        facts = json.loads(gguftool("inspect", line / name, "--json"))
        assert facts["tensor_bytes"] == plan[key]
        assert facts["bytes"] == (line / name).stat().st_size
        widths = [[expert["width"] for expert in layer["experts"]] for layer in facts["layers"]]
        assert widths == [[expert["width"] for expert in layer["experts"]] for layer in plan["layers"]]
        assert len(set(widths[0])) > 1
    assert {"arch", "layout", "layers", "bytes"} <= facts.keys()
    assert {"width", "count", "type"} <= facts["layers"][0]["tiers"][0].keys()


def test_plan_prints_a_table_and_types(line, tmp_path):
    out = gguftool("plan", line / "stats.safetensors", "--keep", "0.6", "--tensors", "-o", tmp_path / "p.json")
    assert "tiers (count × width)" in out and "blk.0.ffn_gate_exps.0.weight" in out


def test_dry_run_writes_nothing_and_counts_the_file(line, base_gguf, tmp_path):
    out = gguftool("prune", base_gguf, "--plan", line / "plan.json", "-o", tmp_path / "x.gguf", "--dry-run", "--json")
    assert json.loads(out)["bytes"] == (line / "pruned.gguf").stat().st_size
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "said"), [("auto", True), ("tenp", False)])
def test_prune_says_that_the_weights_are_missing_which_the_plan_counts_on(method, said, line, base_gguf, tmp_path):
    plan = tmp_path / "plan.json"
    gguftool("plan", line / "stats.safetensors", "--method", method, "--ratio", "0.4", "-o", plan)
    arguments = ["prune", base_gguf, "--plan", plan, "-o", tmp_path / "x.gguf", "--dry-run"]
    done = subprocess.run([sys.executable, "-m", "gguftool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0 and ("none were given: `gguftool refit`" in done.stderr) == said


def test_a_type_in_small_letters_is_called_by_its_name(line, tmp_path):
    assert "is Q8_0, " in gguftool("quantize", line / "pruned.gguf", "q8_0", "-o", tmp_path / "x.gguf")


def test_inspect_experts_and_check(line):
    out = gguftool("inspect", line / "q4.gguf", "--experts", "--check")
    assert "tiered layout" in out and "expert:width" in out and "no fault found" in out


def test_validate_has_its_stable_keys(line, base_gguf, eval_text):
    found = json.loads(
        gguftool(
            "validate", base_gguf, line / "q4.gguf", "--data", eval_text, "--windows", 2, "--backend", "cpu", "--json"
        )
    )
    assert {
        "base",
        "pruned",
        "ln_ppl_ratio",
        "ln_ppl_ratio_err",
        "kld",
        "same_top",
        "tokens",
        "n_ctx",
        "backend",
    } <= found.keys()
    assert {"bytes", "ppl", "ppl_err"} <= found["base"].keys() & found["pruned"].keys()
    assert {"mean", "err", "p99", "max"} <= found["kld"].keys()
    assert found["n_ctx"] == 512 and found["tokens"] == 2 * 255
    assert found["pruned"]["bytes"] < found["base"]["bytes"] and found["kld"]["mean"] > 0 and 0 < found["same_top"] < 1


def test_expand_gives_a_stock_file(line, tmp_path):
    gguftool("expand", line / "pruned.gguf", "-o", tmp_path / "stock.gguf")
    assert not any("tier" in spec.name for spec in GgufFile(tmp_path / "stock.gguf").tensors)


def test_convert_says_what_a_strange_vocabulary_needs(checkpoint_dir, tmp_path, runtime):
    assert "--pre-tokenizer" in gguftool("convert", checkpoint_dir, "-o", tmp_path / "x.gguf", code=1)
    assert not list(tmp_path.iterdir())


def test_convert_refuses_a_pre_tokenizer_that_llama_cpp_does_not_know(checkpoint_dir, tmp_path, runtime):
    said = gguftool("convert", checkpoint_dir, "-o", tmp_path / "x.gguf", "--pre-tokenizer", "qwen22", code=1)
    assert "near are qwen2" in said and not list(tmp_path.iterdir())


def test_calibrate_is_compress_is_step_by_step(checkpoint_dir, tmp_path, runtime):
    texts = builtin.texts()
    arguments = [
        "compress", checkpoint_dir, "--method", "global", "--ratio", "0.4", "--quant", "Q8_0", "--data", texts["calib_code"],
        "--eval", texts["eval_prose"], "--windows", 2, "--eval-windows", 2, "--pre-tokenizer", "qwen2", "-o",
        tmp_path / "out",
    ]  # fmt: skip
    report = json.loads(gguftool(*arguments, "--json", "--backend", "cpu"))
    assert [row["encoding"] for row in report["rows"]] == ["Q8_0", "Q8_0"]
    assert report["rows"][0]["bytes"] < report["rows"][1]["bytes"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.gguf")}
    again = json.loads(gguftool(*arguments, "--json", "--backend", "cpu"))
    assert again["rows"][0]["texts"] == report["rows"][0]["texts"]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.gguf")}
    assert (tmp_path / "out" / "report.md").read_text().count("|") > 20
    gguftool(
        "calibrate", checkpoint_dir, "--data", texts["calib_code"], "--windows", 2, "-o", tmp_path / "s.safetensors"
    )
    gguftool("plan", tmp_path / "s.safetensors", "--ratio", 0.4, "--target", "Q8_0", "-o", tmp_path / "p.json")
    (plan,) = (tmp_path / "out").glob("*.plan.json")
    assert json.loads((tmp_path / "p.json").read_text())["kept_hash"] == json.loads(plan.read_text())["kept_hash"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "{stats}", "--method", "tenp", "-o", "{new}"], 2, "--ratio or --keep"),
        (["plan", "{stats}", "--ratio", "1.5", "-o", "{new}"], 1, "share"),
        (["plan", "{stats}", "--ratio", "0.4", "--method", "tnep", "-o", "{new}"], 1, "did you mean tenp"),
        (["plan", "{text}", "--ratio", "0.4", "-o", "{new}"], 1, "stats"),
        (["plan", "{missing}", "--ratio", "0.4", "-o", "{new}"], 1, "no such stats file"),
        (["plan", "{stats}", "--ratio", "0.95", "--method", "reap", "-o", "{new}"], 1, "routed per token"),
        (["plan", "{stats}", "--ratio", "0.4", "--target", "Q4_KM", "-o", "{new}"], 1, "Q4_K_M"),
        (["prune", "{base}", "--plan", "{text}", "-o", "{new}"], 1, "not a plan"),
        (["prune", "{text}", "--plan", "{plan}", "-o", "{new}"], 1, "not a GGUF"),
        (["prune", "{pruned}", "--plan", "{plan}", "-o", "{new}"], 1, "already"),
        (["prune", "{base}", "--plan", "{plan}", "-o", "{base}"], 1, "is an input"),
        (["prune", "{base}", "--plan", "{plan}", "-o", "{pruned}"], 1, "--force"),
        (["quantize", "{base}", "Q9_X", "-o", "{new}"], 1, "known are"),
        (["quantize", "{base}", "IQ2_XS", "-o", "{new}"], 1, "importance matrix"),
        (["expand", "{base}", "-o", "{new}"], 1, "not a tiered file"),
        (["inspect", "{text}"], 1, "not a GGUF"),
        (["inspect", "{model}"], 1, "a folder, no GGUF; `gguftool convert` makes one"),
        (["validate", "{base}", "{model}", "--data", "{text}"], 1, "a folder, no GGUF"),
        (["validate", "{model}", "{base}", "--data", "{text}"], 1, "a folder, no GGUF"),
        (["plan", "{base}", "--ratio", "0.4", "-o", "{new}"], 1, "a GGUF, no stats file"),
        (["plan", "{plan}", "--ratio", "0.4", "-o", "{new}"], 1, "text, no stats file"),
        (["prune", "{base}", "--plan", "{stats}", "-o", "{new}"], 1, "not a plan but tensors"),
        (["convert", "{base}", "-o", "{new}"], 1, "a file, and a checkpoint's directory is wanted here"),
        (["validate", "{base}", "{pruned}", "--data", "{empty}"], 1, "empty"),
        (["validate", "{base}", "{missing}", "--data", "{text}"], 1, "no such file"),
        (["validate", "{base}", "{pruned}", "--data", "{text}", "--backend", "cpu,metal"], 1, "runtime build --backend metal"),
        (["validate", "{base}", "{pruned}", "--data", "{text}", "--backend", "cpu,gpu"], 2, "'gpu' is none of"),
        (["validate", "{base}", "{pruned}", "--data", "{text}", "--backend", "cpu,cpu"], 2, "name each backend once"),
        (["run", "{missing}"], 1, "no such file"),
        (["serve", "{text}", "--port", "1"], 1, "not a GGUF"),
        (["runtime", "build", "--backend", "cpu", "--cmake", "OPENMP=ON"], 1, "--cmake -DNAME=VALUE"),
        (["runtime", "selftest", "--backend", "metal"], 1, "runtime build --backend metal"),
        (["calibrate", "{empty_dir}", "--data", "{text}", "-o", "{new}"], 1, "config.json"),
        (["calibrate", "{model}", "--data", "{empty}", "-o", "{new}"], 1, "empty"),
        (["convert", "{empty_dir}", "-o", "{new}"], 1, "not a Hugging Face checkpoint"),
        (["compress", "{model}", "--ratio", "0.4", "--data", "{missing}", "--eval", "{text}", "-o", "{new}"], 1, "no such"),
        (["compress", "{model}", "--ratio", "0.4", "--data", "{text}", "--eval", "{text}", "-o", "{text}"], 1, "names a folder"),
        (["verify", "{missing}"], 1, "no such folder; `verify` takes the one that `gguftool compress` wrote into"),
        (["verify", "{empty_dir}"], 1, "no such record of a run; `gguftool compress` leaves one"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(arguments, code, message, line, base_gguf, checkpoint_dir, eval_text, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty-dir").mkdir()
    names = {
        "stats": line / "stats.safetensors", "plan": line / "plan.json", "pruned": line / "pruned.gguf", "base": base_gguf,
        "text": eval_text, "missing": tmp_path / "missing", "empty": tmp_path / "empty.txt", "new": tmp_path / "new",
        "empty_dir": tmp_path / "empty-dir", "model": checkpoint_dir,
    }  # fmt: skip
    before = base_gguf.stat().st_mtime_ns
    said = gguftool(*(argument.format(**names) for argument in arguments), code=code)
    assert message in said
    if code == 1:
        assert len([text for text in said.splitlines() if text.startswith("error:")]) == 1
    assert base_gguf.stat().st_mtime_ns == before
    if arguments[0] != "compress":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty-dir", "empty.txt"]


@pytest.mark.parametrize("command", ["calibrate", "refit", "compress", "fit", "sweep", "validate", "convert"])
def test_an_input_that_is_missing_is_missed_before_anything_is_loaded(command, checkpoint_dir, eval_text, tmp_path):
    rest = {
        "refit": ["--plan", "p"], "compress": ["--ratio", ".4"], "fit": ["--memory", "1GiB"], "sweep": ["--ratio", ".4"],
        "validate": [checkpoint_dir],
    }.get(command, [])  # fmt: skip
    texts = [] if command == "convert" else ["--data", eval_text]
    texts += ["--eval", eval_text] if command in ("compress", "fit", "sweep") else []
    out = [] if command == "validate" else ["-o", tmp_path / "out"]
    missing = tmp_path / "missing"
    tried = {"text": [checkpoint_dir, *rest, *texts, "--data", missing, *out]} if texts else {}
    if command != "validate":
        tried["model"] = [missing, *rest, *texts, *out]
    if command in ("compress", "fit"):
        tried["eval"] = [checkpoint_dir, *rest, *texts, "--eval", missing, *out]
    if command == "compress":
        recipe = tmp_path / "r.toml"
        recipe.write_text(f'data = ["{eval_text}"]\neval = ["missing"]\nratio = 0.4\n')
        tried["recipe"] = [checkpoint_dir, "--recipe", recipe, *out]
    for what, given in tried.items():
        script = (
            "import sys\nfrom gguftool.cli import cli\nfrom gguftool.errors import GgufToolError\n"
            "try: cli(sys.argv[1:], standalone_mode=False)\n"
            "except GgufToolError as error: print(error, 'torch' in sys.modules, 'llama_cpp' in sys.modules)"
        )
        said = subprocess.run([sys.executable, "-c", script, command, *map(str, given)], capture_output=True, text=True)
        assert said.stdout.startswith(f"{missing}: no such") and said.stdout.endswith(" False False\n"), (what, said)
    assert not (tmp_path / "out").exists()


def test_stats_and_plans_may_be_called_as_anybody_likes(line, stats, tmp_path):
    stats.save(tmp_path / "stats.json")
    gguftool("plan", tmp_path / "stats.json", "--ratio", "0.4", "-o", tmp_path / "plan.safetensors")
    gguftool("plan", line / "stats.safetensors", "--ratio", "0.4", "-o", tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.safetensors").kept_hash == PrunePlan.load(tmp_path / "plan.json").kept_hash


def test_a_folder_remembers_what_its_files_were_made_from(tmp_path):
    said: list[str] = []
    made: list[str] = []
    work = Workspace(tmp_path, said.append)

    def make(text):
        return lambda path: (made.append(text), path.write_text(text))

    for inputs, text in ((1, "a"), (1, "a"), (2, "b"), (1, "a")):
        assert work.step("f", {"in": inputs}, make(text)).read_text() == text
    assert made == ["a", "b", "a"] and "already there" in said[0] and "replacing" in said[1]

    def killed(path):
        path.write_text("c")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.step("f", {"in": 3}, killed)
    again = Workspace(tmp_path, said.append)
    assert again.step("f", {"in": 1}, make("d")).read_text() == "d"
    (tmp_path / "mine").write_text("dear")
    with pytest.raises(GgufToolError, match="was not made by this command"):
        again.step("mine", {"in": 1}, make("x"))
    assert (tmp_path / "mine").read_text() == "dear"
    (tmp_path / "state.json").write_text("[]")
    assert Workspace(tmp_path, said.append).state == {}


def test_what_an_ended_run_recorded_is_taken_up_with_the_same_bytes_only(tmp_path):
    said: list[str] = []

    def step() -> str:
        return Workspace(tmp_path, said.append).step("f", {"in": 1}, lambda path: path.write_text("whole")).read_text()

    step()
    record = Verified({"f": sha256(tmp_path / "f")})
    record.save(tmp_path)
    assert step() == "whole" and said == ["f: already there"]
    (tmp_path / "f").write_text("whOle")
    assert step() == "whole" and "f: its bytes are not those that verified.json recorded" in said[1]
    (tmp_path / "verified.json").write_text("{")
    assert step() == "whole" and said[2:] == ["f: already there"], "what nobody can read says nothing of a file"


def test_a_wrong_recipe_is_refused_before_the_first_step(checkpoint_dir, tmp_path, runtime):
    text = builtin.texts()["eval_code"]
    for wrong, message in (
        (["--method", "reep"], "reap"),
        (["--criterion", "x"], "criterion"),
        (["--ctx", "3"], "ctx 3 is less than 4"),
    ):
        said = gguftool(
            "compress", checkpoint_dir, "--ratio", "0.4", "--data", text, "--eval", text, "-o", tmp_path, *wrong, code=1
        )
        assert message in said
        assert not list(tmp_path.glob("*.gguf"))


def test_ctrl_c_is_said_and_is_exit_code_130(monkeypatch, capsys):
    from gguftool import cli

    monkeypatch.setattr(cli.cli, "main", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.run() == 130 and "stopped" in capsys.readouterr().err


def test_a_reader_that_goes_away_gets_no_complaint(line):
    command = f"{sys.executable} -m gguftool inspect {line / 'q4.gguf'} --experts | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
