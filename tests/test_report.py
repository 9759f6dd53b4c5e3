"""The report: its facts by hand, what a hostile name can do to it, and what it says of a run that did not end well."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from gguftool import builtin, pipeline, report_files
from gguftool.bench import Options, working
from gguftool.bench_worker import _peak
from gguftool.divergence import HISTOGRAM_EDGES, KlStatistics, histogram
from gguftool.errors import GgufToolError
from gguftool.extras import Extras, make_prompts
from gguftool.gguf_file import GgufFile
from gguftool.journal import Journal
from gguftool.model_card import MARK, front_matter, model_card, short_command
from gguftool.provenance import command_line, files_of, provenance
from gguftool.recipe import Recipe
from gguftool.recipe_file import RunRecipe
from gguftool.report import Report, Status
from gguftool.report_charts import LEVELS, Bar, intervals, linear_level, log_levels, token_histogram
from gguftool.report_facts import calibrated_facts, expert_facts, expert_saliency
from gguftool.report_files import dumps, load, publish, with_card
from gguftool.report_html import render
from gguftool.runs import Ears, carry_out
from gguftool.sources import Source
from gguftool.svg import Scale, escape, padded, short
from gguftool.trial import (
    OVERHEAD,
    PROGRAM,
    TRANSCRIPT,
    Effort,
    Prompt,
    Tried,
    _completions,
    _routing,
    opening,
    same_start,
    trial,
)
from gguftool.trial_worker import fitted
from gguftool.verification import sha256
from reports import EVIL, make_report
from synthetic import make_plan, make_stats

# --- facts by hand --------------------------------------------------------------------------------------------------


def test_the_histogram_counts_every_token_once_in_bins_that_never_change():
    # Four bins a decade from 1e-6 to 10: bin 1 starts at 1e-6, bin 13 at 1e-3, bin 29 holds what is 10 or more.
    assert HISTOGRAM_EDGES[[0, 4, 12, 28]] == pytest.approx([1e-6, 1e-5, 1e-3, 10])
    got = histogram(np.array([0.0, 9e-7, 1.1e-6, 1.1e-3, 1.7e-3, 1.9e-3, 9.9, 10.0, 400.0]))
    assert len(got) == 30
    assert {i: n for i, n in enumerate(got) if n} == {0: 2, 1: 1, 13: 2, 14: 1, 28: 1, 29: 2}
    assert KlStatistics.of(np.array([0.5, 0.5, 20.0])).histogram[29] == 1


def test_experts_have_the_saliency_of_the_plans_own_criterion_and_the_width_they_kept():
    stats = make_stats(n_layer=2, n_expert=4, n_ff=8, top_k=2)
    plan = make_plan([[8, 0, 2], [4, 4, 4]], 8, 2, router=[[0, 2, 3], [0, 1, 2]], n_expert=4)
    plan = replace(plan, recipe=Recipe("frequency", 0.5), layout="tiered")
    facts = expert_facts(stats, plan)
    assert facts["layers"][0]["width"] == [8, None, 0, 2] and facts["layers"][1]["width"] == [4, 4, 4, None]
    assert facts["layers"][1]["saliency"] == stats.experts["count"][0, 1].tolist()
    assert facts["kept_share"] == pytest.approx((10 + 12) / 64) and facts["layout"] == "tiered"
    assert facts["criterion"].startswith("frequency = N_e")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("global", lambda s: (s.neurons["gate_sq_h_sq"] * s.neurons["down_norm_sq"]).sum(axis=2)),
        ("enp", lambda s: (s.neurons["proj"] / s.experts["count"][0, :, :, None]).sum(axis=2)),
        ("dern", lambda s: s.experts["gate"][0]),
        ("random", lambda s: s.experts["gate_norm"][0]),
        ("family", lambda s: s.experts["gate_norm"][0]),
        ("1,0,2", lambda s: s.experts["norm_sq"][0] / s.experts["count"][0]),
        ("tenp", lambda s: s.experts["turn"][0] / np.linalg.norm(s.experts["turn"][0], axis=1, keepdims=True)),
    ],
)
def test_every_kind_of_method_has_a_saliency_of_experts(method, expected):
    stats = make_stats(tokens=4000)
    _, got = expert_saliency(stats, Recipe(method, 0.25))
    np.testing.assert_allclose(got, expected(stats))


def test_shares_of_a_layer_add_up_to_the_experts_used_per_token():
    facts = calibrated_facts(make_stats(top_k=2))
    assert [sum(row["share"]) for row in facts["layers"]] == pytest.approx([2, 2, 2], rel=1e-4)


def test_watched_routes_are_those_of_the_original_experts():
    plan = make_plan([[8, 0], [8, 8]], 8, 1, layers=[3, 5], router=[[0, 2], [1, 2]], n_expert=3)
    before = [
        {"chosen": {"3": [5, 3, 2], "5": [10, 0, 0]}, "tokens": 10},
        {"chosen": {"3": [0, 0, 10], "5": [0, 10, 0]}, "tokens": 10},
    ]
    after = [
        {"chosen": {"3": [6, 4], "5": [1, 9]}, "tokens": 10},
        {"chosen": {"3": [1, 9], "5": [10, 0]}, "tokens": 10},
    ]
    found = {"original": {"routes": before}, "p": {"routes": after}}
    got = _routing(Tried("original", Path("a")), Tried("p", Path("b"), plan), {"t": ("", False)}, found)
    assert got["layers"] == [
        {"layer": 3, "original": [0.25, 0.15, 0.6], "pruned": [0.35, 0.0, 0.65]},
        {"layer": 5, "original": [0.5, 0.5, 0.0], "pruned": [0.0, 0.55, 0.45]},
    ]
    found["p"]["routes"] = [{"chosen": {"3": [6, 4, 0], "5": [1, 9]}, "tokens": 10}]
    with pytest.raises(GgufToolError, match="layer 3: 3 experts were watched in b, the plan has 2"):
        _routing(Tried("original", Path("a")), Tried("p", Path("b"), plan), {"t": ("", False)}, found)


def test_a_model_that_does_not_fit_into_memory_is_not_run_and_the_report_says_so(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"x" * 1000)
    runtime = type("R", (), {"n_gpu_layers": 0, "backend": "cpu"})()
    got = trial(runtime, [Tried("original", tmp_path / "x.gguf")], [], {}, room=1000)
    assert got["speed"]["models"] == [] and got["speed"]["skipped"] == [
        {"label": "original", "why": "1,000 bytes, and 1,000 of memory are free"}
    ]
    assert "original was not run: 1,000 bytes" in render(replace(make_report(), facts=got))


def test_prompts_end_behind_a_word_and_agreement_is_counted_from_the_start():
    assert opening("t", "one two  three", 9).text == "one two "
    assert opening("t", "one two", 100).text == "one two" and opening("t", "x" * 50, 10).text == "x" * 10
    assert same_start([1, 2, 3], [1, 2, 4, 3]) == 2 and same_start([1, 2], [1, 2, 3]) == 2 and same_start([], [1]) == 0


def test_scales_and_levels():
    assert Scale(0, 10, 100, 200)(5) == 150 and Scale(1e-4, 1, 0, 4, log=True)(1e-2) == 2
    assert Scale(0.5, 9.5, 0, 1).ticks(5) == [2.5, 5.0, 7.5] and Scale(0.02, 30, 0, 1, log=True).ticks(5) == [
        0.1,
        1,
        10,
    ]
    assert [short(v) for v in (0, 1e-6, 0.25, 1234.5, 3e7)] == ["0", "1e-6", "0.25", "1,234", "3e7"]
    levels, low, high = log_levels([[0.0, 1.0], [10.0, 100.0]])
    assert (levels, low, high) == ([[0, 0], [4, LEVELS - 1]], 1.0, 100.0)
    assert [linear_level(v, 8) for v in (0, 0.1, 4, 8, 9)] == [0, 1, 4, 8, 8]


def test_scales_and_levels_of_what_is_not_finite():
    nan, inf = math.nan, math.inf
    assert padded([nan, 2.0, inf, 1.0, -inf]) == padded([1.0, 2.0]) and padded([nan], log=True) == (1e-6, 1.0)
    assert padded([0.1, inf, 1.0], log=True) == padded([0.1, 1.0], log=True)
    assert Scale(0, inf, 0, 1).ticks() == Scale(nan, 1, 0, 1).ticks() == Scale(0.1, inf, 0, 1, log=True).ticks() == []
    assert [Scale(0, 10, 100, 200)(v) for v in (nan, inf, -inf)] == [100, 200, 100]
    assert [short(v) for v in (nan, inf, -inf)] == ["nan", "inf", "-inf"]
    levels, low, high = log_levels([[nan, 1.0], [inf, 100.0]])
    assert (levels, low, high) == ([[0, 0], [LEVELS - 1, LEVELS - 1]], 1.0, 100.0)
    assert [linear_level(v, 8) for v in (nan, inf, -inf)] == [0, LEVELS - 1, 0] and linear_level(1, nan) == 0


def test_what_is_not_finite_has_words_and_no_mark():
    for value, marks in ((1.0, 1), (math.nan, 0), (math.inf, 0)):
        drawn = intervals([Bar("a", value, value, value, f"{value} nats", "pruned")], "KL divergence")
        assert f"{value} nats" in drawn and (drawn.count('"mark '), drawn.count('"err ')) == (marks, marks)
        drawn = token_histogram([("a", {"mean": value, "p99": value, "histogram": [0] * 29 + [9]}, "pruned")], "tokens")
        assert (drawn.count('"mark '), drawn.count('"meanline ')) == (marks, marks)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands the peak on")
def test_the_peak_memory_of_a_process_is_not_that_of_the_one_that_started_it():
    held = b"\1" * (200 << 20)
    code = "from gguftool.bench_worker import _peak; print(_peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(held) <= _peak()


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether its tags close in order."""

    VOID = ("meta", "rect", "line", "path", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("state", ["done", "running", "failed", "interrupted", "cut off"])
def test_nothing_that_comes_from_outside_becomes_a_part_of_the_page(state):
    report = make_report(evil=EVIL, candidates=3)
    report = replace(report, status=Status(state, f"stage{EVIL}", f"message{EVIL}", "t", "t", 1, f"host{EVIL}"))
    text = render(report)
    assert all(part not in text for part in ("<script", "<img", "\x00", "\ud800"))  # else the parser has no end
    page = Page(text)
    assert page.open == [] and not {"script", "img", "iframe", "object", "link", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "style")]
    assert {v[0] for k, v in page.attributes if k == "href"} == {"#"}
    assert "url(" not in text and "@import" not in text
    # All of it is shown, as text.
    assert "alert('x')" in "".join(page.words) and "\x00" not in text and "\ud800" not in text
    text.encode("utf-8")
    sections = set(re.findall(r'<section id="(\w+)"', text))
    assert sections == {
        "size",
        "quality",
        "spread",
        "experts",
        "routing",
        "speed",
        "completions",
        "candidates",
        "notes",
        "reproduce",
    }
    assert ('http-equiv="refresh"' in text) == (state == "running")


