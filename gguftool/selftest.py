"""selftest: whether every device of this machine computes tiered files as the CPU computes their padded twins.

The operations first, by llama.cpp's own tests (`optests`). Then whole models: the built-in one with experts of five
widths, in BF16 and in Q4_K_M, on every device, once with a window's tokens together (a prompt) and once one by one (as in
generation). The reference is the padded twin (`expand`) on the CPU, which skips nothing and needs no patch.

Tolerance. Two right computations differ by rounding: other kernels add in another order and round activations
differently, and a router near a tie then takes another expert. On the CPU, for these models and this text, prompt and
one-by-one differ by a mean KL divergence of 2.4e-5 (BF16) and 9.7e-4 nats (Q4_K_M); exact arithmetic on the same weights
(F32) differs from either by 5.5e-5 and 9.2e-4. A fault is larger: one expert of the 16 of one layer put to zero makes
1.8e-3 to 9.9e-3, two experts exchanged 6.1e-3 to 2.3e-2. So KLD_TOLERANCE is 5 to 10 times the rounding of its type;
what it leaves for ln(perplexity), `evaluate.ln_ppl_tolerance` derives from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import builtin
from .checkpoint import open_checkpoint
from .convert import convert
from .divergence import Divergence, DivergenceSum, Logits, Tokens, score
from .errors import GgufToolError
from .evaluate import ln_ppl_tolerance
from .expand import expand
from .inventory import model_facts
from .optests import SAMPLE, SKIP_OPS, SKIPPING, STOCK_OPS, run_backend_ops, run_moe_skip
from .plan import LayerPlan, PrunePlan
from .processes import ending
from .quantize import QuantizeTool, quantize
from .recipe import Recipe
from .runtime import last_line, require
from .runtime_base import BACKENDS, Runtime, built
from .writer import prune

Progress = Callable[[int, int, str], None]

KLD_TOLERANCE = {"BF16": 5e-4, "Q4_K_M": 5e-3}
# Of 16 experts of width 128: 39 % of the neurons go, one expert keeps none.
WIDTHS = (0, 32, 32, 64, 64, 64, 64, 64, 96, 96, 96, 96, 96, 128, 128, 128)
N_CTX, WINDOWS = 128, 4
# Tokens computed at once.
WAYS = {"prompt": N_CTX, "generation": 1}
TIMEOUT = 1200


@dataclass(frozen=True)
class Check:
    """One row: what was checked on which device, in words and in numbers."""

    backend: str
    device: str
    name: str
    ok: bool
    text: str
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "backend": self.backend, "device": self.device, "check": self.name, "ok": self.ok, "result": self.text,
            **self.facts,
        }  # fmt: skip


@dataclass(frozen=True)
class _Output:
    """What a model said: logits at the scored positions [n, vocabulary], and the tokens that follow there [n]."""

    logits: Logits
    targets: Tokens


def selftest(
    backend: str = "auto", *, full: bool = False, base: Path | None = None, progress: Progress = lambda *_: None
) -> list[Check]:
    """Checks every device of every runtime of today's series that has been built, or of one backend's.

    Args:
        full: run every case of the stock operations, for minutes, instead of a sample.
        base: the built-in model's GGUF, where it has been converted before.
        progress: called with (steps done, steps, what runs).

    Raises:
        GgufToolError: nothing has been built, or the models and their reference could not be made.
    """
    runtimes = _runtimes(backend)
    found: list[tuple[Runtime, dict[str, Any]]] = []
    checks = []
    for runtime in runtimes:
        try:
            own = _ask({"runtime": str(runtime.path)})["devices"]
        except GgufToolError as error:
            checks.append(Check(runtime.backend, "", "devices", False, str(error)))
            continue
        found += [(runtime, device) for device in own]
        if runtime.backend != "cpu" and not any(device["type"] in ("gpu", "igpu") for device in own):
            checks.append(Check(runtime.backend, "", "devices", False, "it finds no GPU: is the driver there?"))
    # Every runtime has the CPU among its devices; once is enough.
    found = [(by, device) for by, device in found if device["type"] != "cpu" or by is runtimes[0]]
    with tempfile.TemporaryDirectory(prefix="gguftool-") as folder:
        scratch = Path(folder)
        progress(0, len(found) + 1, "making the models")
        tiered = make_models(scratch, runtimes[0], base)
        padded = {}
        for kind, path in tiered.items():
            padded[kind] = scratch / f"{kind}-padded.gguf"
            expand(path, padded[kind])
        reference = _outputs(runtimes[0], "", padded, scratch)
        for number, (runtime, device) in enumerate(found):
            progress(number + 1, len(found) + 1, f"{runtime.backend}: {device['name']}")
            where = _Where(runtime, device["name"], device["description"])
            checks += _check_operations(where, device["type"], full)
            if device["runs_models"]:
                checks += _check_models(where, device["type"] == "cpu", tiered, reference, scratch)
    return checks


def _runtimes(backend: str) -> list[Runtime]:
    """What has been built, the CPU first: the first one computes the reference."""
    built_now = [built(name) for name in reversed(BACKENDS)] if backend == "auto" else []
    return [runtime for runtime in built_now if runtime] or [require(backend)]


@dataclass(frozen=True)
class _Where:
    """A device of a runtime."""

    runtime: Runtime
    name: str
    description: str

    def check(self, name: str, ok: bool, text: str, **facts: Any) -> Check:
        """A row about this device."""
        return Check(self.runtime.backend, f"{self.name} ({self.description})", name, ok, text, facts)


def make_models(folder: Path, runtime: Runtime, base: Path | None = None) -> dict[str, Path]:
    """The built-in model with experts of five widths, by type: the keys of KLD_TOLERANCE."""
    checkpoint = open_checkpoint(builtin.unpack(folder / "model"))
    if base is None:
        base = folder / "base.gguf"
        convert(checkpoint.path, base, runtime, pre_tokenizer="qwen2")
    facts, rng = model_facts(checkpoint), np.random.default_rng(0)
    layers = []
    for index in facts.moe_layers:
        retained = [np.sort(rng.permutation(facts.n_ff_exp)[:width]) for width in rng.permutation(WIDTHS)]
        layers.append(LayerPlan(index, tuple(range(facts.n_expert)), tuple(retained)))
    plan = PrunePlan(
        Recipe("random-slices", 0.4), "by hand", facts.name, facts.fingerprint, facts.gguf_arch, None, (),
        facts.n_expert, facts.n_expert_used, facts.n_ff_exp, tuple(layers),
    )  # fmt: skip
    made = {kind: folder / f"{kind}.gguf" for kind in KLD_TOLERANCE}
    prune(base, plan, made["BF16"])
    quantize(made["BF16"], "Q4_K_M", made["Q4_K_M"], tools=QuantizeTool(runtime.tool("llama-quantize")))
    return made


def _check_operations(where: _Where, kind: str, full: bool) -> Iterator[Check]:
    """`kind` is the device's type. One that lost its word for skipping rows would refuse every case: no fault elsewhere."""
    counts = run_backend_ops(where.runtime, where.name, SKIP_OPS)
    counts += run_backend_ops(where.runtime, where.name, STOCK_OPS, None if full else SAMPLE)
    computes = kind == "cpu" or (where.runtime.backend in SKIPPING and kind in ("gpu", "igpu"))
    counts = [replace(count, refusable=not computes) for count in counts]
    if kind == "cpu":
        counts.append(run_moe_skip(where.runtime))
    for count in counts:
        yield where.check(
            count.op, count.ok, str(count), passed=count.passed, on_cpu=count.refused, failed=count.failed,
            failures=list(count.failures),
        )  # fmt: skip


