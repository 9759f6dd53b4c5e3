"""What `runtime selftest`, `validate` on several backends and `doctor` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .doctor import Finding
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
        "control: the stock file ÷ itself. memory: peak ÷ (file + KV + compute buffers). *: a bar is missed",
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


def calibrate_bench_tables(results: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """Memory and speed of each of `bench_calibrate.Result.as_dict()`, and what follows for the whole model."""
    found: list[Table | str] = []
    for result in results:
        memory = Table(
            title=f"{result['model']}, {result['options']['dtype']}: memory",
            title_justify="left",
            caption="own: anonymous pages, the most that was sampled; mapped: file pages at that time, which the system can "
            "take back; max RSS: the kernel's peak of both. The last column: own ÷ (2.5 × layer + statistics + hidden "
            "states, where these lie in memory)",
            caption_justify="left",
        )
        for name in ("layers", "own", "mapped", "max RSS", "one layer", "statistics", "hidden", "÷ bar"):
            memory.add_column(name, justify="right")
        for one in result["memory"]:
            facts = one["facts"]
            hidden = facts["hidden_bytes"] if facts["resident"] else 0
            bar = 2.5 * result["layer_bytes"] + facts["statistics_bytes"] + hidden
            own = one["anonymous"] or one["max_rss"]
            sizes = (
                own,
                one["mapped"],
                one["max_rss"],
                result["layer_bytes"],
                facts["statistics_bytes"],
                facts["hidden_bytes"],
            )
            memory.add_row(str(one["n_layers"]), *(f"{size / 1e9:.3f} GB" for size in sizes), f"{own / bar:.3f}")
        speed = Table(title="speed", title_justify="left")
        for name in ("", "tokens/s of one layer"):
            speed.add_column(name, justify="right" if name else "left")
        for name, value in result["tokens_per_second"].items():
            speed.add_row(name, f"{value:.0f}")
        ratios = Table(title="ratios", title_justify="left")
        for name in ("", "value", "bar"):
            ratios.add_column(name, justify="right" if name else "left")
        for name, ratio in result["ratios"].items():
            bar = result["bars"].get(name)
            ratios.add_row(
                name, f"{ratio['value']:.3f} ± {ratio['value'] * ratio['error']:.3f}", "" if bar is None else f"{bar}"
            )
        whole = result["whole"]
        line = (
            f"a layer loads in {result['load_seconds']:.2f} s, its OBS costs are solved in {result['solve_seconds']:.1f} s. All "
            f"{whole['layers']} layers, {whole['tokens']} tokens, derived and not measured: {whole['hours']:.1f} h (of them "
            f"{whole['solving_hours']:.1f} h solving), {whole['memory_bytes'] / 1e9:.1f} GB of memory, "
            f"{whole['disk_bytes'] / 1e9:.1f} GB of disk"
        )
        found += [memory, speed, ratios, line]
    return found


def doctor_table(found: Sequence[Finding]) -> Table:
    """What `doctor` prints: a line for each thing that it looked at."""
    table = Table(box=box.SIMPLE)
    for name in ("", "", "", "mends it"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    for one in found:
        table.add_row(one.name, Text(one.status, style=colours[one.status]), Text(one.text), Text(one.mend))
    return table
