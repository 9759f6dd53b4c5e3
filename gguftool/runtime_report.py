"""What `runtime selftest` and `validate` on several backends print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .report import with_error


def selftest_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each check, as `selftest.Check.as_dict()` has it."""
    caption = (
        "models: the tiered file here, and in brackets its padded twin on the CPU. on CPU: the device refuses these cases, "
        "and the CPU runs them"
    )
    table = Table(caption=caption, caption_justify="left")
    for name in ("backend", "device", "check", "result", ""):
        table.add_column(name)
    for check in checks:
        cells = [check[key] for key in ("backend", "device", "check", "result")] + ["ok" if check["ok"] else "FAILED"]
        table.add_row(*map(Text, cells))
    return table


def crosscheck_table(facts: Mapping[str, Any]) -> Table:
    """A column for each backend, from `crosscheck.CrossCheck.as_dict()`."""
    found = facts["backends"]
    first = next(iter(found.values()))
    verdict = "within" if facts["ok"] else "NOT within"
    table = Table(
        title=f"{first['tokens']} tokens scored, windows of {first['n_ctx']}",
        title_justify="left",
        caption=f"largest difference of ln(perplexity): {facts['ln_ppl_difference']:.5f}, {verdict} the tolerance of "
        f"{facts['ln_ppl_tolerance']:.5f}",
        caption_justify="left",
    )
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for label, side in (("perplexity, original", "base"), ("perplexity, pruned", "pruned")):
        table.add_row(label, *(with_error(one[side]["ppl"], one[side]["ppl_err"]) for one in found.values()))
    table.add_row("KL divergence", *(f"{one['kld']['mean']:.5f} ± {one['kld']['err']:.5f}" for one in found.values()))
    return table


def bench_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each of `bench.Result.as_dict()`; a missed bar is marked."""
    table = Table(
        caption="ratios of speed, mean of the starts; 1.00 is the goal. tiers: the same experts in two tiers ÷ in one stack. "
        "pruned: speed-up ÷ (active bytes before ÷ after). patched: the stock file with our llama.cpp ÷ without our patches. "
        "control: the stock file ÷ itself. memory: peak ÷ (file + KV + compute buffers). *: below the bar",
        caption_justify="left",
    )
    columns = {
        "tiers gen.": "split_generate", "tiers prompt": "split_prompt", "pruned gen.": "pruned_generate",
        "patched gen.": "patched_generate", "patched prompt": "patched_prompt",
        "control gen.": "control_generate", "control prompt": "control_prompt", "memory": "pruned_memory",
    }  # fmt: skip
    for name in ("model", "type", *columns, "speed-up", "bytes"):
        table.add_column(name, justify="left" if name in ("model", "type") else "right")
    for result in results:
        missed = {line.split(": ")[1].split()[0] for line in result["missed"]}
        cells = [
            _ratio_cell(result["ratios"][key], key in missed) if key in result["ratios"] else ""
            for key in columns.values()
        ]
        table.add_row(
            result["model"],
            result["type"],
            *cells,
            f"{result['speedup']:.2f}×",
            f"÷ {result['active_bytes_ratio']:.2f}",
        )
    return table


def _ratio_cell(ratio: Mapping[str, float], missed: bool) -> str:
    error = f" ± {ratio['error']:.3f}" if ratio["error"] else ""
    return f"{ratio['value']:.3f}{error}{'*' if missed else ''}"
