"""What a stats file holds, as plain values and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .coverage import coverage
from .errors import GgufToolError
from .routing import experts_of, routing
from .stats import SOLVED, CalibrationStats


def stats_facts(stats: CalibrationStats, layer: int | None = None) -> dict[str, Any]:
    """Model, texts, routing and coverage; with `layer`, a decoder index, its experts too.

    Raises GgufToolError for a layer without experts.
    """
    model = stats.model
    if layer is not None and layer not in model.moe_layers:
        known = ", ".join(map(str, model.moe_layers))
        raise GgufToolError(f"--layer {layer} has no experts; the layers that have are {known}")
    facts: dict[str, Any] = {
        "model": {
            "name": model.name, "fingerprint": model.fingerprint, "model_type": model.model_type, "arch": model.gguf_arch,
            "layers": model.block_count, "moe_layers": len(model.moe_layers), "n_expert": model.n_expert,
            "n_expert_used": model.n_expert_used, "n_ff_exp": model.n_ff_exp, "n_embd": model.n_embd,
        },
        "tokens": stats.tokens, "n_ctx": stats.n_ctx, "obs": all(name in stats.neurons for name in SOLVED),
        "domains": [domain.as_dict() for domain in stats.domains],
        "routing": [asdict(found) for found in routing(stats)],
        "coverage": coverage(stats).as_dict(),
    }  # fmt: skip
    if layer is not None:
        row = model.moe_layers.index(layer)
        facts["layer"] = {"layer": layer, "experts": [asdict(expert) for expert in experts_of(stats, row)]}
    return facts


def stats_tables(facts: Mapping[str, Any]) -> list[Table | str]:
    """Facts as `stats_facts` gives them: a line, the texts, and all layers or the experts of the one that was asked for."""
    model = facts["model"]
    head = (
        f"{model['name']} ({model['fingerprint'][:12]}) · {model['model_type']} · {model['moe_layers']} of {model['layers']} "
        f"layers with {model['n_expert']} experts of {model['n_ff_exp']} neurons, {model['n_expert_used']} per token · "
        f"{facts['tokens']} tokens in windows of {facts['n_ctx']}" + ("" if facts["obs"] else " · without OBS costs")
    )
    main = _experts_table(facts) if "layer" in facts else _routing_table(facts)
    return [head, _texts_table(facts), main]


def _texts_table(facts: Mapping[str, Any]) -> Table:
    table = Table(title="texts")
    for name, justify in (
        ("text", "left"),
        ("sha256", "left"),
        ("tokens", "right"),
        ("windows", "left"),
        ("read", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for domain in facts["domains"]:
        drawn = domain["windows"]
        count = domain["tokens"] // facts["n_ctx"] if facts["n_ctx"] else 0
        how = f"the first {count}" if drawn is None else f"{len(drawn)}, drawn up to number {max(drawn)}"
        read = [f"field {domain['field']}" if "field" in domain else "text"]
        read += [f"chat template {domain['template'][:12]}"] if "template" in domain else []
        read += [f"{domain['limit']} documents at most"] if "limit" in domain else []
        read += [f"weight {domain['weight']:g}"] if "weight" in domain else []
        table.add_row(domain["name"], domain["sha256"][:12], f"{domain['tokens']:,}", how, ", ".join(read))
    return table


def _routing_table(facts: Mapping[str, Any]) -> Table:
    covered = facts["coverage"]
    table = Table(title="routing: an expert's share of the tokens")
    for name in ("layer", "most used", "least used", "its tokens", "effective experts", "never routed",
                 f"< {covered['ranked']} tokens", f"< {covered['full']} tokens"):  # fmt: skip
        table.add_column(name, justify="right")
    for row, cover in zip(facts["routing"], covered["layers"], strict=True):
        table.add_row(
            str(row["layer"]), f"{_percent(row['most_share'])} ({row['most']})",
            f"{_percent(row['least_share'])} ({row['least']})", f"{row['least_tokens']:,}",
            f"{row['effective']:.1f} of {facts['model']['n_expert']}", str(len(row["unrouted"])), str(cover["noisy"]),
            str(cover["damped"]),
        )  # fmt: skip
    return table


def _experts_table(facts: Mapping[str, Any]) -> Table:
    table = Table(title=f"layer {facts['layer']['layer']}: experts by their share of the tokens")
    names = [domain["name"] for domain in facts["domains"]] if len(facts["domains"]) > 1 else []
    for name in ("expert", "tokens", "share", *(f"of {name}" for name in names), "mean router weight", "mean ‖f‖"):
        table.add_column(name, justify="right")
    for expert in sorted(facts["layer"]["experts"], key=lambda expert: (-expert["tokens"], expert["expert"])):
        shares = [_percent(share) for share in expert["shares"]] if names else []
        means = ["" if expert[name] is None else f"{expert[name]:.4g}" for name in ("gate", "norm")]
        table.add_row(str(expert["expert"]), f"{expert['tokens']:,}", _percent(expert["share"]), *shares, *means)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
