"""What is printed is what was given: nothing in a name means anything to the terminal, and a line stays one line."""

from __future__ import annotations

import ast
import io
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from rich.table import Table
from rich.text import Text

import gguftool
from gguftool.gguf_file import KeyValue
from gguftool.live import View
from gguftool.printable import one_line, printable
from gguftool.recipe_file import loads
from gguftool.stats import Domain
from gguftool.terminal import PlainConsole, Terminal
from hostile import rebuild, tiny_gguf
from synthetic import make_stats
from typed import typed

# rich's :key: is a picture, its [en] and [/] are styles, the last one of nothing: an error.
NAMES = "chat.jsonl:key:2000 wiki[en].txt [bold]x[/bold] [/]"
# Sets a title, clears the screen, goes back to the start, colours, turns the line around, and adds a line that looks like ours.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\rname\x9b31m\u202egpj\nchecked: no fault found"


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
    assert calls and all(name == "terminal.py" and call.startswith("PlainConsole(") for name, call in calls), calls


def only_prints(said: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in said) and "\nchecked" not in said


def test_a_name_does_nothing_but_be_printed(capsys):
    terminal = Terminal()
    for kind in (str, Text):
        table = Table(title=kind(f"title {HOSTILE}"), caption=kind(f"caption {HOSTILE}"))
        table.add_column(kind(f"head {HOSTILE}"))
        table.add_row(kind(f"cell {HOSTILE}"))
        terminal.show({}, table)
        said = capsys.readouterr().out
        assert only_prints(said) and all(
            rf"{where} \x1b]0;owned" in said for where in ("head", "title", "caption", "cell")
        )
    terminal.show({}, HOSTILE)
    terminal.say(HOSTILE)
    with terminal.progress() as update:
        update(1, 2, HOSTILE)
    for said in capsys.readouterr():
        assert only_prints(said) and r"\x1b]0;owned\x07\x1b[2J\rname\x9b31m\u202egpj checked" in said


def test_nor_on_a_screen():
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=200)
    console.print(View(HOSTILE, None, ()), Text("styled", style="bold"))
    said = console.file.getvalue()
    assert r"\x1b]0;owned" in said and "\x1b]0" not in said and "\x1b[2J" not in said and "\u202e" not in said
    assert "\x1b[1mstyled" in said  # what we ask of the terminal ourselves still comes through


def test_letters_of_all_scripts_stay():
    names = "naïve 语言 可\u00a0a b \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e\u0648"
    assert printable(names) == names and printable("a\tb\nc") == "a\tb\nc" and one_line("a\tb\nc") == "a b c"
    assert printable("\x00\x7f\x85\u2028\ud800") == r"\x00\x7f\x85\u2028\ud800"
    assert one_line("x" * 9, 4) == "xxxx…"


@pytest.mark.parametrize("command", ["inspect", "stats show", "stats show --layer 0"])
def test_names_out_of_a_file(command, tmp_path):
    if command == "inspect":
        name = KeyValue(HOSTILE, gguf.GGUFValueType.STRING)
        path = rebuild(
            tiny_gguf(tmp_path / "sound.gguf"),
            tmp_path / "x.gguf",
            lambda entries, _: entries.update({"general.name": name}),
        )
    else:
        stats, path = make_stats(), tmp_path / "x.safetensors"
        replace(stats, model=replace(stats.model, name=HOSTILE), domains=(Domain(HOSTILE, "0" * 64, 400),)).save(path)
    said = typed(*command.split(), path)
    assert only_prints(said) and r"\x1b]0;owned\x07" in said
