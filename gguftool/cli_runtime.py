"""The commands around the patched llama.cpp: build it, look at it, check it on this machine, run models with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .cli_options import AT_LEAST_ONE, backend_option, make_terminal, output_options
from .cli_types import FILE
from .errors import GgufToolError

# Everything behind MODEL goes to the program as it is, --help too.
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": ["-h", "--help"]}


@click.group()
def runtime() -> None:
    """The patched llama.cpp that runs tiered files."""


@runtime.command("build")
@backend_option
@click.option(
    "--cmake", "cmake", metavar="-DNAME=VALUE", multiple=True, help="A further option of cmake; may be repeated."
)
@click.option("--unpatched", is_flag=True, help="Build the plain base, for comparisons.")
@click.option("--jobs", type=AT_LEAST_ONE, help="Compile so many files at a time.")
@click.option("--force", is_flag=True, help="Build even where it has been built.")
@output_options
def runtime_build(
    backend: str, cmake: tuple[str, ...], unpatched: bool, jobs: int | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Fetch the pinned llama.cpp, patch it, build it, cache it.

    auto is metal on Apple silicon, cuda where nvcc and an NVIDIA GPU are, else cpu.
    """
    from .runtime import build

    terminal = make_terminal(as_json, quiet)
    with terminal.progress() as progress:
        built = build(
            backend, patched=not unpatched, force=force, jobs=jobs, cmake=cmake, progress=progress, say=terminal.say
        )
    terminal.show({"path": str(built.path), "backend": built.backend, "patches": built.patches}, f"{built.path}")


@runtime.command("info")
@backend_option
@output_options
def runtime_info(backend: str, as_json: bool, quiet: bool) -> None:
    """Say which base, which patches, which backends, and whether what is loaded is ours."""
    from .runtime import describe, not_built

    terminal = make_terminal(as_json, quiet)
    facts = describe(backend)
    terminal.show(facts, *(f"{key + ':':<14}{_plain(value)}" for key, value in facts.items()))
    if not facts["built"]:
        terminal.say(str(not_built(backend)))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@runtime.command("selftest")
@backend_option
@click.option("--full", is_flag=True, help="Every case of the stock operations, for minutes, instead of a sample.")
@output_options
def runtime_selftest(backend: str, full: bool, as_json: bool, quiet: bool) -> None:
    """Check that every device of this machine computes tiered files rightly: operations, then whole models.

    Without --backend on all that has been built. About a minute for the CPU.
    """
    from .doctor import note_selftest
    from .runtime_report import selftest_table
    from .selftest import selftest

    terminal = make_terminal(as_json, quiet)
    with terminal.progress() as progress:
        checks = selftest(backend, full=full, progress=progress)
    note_selftest((check.backend, check.ok) for check in checks)
    failed = sum(not check.ok for check in checks)
    terminal.show(
        {"ok": not failed, "checks": [check.as_dict() for check in checks]},
        selftest_table([check.as_dict() for check in checks]),
    )
    if failed:
        raise GgufToolError(f"{failed} of {len(checks)} checks failed")


@click.command(context_settings=_PASSED_ON)
@backend_option
@click.argument("model", type=FILE)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[LLAMA-CLI ARGUMENTS]...")
def run(backend: str, model: Path, arguments: tuple[str, ...]) -> None:
    """Chat with a model in the terminal: llama-cli of the patched llama.cpp. All behind MODEL goes to it."""
    from .launch import launch

    sys.exit(launch("llama-cli", model, arguments, backend))


@click.command(context_settings=_PASSED_ON)
@backend_option
@click.argument("model", type=FILE)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[LLAMA-SERVER ARGUMENTS]...")
def serve(backend: str, model: Path, arguments: tuple[str, ...]) -> None:
    """Serve a model over HTTP, as OpenAI's API: llama-server of the patched llama.cpp. All behind MODEL goes to it."""
    from .launch import launch

    sys.exit(launch("llama-server", model, arguments, backend))
