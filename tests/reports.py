"""Reports made by hand: small, large and hostile, for tests that need no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from gguftool.report import Candidate, Report, Row

EVIL = "\"><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>&'`|\u202e\x00\ud800"
HISTOGRAM = (*[0] * 10, *range(1, 11), *[0] * 10)


def value(ppl: float, kl: float, histogram: tuple[int, ...] = HISTOGRAM) -> dict[str, Any]:
    """What `evaluate` says of one file on one text."""
    kld = {
        "mean": kl,
        "err": kl / 20,
        "median": kl / 2,
        "p90": 2 * kl,
        "p95": 3 * kl,
        "p99": 5 * kl,
        "p999": 8 * kl,
        "max": 9 * kl,
    }
    return {
        "base": {"file": "base.gguf", "bytes": 1000, "ppl": 10.0, "ppl_err": 0.3},
        "pruned": {"file": "x.gguf", "bytes": 500, "ppl": ppl, "ppl_err": 0.3}, "kld": {**kld, "histogram": histogram},
        "tokens": 255, "ln_ppl_ratio": float(np.log(ppl / 10)), "ln_ppl_ratio_err": 0.01, "same_top": 0.9,
        "same_top_err": 0.01, "windows": 1, "n_ctx": 512, "backend": "cpu", "text_sha256": "0" * 64,
    }  # fmt: skip


def make_report(*, n_rows: int = 2, n_layer: int = 3, n_expert: int = 8, evil: str = "", candidates: int = 0) -> Report:
    """A finished report in which every section is filled; `evil` is put into every name and text."""
    rng = np.random.default_rng(0)
    texts = [f"code{evil}", f"prose{evil}"]
    rows = [
        Row(
            f"{'auto 40 %' if pruned else 'unpruned'} {i}{evil}", "auto" if pruned else "none", 0.4, f"Q4_K_M{evil}",
            400 + 50 * i, {name: value(11 + i, 0.05 * (i + 1)) for name in texts}, f"/x/{evil}.gguf",
        )
        for i in range(n_rows) for pruned in [i == 0 or n_rows > 2]
    ]  # fmt: skip
    layers = []
    routes = []
    for layer in range(n_layer):
        widths = [*[64] * (n_expert // 2), *[32] * (n_expert // 4), *[0] * (n_expert // 8)]
        widths += [None] * (n_expert - len(widths))
        layers.append(
            {"layer": layer, "saliency": np.sort(rng.lognormal(0, 2, n_expert))[::-1].tolist(), "width": widths}
        )
        share = 2 * rng.dirichlet(np.ones(n_expert), 2)
        routes.append({"layer": layer, "original": share[0].tolist(), "pruned": share[1].tolist()})
    speeds = {"median": 10.0, "low": 9.0, "high": 11.0}
    models = [
        {
            "label": label,
            "file": f"{label}.gguf",
            "bytes": 5,
            "memory": 1e9,
            "rounds": 5,
            "prompt": speeds,
            "generate": speeds,
        }
        for label in ("original", rows[0].label)
    ]
    answers = [
        {"label": label, "text": f"{label} says {evil}\n  so", "stopped": "length", "tokens": 9, "same": 3}
        for label in ("original", rows[0].label)
    ]
    facts = {
        "model": {"name": f"tiny{evil}", "texts": [{"name": f"text{evil}", "sha256": "0" * 64, "tokens": 4096}]},
        "calibrated": {"tokens": 4096, "layers": [{"layer": r["layer"], "share": r["original"]} for r in routes]},
        "experts": {
            "criterion": f"reap = mean{evil}", "method": f"auto{evil}", "n_ff_exp": 64, "kept_share": 0.6, "kept_hash": "0" * 64,
            "layout": "tiered", "layers": layers,
        },
        "routing": {"tokens": 1000, "texts": texts, "label": rows[0].label, "layers": routes},
        "speed": {
            "models": models, "skipped": [{"label": f"big{evil}", "why": f"no room{evil}"}], "in_turns": True,
            "prompt_tokens": 256, "generated_tokens": 32, "threads": 2, "backend": "cpu",
        },
        "completions": {
            "how": "continued as plain text", "n_tokens": 64,
            "prompts": [{"name": f"p{evil}", "prompt": f"def f():{evil}", "answers": answers}],
        },
        "provenance": {
            "command": f"gguftool compress {evil}", "environment": {"gguftool": "0", f"cpu{evil}": evil},
            "patches": [{"name": f"0001{evil}.patch", "sha256": "a" * 64}],
            "files": [{"role": "output", "name": f"x{evil}.gguf", "bytes": 5, "sha256": "b" * 64}],
        },
        "card": {
            "file": f"x{evil}.gguf", "encoding": "Q4_K_M", "layout": "tiered", "arch": "qwen3moe", "base_model": "",
            "quantized_by": "", "license": "", "license_name": "", "license_link": "",
        },
    }  # fmt: skip
    return Report(
        f"Tiny{evil}", 1000, {name: {"ppl": 10.0, "ppl_err": 0.3, "tokens": 255, "n_ctx": 512} for name in texts}, rows,
        f"by llama-perplexity's protocol{evil}", [f"a note{evil}"], facts=facts,
        candidates=[
            Candidate(f"candidate {i}{evil}", 300 + 60 * i, {n: {"mean": 0.3 / (i + 1), "err": 0.01} for n in texts},
                      i == 1, f"why{evil}") for i in range(candidates)
        ],
        budget={f"size{evil}": f"500 MB{evil}"} if candidates else None,
    )  # fmt: skip