def test_a_large_report_stays_small_and_numbers_only_what_is_worth_it():
    text = render(make_report(n_rows=40, n_layer=48, n_expert=128))
    assert len(text) < 1_000_000
    assert text.count('class="point"') < 30 and "40 models beside the original" in text
    assert 'id="spread"' not in text  # whose tokens would they be?


def test_every_text_has_its_tiles():
    report = make_report()
    rows = [replace(row, texts={**row.texts, "third": row.texts["code"]}) for row in report.rows]
    three = replace(report, base={**report.base, "third": report.base["code"]}, rows=rows)
    tiles = render(three).partition('class="tiles"')[2].partition("</ul>")[0]
    what = re.findall(r'class="what">([^<]*)<', tiles)
    assert what == [
        "size",
        *(f"{measured}, {name}" for name in three.base for measured in ("KL divergence", "perplexity", "same top token")),
        "generation speed", "memory",
    ]  # fmt: skip


def test_a_page_without_facts_has_no_empty_section():
    text = render(Report("m", 0, {}, [], ""))
    assert "<section" not in text and "<nav" not in text


def test_the_same_report_gives_the_same_page():
    assert render(make_report()) == render(Report.from_dict(json.loads(dumps(make_report()))))


def test_json_keeps_everything_and_puts_numbers_on_one_line():
    report = replace(make_report(candidates=2), notes=["[\n1,\n2\n]", "null"])
    text = dumps(report)
    assert json.loads(text) == json.loads(json.dumps(report.as_dict()))
    assert re.search(r'"histogram": \[0, 0, [\d, ]+\]\n', text)
    assert dumps(Report.from_dict(json.loads(text))) == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "not a gguftool report"),
        ({"version": 1}, "report version 1, this gguftool reads 2"),
        ({"rows": [{"label": "x"}]}, "lacks or garbles"),
        ({"base": None}, "lacks or garbles"),
        ({"status": {"state": "done", "colour": "red"}}, "lacks or garbles"),
    ],
)
def test_a_damaged_report_is_refused_in_a_line(tmp_path, change, words):
    (tmp_path / "report.json").write_text(json.dumps(make_report().as_dict() | change))
    with pytest.raises(GgufToolError, match=words):
        load(tmp_path)