def _check_models(
    where: _Where, is_cpu: bool, models: Mapping[str, Path], reference: Mapping[str, _Output], folder: Path
) -> Iterator[Check]:
    try:
        outputs = _outputs(where.runtime, "" if is_cpu else where.name, models, folder)
    except GgufToolError as error:
        yield where.check("models", False, str(error))
        return
    for name, output in outputs.items():
        found, limit = _compare(reference[name], output), KLD_TOLERANCE[name.split(",")[0]]
        ln_ppl_limit = ln_ppl_tolerance(found.tokens, limit)
        ok = found.kld.mean <= limit and abs(found.ln_ppl_ratio.value) <= ln_ppl_limit
        text = f"perplexity {found.ppl.value:.4f} ({found.base_ppl.value:.4f}), KL {found.kld.mean:.1e} (≤ {limit:.0e})"
        yield where.check(
            name, ok, text, ppl=found.ppl.value, reference_ppl=found.base_ppl.value, kld=found.kld.mean,
            kld_tolerance=limit, ln_ppl_ratio=found.ln_ppl_ratio.value, ln_ppl_tolerance=ln_ppl_limit,
        )  # fmt: skip


def _compare(reference: _Output, output: _Output) -> Divergence:
    total = DivergenceSum()
    scores = [score(side.logits, reference.targets) for side in (reference, output)]
    total.add(reference.logits, scores[0], output.logits, scores[1])
    return total.result()


def _outputs(runtime: Runtime, device: str, models: Mapping[str, Path], folder: Path) -> dict[str, _Output]:
    """What every model says on one device, each way. Raises GgufToolError where the device does not compute them."""
    names = {f"{kind}, {way}": (path, n_ubatch) for kind, path in models.items() for way, n_ubatch in WAYS.items()}
    runs = [
        [str(path), n_ubatch, str(folder / f"{number}.npz")] for number, (path, n_ubatch) in enumerate(names.values())
    ]
    text = builtin.texts()["eval_code"].read_text(encoding="utf-8")
    request = {"runtime": str(runtime.path), "device": device, "text": text, "n_ctx": N_CTX, "windows": WINDOWS}
    _ask(request | {"runs": runs})
    outputs = {}
    for number, name in enumerate(names):
        with np.load(folder / f"{number}.npz") as arrays:
            outputs[name] = _Output(arrays["logits"], arrays["targets"])
    return outputs


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's answer. A device that crashes takes only the worker with it."""
    command = [sys.executable, "-m", "gguftool.selftest_worker"]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise GgufToolError(f"no answer after {TIMEOUT} s") from None
    if done.returncode == 0:
        # Libraries may print before it.
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    how = f"{ending(done.returncode)}: " if done.returncode < 0 else ""
    raise GgufToolError(how + last_line(done.stderr).removeprefix("error: "))
