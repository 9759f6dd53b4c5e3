"""README.md beside the GGUF: the model card of the hub, with its front matter.

The section `card` of `Report.facts` has what the report's numbers do not: file, encoding, arch, layout, base_model,
quantized_by, license, license_name, license_link; empty where nothing is known.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from .gguf_file import GgufFile
from .report import Report, Row, markdown_table, megabytes
from .sources import HUB, is_hub_id

# By this a card of ours is told from a file that somebody else put there.
MARK = "<!-- model card by gguftool -->"
CARD = "README.md"


def card_facts(base: GgufFile, model: Path, file: Path, encoding: str, layout: str) -> dict[str, str]:
    """The section `card`: what the base GGUF says of its license and of where it comes from, or `model` does, which is a path or
    the model's name on the hub.

    llama.cpp's converter copies license and names out of the checkpoint's own card.
    """
    url = str(base.value("general.repo_url", base.value("general.source.repo_url", "")))
    return {
        "file": file.name, "encoding": encoding, "layout": layout, "arch": str(base.value("general.architecture", "")),
        "base_model": model.as_posix() if is_hub_id(model) else _hub_name(url) or _hub_cache_name(model),
        "quantized_by": "",
        **{
            key: str(base.value(f"general.license{suffix}", ""))
            for key, suffix in (("license", ""), ("license_name", ".name"), ("license_link", ".link"))
        },
    }  # fmt: skip


def _hub_name(url: str) -> str:
    """OWNER/NAME of an address on the hub, or nothing."""
    head, _, rest = url.partition("huggingface.co/")
    parts = rest.strip("/").split("/")
    return "/".join(parts) if head in ("https://", "http://") and len(parts) == 2 else ""


def _hub_cache_name(model: Path) -> str:
    """OWNER/NAME where the checkpoint lies in the hub's own cache (models--OWNER--NAME/snapshots/...), or nothing."""
    for part in model.absolute().parts:
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    return ""