# --- how a run ended --------------------------------------------------------------------------------------------------


def states(folder: Path) -> tuple[str, str, str]:
    """The state in report.json, and what the page and report.md say."""
    status = json.loads((folder / "report.json").read_text())["status"]
    return status["state"], (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_a_report_follows_its_run_and_says_how_it_ended(tmp_path):
    publish(make_report(), tmp_path)
    assert "finished" not in (tmp_path / "README.md").read_text()
    with Journal(tmp_path, "model") as journal:
        assert states(tmp_path)[0] == "done"  # the folder may be another run's yet
        journal.begin()
        state, page, markdown = states(tmp_path)  # nothing is left of the earlier run
        assert state == "running" and "KL divergence" not in page + markdown
        assert "There is no finished model here. Running" in (tmp_path / "README.md").read_text()
        journal.stage("stats.safetensors")
        journal.learn(calibrated=calibrated_facts(make_stats()))
        journal.stage("plan.json")
        state, page, _ = states(tmp_path)
        assert "Running" in page and "plan.json" in page and str(os.getpid()) in page and 'id="routing"' in page
        journal.measured(make_report())
        report = journal.finish()
    assert report.status.done and report.status.pid == 0 and report.status.started
    assert states(tmp_path)[0] == "done" and "Running" not in states(tmp_path)[1] and "calibrated" in report.facts


def unpruned_report() -> Report:
    """Of a budget for which the unpruned model was the best."""
    report = make_report(candidates=2)
    facts = {name: value for name, value in report.facts.items() if name not in ("experts", "routing")}
    return replace(report, rows=[replace(report.rows[1], method="none")], facts=facts)


def test_a_report_may_be_about_an_unpruned_model():
    report = unpruned_report()
    page = render(report)
    assert report.main is report.rows[0] and 'class="tiles"' in page and 'id="spread"' in page
    assert "Nothing was pruned: unpruned 1 is the best that fits" in page and "beside the original" not in page
    card = model_card(report)
    assert "quantized to Q4_K_M by gguftool, nothing pruned: 0.00 MB" in card and "What was removed" not in card
    assert not {"pruned", "expert-pruning"} & set(front_matter(report)["tags"])
    assert {"pruned", "expert-pruning"} < set(front_matter(make_report())["tags"])
    two = replace(report, rows=[*report.rows, *report.rows])
    assert two.main is None and "2 models beside the original" in render(two)


def test_candidates_are_shown_alike_everywhere():
    report = make_report(candidates=2)
    head, rows = report.weighed()
    assert head == ["candidate", "size", "KL, code", "KL, prose", "", "why"]
    assert rows[1] == ["candidate 1", "0.00 MB", "0.15000 ± 0.01000", "0.15000 ± 0.01000", "taken", "why"]
    first = replace(report.candidates[0], need=2_000_000, texts={"prose": {"mean": 0.5}})
    report = replace(report, candidates=[first, report.candidates[1]])
    head, rows = report.weighed()
    assert head[2] == "needs" and rows[0][2:5] == ["2.00 MB", "", "0.50000 ± 0.00000"] and rows[1][2] == ""
    page, markdown = render(report), report.markdown()
    for cell in (*head, *rows[0]):
        assert cell in page and cell in markdown
    assert "- size: 500 MB" in markdown and "- size: 500 MB" in model_card(report)
    assert "What was weighed" not in make_report().markdown()


def test_what_was_weighed_outlives_the_measurement(tmp_path):
    report = make_report(candidates=2)
    with Journal(tmp_path, "model") as journal:
        journal.begin()
        journal.weighed(report.candidates, report.budget)
        journal.stage("fit.json")
        assert 'id="candidates"' in states(tmp_path)[1]
        journal.measured(make_report())
        found = journal.finish()
    assert (found.candidates, found.budget) == (report.candidates, report.budget)
    assert 'id="candidates"' in states(tmp_path)[1]


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (GgufToolError(f"disk full{EVIL}"), "failed", "disk full"),
        (ValueError(), "failed", "ValueError"),
        (KeyboardInterrupt(), "interrupted", "the same command goes on from there"),
    ],
)
def test_a_run_that_ends_badly_says_so_with_what_is_known(tmp_path, error, state, words):
    with pytest.raises(type(error)), Journal(tmp_path, "model") as journal:
        journal.begin()
        journal.learn(experts=make_report().facts["experts"])
        journal.stage("pruned.gguf")
        raise error
    got, page, markdown = states(tmp_path)
    assert got == state and words in page and words in markdown and "pruned.gguf" in page and "pruned.gguf" in markdown
    assert 'id="experts"' in page and "What was known by then follows" in page and "<script" not in page


