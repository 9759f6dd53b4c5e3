"""The commands about the installation: what is missing, and completion for the shell."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import make_terminal, output_options
from .cli_types import FILE
from .errors import GgufToolError


@click.command()
@click.option("--dir", "folder", type=FILE, help="Where outputs will go, for the disk.  [default: here]")
@output_options
def doctor(folder: Path | None, as_json: bool, quiet: bool) -> None:
    """Look at what this machine has, and print the command that mends what is missing. Changes nothing.

    Exits with 1 where something is missing without which gguftool does not work.
    """
    from .doctor import MISSING, examine
    from .runtime_report import doctor_table

    found = examine(folder)
    missing = [one for one in found if one.status == MISSING]
    facts = {"ok": not missing, "findings": [vars(one) for one in found]}
    make_terminal(as_json, quiet).show(facts, doctor_table(found))
    if missing:
        raise GgufToolError(f"{len(missing)} missing; first: {missing[0].mend}")


SHELLS = {
    "bash": 'eval "$(gguftool completion bash)"     # in ~/.bashrc',
    "zsh": 'eval "$(gguftool completion zsh)"     # in ~/.zshrc, behind compinit',
    "fish": "gguftool completion fish | source     # in ~/.config/fish/config.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print what a shell needs to complete commands, options and files of gguftool with the Tab key.

    Put this line where the shell reads it when it starts: eval "$(gguftool completion bash)" in ~/.bashrc, the same with
    zsh in ~/.zshrc (behind compinit), gguftool completion fish | source in ~/.config/fish/config.fish.
    """
    from click.shell_completion import get_completion_class

    commands = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(f"{kind(commands, {}, 'gguftool', '_GGUFTOOL_COMPLETE').source()}\n# {SHELLS[shell]}")
