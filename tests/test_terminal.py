"""What is printed is what was given: nothing in a name means anything to the terminal, and a line stays one line."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

from rich.table import Table

import gguftool
from gguftool.recipe_file import loads
from gguftool.terminal import Terminal
from typed import typed

# rich's :key: is a picture, its [en] and [/] are styles, the last one of nothing: an error.
NAMES = "chat.jsonl:key:2000 wiki[en].txt [bold]x[/bold] [/]"


def test_lines_are_printed_as_they_are(capsys):
    terminal = Terminal()
    terminal.show({}, NAMES)
    terminal.say(NAMES)
    assert capsys.readouterr() == (f"{NAMES}\n", f"{NAMES}\n")


def test_strings_in_a_table_are_printed_as_they_are(capsys):
    table = Table(f"head {NAMES}", title=f"title {NAMES}", caption=f"caption {NAMES}")
    table.add_row(f"cell {NAMES}")
    Terminal().show({}, table)
    said = capsys.readouterr().out
    for where in ("head", "title", "caption", "cell"):
        assert f"{where} {NAMES}" in said, where


def test_a_recipe_that_is_printed_is_the_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text('data = ["chat.jsonl:key:2000", "wiki[en].txt"]\nratio = 0.4\n')
    said = typed("recipes", tmp_path / "mine.toml")
    assert said == (tmp_path / "mine.toml").read_text()
    (source, _) = loads(said, tmp_path).data
    assert (source.field, source.limit) == ("key", 2000)


def test_a_line_on_a_screen_is_not_broken(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("TERM", "dumb")
    line = "gguftool run " + "a/long/path " * 30 + "-c 8192"
    Terminal().show({}, line)
    assert sys.stdout.getvalue() == f"{line}\n"


def test_every_console_leaves_names_alone():
    calls = [
        (path.name, ast.unparse(node))
        for path in Path(gguftool.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Console")
    ]
    assert calls and all(name == "terminal.py" and "**plain" in call for name, call in calls), calls
