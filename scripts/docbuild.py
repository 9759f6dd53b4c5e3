"""Renews what pages take from the code and, where it is asked for, runs their commands. See scripts/docs."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import docfacts
from docpages import ROOT, Differs, Runner, blocks, make_clone, pages, starts_in
from gguftool import runtime_build


class Book:
    """The pages that are run, each once and in a folder of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.folders: dict[Path, Path] = {}
        self.differs: dict[Path, list[str]] = {}

    def run(self, page: Path, update: bool = False) -> list[str]:
        """Runs a page's blocks, once. What differs, as text; with `update` the page is written anew instead."""
        if page not in self.differs:
            self.differs[page] = self._run(page, update)
        return self.differs[page]

    def _run(self, page: Path, update: bool) -> list[str]:
        runner, differs = self._runner(page), []
        lines, shift = page.read_text(encoding="utf-8").splitlines(), 0
        for block in blocks(page):
            if "file" in block.says:
                (runner.folder / block.says["file"]).write_text("\n".join(block.lines) + "\n", encoding="utf-8")
            if block.language != "console" or "not run" in block.says:
                continue
            print(block.where, file=sys.stderr, flush=True)
            try:
                if update:
                    new = runner.renewed(block)
                    lines[block.start + shift : block.end + shift] = new
                    shift += len(new) - len(block.lines)
                else:
                    runner.check(block)
            except Differs as error:
                differs.append(str(error))
        if update:
            page.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return differs

    def _runner(self, page: Path) -> Runner:
        """The runner of a page, its folder as the page expects it; runs the page whose folder that is, if need be."""
        number = len(self.folders)
        folder = self.scratch / str(number) / page.stem
        self.folders[page] = folder
        before = starts_in(page)
        place, _, more = before.partition(", with ")
        if place == "a clone":
            make_clone(folder)
            if more == "the source distribution":
                sdist = runtime_build.fetch()
                os.symlink(sdist, folder / sdist.name)
            elif more:
                other, _, name = more.partition(" in ")
                self._left_by(page.parent / other, folder / name)
        elif before:
            self._left_by(page.parent / before, folder)
        else:
            folder.mkdir(parents=True)
        return Runner(folder, self.scratch / str(number) / "tools")

    def _left_by(self, other: Path, folder: Path) -> None:
        """Makes `folder` a copy of what the page `other` left. Of links, as nothing here changes a file in place."""
        self.run(other.resolve())
        shutil.copytree(self.folders[other.resolve()], folder, symlinks=True, copy_function=os.link)


def main() -> int:
    """1 where a command prints something else than its page says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run every command of every page and say what differs")
    parser.add_argument("--update", action="store_true", help="run them and write what they print into the pages")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="only these")
    args = parser.parse_args()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := docfacts.renewed(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: renewed from the code", file=sys.stderr)
    if not (args.run or args.update):
        return 0
    differs: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gguftool-docs-") as scratch:
        book, asked = Book(Path(scratch)), [page.resolve() for page in args.pages] or pages()
        # What other pages go on from comes first, so that it is renewed before they are.
        for page in sorted(asked, key=lambda page: starts_in(page) != ""):
            differs += book.run(page, update=args.update)
    print("\n\n".join(differs), file=sys.stderr)
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
