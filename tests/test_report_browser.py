"""The report in a real browser: light and dark, wide and as narrow as a phone, without network.

It needs Chromium or Chrome (scripts/test installs Debian's where it may), or GGUFTOOL_BROWSER names the program.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import browser
from gguftool.report import Status
from gguftool.report_files import publish
from reports import EVIL, make_report

REPORTS = {
    "small": make_report(candidates=3),
    "large": make_report(n_rows=36, n_layer=48, n_expert=128),
    "hostile": make_report(evil=EVIL + "x" * 200, candidates=2),
    "failed": replace(
        make_report(), rows=[], base={}, status=Status("failed", "plan.json", f"no room{EVIL}", "t", "t")
    ),
}
# Luminance of a colour as WCAG 2 has it, and the contrast of two.
COLOURS = """
const parts = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
const linear = v => v <= 10.314 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
const brighter = (x, y) => (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
const contrast = (a, b) => brighter(luminance(a), luminance(b));
"""
# The text of every element against what lies behind it: 4.5 is enough.
CONTRAST = (
    "(() => {"
    + COLOURS
    + """
  const behind = e => {
    for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c; }
    return [255, 255, 255];
  };
  const poor = []; let seen = 0;
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["title", "style"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const ratio = contrast(parts(e.tagName === "text" ? style.fill : style.color), behind(e)); seen += 1;
    if (ratio < 4.5) poor.push([e.tagName, e.className.baseVal ?? e.className, e.textContent.slice(0, 30), ratio]);
  }
  return {seen, poor: poor.slice(0, 5)};
})()"""
)
# Marks that carry meaning against the panel that they lie on: 3 is enough.
MARKS = (
    "(() => {"
    + COLOURS
    + """
  const probe = document.createElement("span"); document.body.append(probe);
  const value = name => { probe.style.color = `var(${name})`; return parts(getComputedStyle(probe).color); };
  const names = ["--c-base", "--c-pruned", "--c-quantized", "--c-candidate", "--c-chosen", "--s8", "--soft"];
  const poor = names.filter(name => contrast(value(name), value("--surface")) < 3);
  probe.remove();
  return poor;
})()"""
)
# Letters of charts that stick out of their drawing, and numbers that lie over each other.
OUTSIDE = """
[...document.querySelectorAll("figure svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(t => { const b = t.getBoundingClientRect();
    return b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1 || b.bottom > frame.bottom + 1; })
    .map(t => t.textContent);
})
"""


@pytest.fixture(scope="module")
def page():
    program = browser.find()
    if program is None:
        pytest.fail(
            "no Chromium or Chrome was found: install one (Debian: chromium) or set GGUFTOOL_BROWSER to its program"
        )
    with browser.Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, report in REPORTS.items():
        found[name] = tmp_path_factory.mktemp(name)
        publish(report, found[name])
    return found


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (360, False), (360, True)])
def test_the_page_looks_right(page, folders, name, width, dark, tmp_path):
    path = folders[name] / "report.html"
    page.open(path, width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.requests() == [path.as_uri()] and page.complaints() == []
    assert page.run("document.documentElement.scrollWidth") <= page.run("document.documentElement.clientWidth") == width
    assert page.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(17, 19, 22)" if dark else "rgb(246, 246, 243)"
    )
    found = page.run(CONTRAST)
    assert found["poor"] == [] and found["seen"] > 40
    assert page.run(MARKS) == [] and page.run(OUTSIDE) == []
    # Letters that a person can read, at any width.
    assert (
        page.run(
            "Math.min(...[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width / 340))"
        )
        > 0.8
    )
    drawings = page.run("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert len(drawings) >= {"small": 16, "large": 8, "hostile": 16, "failed": 9}[name] and min(drawings) > 30
    unnamed = "[...document.querySelectorAll('figure svg')].filter(s => !s.getAttribute('aria-label')).length"
    assert page.run(unnamed) == 0
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_what_the_page_may_not_do_the_browser_refuses(page, folders, tmp_path):
    """The page's own policy: were something hostile to get in, it would neither run nor ask for anything."""
    text = (folders["small"] / "report.html").read_text()
    path = tmp_path / "report.html"
    path.write_text(
        text.replace("</main>", '<script>document.title = "run"</script><img src="http://127.0.0.1:9/x.png"></main>')
    )
    page.open(path)
    assert page.run("document.title") != "run" and page.complaints()
    refused = [e["params"].get("blockedReason") for e in page.events if e["method"] == "Network.loadingFailed"]
    assert refused == ["csp"] and page.requests()[1:] == ["http://127.0.0.1:9/x.png"]


def test_a_failure_is_the_first_thing_that_is_seen(page, folders):
    page.open(folders["failed"] / "report.html", width=360)
    box = "document.querySelector('[role=status]').getBoundingClientRect()"
    assert page.run(f"{box}.top") < 300 and page.run("document.querySelector('[role=status]').innerText").startswith(
        "Failed at"
    )