def test_a_run_that_never_had_the_folder_leaves_its_report_alone(tmp_path):
    publish(make_report(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(GgufToolError), Journal(tmp_path, "model"):
        raise GgufToolError("another run holds the folder")
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_run_whose_numbers_cannot_be_right_has_failed(tmp_path):
    with Journal(tmp_path, "model") as journal:
        journal.begin()
        journal.measured(replace(make_report(), failures=("KL divergence is nan",)))
        report = journal.finish()
    state, page, markdown = states(tmp_path)
    assert state == "failed" and not report.status.done and not (tmp_path / "README.md").exists()
    assert (
        "this cannot be right: KL divergence is nan" in page
        and "KL divergence is nan" in markdown
        and 'id="quality"' in page
    )
    assert load(tmp_path).failures == ["KL divergence is nan"]


def with_value(found: float) -> Report:
    """A report in which all that was measured of its first row on its first text is `found`, and the saliency of an expert."""
    report = make_report(candidates=2)
    row, name = report.rows[0], "code"
    value = row.texts[name]
    value = {
        **value, "pruned": {**value["pruned"], "ppl": found, "ppl_err": found}, "ln_ppl_ratio": found,
        "kld": {**dict.fromkeys(value["kld"], found), "histogram": value["kld"]["histogram"]},
    }  # fmt: skip
    facts = json.loads(json.dumps(report.facts))
    facts["experts"]["layers"][0]["saliency"][0] = found
    rows = [replace(row, texts={**row.texts, name: value}), *report.rows[1:]]
    candidates = [replace(report.candidates[0], texts={name: {"mean": found, "err": found}}), report.candidates[1]]
    return replace(report, rows=rows, facts=facts, candidates=candidates)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_that_measured_nothing_finite_has_a_report_that_says_so(value, tmp_path):
    fault = f"auto 40 % 0 on code: perplexity {value} (original 10.0), KL divergence {value}: not finite"
    with Journal(tmp_path, "model") as journal:
        journal.begin()
        journal.measured(with_value(value))
        journal.stage("checks")
        journal.measured(replace(with_value(value), failures=(fault,)))
        journal.finish()
    state, page, markdown = states(tmp_path)
    assert state == "failed" and fault in page and fault in markdown and load(tmp_path).failures == [fault]
    assert f"{value} ± {value}" in page and "A divergence that is not finite has no place here: auto 40 % 0." in page
    names = ("x", "y", "x1", "x2", "y1", "y2", "width", "height", "cx", "cy", "d")
    places = [value for name, value in Page(page).attributes if name in names]
    assert len(places) > 500 and not [v for v in places if "nan" in v or "inf" in v]


def test_a_page_that_cannot_be_drawn_hides_no_failure(tmp_path, monkeypatch):
    def fail(_: Report) -> str:
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"), Journal(tmp_path, "model") as journal:
        journal.begin()
        journal.measured(replace(make_report(), failures=("KL divergence is nan",)))
        monkeypatch.setattr(report_files, "render", fail)
        journal.finish()
    status = load(tmp_path).status
    assert status.state == "failed"
    assert status.message == "this cannot be right: KL divergence is nan; then: a fault of ours"


def test_a_journal_hears_the_steps_and_lets_others_hear_them(tmp_path):
    heard = []
    with Journal(tmp_path, "model") as journal:
        journal.begin()
        watch = journal.hearing(lambda what, facts: heard.append((what, facts.get("state"))))
        watch("step", {"name": "a.gguf", "state": "making"})
        watch("step", {"name": "a.gguf", "state": "made"})
        watch("step", {"name": "b.gguf", "state": "there"})
        watch("stage", {"name": "measure"})
        watch("measured", {"text": "t", "models": []})
        assert journal.stages == ["a.gguf", "b.gguf", "perplexity and KL divergence"]
        journal.finish()
    assert heard == [("step", "making"), ("step", "made"), ("step", "there"), ("stage", None), ("measured", None)]


@pytest.mark.parametrize("fault", [OSError("disk full"), ValueError("a fault of ours")])
def test_a_report_that_cannot_be_written_hides_no_error(fault, tmp_path, monkeypatch):
    with pytest.raises(GgufToolError, match="the real one"), Journal(tmp_path, "model") as journal:
        journal.begin()
        monkeypatch.setattr("gguftool.journal.publish", lambda *_: (_ for _ in ()).throw(fault))
        raise GgufToolError("the real one")


def test_a_killed_run_is_found_out(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from gguftool.journal import Journal\n"
        "with Journal(Path(sys.argv[1]), 'm') as j:\n    j.begin()\n    j.stage('base.gguf')\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path])
    assert "If that process is gone, the run was cut off" in states(tmp_path)[1]
    found = load(tmp_path)
    assert found.status.state == "cut off" and "base.gguf" in render(found)
    alive = replace(found, status=replace(found.status, state="running", pid=os.getpid()))
    publish(alive, tmp_path)
    assert load(tmp_path).status.state == "running"
    publish(replace(alive, status=replace(found.status, state="running", host="elsewhere")), tmp_path)
    assert load(tmp_path).status.state == "running" and socket.gethostname() != "elsewhere"


# --- the model card ---------------------------------------------------------------------------------------------------


def card_of(**changes: str) -> Report:
    report = make_report()
    return replace(report, facts={**report.facts, "card": {**report.facts["card"], **changes}})


def matter(text: str) -> dict:
    """The front matter of a card, as the hub reads it."""
    found = re.fullmatch(r"---\n(.*?)\n---\n.*", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def test_the_card_has_the_hubs_front_matter():
    text = model_card(card_of(base_model="Org/Model", quantized_by="me", license="other", license_name="mine"))
    got = matter(text)
    assert got == {
        "base_model": "Org/Model", "base_model_relation": "quantized", "quantized_by": "me", "license": "other",
        "license_name": "mine", "library_name": "gguf", "pipeline_tag": "text-generation",
        "tags": ["gguf", "moe", "mixture-of-experts", "pruned", "expert-pruning", "gguftool", "qwen3moe", "Q4_K_M"],
    }  # fmt: skip
    assert "needs a llama.cpp with gguftool's patches" in text and "0.05000 ± 0.00250" in text
    assert "any llama.cpp runs it" in model_card(card_of(layout="stock"))
    assert "base_model" not in front_matter(make_report()) and "--base-model OWNER/NAME" in model_card(make_report())


def test_hostile_names_stay_inside_the_cards_front_matter_and_cells():
    evil = "x\n---\nlicense: mit\ntags: [a]\n# <script>|"
    text = model_card(replace(card_of(license=evil, quantized_by=evil), notes=[evil, "<img src=x>"]))
    assert matter(text)["license"] == evil and matter(text)["tags"][0] == "gguf"
    assert "<script>" not in text.partition(MARK)[2] and "<img" not in text
    # Inside of code, which is shown as it is, anything may stand; outside nothing.
    text = model_card(make_report(evil=EVIL + "```\n`")).partition(MARK)[2]
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    assert "script" in text and "<script>" not in text and "<img" not in text


def test_a_card_tells_nobody_where_files_lay():
    typed = command_line(["compress", "/home/me/My Model/", "--ratio", "0.4", "-o", "../out", "--data", "~/a.txt"])
    assert typed == "gguftool compress '/home/me/My Model/' --ratio 0.4 -o ../out --data '~/a.txt'"
    assert short_command(typed) == "gguftool compress 'My Model' --ratio 0.4 -o out --data a.txt"
    assert short_command("gguftool compress '/home/me") == ""


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--data=/home/me/x.txt", "--data=x.txt"),
        ("-o/home/me/out/", "-oout"),
        ("acme/secret/x.txt:text:20@2", "x.txt:text:20@2"),
        ("--data=/home/me@acme/x.txt:text@2", "--data=x.txt:text@2"),
        ("hf:/home/me/set/:train:text@2", "hf:set:train:text@2"),
        ("--data=hf:acme/set", "--data=hf:set"),
        ("acme/Model", "Model"),
        ("C:\\Users\\me\\x.txt", "x.txt"),
        ("--ratio=0.4", "--ratio=0.4"),
        ("--quiet", "--quiet"),
        # What everybody can look up stays whole, and so does what is no path.
        ("Org/Model", "Org/Model"),
        ("hf:Org/Set/en:train:text:20@0.5", "hf:Org/Set/en:train:text:20@0.5"),
        ("--data=hf:Org/Set/en", "--data=hf:Org/Set/en"),
        ("--prompt=this and/or that", "--prompt=this and/or that"),
    ],
)
def test_however_a_path_is_written_its_folders_stay_off_the_card(given, shown):
    report = card_of(base_model="Org/Model")
    texts = [{"name": name, "sha256": "0" * 64, "tokens": 9} for name in ("Org/Set/en:train", "set:train", "x.txt")]
    command = command_line(["compress", given, "--prompt", "either/or"])
    facts = {
        **report.facts, "model": {**report.facts["model"], "texts": texts},
        "provenance": {**report.facts["provenance"], "command": command},
    }  # fmt: skip
    text = model_card(replace(report, facts=facts))
    (line,) = [line for line in text.splitlines() if line.startswith("gguftool compress ")]
    assert shlex.split(line) == ["gguftool", "compress", shown, "--prompt", "either/or"]
    if given != shown:
        assert not re.search("home|me@|acme|Users", text)


def test_a_readme_of_somebody_else_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert "was not made by gguftool" in publish(make_report(), tmp_path)[0]
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    assert publish(make_report(), tmp_path) == [] and MARK in (tmp_path / "README.md").read_text()
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path, "model") as journal:
        journal.begin()
        raise KeyboardInterrupt
    assert "There is no finished model here. Interrupted" in (tmp_path / "README.md").read_text()


def test_facts_for_the_card_are_checked():
    assert with_card(make_report(), base_model=None).facts["card"]["base_model"] == ""
    assert with_card(make_report(), base_model="a/b", license="mit").facts["card"]["base_model"] == "a/b"
    with pytest.raises(GgufToolError, match="is not OWNER/NAME"):
        with_card(make_report(), base_model="https://x/a/b")
    with pytest.raises(GgufToolError, match="no model card"):
        with_card(replace(make_report(), facts={}), license="mit")


# --- where it comes from ----------------------------------------------------------------------------------------------


def test_every_file_has_its_hash(tmp_path, runtime):
    (tmp_path / "model").mkdir()
    for name in ("config.json", ".hidden"):
        (tmp_path / "model" / name).write_text("abc")
    (tmp_path / "out.gguf").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    got = provenance(runtime, "gguftool x", [tmp_path / "model"], [tmp_path / "out.gguf"])
    assert got["files"] == [
        {"role": "input", "name": "model/config.json", "bytes": 3, "sha256": abc},
        {"role": "output", "name": "out.gguf", "bytes": 3, "sha256": abc},
    ]
    assert [p["name"] for p in got["patches"]] == list(runtime.patches) and got["patches"]
    assert runtime.base.llama_cpp_commit in got["environment"]["llama.cpp"]
    assert provenance(runtime, "", [], [tmp_path / "out.gguf"], hashes=False)["files"][0]["sha256"] == ""
    assert files_of(tmp_path / "nothing") == []


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory, checkpoint_dir, llama):
    """A small run of compress: (recipe, folder, report)."""
    texts = builtin.texts()
    recipe = RunRecipe(
        model=checkpoint_dir, data=(Source(str(texts["calib_code"])),), eval=(texts["eval_code"],), method="global", ratio=0.4,
        windows=2, eval_windows=2, pre_tokenizer="qwen2", backend="cpu",
    )  # fmt: skip
    out = tmp_path_factory.mktemp("ran") / "out"
    report = carry_out(recipe, out, extras=Extras(command="gguftool compress x"))
    return recipe, out, report


