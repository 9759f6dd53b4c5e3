"""The command line: its commands in one group, errors as exit codes.

The commands are in cli_*. Each parses, calls, prints; what it calls is imported inside it, so that --help is quick.
"""

from __future__ import annotations

import os
import sys

import click

from . import (
    __version__,
    cli_bench,
    cli_calibrate,
    cli_compress,
    cli_doctor,
    cli_fit,
    cli_gguf,
    cli_plan,
    cli_recipes,
    cli_refit,
    cli_report,
    cli_runtime,
    cli_sensitivity,
    cli_stats,
    cli_sweep,
    cli_validate,
)
from .cli_examples import add_examples
from .errors import GgufToolError
from .printable import one_line
from .processes import process_count, process_rank


def main() -> None:
    """Runs the command line. A stated failure is one line on stderr and exit code 1; wrong usage is exit code 2."""
    sys.exit(run())


def run() -> int:
    """The exit code of the command line: 0 done, 1 a stated failure, 2 wrong usage, 130 stopped with Ctrl-C."""
    try:
        cli.main(prog_name="gguftool", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\nstopped; calibrate, refit, compress, fit, sensitivity, sweep and demo go on from here when they are started again",
            err=True,
        )
        return 130
    except GgufToolError as error:
        return _fail(str(error))
    except (OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except Exception as error:
        if os.environ.get("GGUFTOOL_TRACEBACK"):
            raise
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())} (GGUFTOOL_TRACEBACK=1 shows where)")
    return 0


def _fail(text: str) -> int:
    if process_rank():
        return 1  # the first of several processes speaks for all
    click.echo(f"error: {one_line(text)}", err=True)
    return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gguftool")
@click.pass_context
def cli(context: click.Context) -> None:
    """Makes Mixture-of-Experts models fit: stats -> plan -> gguf, then the report of what it cost.

    `gguftool demo` does all of it on the built-in model; `gguftool compress` on yours.
    """
    if process_count() > 1 and context.invoked_subcommand != "calibrate":
        raise GgufToolError(
            f"{context.invoked_subcommand} was started {process_count()} times by torchrun; only calibrate shares its work "
            "among processes, start everything else once"
        )


for _command in (
    cli_compress.compress, cli_fit.fit, cli_recipes.recipes, cli_recipes.verify, cli_report.report, cli_compress.demo,
    cli_gguf.convert, cli_calibrate.calibrate, cli_stats.stats, cli_plan.architectures, cli_plan.methods, cli_plan.plan,
    cli_refit.refit, cli_refit.dern,
    cli_gguf.prune, cli_gguf.expand, cli_gguf.quantize, cli_gguf.inspect, cli_validate.validate,
    cli_sensitivity.sensitivity, cli_sweep.sweep,
    cli_runtime.runtime, cli_runtime.run, cli_runtime.serve, cli_bench.bench,
    cli_doctor.doctor, cli_doctor.completion,
):  # fmt: skip
    cli.add_command(_command)
add_examples(cli)
