"""What `gguftool stats show` says."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gguftool.cli import cli
from gguftool.errors import GgufToolError
from gguftool.planner import fingerprint
from gguftool.routing import experts_of, routing
from gguftool.stats import CalibrationStats, Domain
from gguftool.stats_report import stats_facts
from synthetic import make_stats


def two_texts():
    """Two layers of four experts, two used per token; 100 tokens of code and 300 of chat."""
    count = np.array([[[100, 100, 0, 0], [80, 60, 40, 20]], [[100, 100, 300, 100], [300, 240, 60, 0]]], dtype=float)
    stats = make_stats(n_layer=2, n_expert=4)
    domains = (
        Domain("code.txt", "c" * 64, 100),
        Domain("chat.jsonl", "d" * 64, 300, (1, 5, 9), "messages", "e" * 64, 50, 3.0),
    )
    return replace(stats, domains=domains, n_ctx=100, experts={**stats.experts, "count": count})


def test_routing_by_hand():
    """Layer 0: 200, 200, 300, 100 of 800 routed; layer 1: 380, 300, 100, 20. 400 tokens in all."""
    first, second = routing(two_texts())
    assert (first.most, first.most_share, first.least, first.least_share, first.least_tokens) == (2, 0.75, 3, 0.25, 100)
    entropy = -(2 * 0.25 * log(0.25) + 0.375 * log(0.375) + 0.125 * log(0.125))
    assert first.entropy == pytest.approx(entropy) and first.effective == pytest.approx(exp(entropy))
    assert (second.most, second.most_share, second.least_tokens, second.unrouted) == (0, 0.95, 20, ())
    even = make_stats(n_layer=1, n_expert=4)
    even = replace(even, experts={**even.experts, "count": np.array([[[400.0, 400, 0, 0]]])})
    (layer,) = routing(even)
    assert layer.effective == pytest.approx(2) and layer.unrouted == (2, 3) and layer.least_share == 0


def test_experts_by_hand():
    stats = two_texts()
    rows = experts_of(stats, 0)
    assert [(row.tokens, row.share, row.shares) for row in rows] == [
        (200, 0.5, (1.0, 1 / 3)), (200, 0.5, (1.0, 1 / 3)), (300, 0.75, (0.0, 1.0)), (100, 0.25, (0.0, 1 / 3)),
    ]  # fmt: skip
    assert rows[2].gate == pytest.approx(stats.experts["gate"][:, 0, 2].sum() / 300)
    none = replace(stats, experts={**stats.experts, "count": stats.experts["count"] * np.array([1, 1, 1, 0])})
    assert (experts_of(none, 0)[3].gate, experts_of(none, 0)[3].norm) == (None, None)


def test_the_command_prints_tables_and_json(tmp_path):
    path = tmp_path / "s.safetensors"
    stats = two_texts()
    experts = {name: v if name == "count" else np.broadcast_to(v, (2, 2, 4)) for name, v in stats.experts.items()}
    replace(stats, experts=experts).save(path)
    run = CliRunner().invoke(cli, ["stats", "show", str(path)], catch_exceptions=False)
    for text in ("synthetic (ffffffffffff)", "without OBS costs", "code.txt", "3, drawn up to number 9", "field messages",
                 "chat template eeeeeeeeeeee", "50 documents at most", "weight 3", "75.00 % (2)", "3.7 of 4",
                 "note: few tokens", "< 128 tokens"):  # fmt: skip
        assert text in run.output, text
    one = CliRunner().invoke(cli, ["stats", "show", str(path), "--layer", "1"], catch_exceptions=False)
    assert "layer 1: experts" in one.output and "of chat.jsonl" in one.output and "100.00 %" in one.output
    facts = json.loads(CliRunner().invoke(cli, ["stats", "show", str(path), "--layer", "1", "--json"]).stdout)
    assert facts["tokens"] == 400 and facts["domains"][1]["template"] == "e" * 64 and "field" not in facts["domains"][0]
    assert [expert["tokens"] for expert in facts["layer"]["experts"]] == [380, 300, 100, 20]
    assert [layer["damped"] for layer in facts["coverage"]["layers"]] == [1, 2] and len(facts["routing"]) == 2
    with pytest.raises(GgufToolError, match="--layer 7 has no experts; the layers that have are 0, 1"):
        stats_facts(stats, 7)


def test_stats_of_before_still_load_and_are_the_same(tmp_path):
    """A file without the later fields of a text loads, and its fingerprint is that of the same text now."""
    stats = make_stats()
    stats.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["gguftool"])
    assert header["domains"] == [{"name": "text", "sha256": "0" * 64, "tokens": 400, "windows": None}]
    assert header["version"] == 1
    save_file(load_file(tmp_path / "new.safetensors"), tmp_path / "old.safetensors", {"gguftool": json.dumps(header)})
    old = CalibrationStats.load(tmp_path / "old.safetensors")
    assert old.domains == stats.domains and fingerprint(old) == fingerprint(stats)
    later = replace(stats, domains=(replace(stats.domains[0], field="messages", template="t", limit=3, weight=2.0),))
    later.save(tmp_path / "later.safetensors")
    assert CalibrationStats.load(tmp_path / "later.safetensors").domains == later.domains
    assert fingerprint(later) != fingerprint(stats)
