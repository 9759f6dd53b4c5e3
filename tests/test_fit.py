"""fit: bytes and memory before a file is there, what is chosen by hand-made damage, refusals, and a small run of all of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGUFValueType as V

from gguftool import builtin, fit, fit_measure, gguf_file, runs
from gguftool.budget import JITTER, Memory, measure
from gguftool.checkpoint import open_checkpoint
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.fit import Ask, candidates, check, weigh
from gguftool.fit_choose import is_past, mean_kl, verdict
from gguftool.fit_report import CHOSEN, LEFT_OUT, MEASURED, TOO_LARGE, Weighed
from gguftool.fit_solve import Choice, Solver, targets_for
from gguftool.gguf_file import GgufFile, KeyValue
from gguftool.gguf_model import open_gguf
from gguftool.outline import Base, Outline, entry_bytes, pruned, unpruned
from gguftool.prepare import Job, Prepared
from gguftool.quantize import QuantizeTool, quantize
from gguftool.recipe import Recipe
from gguftool.recipe_file import RunRecipe
from gguftool.stats import CalibrationStats
from gguftool.workspace import Workspace
from gguftool.writer import prune
from typed import typed

CTX = 64  # short: the buffers of a batch would take more than this small model


@pytest.fixture
def source(checkpoint_dir, base_gguf, stats) -> Prepared:
    return Prepared(open_checkpoint(checkpoint_dir), base_gguf, stats, ())


@pytest.fixture
def job(checkpoint_dir, runtime, llama, eval_text) -> Job:
    return Job(
        checkpoint_dir,
        [builtin.texts()["calib_code"]],
        [eval_text],
        runtime,
        llama,
        lambda *_: None,
        n_ctx=256,
        windows=4,
        eval_windows=2,
        pre_tokenizer="qwen2",
    )


@pytest.fixture
def solver(job, source, tmp_path) -> Solver:
    return Solver(job, Workspace(tmp_path / "work", lambda _: None), source, 1 << 40, CTX, Recipe("global", 0.0))


def quantized(file: Path, target: str, out: Path, runtime: Any, stats: CalibrationStats) -> Path:
    return quantize(file, target, out, imatrix=stats, tools=QuantizeTool(runtime.tool("llama-quantize"))).path


def enough_for(solver: Solver, target: str) -> int:
    """A budget that holds the unpruned model at `target`, and what tiers take in buffers: much beside so small a file."""
    taken = solver.unpruned(target).memory
    assert taken is not None
    return taken.peak + JITTER + 500_000


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_of_metadata_by_hand() -> None:
    # length of the name 8, name, type 4, then: a string's length 8 and bytes; an array's type 4 and count 8 and items
    assert entry_bytes("a.b", KeyValue("xyz", V.STRING)) == 8 + 3 + 4 + 8 + 3
    assert entry_bytes("a.b", KeyValue("ü", V.STRING)) == 8 + 3 + 4 + 8 + 2
    assert entry_bytes("a", KeyValue([1, 2, 3], V.ARRAY, V.UINT32)) == 8 + 1 + 4 + 12 + 3 * 4
    assert entry_bytes("a", KeyValue(["x", "yz"], V.ARRAY, V.STRING)) == 8 + 1 + 4 + 12 + 9 + 10
    assert entry_bytes("a", KeyValue(True, V.BOOL)) == 8 + 1 + 4 + 1


def test_the_base_file_is_foretold(base_gguf) -> None:
    assert unpruned(Base.open(base_gguf)).file_bytes == base_gguf.stat().st_size


@pytest.mark.parametrize("target", ["Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XS"])
def test_files_are_foretold_to_the_byte(solver, runtime, base_gguf, stats, tmp_path, target) -> None:
    whole = quantized(base_gguf, target, tmp_path / "whole.gguf", runtime, stats)
    assert solver.unpruned(target).outline.file_bytes == whole.stat().st_size
    for slices in (100, 177):
        choice = solver.at(target, slices)
        assert choice.plan is not None
        cut = tmp_path / f"cut-{slices}.gguf"
        prune(base_gguf, choice.plan, cut)
        assert pruned(solver.base, choice.plan, None).file_bytes == cut.stat().st_size
        small = quantized(cut, target, tmp_path / f"small-{slices}.gguf", runtime, stats)
        assert choice.outline.file_bytes == small.stat().st_size


def test_new_weights_are_named_in_the_file(solver) -> None:
    plan = solver.at("Q4_K_M", 100).plan
    assert plan is not None
    named = pruned(solver.base, plan, "refit").entry_bytes - pruned(solver.base, plan, None).entry_bytes
    assert named == entry_bytes("gguftool.weights", KeyValue("refit", V.STRING))


def test_the_file_uses_the_room_up(solver) -> None:
    room = 3_500_000
    most = solver._most_slices("Q4_K_M", room)
    assert most is not None
    assert solver.at("Q4_K_M", most).outline.file_bytes <= room < solver.at("Q4_K_M", most + 1).outline.file_bytes
    assert len(solver._sizes["Q4_K_M"]) < 9  # of 256: sizes grow nearly in a line
    for target, room in (("Q6_K", 4_000_000), ("Q2_K", 2_000_000), ("Q8_0", 7_000_000)):
        most = solver._most_slices(target, room)
        assert most is not None and solver._size(target, most) <= room < solver._size(target, most + 1)
    assert solver._most_slices("Q4_K_M", 1_000_000) is None


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_skeleton_takes_what_the_file_takes(solver, runtime, base_gguf, tmp_path) -> None:
    choice = solver.at("Q8_0", 100)
    skeleton = tmp_path / "skeleton.gguf"
    choice.outline.write_skeleton(skeleton, solver.base)
    assert skeleton.stat().st_size == choice.outline.file_bytes
    assert choice.plan is not None
    prune(base_gguf, choice.plan, tmp_path / "cut.gguf")
    real = quantized(tmp_path / "cut.gguf", "Q8_0", tmp_path / "real.gguf", runtime, solver.source.stats)
    there, before = measure(runtime, real, CTX), measure(runtime, skeleton, CTX)
    assert abs(there.peak - before.peak) < JITTER
    assert (there.kv, there.compute) == (before.kv, before.compute)
    assert there.other > 0


def test_the_kv_cache_grows_with_the_context(runtime, base_gguf) -> None:
    file = GgufFile(base_gguf)
    row = 2 * file.arch_integer("attention.head_count_kv") * file.arch_integer("attention.key_length")
    for ctx in (256, 1024):  # K and V in F16; llama.cpp says hundredths of MiB
        assert measure(runtime, base_gguf, ctx).kv == pytest.approx(
            file.arch_integer("block_count") * row * ctx * 2, abs=6000
        )


def test_a_file_that_does_not_load_is_a_stated_error(runtime, tmp_path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(GgufToolError, match="does not load"):
        measure(runtime, tmp_path / "no.gguf", CTX)


# --- what is chosen ------------------------------------------------------------------------------------------------


def memory(size: int) -> Memory:
    return Memory(size, size + 60, 30, 10, 15)


def row(label: str, ratio: float, kl: float, err: float = 0.001, status: str = MEASURED) -> Weighed:
    texts = {name: {"kld": factor * kl, "kld_err": err} for name, factor in (("in", 0.5), ("out", 1.5))}
    return Weighed(label, label.split()[-1], ratio, 100, 160, 100, texts, status)


def test_the_mean_over_texts_by_hand() -> None:
    one = row("a Q8_0", 0.2, 0.02)
    assert one.kl == pytest.approx(0.02) and one.error == pytest.approx(0.001 / 2**0.5)
    assert Weighed("a", "Q8_0", 0, 1).kl is None


def test_where_damage_grows_the_walk_ends() -> None:
    a, b = row("a Q3_K_M", 0.1, 0.030), row("a Q4_K_M", 0.3, 0.020)
    assert not is_past([a]) and not is_past([a, b])
    assert is_past([b, a])
    # 0.0012 apart, and 2 x sqrt(2) x 0.0007 = 0.002 is the doubt
    assert not is_past([b, row("a Q5_K_M", 0.4, 0.0212)])


def test_the_verdict_names_the_rivals() -> None:
    rows = [
        row("auto 30 % Q4_K_M", 0.3, 0.02, status=CHOSEN),
        row("unpruned Q3_K_M", 0.0, 0.0205),
        row("auto 40 % Q5_K_M", 0.4, 0.05),
    ]
    text = verdict(rows)
    assert text.startswith("auto 30 % Q4_K_M has the least mean KL")
    assert "the best unpruned one, unpruned Q3_K_M, has 0.02050" in text and "within two standard" in text
    assert "the next pruned one, auto 40 % Q5_K_M, has 0.05000" in text
    assert verdict([row("a", 0, 1)]) == ""


def test_what_is_not_finite_is_never_the_least() -> None:
    rows = [row("broken", 0.3, float("nan")), row("whole", 0.4, 0.05), row("far", 0.5, float("inf"))]
    assert min(rows, key=mean_kl).label == "whole" and min(rows[::-1], key=mean_kl).label == "whole"


class FakeBench:
    """Damage by label instead of by measuring."""

    def __init__(self, damage: dict[str, float], took: list[int] | None = None) -> None:
        self.damage, self.measured, self.kept, self._took = damage, [], [], took or []

    def measure(self, choices: list[Choice]) -> list[Weighed]:
        self.measured += [choice.target for choice in choices]
        return [row(f"{choice.label}", choice.ratio, self.damage[name(choice)]) for choice in choices]

    def forget(self, kept: Choice) -> None:
        self.kept.append(name(kept))

    def took(self, choice: Choice, ctx: int) -> Memory:
        return replace(memory(100), peak=self._took.pop(0))


def name(choice: Choice) -> str:
    return f"{'whole' if choice.plan is None else 'cut'} {choice.target}"


@pytest.fixture
def choices(solver) -> list[Choice]:
    """Q3_K_M and Q2_K fit whole; Q4_K_M, Q5_K_M, Q6_K and Q8_0 lose more and more."""
    outline = Outline("x", {}, 0, ())
    whole = [Choice(target, None, None, outline) for target in ("Q3_K_M", "Q2_K")]
    slices = {"Q4_K_M": 200, "Q5_K_M": 160, "Q6_K": 120, "Q8_0": 80}
    return whole + [replace(solver.at(target, n), memory=memory(100)) for target, n in slices.items()]


ASK = Ask(1 << 30, CTX, Recipe("global", 0.0))


def test_the_unpruned_file_wins_where_it_is_better(choices) -> None:
    bench = FakeBench({"whole Q3_K_M": 0.02, "whole Q2_K": 0.07, "cut Q4_K_M": 0.03, "cut Q5_K_M": 0.05})
    rows = weigh(ASK, choices, bench)
    assert bench.kept[-1] == "whole Q3_K_M"
    # Q5_K_M was worse than Q4_K_M for sure, so that nobody asked for more pruning at more bits
    assert bench.measured == ["Q3_K_M", "Q2_K", "Q4_K_M", "Q5_K_M"]
    assert rows["Q8_0", True].status == LEFT_OUT and "no longer pays" in rows["Q8_0", True].why


def test_the_pruned_file_wins_where_it_is_better(choices) -> None:
    damage = {
        "whole Q3_K_M": 0.05,
        "whole Q2_K": 0.07,
        "cut Q4_K_M": 0.04,
        "cut Q5_K_M": 0.03,
        "cut Q6_K": 0.02,
        "cut Q8_0": 0.06,
    }
    bench = FakeBench(damage)
    weigh(ASK, choices, bench)
    assert bench.kept[-1] == "cut Q6_K" and bench.measured[-1] == "Q8_0"
    bench = FakeBench(damage | {"cut Q5_K_M": 0.06})
    weigh(replace(ASK, every=True), choices, bench)
    assert bench.kept[-1] == "cut Q6_K" and len(bench.measured) == 6


def test_a_file_that_took_too_much_is_made_smaller(choices, solver, monkeypatch) -> None:
    bench = FakeBench(
        {"whole Q3_K_M": 0.05, "whole Q2_K": 0.07, "cut Q4_K_M": 0.04, "cut Q5_K_M": 0.09}, took=[1001, 1000]
    )
    rows = weigh(replace(ASK, every=False), choices, bench)
    smaller = solver.at("Q4_K_M", 190)
    monkeypatch.setattr(Solver, "pruned", lambda self, target: smaller)
    ask, said = replace(ASK, budget=1000), []
    chosen, taken = fit._settle(ask, solver, bench, choices, rows, said.append)
    assert chosen is smaller and taken.peak == 1000 and solver.tightened == {"Q4_K_M": 1} and "1 bytes more" in said[0]
    assert rows["Q4_K_M", True].status == CHOSEN
    with pytest.raises(GgufToolError, match="no file was found"):
        fit._settle(
            ask, solver, FakeBench(bench.damage, took=[1001] * 9), choices, weigh(ASK, choices, bench), said.append
        )


def test_candidates_are_the_whole_file_or_the_least_cut_one(solver) -> None:
    solver.budget = enough_for(solver, "Q4_K_M")
    found, rows = candidates(replace(ASK, targets=("Q8_0", "Q4_K_M", "F32")), solver)
    assert [name(choice) for choice in found] == ["whole Q4_K_M", "cut Q8_0"]
    assert rows["Q8_0", False].status == rows["F32", False].status == rows["F32", True].status == TOO_LARGE
    cut = found[1]
    assert cut.memory is not None and cut.memory.peak <= solver.budget - JITTER
    # what is left is less than the process' own jitter and a slice of 32 neurons
    assert solver.budget - JITTER - cut.memory.peak < JITTER


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1 << 60}, "cannot be measured here"),
        ({"ctx": 1}, "at least 2 tokens"),
        ({"targets": ("Q4_KM",)}, "Q4_K_M"),
        ({"recipe": Recipe("dern", 0.0), "refit": "plain"}, "dern makes new weights"),
    ],
)
def test_what_cannot_be_asked(job, change, message) -> None:
    with pytest.raises(GgufToolError, match=message):
        check(job, replace(ASK, **change))
    with pytest.raises(GgufToolError, match="--eval"):
        check(replace(job, evaluation=[]), ASK)
    with pytest.raises(GgufToolError, match="two evaluation texts are called 'x'"):
        check(replace(job, evaluation=[Path("a/x.txt"), Path("b/x.txt")]), ASK)


MISSING = [Path("missing.txt")]


@pytest.mark.parametrize(
    ("of_job", "of_ask", "message"),
    [
        ({"calibration": MISSING}, {}, "missing.txt: no such text file"),
        ({"evaluation": MISSING}, {}, "missing.txt: no such text file"),
        ({"eval_windows": 0}, {}, "1 window are needed"),
        ({"n_ctx": 2048}, {}, "more than the model's 1024"),
        ({"device": "wrong"}, {}, "device 'wrong' cannot be used"),
        ({"memory": "1MiB"}, {}, "at least"),
        ({}, {"targets": ()}, "no type to choose from"),
        ({}, {"recipe": Recipe("tnep", 0.0)}, "did you mean tenp"),
        ({}, {"recipe": Recipe("auto", 0.0, criterion="x")}, "criterion"),
        ({}, {"recipe": Recipe("auto", 0.0, layout="stock")}, "^--layout stock"),
        (
            {},
            {"recipe": Recipe("tenp", 0.0, whole=0.95)},
            "from 90% down to 10%, no share .* at most 0.9 of the experts",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_was_typed_is_looked_at_before_anything_is_written(
    job, of_job, of_ask, message, dry_run, tmp_path
) -> None:
    with pytest.raises(GgufToolError, match=message):
        fit.run(replace(job, **of_job), tmp_path / "out", replace(ASK, **of_ask), lambda _: None, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_not_refused_for_a_ratio_that_nobody_gave(job, base_gguf, stats, tmp_path, monkeypatch) -> None:
    ask = replace(ASK, recipe=Recipe("tenp", 0.0, whole=0.6), targets=("Q8_0",))
    job, asked = replace(job, model=base_gguf), []

    def prepare(job, work, recipes, known):
        asked.append(recipes)
        return Prepared(known.model, base_gguf, stats, ())

    monkeypatch.setattr(fit, "prepare", prepare)
    fit.start(job, Workspace(tmp_path, lambda _: None), ask, check(job, ask))
    assert asked == [[]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--calibration-memory", "12Gi"], "--calibration-memory: '12Gi' is no size"),
        (["--window", 3], "--window 3 is less than 4"),
        (["--ctx", 0], "--ctx 0 is less than 1"),
        (["--eval-windows", 0], "--eval-windows 0 is less than 1"),
    ],
)
def test_what_is_wrong_is_called_as_it_was_typed(given, said, checkpoint_dir, eval_text, tmp_path) -> None:
    given = [
        checkpoint_dir,
        "--memory",
        "1GiB",
        "--data",
        eval_text,
        "--eval",
        eval_text,
        "-o",
        tmp_path / "out",
        *given,
    ]
    assert f"error: {said}" in typed("fit", *given, code=1)


def test_a_budget_below_the_weights_is_refused_before_anything_is_converted(job, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit, "base_gguf", lambda *_: pytest.fail("converted"))
    with pytest.raises(GgufToolError, match=r"0\.5 MiB is too small: with 90% of the experts gone .* as Q2_K"):
        fit.run(job, tmp_path / "out", replace(ASK, budget=1 << 19), lambda _: None)


def test_a_budget_below_the_smallest_file_in_memory_is_refused_before_calibration(job, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit, "prepare", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(
        GgufToolError, match=r"the smallest file, global 89.8 % Q2_K, takes .*KV cache.*--memory [\d.]+MiB"
    ):
        fit.run(job, tmp_path / "out", replace(ASK, budget=10 << 20), lambda _: None)


@pytest.mark.parametrize(
    ("command", "budget", "ctx"), [("fit", "--memory", "--ctx"), ("compress", "--fit", "--fit-ctx")]
)
def test_remedies_are_in_the_words_of_the_command(command, budget, ctx, job, checkpoint_dir, tmp_path) -> None:
    def said(*changed: object) -> str:
        given = {"--data": job.calibration[0], "--eval": job.evaluation[0], "--quant": "Q2_K", "--backend": "cpu"}
        given |= {"--method": "global", "--pre-tokenizer": "qwen2", budget: "10MiB", ctx: CTX, "-o": tmp_path / "out"}
        args = [command, checkpoint_dir, *(part for pair in given.items() for part in pair), *changed, "--dry-run"]
        return str(CliRunner().invoke(cli, list(map(str, args))).exception)

    assert re.search(rf"and 0\.5 MiB that stay free\. What helps: {budget} [\d.]+MiB or more$", said())
    assert said(ctx, 1) == f"{ctx} 1: a context has at least 2 tokens"


@pytest.mark.parametrize(
    ("file", "kv", "helps"),
    [
        (60, 5, "a --quant with fewer bits, --memory 100.5MiB or more"),
        (60, 11, "a shorter --ctx, a --quant with fewer bits, --memory 100.5MiB or more"),
        (5, 40, "a shorter --ctx, --memory 100.5MiB or more"),
        (5, 5, "--memory 100.5MiB or more"),
        (90, 5, "a --quant with fewer bits, --memory with more than that"),
    ],
)
def test_a_remedy_is_named_where_it_can_be_enough(file, kv, helps) -> None:
    """Budget 90 MiB, peak 100: what has to go is 10.5, out of the context or out of the file."""
    choice = SimpleNamespace(outline=SimpleNamespace(file_bytes=file << 20), label="x 90 % Q2_K", target="Q2_K")
    memory = Memory(file << 20, 100 << 20, 20 << 20, kv << 20, 0)
    solver = SimpleNamespace(
        smallest=lambda _: choice, tried=lambda _: SimpleNamespace(memory=memory), limit=lambda _: (90 << 20) - JITTER
    )
    with pytest.raises(GgufToolError) as error:
        fit._smallest(solver, replace(ASK, budget=90 << 20, targets=("Q2_K",)))
    assert str(error.value).split("What helps: ")[1] == helps


def test_too_little_disk_is_refused_before_calibration(job, base_gguf, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit, "prepare", lambda *_: pytest.fail("calibrated"))
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=60_000_000))
    with pytest.raises(GgufToolError, match=r"needs 0\.0[89] GB, the disk has 0\.06 GB free"):  # six times 14.8 MB
        fit.run(replace(job, model=base_gguf), tmp_path / "out", replace(ASK, budget=100 << 20), lambda _: None)


def test_compress_fit_finds_the_ratio_itself(checkpoint_dir, eval_text, tmp_path) -> None:
    text = str(eval_text)
    args = ["compress", str(checkpoint_dir), "--data", text, "--eval", text, "-o", str(tmp_path), "--fit", "1GiB"]
    done = CliRunner().invoke(cli, [*args, "--ratio", "0.4"])
    assert done.exit_code == 2 and "leave --ratio and --keep out" in done.output


def test_a_quantized_original_is_not_blown_up(base_gguf, runtime, stats, tmp_path) -> None:
    small = quantized(base_gguf, "Q4_K_M", tmp_path / "q4.gguf", runtime, stats)
    model = open_gguf(small)
    source = Prepared(model, small, stats, ())
    base = Base.open(small)
    kept, notes = targets_for(source, ("Q8_0", "Q4_K_M", "Q2_K", "BF16"), base)
    assert kept == ["Q4_K_M", "Q2_K"] and notes == [
        "Q8_0, BF16: not tried, the original is Q4_K_M and more bits bring nothing back"
    ]
    # Its own type is looked at where nobody named others.
    assert targets_for(source, ("Q2_K",), base) == (["Q4_K_M", "Q2_K"], [])
    assert targets_for(source, ("Q2_K",), base, named=True) == (["Q2_K"], [])
    assert targets_for(source, ("Q4_K_M",), base, named=True) == (["Q4_K_M"], [])
    with pytest.raises(GgufToolError, match="Q8_0, BF16: the original is Q4_K_M and .* name a smaller type"):
        targets_for(source, ("Q8_0", "BF16"), base, named=True)


def test_compress_says_whether_the_type_was_named() -> None:
    asked = [runs.ask_of(RunRecipe(fit="1GiB", quant=quant)) for quant in (None, "Q6_K")]
    assert [(ask.named, ask.targets) for ask in asked] == [(False, fit.TARGETS), (True, ("Q6_K",))]


# --- all of it -----------------------------------------------------------------------------------------------------


def test_a_whole_run_and_again(job, solver, tmp_path, monkeypatch) -> None:
    ask = Ask(enough_for(solver, "Q4_K_M"), CTX, Recipe("auto", 0.0), ("Q8_0", "Q4_K_M"))
    out = tmp_path / "out"
    report = fit.run(job, out, ask, lambda _: None)
    chosen = report.rows[0]
    assert chosen.status == CHOSEN and chosen.kl == min(row.kl for row in report.rows if row.kl is not None)
    measured = [row for row in report.rows if row.kl is not None]
    assert {(row.target, row.ratio > 0) for row in measured} == {("Q4_K_M", False), ("Q8_0", True)}
    assert all(row.bytes == row.predicted for row in measured)
    assert report.memory is not None and report.memory.peak <= ask.budget
    assert report.path is not None and report.path.stat().st_size == chosen.bytes == report.memory.file
    assert f"-c {CTX}" in report.command and not list(out.glob("fit.work"))
    monkeypatch.setattr(fit_measure, "compare_many", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(fit_measure, "build", lambda *_, **__: pytest.fail("built again"))
    assert fit.run(job, out, ask, lambda _: None).as_dict() == report.as_dict()


def test_a_gguf_will_do(job, base_gguf, solver, tmp_path) -> None:
    ask = Ask(enough_for(solver, "Q4_K_M"), CTX, Recipe("global", 0.0), ("Q8_0",))
    job = replace(job, model=base_gguf)
    dry = fit.run(job, tmp_path / "out", ask, lambda _: None, dry_run=True)
    assert [(row.status, row.ratio > 0) for row in dry.rows] == [("fits", True), (TOO_LARGE, False)]
    assert dry.path is None and any("without stats" in note for note in dry.notes)
    report = fit.run(job, tmp_path / "out", ask, lambda _: None)
    assert report.memory is not None and report.memory.peak <= ask.budget
    assert report.rows[0].status == CHOSEN and report.rows[0].bytes == report.rows[0].predicted