def test_a_run_measures_what_its_report_shows(ran):
    _, out, report = ran
    assert load(out).as_dict() == json.loads(json.dumps(report.as_dict()))
    speed = report.facts["speed"]
    assert [m["label"] for m in speed["models"]] == ["original", "global 40 %"] and speed["skipped"] == []
    sizes = {m["label"]: m["bytes"] for m in speed["models"]}
    for model in speed["models"]:
        for kind in ("prompt", "generate"):
            assert 0 < model[kind]["low"] <= model[kind]["median"] <= model[kind]["high"]
        if sys.platform == "linux":
            assert model["bytes"] < model["memory"] < model["bytes"] + (200 << 20)
    assert sizes["global 40 %"] < sizes["original"]
    routing = report.facts["routing"]
    assert [row["layer"] for row in routing["layers"]] == [0, 1, 2, 3] and routing["tokens"] == Effort().watched
    for row in routing["layers"]:
        assert sum(row["original"]) == pytest.approx(4, rel=1e-4) and sum(row["pruned"]) == pytest.approx(4, rel=1e-4)
        assert row["original"] != row["pruned"] or row["layer"] == 0
    (prompt,) = report.facts["completions"]["prompts"]
    assert prompt["name"] == "eval_code" and builtin.texts()["eval_code"].read_text().startswith(prompt["prompt"])
    first, second = prompt["answers"]
    assert first["same"] == first["tokens"] > 0 and second["same"] <= second["tokens"] and first["text"]
    assert sum(report.rows[0].texts["eval_code"]["kld"]["histogram"]) == report.rows[0].texts["eval_code"]["tokens"]