def front_matter(report: Report) -> dict[str, Any]:
    """What stands between the lines of dashes."""
    card = report.facts["card"]
    found: dict[str, Any] = {}
    if card.get("base_model"):
        found |= {"base_model": card["base_model"], "base_model_relation": "quantized"}
    if card.get("quantized_by"):
        found["quantized_by"] = card["quantized_by"]
    found |= {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    pruned = ["pruned", "expert-pruning"] if report.main and report.main.method != "none" else []
    tags = ["gguf", "moe", "mixture-of-experts", *pruned, "gguftool", card["arch"], card["encoding"]]
    return found | {"library_name": "gguf", "pipeline_tag": "text-generation", "tags": [tag for tag in tags if tag]}


def model_card(report: Report) -> str:
    """The page. Of a run that did not come to its end it says so, and nothing that could be taken for a result."""
    row = report.main
    if not report.status.done or "card" not in report.facts or row is None:
        return f"{MARK}\n\n# {_line(report.model)}\n\nThere is no finished model here. {_line(str(report.status))}\n"
    card = report.facts["card"]
    head, rows = report.cells(short=False)
    base = (
        f"[{card['base_model']}](https://huggingface.co/{card['base_model']})"
        if card.get("base_model")
        else _line(report.model)
    )
    lines = [
        "---", yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True).rstrip(), "---", MARK, "",
        f"# {_line(Path(card['file']).stem)}", "",
        f"{base} {_done_to_it(report, row)}: {megabytes(row.bytes)}, {100 * row.bytes / report.base_bytes:.1f} % of the "
        "original.", "",
        *([] if card.get("base_model") else [
            "<!-- The hub wants to know the base model: gguftool report FOLDER --base-model OWNER/NAME -->", "",
        ]),
        "## What it cost", "", *markdown_table(head, rows), "", _line(report.protocol) + ".", "",
        *_how_to_run(card), "## How it was made", "", *_made(report), "",
        "## Limits", "", *_limits(report),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _done_to_it(report: Report, row: Row) -> str:
    if row.method == "none":
        return f"quantized to {_line(row.encoding)} by gguftool, nothing pruned"
    gone = 100 * (1 - report.facts.get("experts", {}).get("kept_share", 1 - row.ratio))
    return f"with {gone:.1f} % of its routed experts' parameters removed by gguftool, method `{_code(row.method)}`"


def _how_to_run(card: dict[str, Any]) -> list[str]:
    file = shlex.quote(card["file"])
    lines = ["## How to run it", ""]
    if card["layout"] == "tiered":
        lines += [
            "The experts of a layer have different widths, which needs a llama.cpp with gguftool's patches; a stock one refuses "
            "the file.", "", "```", "gguftool runtime build", _fenced(f"gguftool run {file}"), "```", "",
            f"`gguftool expand {_code(file)} -o stock.gguf` pads the experts with zeros: the same function, larger, for any "
            "llama.cpp.", "",
        ]  # fmt: skip
    else:
        lines += ["A stock file: any llama.cpp runs it.", "", "```", _fenced(f"llama-cli -m {file}"), "```", ""]
    return lines


def _made(report: Report) -> list[str]:
    facts = report.facts
    lines = [f"- {_line(name)}: {_line(str(value))}" for name, value in (report.budget or {}).items()]
    if "experts" in facts:
        lines.append(f"- saliency: {_line(facts['experts']['criterion'])}")
    if "model" in facts:
        texts = ", ".join(f"{t['name']} ({t['tokens']:,} tokens)" for t in facts["model"]["texts"])
        lines.append(f"- calibrated on {_line(texts)}")
    if "provenance" in facts:
        origin = facts["provenance"]
        lines += [
            f"- {_line(name)}: {_line(value)}" for name, value in origin["environment"].items() if name in PROGRAMS
        ]
        if command := short_command(origin.get("command", ""), _hub_names(report)):
            lines += ["", "```", _fenced(command), "```"]
        hashes = [f for f in origin["files"] if f["sha256"] and f["role"] == "output" and f["name"].endswith(".gguf")]
        if hashes:
            lines += ["", *markdown_table(["file", "sha256"], [[f["name"], f["sha256"]] for f in hashes])]
    return lines


PROGRAMS = ("gguftool", "llama.cpp")
REMOVED = "What was removed is gone for every text; on texts unlike the calibration data the loss may be far larger."


def short_command(command: str, hub: Collection[str] = ()) -> str:
    """A command line with the names of files instead of their paths: where they lay on somebody's machine is nobody's matter.

    Args:
        hub: names of models and datasets (with their configuration) on the hub, which stay whole; by looks they are paths.

    What is no command line is left out: nothing of it is known.
    """
    try:
        parts = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join(_part(part, before, hub) for before, part in zip(["", *parts], parts, strict=False))


def _part(part: str, before: str, hub: Collection[str]) -> str:
    """A part of a command line behind the part `before`, as --data FILE, --data=FILE or -oFOLDER may be written."""
    if before == "--prompt" or part.startswith("--prompt="):  # a text and no path
        return part
    if part.startswith("--"):
        option, sign, value = part.partition("=")
        return option + sign + _last_name(value, hub)
    return part[:2] + _last_name(part[2:], hub) if part.startswith("-") else _last_name(part, hub)


def _last_name(value: str, hub: Collection[str]) -> str:
    """What --data has (PATH:FIELD:LIMIT@WEIGHT, the same behind hf:), or any path, without folders."""
    head, place = (HUB, value.removeprefix(HUB)) if value.startswith(HUB) else ("", value)
    if re.split("[:@]", place, maxsplit=1)[0] in hub:
        return value
    return head + re.split(r"[/\\]", re.sub(r"[/\\]+(?=[:@]|$)", "", place))[-1]


def _hub_names(report: Report) -> set[str]:
    """The model, and the datasets among the calibration texts; these are called OWNER/NAME[/CONFIG]:SPLIT, files NAME."""
    texts = [str(text["name"]).rpartition(":")[0] for text in report.facts.get("model", {}).get("texts", ())]
    return {name for name in (report.facts["card"].get("base_model", ""), *texts) if "/" in name}


def _limits(report: Report) -> list[str]:
    known = [
        *([] if report.main and report.main.method == "none" else [REMOVED]),
        "Perplexity and KL divergence on these texts are all that was measured: no benchmark, no safety, no long context.",
    ]
    return [f"- {_line(note)}" for note in (*known, *report.notes)]


def _line(text: str) -> str:
    """Text as one line of Markdown that starts nothing of Markdown's or HTML's own."""
    plain = " ".join(text.split())
    for sign, safe in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("[", "\\["),
        ("`", "\\`"),
        ("*", "\\*"),
        ("|", "\\|"),
    ):
        plain = plain.replace(sign, safe)
    return plain


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def _fenced(text: str) -> str:
    return text.replace("```", "'''")
