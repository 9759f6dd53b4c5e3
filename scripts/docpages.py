"""Pages whose commands are run: reads the blocks of a Markdown page, runs them, compares or renews what is printed.

A ```console block holds commands behind "$ " and what they leave on the screen. A page's blocks run in order in one folder.
Comments in the page say what is special:

  <!-- starts in: tutorial.md -->    the page goes on in (a copy of) the folder that another page left
  <!-- starts in: a clone -->        its folder is a clone of the repository; "a clone, with PAGE in FOLDER": and has in
                                     FOLDER what that page left; "a clone, with the source distribution": the pinned one
  <!-- not run: reason -->           the next block is not run here
  <!-- fails -->                     the last command of the next block ends with an error, every other one does not
  <!-- numbers: within 5 % -->       the next block's numbers may differ by so much; without it they are exact
  <!-- answers vary -->              the next block is a chat: what is typed counts, and that something is answered
  <!-- file: NAME -->                the next block is what the reader saves as NAME

In what is printed, … stands for anything on that line, and a line of … alone for any lines. Progress lines, which a terminal
wipes away, and warnings of Python are left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANY = "…"
CHAT_PROMPT = "> "
# What a page calls the folder that it is run in.
HOME = "/home/you/gguftool"
TIMEOUT = 600
_FENCE = re.compile(r"```(\w*)\s*$")
_COMMENT = re.compile(r"<!-- ([a-z ]+?)(?:: (.*?))? -->$")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_PROGRESS = re.compile(r"\s+\d+/\d+ .*")
_COPIED = ("gguftool", "patches", "scripts", "tests", "docs", "README.md", "pyproject.toml")


class Differs(Exception):
    """A block whose commands print something else than the page says; or that fails."""


@dataclass
class Command:
    """One command: its lines as they are typed, what is printed below."""

    typed: list[str]
    printed: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """What the shell gets."""
        return "\n".join(line[2:] for line in self.typed)


@dataclass
class Block:
    """A fenced block: where it stands (`start` and `end` are its first and behind its last line), what its comments say."""

    page: Path
    start: int
    language: str
    lines: list[str]
    says: dict[str, str]

    @property
    def end(self) -> int:
        return self.start + len(self.lines)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.start}"

    def commands(self) -> list[Command]:
        """The commands of a console block."""
        found: list[Command] = []
        goes_on = False
        for line in self.lines:
            if goes_on:
                found[-1].typed.append("  " + line)
            elif line.startswith("$ "):
                found.append(Command([line]))
            elif not found:
                raise Differs(f"{self.where}: {line!r} stands before any command")
            else:
                found[-1].printed.append(line)
                continue
            goes_on = line.endswith("\\")
        return found


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    says: dict[str, str] = {}
    lines, number = page.read_text(encoding="utf-8").splitlines(), 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if match := _FENCE.match(line):
            start = number
            while number < len(lines) and not lines[number].startswith("```"):
                number += 1
            yield Block(page, start, match[1], lines[start:number], says)
            number, says = number + 1, {}
        elif match := _COMMENT.match(line):
            says[match[1]] = match[2] or ""
        elif line:
            says = {}


def starts_in(page: Path) -> str:
    """The page whose folder this one goes on in, "a clone", or "" for an empty folder."""
    match = re.search(r"^<!-- starts in: (.*) -->$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else ""


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]


def make_clone(folder: Path) -> None:
    """What a fresh clone of the repository holds, as far as pages use it, as a repository of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", "_build", "*.pyc")
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copyfile(source, folder / name)
    git = ["git", "-c", "user.name=reader", "-c", "user.email=reader@example.invalid"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "clone"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True, capture_output=True)