def test_what_a_model_writes_is_held_against_the_original_only_where_that_was_run(ran, runtime):
    """There is room for the pruned file alone."""
    _, out, report = ran
    (row,) = report.rows
    models = [Tried("original", out / "base.gguf"), Tried(row.label, Path(row.path))]
    effort = Effort(prompt=8, generate=2, rounds=1, seconds=1, complete=4)
    got = trial(
        runtime, models, [Prompt("p", "def f(", "def f(")], {}, effort=effort, room=row.bytes + OVERHEAD
    )  # fmt: skip
    (answer,) = got["completions"]["prompts"][0]["answers"]
    assert (answer["label"], answer["same"]) == (row.label, None) and answer["text"]
    alone = replace(report, facts={**report.facts, **got})
    page, markdown = render(alone), alone.markdown()
    assert "The original was not run, so nothing is marked." in page
    assert "as the original&#x27;s" not in page and "<mark>" not in page
    for text in (page, markdown):
        assert "of memory are free; what the others write is compared with nothing" in text
    assert "as the original&#x27;s" in render(report) and "was not run" not in report.markdown()


def test_a_run_says_where_everything_came_from(ran, checkpoint_dir):
    _, out, report = ran
    files = {f["name"]: f for f in report.facts["provenance"]["files"]}
    (pruned,) = [name for name in files if name.startswith("Builtin") or name.endswith("-BF16.gguf")]
    assert files["base.gguf"]["sha256"] == sha256(out / "base.gguf") and files[pruned]["sha256"] == sha256(out / pruned)
    assert {
        "stats.safetensors",
        "eval_code.txt",
        "calib_code.txt",
        f"{checkpoint_dir.name}/config.json",
    } <= files.keys()
    card = (out / "README.md").read_text()
    assert matter(card)["tags"][-1] == "BF16" and pruned in card
    assert report.facts["card"]["layout"] == GgufFile(out / pruned).value("gguftool.layout")


