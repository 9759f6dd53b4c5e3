"""The commands around recipe files: list and print those that are shipped, carry one out again and compare."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_options import make_terminal, output_options
from .cli_types import FILE
from .errors import GgufToolError

if TYPE_CHECKING:
    from .terminal import Terminal


@click.command()
@click.argument("name", required=False)
@output_options
def recipes(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the recipes that are shipped, or print one: a start for your own.

    A recipe is a TOML file with the options of `compress` as its keys; `compress --recipe NAME` takes it.
    """
    from .recipe_file import find, load, shipped, start

    terminal = make_terminal(as_json, quiet)
    if name is not None:
        text = start(name)
        terminal.show({"path": str(find(name)), "text": text}, *text.split("\n"))
        return
    found = {known: load(path).about for known, path in shipped().items()}
    facts = [{"name": known, "about": about, "path": str(shipped()[known])} for known, about in found.items()]
    terminal.show({"recipes": facts}, *(f"{known:<10}{about}" for known, about in found.items()))


@click.command()
@click.argument("folder", type=FILE)
@click.option("--fast", is_flag=True, help="Make nothing again: hash the files and read every GGUF.")
@click.option(
    "--scratch", type=FILE, help="Folder to make it in again.  [default: FOLDER.verify, removed where all is the same]"
)
@output_options
def verify(folder: Path, fast: bool, scratch: Path | None, as_json: bool, quiet: bool) -> None:
    """Carry out FOLDER's recipe.toml again and compare the sha256 of every file. Takes as long as `compress` did.

    Stopped, it goes on where it was. With --fast it finds files that were changed or damaged since they were made. A run that
    was not done, or is not at its end, is no success either.
    """
    from .verification import Verified, not_done, recheck

    if fast and scratch is not None:
        raise click.UsageError("--fast makes nothing again; leave --scratch out")
    terminal = make_terminal(as_json, quiet)
    was = Verified.load(folder)
    why = not_done(folder, was)
    if fast:
        with terminal.progress() as progress:
            found = recheck(folder, was, progress)
    else:
        found = _again(folder, scratch, terminal)
    facts = {"path": str(folder), "ok": not found and not why, "files": dict(was.files), "differences": found}
    how = "as they were made" if fast else "made again, byte for byte the same"
    terminal.show(facts | {"failures": why}, *([] if found else [f"{len(was.files)} files {how}"]))
    if found:
        count = f"{len(found)} difference{'s' if len(found) > 1 else ''}"
        raise GgufToolError(f"{folder}: {count}: {'; '.join(found)}")
    if why:
        raise GgufToolError(f"{folder}: the files are what was made, but that run was not done: {'; '.join(why)}")


def _again(folder: Path, scratch: Path | None, terminal: Terminal) -> list[str]:
    from .recipe_file import NAME, load
    from .runs import Ears, other_conditions, replay
    from .workspace import is_free

    whole = folder.resolve()  # "." and ".." have no name of their own
    place = scratch or whole.with_name(f"{whole.name}.verify")
    if scratch is None and not is_free(place):
        raise GgufToolError(f"{place} is there and no run of gguftool made it; name another with --scratch")
    with terminal.progress() as progress:
        found = replay(folder, place, Ears(progress, terminal.say))
    if not found and scratch is None:
        shutil.rmtree(place)
    if found:
        terminal.say(f"note: what was made again stays in {place}; the run's own command puts right what was damaged")
    made = load(folder / NAME).made
    for line in other_conditions(made) if found and made else ():
        terminal.say(f"note: {line}")
    return found