class Runner:
    """Runs the blocks of one page in `folder`. `gguftool` and `python` are this checkout's, or the clone's where it is one.

    Args:
        tools: a folder for the two of them.
        environment: further variables.
    """

    def __init__(self, folder: Path, tools: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        source = folder if (folder / "gguftool" / "cli.py").is_file() else ROOT
        tools.mkdir(parents=True, exist_ok=True)
        for name, arguments in (("gguftool", "-m gguftool "), ("python", "")):
            script = tools / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
            script.chmod(0o755)
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        quiet = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "passive", "LC_ALL": "C.UTF-8"}
        self.environment = {**os.environ, **quiet, "PATH": path, "PYTHONPATH": str(source), **(environment or {})}
        self.environment.pop("COLUMNS", None)

    def check(self, block: Block) -> None:
        """Raises Differs where the block's commands print something else than the page says, or end otherwise."""
        for command, fails in endings(block):
            printed = self.run(command, fails)
            if not same(command.printed, printed, block.says):
                raise Differs(
                    "\n".join(
                        [f"{block.where}: {command.line}", "the page says:", *command.printed, "printed is:", *printed]
                    )
                )

    def renewed(self, block: Block) -> list[str]:
        """The block's lines with what its commands print now; where that is the same to the reader, as they were."""
        out: list[str] = []
        for command, fails in endings(block):
            printed = self.run(command, fails)
            keep = same(command.printed, printed, block.says)
            out += command.typed[:1] + [line[2:] for line in command.typed[1:]] + (command.printed if keep else printed)
        return out

    def run(self, command: Command, fails: bool = False) -> list[str]:
        """What stays on the screen. Raises Differs where the command fails and should not, or the other way round."""
        typed = [line[2:] for line in command.printed if line.startswith(CHAT_PROMPT)]
        done = subprocess.run(
            ["bash", "-c", command.line], cwd=self.folder, env=self.environment, input="".join(f"{t}\n" for t in typed),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", timeout=TIMEOUT,
        )  # fmt: skip
        printed = screen(done.stdout.replace(str(self.folder.resolve()), HOME))
        if (done.returncode != 0) != fails:
            raise Differs("\n".join([f"{command.line}: exit status {done.returncode}", *printed[-20:]]))
        return printed


def endings(block: Block) -> list[tuple[Command, bool]]:
    """A block's commands, and whether each ends with an error."""
    commands = block.commands()
    return [(command, "fails" in block.says and command is commands[-1]) for command in commands]


def screen(text: str) -> list[str]:
    """The lines that stay on a terminal: without colours, spinners, progress; without empty lines at the end."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    while "\x08" in text:
        text = re.sub(r"[^\n\x08]?\x08", "", text, count=1)
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    kept = [line for line in lines if not _PROGRESS.fullmatch(line)]
    while kept and not kept[-1]:
        kept.pop()
    return kept


def same(page: list[str], printed: list[str], says: dict[str, str]) -> bool:
    """Whether a reader sees what the page says."""
    page = page[: max((i + 1 for i, line in enumerate(page) if line), default=0)]
    if "answers vary" in says:
        return _same_chat(page, printed)
    if page and page[0] == ANY:
        return any(same(page[1:], printed[start:], says) for start in range(len(printed) + 1))
    if not page or not printed:
        return not page and not printed
    within = float(says["numbers"].removeprefix("within ").removesuffix(" %")) / 100 if "numbers" in says else 0.0
    return same_line(page[0], printed[0], within) and same(page[1:], printed[1:], says)


def same_line(page: str, printed: str, within: float) -> bool:
    """Whether two lines are the same but for …, and for numbers that differ by the share `within`."""
    if ANY in page:
        pattern = ".*".join(re.escape(part) for part in page.split(ANY))
        return re.fullmatch(pattern, printed) is not None
    if not within:
        return page == printed
    numbers = [_NUMBER.findall(line) for line in (page, printed)]
    shapes = [re.sub(r"[\s─━]+", " ", _NUMBER.sub("#", line)) for line in (page, printed)]
    if shapes[0] != shapes[1]:
        return False
    pairs = ((float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in zip(*numbers, strict=True))
    return all(abs(a - b) <= within * max(abs(a), abs(b)) for a, b in pairs)


def _same_chat(page: list[str], printed: list[str]) -> bool:
    """Every typed line is answered by something, on the page and here."""
    turns = [line for line in page if line.startswith(CHAT_PROMPT) and not line.startswith(CHAT_PROMPT + "/")]
    said = [re.split(r"^>.*$", "\n".join(lines), flags=re.MULTILINE)[1:] for lines in (page, printed)]
    answers = [[text for text in texts if "Generation:" in text] for texts in said]
    given = all(len(text.split("[ Prompt:")[0].strip()) > 3 for texts in answers for text in texts)
    return given and len(turns) == len(answers[0]) == len(answers[1])