@pytest.fixture
def again(ran, tmp_path, monkeypatch):
    """The same run in a folder of its own, in which nothing is measured anew: (recipe, folder)."""
    recipe, out, report = ran
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr(pipeline, "judge", lambda *_: report)
    monkeypatch.setattr(pipeline, "far_from_plan", lambda *_: [])
    return recipe, tmp_path / "out"


def test_a_model_of_the_hub_is_named_and_its_files_are_hashed(again, checkpoint_dir, monkeypatch):
    recipe, out = again
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(checkpoint_dir))
    hub = replace(recipe, model=Path("someone/A-Model"))
    report = carry_out(hub, out, extras=Extras(measure=False))
    names = [f["name"] for f in report.facts["provenance"]["files"] if f["role"] == "input"]
    assert {f"{checkpoint_dir.name}/config.json", f"{checkpoint_dir.name}/model.safetensors"} <= set(names)
    assert matter((out / "README.md").read_text())["base_model"] == "someone/A-Model"


def test_the_router_is_watched_as_calibration_counted_it(base_gguf, stats, runtime):
    """llama.cpp's choices on the calibration text against those that torch made there."""
    text = builtin.texts()["calib_code"].read_text()
    with working(runtime, base_gguf, Options(), program=PROGRAM) as worker:
        answer = worker.ask("routes", stats.tokens, text=text, special=False)
        assert worker.ask("routes", 512, text=text, special=False)["tokens"] == 512
    watched = np.array([answer["chosen"][str(layer)] for layer in range(4)])
    assert answer["tokens"] == stats.tokens and watched.sum() == 4 * 4 * stats.tokens
    assert np.abs(watched - stats.expert("count")).sum() < 0.01 * watched.sum()


def test_a_completion_is_the_likeliest_token_again_and_again(base_gguf, runtime):
    text = builtin.texts()["eval_code"].read_text()[:300]
    with working(runtime, base_gguf, Options(), program=PROGRAM) as worker:
        ask = {"text": text, "special": False, "seconds": 60}
        long, short_one = worker.ask("complete", 12, **ask), worker.ask("complete", 5, **ask)
        assert short_one["tokens"] == long["tokens"][:5] and long["text"].startswith(short_one["text"])
        assert worker.ask("complete", 12, **ask | {"seconds": 0})["stopped"] == "time"


def test_of_a_long_prompt_the_start_goes_but_for_the_token_of_the_beginning():
    tokens = np.arange(10, dtype=np.int32)
    for room, keep, want in ((10, 1, range(10)), (4, 1, [0, 7, 8, 9]), (4, 0, [6, 7, 8, 9])):
        got, left_out = fitted(tokens, room, keep)
        assert got.tolist() == list(want) and left_out == 10 - room


