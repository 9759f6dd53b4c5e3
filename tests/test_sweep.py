"""The sweep: its grammar, its verdicts by hand, its report, and a small one that is stopped and goes on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gguftool import plot, sweep
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.prepare import Job, prepare
from gguftool.stats import CalibrationStats
from gguftool.sweep import Grid, check, parse_groups, parse_targets
from gguftool.sweep_report import CONTROL, PRUNED, UNPRUNED, Name, Score, SweepReport, SweepRow
from gguftool.tradeoff import Point, Verdict, at_each_size, curve, front, interpolate, judge, winning_sizes
from gguftool.variants import Variant, parse_variant
from gguftool.workspace import Workspace
from models import sample_text, tiny_checkpoint

# --- what is asked for ---------------------------------------------------------------------------------------------


def test_variants() -> None:
    assert parse_variant("global") == Variant("global", "global", "")
    assert parse_variant(" tenp+refit ") == Variant("tenp+refit", "tenp", "plain")
    assert parse_variant("global+refit=sequential") == Variant("global+refit=sequential", "global", "sequential")
    assert parse_variant("1,0,2") == Variant("1,0,2", "1,0,2")
    assert parse_variant("random").is_control and parse_variant("inverted").is_control
    assert not parse_variant("global").is_control and not parse_variant("1,0,2").is_control
    recipe = parse_variant("global+refit").recipe(0.4, "Q4_K_M", 3)
    assert (recipe.method, recipe.ratio, recipe.target, recipe.seed) == ("global", 0.4, "Q4_K_M", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("globl", "did you mean global"), ("global+refti", "known are 'global', 'global+refit'"), ("+refit", "no method"),
     ("3,0,0", "not measured")],
)  # fmt: skip
def test_what_is_no_variant(text: str, message: str) -> None:
    with pytest.raises(GgufToolError, match=re.escape(message)):
        parse_variant(text)


def test_groups(tmp_path: Path) -> None:
    a, b, c = Path("x/a.txt"), Path("b.txt"), Path("c.txt")
    assert parse_groups(["in:x/a.txt", "out:c.txt", "in:b.txt"]) == {"in": [a, b], "out": [c]}
    assert parse_groups(["x/a.txt", "c.txt"]) == {"a": [a], "c": [c]}
    (odd := tmp_path / "in:odd.txt").touch()
    assert parse_groups([str(odd)]) == {"in:odd": [odd]}
    for wrong in (["in:a.txt", "in:a.txt"], ["a.txt", "x/a.txt"], ["a:b.txt", "a.txt"]):
        with pytest.raises(GgufToolError, match="--eval"):
            parse_groups(wrong)


def test_targets() -> None:
    assert parse_targets(["none", "q4_k", "Q4_K_M", "Q8_0"]) == [None, "Q4_K_M", "Q8_0"]
    with pytest.raises(GgufToolError, match="Q4_K_M"):
        parse_targets(["Q4_KM"])


# --- size against divergence ---------------------------------------------------------------------------------------


def test_the_front_by_hand() -> None:
    points = [Point("a", 10, 0.5), Point("b", 20, 0.3), Point("worse than b", 25, 0.4), Point("c", 30, 0.1),
              Point("as large as c", 30, 0.2), Point("as good as c", 40, 0.1), Point("a's twin", 10, 0.5)]  # fmt: skip
    assert front(points) == [True, True, False, True, False, False, True]


LINE = [Point("small", 100, 0.01, 0.001), Point("large", 200, 0.0001, 0.00002)]


def test_quantizing_alone_is_interpolated_in_the_logarithm() -> None:
    # half way between 1e-2 and 1e-4 lies 1e-3; relative errors of 10 % and 20 % give 15 %
    assert interpolate(LINE, 150) == pytest.approx((1e-3, 1.5e-4))
    # a quarter of the way: 10^-2.5; 0.75 x 10 % + 0.25 x 20 % = 12.5 %
    assert interpolate(LINE, 125) == pytest.approx((10**-2.5, 0.125 * 10**-2.5))
    assert interpolate(LINE, 100) == (0.01, 0.001) and interpolate(LINE, 200) == (0.0001, 0.00002)
    assert interpolate(LINE, 99) is None and interpolate(LINE, 201) is None and interpolate([], 1) is None


def test_the_line_leaves_out_what_nobody_would_pick() -> None:
    extra = [Point("beaten", 150, 0.02), Point("lossless", 400, 0.0), Point("same", 100, 0.01)]
    assert [point.bytes for point in curve([*LINE[::-1], *extra])] == [100, 200]


@pytest.mark.parametrize(
    ("point", "outcome"),
    [
        (Point("p", 150, 0.0005, 0.0001), "win"),  # 0.001 +- 0.00015 against it: 5e-4 is more than 2 x 1.8e-4
        (Point("p", 150, 0.0007, 0.0001), "tie"),  # 3e-4 is less
        (Point("p", 150, 0.0015, 0.0001), "loss"),
        (Point("p", 100, 0.02, 0.001), "loss"),
        (Point("p", 90, 0.005, 0.001), "win"),  # smaller than all and better than the smallest
        (Point("p", 90, 0.02, 0.001), "open"),
        (Point("p", 210, 0.001, 0.0001), "loss"),  # larger than all and worse than the largest
        (Point("p", 210, 0.00001, 0.000001), "open"),
    ],
)
def test_verdicts_by_hand(point: Point, outcome: str) -> None:
    assert judge(point, LINE).outcome == outcome
    assert judge(point, []) == Verdict(point, None, "open")


def test_at_each_size_the_best_that_fits_is_judged() -> None:
    line = [Point("", 100, 1.0), Point("", 200, 0.1), Point("", 300, 0.01)]
    points = [
        Point("a", 120, 0.5),
        Point("beaten", 150, 0.9),
        Point("b", 250, 0.5),
        Point("c", 280, 0.4),
        Point("d", 90, 2.0),
    ]
    # On the line: 120 -> 0.63, 150 -> 0.32, 250 -> 0.032, 280 -> 0.016. d is open; a is the best at 120, 150 and 250.
    found = [(v.point.label, v.point.bytes, v.outcome) for v in at_each_size(points, line)]
    assert found == [("a", 120, "win"), ("a", 150, "loss"), ("a", 250, "loss"), ("c", 280, "loss")]


def test_ranges_of_sizes_in_which_pruning_wins() -> None:
    def sizes(*outcomes: str) -> list[tuple[float, float]]:
        """For files of 10, 20, ... bytes."""
        return winning_sizes([Verdict(Point("", 10 * (i + 1), 1), None, o) for i, o in enumerate(outcomes)])

    assert sizes("win", "win", "loss", "win") == [(10, 20), (40, 40)]
    assert sizes("tie", "win", "win") == [(20, 30)]
    assert sizes("loss", "tie") == sizes() == []


# --- the report ----------------------------------------------------------------------------------------------------


def measured(ppl: float, kl: float, err: float = 0.001) -> dict[str, Any]:
    return {"ppl": ppl, "ppl_err": 0.5, "kld": {"mean": kl, "err": err, "p99": 9 * kl}, "same_top": 0.9}


def row(method: str, kind: str, ratio: float, encoding: str, size: float, *kls: float) -> SweepRow:
    """A row with a run for each of `kls`, on the groups in and out."""
    label = f"{method} {ratio} {encoding}"
    runs = [
        {"seed": seed, "bytes": size, "kept": 1 - ratio, "formula": "", "notes": [],
         "groups": {"in": measured(30, kl), "out": measured(40, 2 * kl)}}
        for seed, kl in enumerate(kls)
    ]  # fmt: skip
    return SweepRow(Name(label, method, kind, ratio, encoding, encoding != "BF16"), runs)


def report(rows: list[SweepRow]) -> SweepReport:
    base = {
        name: {"ppl": 29.0, "ppl_err": 0.5, "tokens": 510, "texts": [{"name": f"{name}.txt"}]} for name in ("in", "out")
    }
    return SweepReport("Model", 15_000_000, base, rows, "protocol", ("a note",))


def unpruned() -> list[SweepRow]:
    types = (("Q8_0", 8e6, 0.001), ("Q4_K_M", 5e6, 0.01), ("Q3_K_M", 4e6, 0.02), ("Q2_K", 3.2e6, 0.06))
    return [row("none", UNPRUNED, 0, name, size, kl) for name, size, kl in types]


def test_a_score_is_the_mean_over_seeds_with_its_spread() -> None:
    score = Score.of([measured(30, 0.1), measured(34, 0.2), measured(32, 0.3)])
    assert (score.ppl, score.kl, score.ppl_err, score.kl_err) == pytest.approx((32, 0.2, 0.5, 0.001))
    assert (score.ppl_spread, score.kl_spread) == pytest.approx((2, 0.1))
    assert score.kl_uncertainty == pytest.approx((0.001**2 + 0.1**2 / 3) ** 0.5)
    assert Score.of([measured(30, 0.1)]).kl_spread is None


def test_a_report_says_where_pruning_wins() -> None:
    rows = [row("global", PRUNED, r, "Q4_K_M", size, kl) for r, size, kl in ((0.25, 4.1e6, 0.03), (0.5, 3.1e6, 0.04))]
    found = report([*rows, row("random", CONTROL, 0.5, "Q4_K_M", 3e6, 0.9), *unpruned()])
    assert found.conclusion("in") == (
        "in: prune + quantize beats quantize alone at 3.10 MB, the smallest size compared, not above [1 win, 1 loss]"
    )
    facts = json.loads(json.dumps(found.as_dict()))
    assert [r["groups"]["in"]["front"] for r in facts["rows"]] == [False, True, True, True, True, True, False]
    assert [v["outcome"] for v in facts["against_quantizing_alone"]["out"]["rows"]] == ["loss", "win"]
    page = found.markdown()
    assert "| global 0.5 Q4_K_M | * | 3.10 MB |" in page and "| random 0.5 Q4_K_M | * |" in page
    assert "seeds" not in page and "## out" in page
    assert facts["against_quantizing_alone"]["in"]["winning_bytes"] == [[3_100_000, 3_100_000]]
    assert "at every size measured (3.10 MB)" in report([rows[1], *unpruned()]).conclusion("in")
    # a loss at a smaller size does not hide a win above it
    more = [row("a", PRUNED, 0.4, "Q4_K_M", 3.4e6, 0.03), row("b", PRUNED, 0.5, "Q4_K_M", 3.3e6, 0.09)]
    said = report([rows[0], *more, *unpruned()]).conclusion("in")
    assert said == "in: prune + quantize beats quantize alone at 3.40 MB, not elsewhere [1 win, 2 loss]"
    said = report([*rows, more[0], *unpruned()]).conclusion("in")
    assert said == "in: prune + quantize beats quantize alone from 3.40 MB down to 3.10 MB, not above [2 win, 1 loss]"
    losing = report([rows[0], *unpruned()])
    assert "does not beat quantize alone at any size" in losing.conclusion("in")
    assert "nothing was pruned and quantized" in report(unpruned()).conclusion("in")
    assert "open" in report([rows[0]]).conclusion("in")


def test_the_plot_is_the_same_twice_and_shows_everything(tmp_path: Path) -> None:
    names = [f"method-{i}" for i in range(13)]
    rows = [
        row(name, PRUNED, ratio, encoding, size * (1 - ratio), 0.02 * (i + 1) * ratio, 0.026 * (i + 1) * ratio)
        for i, name in enumerate(names)
        for ratio in (0.25, 0.5)
        for encoding, size in (("BF16", 1.5e7), ("Q4_K_M", 5e6))
    ]
    found = report([*rows, row("random", CONTROL, 0.5, "BF16", 5e6, 0.5), *unpruned()])
    figure = plot.draw(found)
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {*names, "random", "as BF16", "as Q4_K_M", "unpruned", "Pareto front"}
    assert [axes.get_title() for axes in figure.axes] == ["in", "out"]
    styles = plot._styles(found)
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == len(styles)
    written = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        plot.save(found, [folder / "s.png", folder / "s.svg"])
        written.append([(folder / name).read_bytes() for name in ("s.png", "s.svg")])
    assert written[0] == written[1] and b"<dc:date>" not in written[0][1]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["s.png", "s.svg"]


def test_a_plot_of_lossless_files_alone(tmp_path: Path) -> None:
    plot.save(report([row("none", UNPRUNED, 0, "BF16", 1.5e7, 0.0)]), [tmp_path / "s.png"])
    assert (tmp_path / "s.png").stat().st_size > 1000


# --- the whole of it -----------------------------------------------------------------------------------------------

N_CTX = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint, two texts to calibrate on and three to measure on."""
    folder = tmp_path_factory.mktemp("tiny")
    paths = {"model": tiny_checkpoint(folder / "model", moe_intermediate_size=64)}
    for seed, name in enumerate(("calib_a", "calib_b", "eval_a", "eval_b", "eval_c")):
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(sample_text(1200, seed=seed))
    return paths


