"""The sections of report.html, each a function of the report to HTML; an empty text where it has nothing to show."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

import numpy as np

from . import report_charts as charts
from .page import details, figure, panels, table
from .report import Report, Row, megabytes, with_error
from .svg import escape, mark, short

FILES_SHOWN = 24
# Rounds whose fastest is so many times the slowest were disturbed.
WIDE = 1.5


def header(report: Report) -> str:
    """Name, what was done in a sentence, and where a run stands that is not done."""
    experts = report.facts.get("experts")
    words = f"Run of {report.status.started}" if report.status.started else ""
    if report.rows and report.main is None:
        words = f"{len(report.rows)} models beside the original"
    elif report.main is not None and report.main.method == "none":
        words = f"Nothing was pruned: {report.main.label} is the best that fits"
    elif experts:
        gone = 100 * (1 - experts["kept_share"])
        words = f"Pruned by {experts['method']}: {gone:.1f} % of the routed experts' parameters are gone" + (
            f" · {experts['layout']} layout" if experts.get("layout") else ""
        )
    banner = ""
    if not report.status.done:
        known = "What was known by then follows." if report.facts or report.rows else "Nothing was measured yet."
        head, _, rest = str(report.status).partition(": ")
        parts = "".join(f"<div>{escape(part)}</div>" for part in (rest, known) if part)
        banner = f'<div class="status" role="status"><strong>{escape(head)}</strong>{parts}</div>\n'
    return f'<header><h1>{escape(report.model)}</h1><p class="lead">{escape(words)}</p>{banner}</header>\n'


def tiles(report: Report) -> str:
    """The numbers that people ask for first, those of the first row; none of a comparison of many models."""
    row = report.main
    if row is None:
        return ""
    found = [
        (
            "size",
            f"{100 * row.bytes / report.base_bytes:.1f} %",
            f"{megabytes(row.bytes)} of {megabytes(report.base_bytes)}",
        )
    ]
    for name in report.base:
        value = row.texts[name]
        kld = value["kld"]
        with np.errstate(over="ignore"):  # inf is the right word for it
            ratio = 100 * (np.exp(value["ln_ppl_ratio"]) - 1)
        found.append((f"KL divergence, {name}", f"{kld['mean']:.4f}", f"± {kld['err']:.4f} nats"))
        found.append(
            (f"perplexity, {name}", f"{ratio:+.2f} %", f"{value['base']['ppl']:.3f} → {value['pruned']['ppl']:.3f}")
        )
        found.append((f"same top token, {name}", f"{100 * value['same_top']:.1f} %", f"of {value['tokens']:,} tokens"))
    by_label = {model["label"]: model for model in report.facts.get("speed", {}).get("models", ())}
    base, mine = by_label.get("original"), by_label.get(row.label)
    if base and mine:
        ratio = mine["generate"]["median"] / base["generate"]["median"]
        found.append(
            ("generation speed", f"{ratio:.2f} ×", f"{_rate(mine['generate'])} tokens/s, {_reach(mine['generate'])}")
        )
        if base.get("memory") and mine.get("memory"):
            found.append(
                ("memory", f"{100 * mine['memory'] / base['memory']:.0f} %",
                 f"{megabytes(mine['memory'])} of {megabytes(base['memory'])}")
            )  # fmt: skip
    return (
        '<ul class="tiles">'
        + "".join(
            f'<li><span class="what">{escape(what)}</span><span class="big">{escape(big)}</span>'
            f'<span class="more">{escape(more)}</span></li>'
            for what, big, more in found
        )
        + "</ul>\n"
    )


def size_against_quality(report: Report) -> str:
    """A panel for each text."""
    names = [name for name in _texts(report) if charts.dots(report, name)]
    if not names or not report.base_bytes:
        return ""
    kinds = {dot.kind for name in names for dot in charts.dots(report, name)}
    words = {
        "pruned": "pruned", "quantized": "unpruned, quantized only", "candidate": "weighed, not taken", "chosen": "taken",
    }  # fmt: skip
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark(7, 7, charts.SHAPES[kind], f"mark {kind}")}</svg>'
        f"{word}</li>"
        for kind, word in words.items() if kind in kinds
    )  # fmt: skip
    drawn = [figure(name, charts.size_quality(report, name)) for name in names]
    left = [row.label for row in report.rows if not all(isfinite(text["kld"]["mean"]) for text in row.texts.values())]
    more = f" A divergence that is not finite has no place here: {escape(', '.join(left))}." if left else ""
    return (
        '<p class="note">Down and to the left is better. Numbers are those of the table below; the dotted line joins the files '
        f"that no other one beats in both, bars are one standard error.{more}</p>"
        f'<ul class="legend">{legend}</ul>{panels(drawn)}'
    )


def quality(report: Report) -> str:
    """All numbers as a table, and intervals where they are few."""
    if not report.base:
        return ""
    head, rows = report.cells(short=False)
    lines = [["", *rows[0]], *([str(i), *cells] for i, cells in enumerate(rows[1:], 1))]
    listed = table(["#", *head], lines, left=(1,), wrap=(1,), main=1 if report.main else None)
    drawn = []
    if len(report.rows) <= charts.FEW:
        for name, base in report.base.items():
            first = charts.Bar(
                "original", base["ppl"], base["ppl"] - base["ppl_err"], base["ppl"] + base["ppl_err"],
                with_error(base["ppl"], base["ppl_err"]), "base",
            )  # fmt: skip
            ppl = [first, *(_bar(row, **_ppl(row, name)) for row in report.rows)]
            kl = [_bar(row, **_kl(row, name)) for row in report.rows]
            drawn.append(figure(f"{name}: perplexity", charts.intervals(ppl, "perplexity")))
            drawn.append(
                figure(f"{name}: divergence from the original", charts.intervals(kl, "KL divergence, nats", log=True))
            )
    return f'{listed}<p class="note">{escape(report.protocol)}</p>{panels(drawn, "two")}'


def _ppl(row: Row, name: str) -> dict[str, Any]:
    value = row.texts[name]["pruned"]
    return {"value": value["ppl"], "error": value["ppl_err"], "words": with_error(value["ppl"], value["ppl_err"])}


def _kl(row: Row, name: str) -> dict[str, Any]:
    kld = row.texts[name]["kld"]
    return {"value": kld["mean"], "error": kld["err"], "words": f"{kld['mean']:.5f} ± {kld['err']:.5f}"}


def _bar(row: Row, value: float, error: float, words: str) -> charts.Bar:
    kind = "quantized" if row.method == "none" else "pruned"
    return charts.Bar(row.label, value, value - error, value + error, words, kind)


def spread(report: Report) -> str:
    """The histogram of each text: the first row's, and the first unpruned one's beside it."""
    main = report.main
    rows = [main, *(row for row in report.rows if row.method == "none" and row is not main)][:2] if main else []
    drawn = []
    for name in report.base:
        series = [
            (row.label, row.texts[name]["kld"], "quantized" if row.method == "none" else "pruned")
            for row in rows if row.texts[name]["kld"].get("histogram")
        ]  # fmt: skip
        if series:
            quantiles = "".join(
                f"<li>{escape(label)}: median {short(kld['median'])}, 99 % below {short(kld['p99'])}, "
                f"most {short(kld['max'])}</li>"
                for label, kld, _ in series
            )
            body = charts.token_histogram(series, f"Divergence at single tokens of {name}")
            drawn.append(figure(name, body, f'<ul class="plain note">{quantiles}</ul>'))
    if not drawn:
        return ""
    legend = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark(7, 7, "square", f"mark {kind}")}</svg>{escape(row.label)}</li>'
        for row in rows
        for kind in (["quantized"] if row.method == "none" else ["pruned"])
    )
    return (
        '<p class="note">How much the distribution over the next token differs from the original\'s, token by token. What lies '
        "beyond the ends of the scale is counted in its outermost bins; the dashed lines are means.</p>"
        f'<ul class="legend">{legend}</ul>{panels(drawn)}'
    )


def speed(report: Report) -> str:
    """Tokens per second and memory of each model, measured side by side."""
    facts = report.facts.get("speed")
    if not facts:
        return ""
    if "error" in facts:
        return f"<p>Not measured: {escape(facts['error'])}</p>"
    models = facts["models"]
    skipped = "".join(f"<li>{escape(line)}</li>" for line in report.untried)
    listed = f'<ul class="plain">{skipped}</ul>' if skipped else ""
    if not models:
        return listed
    kinds = [
        "base" if m["label"] == "original" else "quantized" if m["label"].startswith("unpruned") else "pruned"
        for m in models
    ]
    drawn = []
    for key, title, n in (
        ("prompt", "Reading a prompt", facts["prompt_tokens"]), ("generate", "Writing", facts["generated_tokens"]),
    ):  # fmt: skip
        bars = [
            charts.Bar(m["label"], m[key]["median"], m[key]["low"], m[key]["high"], _rate(m[key]), kind)
            for m, kind in zip(models, kinds, strict=True)
        ]
        drawn.append(figure(f"{title}, tokens/s", charts.lengths(bars, f"{title}, {n} tokens"), f"{n} tokens"))
    memory = [
        charts.Bar(m["label"], m["memory"], m["memory"], m["memory"], megabytes(m["memory"]), kind)
        for m, kind in zip(models, kinds, strict=True) if m.get("memory")
    ]  # fmt: skip
    if memory:
        drawn.append(figure("Memory", charts.lengths(memory, "Memory"), "most that the process held, weights read in"))
    turns = "all loaded and asked in turns" if facts["in_turns"] else "one after the other, which memory asked for"
    rounds = min([m["rounds"] for m in models] or [0])
    words = (
        f"Measured here on {facts['threads']} threads, backend {facts['backend']}: {turns}, medians of {rounds} rounds after one "
        "that is not counted; the thin lines reach from the slowest to the fastest. A few per cent between equal files are "
        "chance."
    )
    if any(m[kind]["high"] > WIDE * m[kind]["low"] for m in models for kind in ("prompt", "generate")):
        words += " The rounds differ widely: the machine had other work, so the medians say little."
    return f'<p class="note">{escape(words)}</p>{panels(drawn)}{listed}'


def _reach(values: dict[str, float]) -> str:
    return f"{_rates(values['low'])} to {_rates(values['high'])}"


def _rate(values: dict[str, float]) -> str:
    return _rates(values["median"])


def _rates(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def completions(report: Report) -> str:
    """What each model writes after the same prompts."""
    facts = report.facts.get("completions")
    if not facts:
        return ""
    cards, compared = [], True
    for prompt in facts["prompts"]:
        original = next((answer["text"] for answer in prompt["answers"] if answer["label"] == "original"), None)
        compared = compared and original is not None
        answers = "".join(
            f'<div><h3>{escape(answer["label"])}</h3><p class="note">{escape(_agreement(answer, original))}</p>'
            f"<pre>{_answer(answer['text'], original)}</pre></div>"
            for answer in prompt["answers"]
        )
        left_out = prompt.get("left_out", 0)
        cut = f'<p class="note">Too long here: the first {left_out:,} tokens were left out.</p>' if left_out else ""
        cards.append(
            f'<div class="card"><h3>{escape(prompt["name"])}</h3><pre class="prompt">{escape(prompt["prompt"])}</pre>'
            f'{cut}<div class="answers">{answers}</div></div>'
        )
    marked = (
        "Marked is what is the same as the original's from the start. One changed token changes all that follows, so this shows"
        if compared
        else "The original was not run, so nothing is marked. This shows"
    )
    words = (
        f"The likeliest token each time, {facts['n_tokens']} at most; prompts are {facts['how']}. {marked} what models are "
        "like, not how good they are."
    )
    return f'<p class="note">{escape(words)}</p>{"".join(cards)}'


def _agreement(answer: dict[str, Any], original: str | None) -> str:
    ended = {"end": ", ended by itself", "time": ", stopped when its time was over"}.get(answer["stopped"], "")
    if answer["label"] == "original" or original is None:
        return f"{answer['tokens']} tokens{ended}"
    return f"{answer['tokens']} tokens{ended}; the first {answer['same']} as the original's"


def _answer(text: str, original: str | None) -> str:
    if original is None:
        return escape(text)
    same = next(
        (i for i, (a, b) in enumerate(zip(text, original, strict=False)) if a != b), min(len(text), len(original))
    )
    head, rest = text[:same], text[same:]
    return (f"<mark>{escape(head)}</mark>" if head and text != original else escape(head)) + escape(rest)


def candidates(report: Report) -> str:
    """What was weighed by which budget."""
    if not report.candidates and not report.budget:
        return ""
    budget = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in (report.budget or {}).items())
    head, rows = report.weighed()
    chosen = next((i for i, item in enumerate(report.candidates) if item.chosen), None)
    listed = table(head, rows, left=(0, len(head) - 1), wrap=(len(head) - 1,), main=chosen) if rows else ""
    return (f'<ul class="plain">{budget}</ul>' if budget else "") + listed


def notes(report: Report) -> str:
    """What a reader must know."""
    return (
        "".join(['<ul class="plain">', *(f"<li>{escape(n)}</li>" for n in report.notes), "</ul>"])
        if report.notes
        else ""
    )


def reproduce(report: Report) -> str:
    """The command, what it ran on, and the hash of every file."""
    facts = report.facts.get("provenance")
    if not facts:
        return ""
    command = f'<div class="card"><pre>{escape(facts["command"])}</pre></div>' if facts.get("command") else ""
    where = "".join(
        f'<tr><td class="l">{escape(k)}</td><td class="l wrap">{escape(v)}</td></tr>'
        for k, v in facts["environment"].items()
    )
    rows = [[f["role"], f["name"], f"{f['bytes']:,}", f["sha256"] or "not hashed"] for f in facts["files"]]
    files = table(["", "file", "bytes", "sha256"], rows, left=(0, 1, 3), mono=(3,)) if rows else ""
    if len(rows) > FILES_SHOWN:
        files = details(f"{len(rows)} files and their hashes", files)
    patches = "".join(
        f"<li><code>{escape(p['sha256'])}</code> {escape(p['name'])}</li>" for p in facts.get("patches", ())
    )
    more = details("The patches of llama.cpp and their sha256", f'<ul class="plain">{patches}</ul>') if patches else ""
    places = f'<div class="scroll" tabindex="0" role="region" aria-label="Environment"><table>{where}</table></div>'
    return f"{command}{places}{files}{more}"


def _texts(report: Report) -> Iterable[str]:
    return dict.fromkeys([*report.base, *(name for item in report.candidates for name in item.texts)])