def test_a_long_prompt_is_gone_on_from_at_its_end_and_the_page_says_so(base_gguf, runtime):
    text = builtin.texts()["eval_code"].read_text()[:4000]
    prompts = [Prompt(name, name, start * 200 + text) for name, start in (("a", "import os\n"), ("b", "# nothing\n"))]
    effort = Effort(prompt=8, generate=2, rounds=1, seconds=1, complete=12)
    prompts.append(Prompt("short", "short", text[:100]))
    got = trial(runtime, [Tried("original", base_gguf)], prompts, {}, effort=effort)
    one, other, short_one = got["completions"]["prompts"]
    # What they have in common at their ends is more than the context holds.
    assert one["answers"] == other["answers"] and one["answers"][0]["tokens"] > 0
    assert one["left_out"] > 512 and other["left_out"] > 512 and short_one["left_out"] == 0
    page = render(replace(make_report(), facts=got))
    assert page.count("tokens were left out.") == 2
    assert f"the first {one['left_out']:,} tokens were left out." in page
    assert "left out" not in render(make_report()).partition('id="completions"')[2]


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (GgufToolError("no <b>"), "failed")]
)
def test_a_run_that_is_stopped_leaves_a_report_of_what_it_knew(ran, monkeypatch, error, state):
    recipe, out, _ = ran

    def stop(*_):
        raise error

    monkeypatch.setattr(pipeline, "judge", stop)
    with pytest.raises(type(error)):
        carry_out(recipe, out, extras=Extras(measure=False))
    got, page, _ = states(out)
    assert got == state and "perplexity and KL divergence" in page and 'id="experts"' in page and "no <b>" not in page
    monkeypatch.undo()
    report = carry_out(recipe, out, extras=Extras(measure=False))
    assert report.status.done and "speed" not in report.facts and report.facts["provenance"]["files"][0]["sha256"] == ""


def test_a_trial_that_fails_costs_nothing_else_of_the_report(ran, monkeypatch):
    recipe, out, _ = ran
    monkeypatch.setattr("gguftool.trial.PROGRAM", "gguftool.no_such_module")
    report = carry_out(recipe, out)
    assert report.status.done and "ended with exit code 1" in report.facts["speed"]["error"] and report.rows
    assert "Not measured: base.gguf: the" in (out / "report.html").read_text()


def test_a_run_says_that_somebody_elses_readme_stays(again):
    recipe, out = again
    (out / "README.md").write_text("mine")
    said: list[str] = []
    carry_out(recipe, out, Ears(say=said.append), Extras(measure=False))
    note = f"note: {out / 'README.md'} was not made by gguftool and stays as it is; move it to have the model card"
    assert [line for line in said if "README" in line] == [note]
    assert (out / "README.md").read_text() == "mine"


def test_prompts_that_are_given_go_through_the_chat_template(tmp_path, base_gguf, monkeypatch):
    plain = make_prompts(base_gguf, [builtin.texts()["eval_code"]], ["Hello"])
    assert [(p.text, p.special) for p in plain] == [("Hello", False)]
    from gguftool.chat import ChatTemplate

    source = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    monkeypatch.setattr(
        "gguftool.extras.template_of_gguf", lambda _: ChatTemplate({"default": source}, {"bos_token": "<s>"})
    )
    (prompt,) = make_prompts(base_gguf, [], ["Hello"])
    assert (prompt.text, prompt.shown, prompt.special) == ("<user>Hello<bot>", "Hello", True)
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n')
    (opened,) = make_prompts(base_gguf, [chat], [])
    assert (opened.text, opened.special) == ("<user>Hi<assistant>Ho", True)
    answer = {"tokens": [], "text": "", "stopped": "end", "left_out": 0}
    for prompts, how in (
        ([prompt], "given as a user's message, through the model's chat template"),
        (plain, "continued as plain text"),
        ([opened], TRANSCRIPT),
        ([*plain, opened], f"continued as plain text (prompt 1); {TRANSCRIPT} (chat)"),
    ):
        found = {"m": {"answers": [answer] * len(prompts)}}
        assert _completions(None, [Tried("m", tmp_path)], prompts, found, Effort())["how"] == how


def test_the_command_renders_again_and_opens(tmp_path, monkeypatch, capsys):
    from gguftool.cli import cli

    publish(make_report(), tmp_path)
    (tmp_path / "report.html").unlink()
    opened = []
    monkeypatch.setattr(report_files.webbrowser, "open", lambda url: opened.append(url) or False)
    cli(["report", str(tmp_path), "--open", "--base-model", "Org/M", "--quantized-by", "me"], standalone_mode=False)
    assert opened == [(tmp_path / "report.html").as_uri()] and (tmp_path / "report.html").is_file()
    assert matter((tmp_path / "README.md").read_text())["quantized_by"] == "me"
    out, err = capsys.readouterr()
    assert "what it cost" in out and "no browser could be started; open" in err.replace("\n", " ")
    with pytest.raises(GgufToolError, match="no such report"):
        cli(["report", str(tmp_path / "none")], standalone_mode=False)


def test_escape_covers_quotes_and_control_characters():
    assert escape("<a b='\"'>&\x1b") == "&lt;a b=&#x27;&quot;&#x27;&gt;&amp;\ufffd"