COMPARE = sweep.compare_many


def compare_on_one_thread(*arguments: Any, **options: Any) -> Any:
    """Threads that wait for each other are slow on tiny models."""
    return COMPARE(*arguments, threads=1, **options)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "compare_many", compare_on_one_thread)


class Counted:
    """`compare_many` that notes (text, files) and stops like Ctrl-C before call number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.stop = stop

    def __call__(self, base: Path, files: list[Path], text: str, **options: Any) -> Any:
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((text, [path.name for path in files]))
        return compare_on_one_thread(base, files, text, **options)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(text, file) for text, files in self.calls for file in files]


def job_of(tiny: dict[str, Path], runtime: Any, llama: Any) -> Job:
    return Job(
        model=tiny["model"], calibration=[tiny["calib_a"], tiny["calib_b"]], evaluation=[], runtime=runtime, llama=llama,
        progress=lambda *_: None, n_ctx=N_CTX, windows=6, eval_windows=3, pre_tokenizer="qwen2",
    )  # fmt: skip


def grid_of(tiny: dict[str, Path], *ratios: float, **changed: Any) -> Grid:
    variants = [parse_variant(name) for name in ("global+refit", "reap", "random")]
    groups = {"in": [tiny["eval_a"], tiny["eval_b"]], "out": [tiny["eval_c"]]}
    usual = {"variants": variants, "ratios": ratios, "targets": [None, "Q8_0"], "unpruned": ["Q8_0"], "groups": groups}
    return Grid(**usual | changed)


@pytest.fixture(scope="module")
def prepared(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, runtime: Any, llama: Any) -> Path:
    """A folder with the base GGUF and the stats of the first seed."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(job_of(tiny, runtime, llama), Workspace(folder, lambda _: None), [])
    return folder


