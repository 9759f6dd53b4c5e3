"""The shape of the code: one direction of imports, documented commands, a quick --help."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gguftool import cli_types
from gguftool.cli import cli
from gguftool.cli_examples import EXAMPLES

PACKAGE = Path(__file__).parent.parent / "gguftool"

# A module imports only from rows above its own. Third parties are what a row may use besides the rows above it.
ROWS = [
    ({"errors", "printable", "processes", "strict_json"}, set()),
    ({"durable"}, set()),
    ({"architectures", "tensors"}, set()),
    ({"recipe", "stats"}, {"numpy", "safetensors"}),
    ({"parts"}, {"numpy"}),
    ({"sources"}, set()),
    ({"saliency", "plan", "tiers", "encoding"}, {"numpy"}),
    ({"recipe_file"}, set()),
    ({"schedules"}, {"numpy"}),
    ({"methods", "method_options", "layout", "overrides"}, {"numpy", "safetensors"}),
    ({"planner", "variants", "coverage", "routing"}, {"numpy"}),
    ({"sensitivity", "prediction"}, {"numpy"}),
    ({"gguf_header"}, {"numpy"}),
    ({"gguf_file", "builtin"}, {"numpy", "gguf", "torch", "safetensors"}),
    ({"chat"}, {"jinja2", "transformers"}),
    ({"documents"}, {"datasets"}),
    ({"experts", "stored"}, {"numpy", "torch"}),
    ({"checkpoint_config"}, {"huggingface_hub"}),
    ({"corpus", "checkpoint", "surgery", "cut", "requant", "router_fix", "windows"},
     {"numpy", "torch", "tokenizers", "safetensors", "transformers", "gguf", "jinja2"}),
    ({"obs"}, {"torch"}),
    ({"inventory", "loader", "recorders", "workdir", "random_model"},
     {"numpy", "torch", "transformers", "gguf", "safetensors"}),
    ({"ranks", "routes"}, {"numpy", "torch"}),
    ({"grams", "memory"}, {"torch"}),
    ({"refit_needs"}, {"torch"}),
    ({"random_checkpoint"}, {"numpy"}),
    ({"runtime_base"}, set()),
    ({"ggml_nodes"}, {"numpy"}),
    ({"devices", "toolchain", "optests"}, set()),
    ({"runtime_build"}, set()),
    ({"doctor"}, set()),
    ({"runtime", "hf_to_gguf"}, {"llama_cpp", "convert_hf_to_gguf", "conversion", "torch", "transformers"}),
    ({"launch", "loading"}, set()),
    ({"forward", "gguf_model"}, {"numpy", "torch"}),
    ({"divergence"}, {"numpy"}),
    ({"tradeoff"}, set()),
    ({"perplexity"}, {"numpy", "llama_cpp"}),
    ({"llama_observer", "gguf_tokenizer"}, {"numpy", "torch"}),
    ({"gguf_pass"}, {"numpy", "torch", "safetensors"}),
    ({"calibrate", "refit", "dern", "writer", "expand", "quantize", "convert", "evaluate", "inspection"},
     {"numpy", "torch", "transformers", "gguf", "llama_cpp"}),
    ({"sequential", "gguf_calibrate", "gguf_refit"}, {"numpy", "torch"}),
    ({"asked"}, {"torch"}),
    ({"calibration"}, {"torch"}),
    ({"refitting"}, {"torch"}),
    ({"probe"}, set()),
    ({"bench", "bench_worker"}, {"numpy", "llama_cpp"}),
    ({"bench_calibrate", "bench_calibrate_worker"}, {"numpy", "torch"}),
    ({"crosscheck", "selftest", "selftest_worker"}, {"numpy"}),
    ({"report"}, {"rich"}),
    ({"svg", "report_facts"}, {"numpy"}),
    ({"page"}, set()),
    ({"trial", "trial_worker", "report_charts"}, {"numpy"}),
    ({"report_sections", "report_maps"}, {"numpy"}),
    ({"report_html", "model_card"}, {"yaml"}),
    ({"report_files"}, set()),
    ({"verification"}, set()),
    ({"workspace"}, set()),
    ({"journal", "measurements"}, set()),
    ({"live"}, {"rich"}),
    ({"terminal"}, {"rich"}),
    ({"runtime_report", "sweep_report", "stats_report"}, {"rich"}),
    ({"plot"}, {"matplotlib"}),
    ({"outline"}, {"gguf"}),
    ({"budget", "budget_worker"}, {"llama_cpp"}),
    ({"prepare"}, {"numpy"}),
    ({"provenance"}, set()),
    ({"extras"}, set()),
    ({"pipeline"}, {"numpy"}),
    ({"demo", "sweep"}, set()),
    ({"fit_report", "fit_solve"}, {"rich"}),
    ({"fit_measure", "fit_choose"}, set()),
    ({"fit"}, set()),
    ({"fit_run"}, set()),
    ({"runs"}, {"torch"}),
    ({"api"}, set()),
    ({"__init__"}, set()),
    ({"cli_types", "cli_examples"}, {"click"}),
    ({"cli_options"}, {"click"}),
    ({"cli_fit"}, {"click"}),
    ({"cli_calibrate", "cli_plan", "cli_refit", "cli_gguf", "cli_validate", "cli_compress"}, {"click", "rich"}),
    ({"cli_runtime", "cli_bench", "cli_sensitivity", "cli_stats", "cli_sweep", "cli_recipes", "cli_doctor", "cli_report"},
     {"click"}),
    ({"cli"}, {"click"}),
    ({"__main__"}, set()),
]  # fmt: skip


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of the package, third parties) that a file imports anywhere."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            others |= {name.split(".")[0] for name in names}
    return own - {"__version__"}, {name for name in others if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    rows = [row for row, (names, _) in enumerate(ROWS) if path.stem in names]
    assert len(rows) == 1, f"{path.stem} has no row of its own"
    own, others = imports(path)
    above = set().union(*(names for names, _ in ROWS[: rows[0]]))
    assert own <= above, f"{path.stem} may not import {own - above}"
    assert others <= ROWS[rows[0]][1], f"{path.stem} may not use {others - ROWS[rows[0]][1]}"


def test_there_is_no_module_for_odds_and_ends():
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in PACKAGE.glob("*.py")}


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{name} ") if isinstance(command, click.Group) else {prefix + name: command}
    return found


def test_every_command_and_option_has_help_and_stands_in_the_readme():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    for name, command in commands(cli).items():
        assert command.help, name
        assert f"gguftool {name}" in readme, f"README does not mention `gguftool {name}`"
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, f"{name} {option.name}"


# Whole numbers that are held against more than a bound, or by a recipe that may come from a file, before anything is done.
CHECKED_LATER = {
    "compress fit_ctx", "compress eval_windows", "fit ctx", "fit n_ctx", "fit eval_windows",
    "sweep seeds", "stats show layer",
}  # fmt: skip


def test_every_whole_number_has_its_bounds():
    free = {
        f"{name} {option.name}"
        for name, command in commands(cli).items()
        for option in command.params
        if isinstance(option.type, type(click.INT)) and not isinstance(option.type, click.IntRange)
    }
    assert free == CHECKED_LATER


def groups(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {prefix.strip(): group}
    for name, command in group.commands.items():
        found |= groups(command, f"{prefix}{name} ") if isinstance(command, click.Group) else {}
    return found


@pytest.mark.parametrize(("name", "command"), {**groups(cli), **commands(cli)}.items())
def test_every_help_ends_in_an_example_that_can_be_typed(name, command, monkeypatch):
    for check in ("check_model", "check_texts"):  # nobody has the files of the examples
        monkeypatch.setattr(cli_types, check, lambda _: None)
    context = click.Context(command, info_name=f"gguftool {name}", **command.context_settings)
    said = [line.strip() for line in command.get_help(context).splitlines()]
    for example in EXAMPLES[name]:
        assert example in said and example.startswith(f"gguftool {name}".strip())
        arguments = shlex.split(example.split(" > ")[0])[1 + len(name.split()) :]
        if not isinstance(command, click.Group):
            # Raises for an option that there is not, and for an argument too many.
            command.make_context(name, list(arguments))


def test_help_says_who_takes_another_method_where_none_is_named():
    options = {name: next(o for o in commands(cli)[name].params if "--method" in o.opts) for name in
               ("plan", "sweep", "compress", "fit")}  # fmt: skip
    default = {name: option.default[0] if option.multiple else option.default for name, option in options.items()}
    for name, option in options.items():
        others = [other for other in options if default[other] != default[name]]
        assert len(others) == 2
        assert f"{' and '.join(f'`{other}`' for other in others)} take {default[others[0]]}" in option.help


def test_there_is_no_example_of_a_command_that_is_none():
    assert set(EXAMPLES) == {*groups(cli), *commands(cli)}


@pytest.mark.parametrize("name", sorted(set(commands(cli)) - {"run", "serve", "completion"}))
def test_every_command_can_be_quiet_and_speak_json(name):
    options = {text for option in commands(cli)[name].params for text in option.opts}
    assert {"--json", "--quiet"} <= options


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from gguftool.cli import cli; cli(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "gguf", "transformers", "llama_cpp", "rich", "matplotlib"} & set(done.stdout.split())
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "gguftool", "--help"], check=True, capture_output=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    # What it takes of the processor, so that a busy machine does not fail the test. About 0.15 s on an idle one.
    assert min(times) < 0.3


def test_the_readme_has_no_gap():
    assert not re.findall(r"@[A-Z]+@", (PACKAGE.parent / "README.md").read_text(encoding="utf-8"))
