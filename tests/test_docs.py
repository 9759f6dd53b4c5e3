"""The documentation: every command in it is run and prints what its page says; its facts are the code's; no link is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import docfacts
from docbuild import Book
from docpages import ROOT, Command, Differs, Runner, blocks, pages, same, screen, starts_in
from gguftool import cut, demo
from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.methods import METHODS, method
from synthetic import make_plan

DOCS = ROOT / "docs"
README = ROOT / "README.md"
NAMES = {str(page.relative_to(DOCS)): page for page in pages()}
CONSOLE = [name for name, page in NAMES.items() if any(block.language == "console" for block in blocks(page))]
# What no test runs, and why.
NOT_RUN = {
    ("tutorial.md", "scripts/test has done it when the tests run"): 1,
    ("tutorial.md", "needs a hub"): 2,
    ("patches.md", "needs the network"): 1,
    ("patches.md", "needs a newer source distribution and compiles for minutes"): 1,
}


@pytest.fixture(scope="module")
def book(tmp_path_factory, runtime) -> Book:
    return Book(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("name", sorted(CONSOLE, key=lambda name: starts_in(NAMES[name]) != ""))
def test_commands_print_what_the_page_says(name, book):
    """In order, in one folder for each page. `scripts/docs --update PAGE` writes what they print now."""
    differs = book.run(NAMES[name])
    assert not differs, "\n\n".join(differs)


def test_what_is_not_run_is_known():
    found: dict[tuple[str, str], int] = {}
    for name, page in NAMES.items():
        for block in blocks(page):
            if "not run" in block.says:
                key = (name, block.says["not run"])
                found[key] = found.get(key, 0) + 1
    assert found == NOT_RUN


def test_the_readmes_session_is_the_tutorials():
    told = {command.line: command.printed for command in commands_of(DOCS / "tutorial.md")}
    session = list(commands_of(README))
    assert len(session) >= 5
    for command in session:
        assert told.get(command.line) == command.printed, command.line


def commands_of(page: Path):
    for block in blocks(page):
        if block.language == "console":
            yield from block.commands()


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{name} ") if isinstance(command, click.Group) else {prefix + name: command}
    return found


def unknown(text: str) -> list[str]:
    """Commands and options in `text`, as `gguftool NAME --option …` in blocks and in backticks, that there are not."""
    known = commands(cli)
    wrong = []
    spans = [
        line for block in re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    spans += re.findall(r"`(gguftool [^`]+)`", text)
    for span in spans:
        for call in re.findall(r"gguftool ((?:[a-z]+ )*[a-z]+)([^#|`\n]*)", span):
            words = call[0].split()
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
            if name is None:
                wrong += [] if words[0] in cli.commands or call[0].startswith("methods") else [call[0]]
            elif name not in ("run", "serve"):
                options = {o for param in known[name].params for o in (*param.opts, *param.secondary_opts)}
                wrong += [
                    f"{name} {o}" for o in re.findall(r"(?<!\S)--[a-z-]+", call[1]) if o not in options | {"--help"}
                ]
    return wrong


@pytest.mark.parametrize("page", [*NAMES.values(), README], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_that_a_page_names_exist(page):
    assert unknown(page.read_text(encoding="utf-8")) == []


def test_unknown_commands_and_options_are_found():
    assert unknown("`gguftool prunee x` and `gguftool prune x --plann y`") == ["prunee x", "prune --plann"]
    assert unknown("```\n$ gguftool plan s -o p --ratios 1\n```") == ["plan --ratios"]


# --- Facts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_generated_is_what_the_code_has(name):
    assert not docfacts.stale(NAMES[name]), "run scripts/docs"


def test_what_is_generated_is_renewed():
    text = "a\n<!-- generated: method man -->\nold\n<!-- end -->\nb"
    new = docfacts.renewed(text)
    assert "\nold" not in new and r"`mean \|\|f\|\|`" in new and new.startswith("a\n") and new.endswith("\nb")
    assert docfacts.renewed(new) == new
    short = docfacts.renewed("<!-- generated: methods -->\n<!-- end -->\n")
    assert short.count("<!-- end -->") == 1 and short.endswith(
        "(random-slices.md) | control: one budget of slices at random | control | tiered |\n\n<!-- end -->\n"
    )


def test_everything_that_can_be_generated_stands_somewhere():
    text = "\n".join(page.read_text(encoding="utf-8") for page in NAMES.values())
    assert set(re.findall(r"^<!-- generated: (\w+)", text, re.MULTILINE)) == set(docfacts.KINDS)
    assert text.count("<!-- generated: ") == text.count("<!-- end -->")


def test_every_method_has_a_page_that_plans_by_it():
    for name in METHODS:
        text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- generated: method {name} -->" in text and f"<!-- generated: figures {name} -->" in text
        assert re.search(rf"^\$ gguftool plan .*--method {re.escape(name)} ", text, re.MULTILINE), name
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == {*METHODS, "index"}


def test_the_readmes_table_of_methods_is_the_codes():
    table = README.read_text(encoding="utf-8").partition("| name | what goes | by | source | layout |")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in table.partition("\n\n")[0].splitlines()[2:]]
    told = {row[0].removeprefix("such as ").strip("`"): (row[3], row[4]) for row in rows}
    words = {"gguftool": "ours", "control": ""}
    code = {name: method(name.removesuffix("+refit")) for name in (*METHODS, "global+refit", "1,0,2")}
    assert told == {
        name: (words.get(one.source, one.source), "stock" if one.stock else "tiered") for name, one in code.items()
    }
    assert len(told) == len(rows)


def test_options_of_a_method_are_found_by_trying():
    assert docfacts.takes(METHODS["man"]) == ["--criterion"]
    assert docfacts.takes(METHODS["global"]) == ["--criterion", "--relative", "--cut-router", "--layers"]
    assert docfacts.takes(METHODS["random"]) == []
    assert docfacts.takes(METHODS["family"]) == ["--calibration"]
    assert {"--whole", "--schedule", "--depth", "--mix", "--layers"} < set(docfacts.takes(METHODS["tenp"]))


def test_figures_are_those_of_the_tables():
    built_in, larger = docfacts.results()
    assert len(built_in) >= 30 and set(larger) >= {"auto", "global", "global+refit", "random", "tenp"}
    row = built_in["tenp 25 %"]
    assert f"| 25 % gone | {row[1]} | {row[3]} | {row[5]} |" in docfacts._figures("tenp")


def test_the_specification_has_every_key_with_its_type():
    text = (DOCS / "format.md").read_text(encoding="utf-8")
    plan = make_plan([[32, 16], [16, 16]], 32, 1)
    types = {name: entry.type.name for name, entry in cut.entries(plan, "tiered").items()}
    types |= {f"{cut.KEY}weights": "STRING", f"{cut.KEY}dataset.names": "ARRAY", f"{cut.KEY}dataset.tokens": "ARRAY"}
    for name, kind in types.items():
        stated = re.search(rf"^\| `{re.escape(name)}` \| (\w+)( array)? \|", text, re.MULTILINE)
        assert stated, name
        assert "ARRAY" if stated[2] else stated[1] == kind, name
    assert set(re.findall(r"^\| `(gguftool\.[\w.]+)`", text, re.MULTILINE)) == set(types)
    assert f"Version {cut.FILE_VERSION} " in text


# --- Links --------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """A page's headings as links name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(page: Path) -> list[str]:
    """Links to files or headings that there are not."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page if not path else page.parent / path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", [*NAMES.values(), README, ROOT / "patches" / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One head, two\n[a](#one-head-two) [b](#no) [c](no.md) [d](page.md#one-head-two) [e](https://x.y)\n"
    )
    assert broken(page) == ["#no", "no.md"]


def test_every_page_can_be_reached():
    seen, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop().resolve()
        if page in seen or not page.is_relative_to(DOCS):
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        todo += [page.parent / link for link in links if "://" not in link]
    assert seen == set(NAMES.values())


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, tmp_path / "html"]
    done = subprocess.run([*command, "-d", tmp_path / "trees"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (tmp_path / "html" / "methods").glob("*.html")} == {*METHODS, "index"}


# --- How pages are run --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_page(tmp_path, tmp_path_factory, monkeypatch):
    """What differs in a page of this text."""
    monkeypatch.setattr("docpages.ROOT", tmp_path)

    def run(text: str, update: bool = False) -> list[str] | str:
        page = tmp_path / "page.md"
        page.write_text(text, encoding="utf-8")
        differs = Book(tmp_path_factory.mktemp("book")).run(page, update)
        return page.read_text(encoding="utf-8") if update else differs

    return run


def console(*lines: str, says: str = "") -> str:
    return "\n".join([says, "```console", *lines, "```", ""])


def test_what_differs_is_found(run_page):
    assert run_page(console("$ echo one", "one", "$ echo two >&2", "two")) == []
    assert "page.md:2: echo one" in run_page(console("$ echo one", "on"))[0]
    assert run_page(console("$ echo one"))
    assert run_page(console("$ echo one", "one", "more"))
    assert run_page(console("$ printf 'one\\ntwo\\n'", "one"))
    assert run_page(console("$ printf 'a\\nb\\nc\\n'", "a", "…", "c")) == []
    assert run_page(console("$ printf 'a\\nb\\nd\\n'", "a", "…", "c"))
    assert run_page(console("$ echo took 3 s", "took … s")) == []
    assert run_page(console("$ echo took 3 m", "took … s"))


def test_a_command_fails_where_the_page_says_so(run_page):
    assert "exit status 3" in run_page(console("$ exit 3"))[0]
    assert run_page(console("$ echo a; exit 3", "a", says="<!-- fails -->")) == []
    assert run_page(console("$ echo a", "a", "$ exit 3", says="<!-- fails -->")) == []
    assert run_page(console("$ echo a", "a", says="<!-- fails -->"))
    assert run_page(console("$ exit 3", "$ echo a", "a", says="<!-- fails -->"))


def test_numbers_may_differ_by_what_is_stated(run_page):
    says = "<!-- numbers: within 3 % -->"
    assert run_page(console("$ echo '│ 10.2 ± 1,000 │'", "│ 10.0 ± 1,010 │", says=says)) == []
    assert run_page(console("$ echo '│ 10.4 ± 1,000 │'", "│ 10.0 ± 1,010 │", says=says))
    assert run_page(console("$ echo '│ 10.0 + 1,000 │'", "│ 10.0 ± 1,000 │", says=says))
    assert run_page(console("$ echo 10.2", "10.0"))


def test_blocks_share_a_folder_and_files_are_saved(run_page):
    text = (
        "<!-- file: a.txt -->\n```text\nsaved\n```\n" + console("$ cat a.txt > b.txt") + console("$ cat b.txt", "saved")
    )
    assert run_page(text) == []
    assert run_page("<!-- not run: because -->\n" + console("$ exit 3").lstrip()) == []


def test_update_writes_what_is_printed(run_page):
    page = console("$ echo one \\", "    two", "$ echo 3 s", "… s") + "text\n" + console("$ echo three", "old", "older")
    assert run_page(page, update=True) == page.replace("$ echo 3 s", "one two\n$ echo 3 s").replace(
        "old\nolder", "three"
    )


def test_a_chat_is_compared_by_its_turns():
    says = {"answers vary": ""}
    page = ["> hello", "some text", "", "[ Prompt: 1 t/s | Generation: 2 t/s ]", "", "> /exit"]
    assert same(page, ["banner", "> hello", "other text", "[ Prompt: 9 t/s | Generation: 9 t/s ]", "> /exit"], says)
    assert not same(page, ["banner", "> hello", "", "[ Prompt: 9 t/s | Generation: 9 t/s ]", "> /exit"], says)
    assert not same(page, ["banner", "> hello", "error"], says)
    assert not same(["> hello", "> /exit"], ["> hello", "other text", "[ Prompt: 9 t/s | Generation: 9 t/s ]"], says)


def test_what_stays_on_the_screen():
    assert screen("\x1b[1mbold\x1b[0m\n  3/10 layer 1\nold\rnew\n|\x08-\x08end  \n\n") == ["bold", "new", "end"]


def test_a_page_without_a_command_first_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("docpages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text("```console\nno command\n```\n")
    with pytest.raises(Differs, match="stands before any command"):
        next(blocks(tmp_path / "page.md")).commands()


def test_chat_lines_are_typed(tmp_path):
    runner = Runner(tmp_path, tmp_path / "tools")
    assert runner.run(Command(["$ cat"], ["> hello", "> /exit"])) == ["hello", "/exit"]


# --- The model that the tutorial starts from ----------------------------------------------------------------------------


def test_the_demo_has_as_many_methods_as_is_said():
    count = {9: "nine", 10: "ten", 11: "eleven"}[len({*demo.METHODS, demo.SHOWN[0]})]
    for text in (README.read_text(encoding="utf-8"), cli.commands["demo"].help):
        assert f"the built-in model by {count} methods" in text


def test_demo_unpack_writes_the_model_and_its_texts(tmp_path):
    written = demo.unpack(tmp_path)
    assert [path.name for path in written] == [
        "Builtin-7M", "calib_code.txt", "eval_code.txt", "calib_prose.txt", "eval_prose.txt"
    ]  # fmt: skip
    assert (tmp_path / "Builtin-7M" / "config.json").is_file()
    assert written[1].read_bytes() == demo.builtin.texts()["calib_code"].read_bytes()
    assert demo.unpack(tmp_path) == written
    written[2].write_text("mine")
    with pytest.raises(GgufToolError, match="is not the built-in text"):
        demo.unpack(tmp_path)
    assert written[2].read_text() == "mine"