@pytest.fixture
def out(tmp_path: Path, prepared: Path) -> Path:
    """A folder of a test's own in which the first dear steps are done."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def test_a_sweep_is_stopped_goes_on_and_is_asked_for_more(
    tiny: dict[str, Path], out: Path, runtime: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, grid = job_of(tiny, runtime, llama), grid_of(tiny, 0.34)
    monkeypatch.setattr(sweep, "BATCH", 4)
    said: list[str] = []

    def sweep_it(grid: Grid, stop: int | None = None) -> tuple[SweepReport | None, Counted]:
        counted = Counted(stop)
        monkeypatch.setattr(sweep, "compare_many", counted)
        if stop is None:
            return sweep.run(job, out, grid, said.append), counted
        with pytest.raises(KeyboardInterrupt):
            sweep.run(job, out, grid, said.append)
        return None, counted

    # 7 models in batches of 4 and 3, of which each meets three texts: in has two of them. Stopped before "out".
    _, first = sweep_it(grid, stop=2)
    assert len(list((out / "rows").glob("*.json"))) == 4
    made = {path.name: path.stat().st_mtime_ns for path in (out / sweep.SCRATCH).glob("*.gguf")}
    assert len(made) == 4 and not list((out / sweep.SCRATCH).glob("cell-*"))
    left = out / sweep.SCRATCH / "of-other-options.gguf"
    left.write_text("left by a sweep that was stopped")
    measure_batch = sweep._Bench._measure_batch

    def without_it(self: sweep._Bench, batch: Any) -> None:
        assert not left.exists()  # the disk may have no room for both
        measure_batch(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sweep._Bench, "_measure_batch", without_it)
        report, second = sweep_it(grid)
    assert report is not None
    assert "0 of 7" in "".join(said) and len(first.calls) == 2 and len(second.calls) == 4
    assert not set(first.pairs) & set(second.pairs) and len({*first.pairs, *second.pairs}) == 7 * 3
    assert set(made) <= {file for _, file in second.pairs}
    assert [row.name.label for row in report.rows] == [
        "global+refit 34 %", "global+refit 34 % Q8_0", "reap 34 %", "reap 34 % Q8_0", "random 34 %", "random 34 % Q8_0",
        "unpruned Q8_0",
    ]  # fmt: skip
    # Nothing is left but the base, the stats, the rows and the report; nothing is measured twice.
    assert [path.name for path in out.rglob("*.gguf")] == ["base.gguf"]
    again, third = sweep_it(grid)
    assert again is not None and not third.calls and again.as_dict() == report.as_dict()
    # Another ratio: only its six models, and those on all three texts.
    _, more = sweep_it(grid_of(tiny, 0.34, 0.5))
    assert len(set(more.pairs)) == len(more.pairs) == 6 * 3
    # Another text: all seven on that alone; a damaged row is measured anew.
    groups = {**grid.groups, "new": [tiny["calib_a"]]}
    _, new = sweep_it(grid_of(tiny, 0.34, groups=groups))
    assert len(new.pairs) == 7 and {text for text, _ in new.pairs} == {tiny["calib_a"].read_text()}
    next((out / "rows").glob("*.json")).write_text("{")
    kept = {path.name for path in (out / "rows").iterdir()}
    sweep_it(grid_of(tiny, 0.34, 0.5, groups=groups))
    assert all(json.loads(path.read_text()) for path in (out / "rows").iterdir())
    assert kept <= {path.name for path in (out / "rows").iterdir()}


def test_numbers_are_those_of_the_files(tiny: dict[str, Path], out: Path, runtime: Any, llama: Any) -> None:
    grid = grid_of(tiny, 0.5, keep_files=True, variants=[parse_variant("global")])
    report = sweep.run(job_of(tiny, runtime, llama), out, grid, lambda _: None)
    files = sorted((out / "models").glob("*.gguf"), key=lambda path: path.stat().st_size)
    assert sorted(row.bytes for row in report.rows) == [path.stat().st_size for path in files]
    row = report.rows[1]
    (file,) = (out / "models").glob("*-global-50-Q8_0-*.gguf")
    options = {"llama": llama, "n_ctx": N_CTX, "max_windows": 3, "threads": 1}
    a, b = (COMPARE(out / "base.gguf", [file], tiny[name].read_text(), **options)[0] for name in ("eval_a", "eval_b"))
    one, two, pooled = a.divergence, b.divergence, row.scores["in"]
    assert one.tokens == two.tokens
    assert pooled.kl == pytest.approx((one.kld.mean + two.kld.mean) / 2, rel=1e-9)
    assert log(pooled.ppl) == pytest.approx((log(one.ppl.value) + log(two.ppl.value)) / 2, rel=1e-9)
    assert pooled.p99 <= max(one.kld.p99, two.kld.p99)
    # A kept file is measured again on a further text without being made again.
    before = {path: path.stat().st_mtime_ns for path in files}
    more = grid_of(tiny, 0.5, keep_files=True, variants=grid.variants, groups={"c": [tiny["calib_b"]]})
    sweep.run(job_of(tiny, runtime, llama), out, more, lambda _: None)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "models").glob("*.gguf")}


def test_texts_of_one_name_are_told_apart_and_files_can_be_kept_later(
    tiny: dict[str, Path], out: Path, tmp_path: Path, runtime: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, news = tmp_path / "code" / "test.txt", tmp_path / "news" / "test.txt"
    for path, text in ((code, "eval_a"), (news, "eval_b")):
        path.parent.mkdir()
        shutil.copyfile(tiny[text], path)
    groups = {"in": [code], "out": [news], "all": [news, tiny["eval_c"], code]}
    # The base is BF16: by that name its type is no further file.
    own = {"variants": [parse_variant("global")], "targets": [None, "BF16", "Q8_0"], "groups": groups}
    job, said = job_of(tiny, runtime, llama), []
    report = sweep.run(job, out, grid_of(tiny, 0.5, **own), said.append)
    assert [row.name.label for row in report.rows] == ["global 50 %", "global 50 % Q8_0", "unpruned Q8_0"]
    assert len({score.kl for score in report.rows[0].scores.values()}) == 3
    page = (out / "sweep.md").read_text()
    for texts in (f"{code}. ", f"{news}. ", f"{news}, eval_c.txt, {code}. "):
        assert f"\nTexts: {texts}" in page
    # Asked for the files of what is measured already, it makes them and measures nothing.
    monkeypatch.setattr(sweep, "compare_many", lambda *_, **__: pytest.fail("measured again"))
    keeping = grid_of(tiny, 0.5, keep_files=True, **own)
    assert sweep.run(job, out, keeping, said.append).as_dict() == report.as_dict()
    kept = sorted(path.stat().st_size for path in (out / "models").glob("*.gguf"))
    assert kept == sorted(row.bytes for row in report.rows) and "0 of 3 models are measured and kept already" in said
    for name in ("build", "quantize_base"):
        monkeypatch.setattr(sweep, name, lambda *_, **__: pytest.fail("made again"))
    sweep.run(job, out, keeping, said.append)
    assert said[-1] == "3 of 3 models are measured and kept already" and not (out / sweep.SCRATCH).exists()


def test_seeds_take_other_windows_and_other_random_experts(
    tiny: dict[str, Path], out: Path, runtime: Any, llama: Any
) -> None:
    grid = grid_of(tiny, 0.5, seeds=3, targets=["Q8_0"], variants=[parse_variant("global"), parse_variant("random")])
    report = sweep.run(job_of(tiny, runtime, llama), out, grid, lambda _: None)
    domains = [CalibrationStats.load(path).domains for path in sorted(out.glob("stats*.safetensors"))]
    assert len(domains) == 3 and len({domain[0].windows for domain in domains}) == 3
    assert all(domain[0].tokens == 6 * N_CTX for domain in domains)
    pruned, control, alone = report.rows
    assert len(pruned.runs) == len(control.runs) == 3 and len(alone.runs) == 1
    assert len({run["formula"] for run in control.runs}) == 3
    assert pruned.scores["in"].kl_spread and control.scores["out"].ppl_spread and alone.scores["in"].kl_spread is None
    assert "over 3 calibrations" in (out / "sweep.md").read_text()


def test_the_command_writes_its_files(tiny: dict[str, Path], out: Path, runtime: Any, llama: Any) -> None:
    arguments = [
        "sweep", tiny["model"], "-o", out, "--data", tiny["calib_a"], "--eval", f"in:{tiny['eval_a']}", "--eval",
        tiny["eval_c"], "--ratio", 0.5, "--quant", "Q8_0", "--unpruned", "Q8_0", "--windows", 4, "--eval-windows", 2, "--ctx",
        N_CTX, "--pre-tokenizer", "qwen2", "--backend", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json", "--quiet"], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert facts == json.loads((out / "sweep.json").read_text())
    assert list(facts["base"]["groups"]) == ["in", "eval_c"]
    assert {path.suffix for path in out.glob("sweep.*")} == {".json", ".md", ".png", ".svg"}
    assert "Pareto" in (out / "sweep.md").read_text()
    table = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert "global 50 % Q8_0" in table.stdout and "2 of 2 models are measured already" in table.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "globl"], "did you mean global"),
        (["--method", "reap+refit"], "nothing to refit"),
        (["--method", "reap", "--ratio", "0.9"], "routed per token"),
        (["--ratio", "1.5"], "not a share"),
        (["--quant", "Q4_KM"], "Q4_K_M"),
        (["--unpruned", "Q9"], "known are"),
        (["--eval", "in:missing.txt"], "no such text"),
        (["--data", "missing.txt"], "no such text"),
        (["--seeds", "2"], "another seed would not take others"),
        (["--seeds", "0"], "--seeds 0"),
        (["--ctx", "3"], "windows of 3 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_made(
    tiny: dict[str, Path], tmp_path: Path, runtime: Any, llama: Any, wrong: list[str], message: str
) -> None:
    arguments = [
        "sweep", tiny["model"], "-o", tmp_path / "out", "--data", tiny["calib_a"], "--eval", tiny["eval_c"], "--ratio", 0.5,
        "--ctx", N_CTX, "--pre-tokenizer", "qwen2", "--backend", "cpu", *wrong,
    ]  # fmt: skip
    done = CliRunner().invoke(cli, [*map(str, arguments)])
    assert isinstance(done.exception, GgufToolError) and message in str(done.exception)
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("*.safetensors"))


def test_a_refit_that_cannot_be_had_is_refused_by_its_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "model", "olmoe")
    job = Job(model, [], [], None, None, lambda *_: None)  # type: ignore[arg-type]

    def grid(name: str) -> Grid:
        return Grid([parse_variant(name)], [1 / 3], [None], [], {"text": []})

    check(job, grid("reap+refit"))  # takes back how much the router's weights grow
    with pytest.raises(
        GgufToolError, match=r"--method reap\+refit=sequential: the plan drops experts .* refit it plainly"
    ):
        check(job, grid("reap+refit=sequential"))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(GgufToolError, match="solves in float64"):
        check(replace(job, device="mps"), grid("auto"))
