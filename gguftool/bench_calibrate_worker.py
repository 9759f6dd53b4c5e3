"""A process that calibrates, or times calibration against a plain forward pass, and prints what it found as JSON.

    python -m gguftool.bench_calibrate_worker '{"task": "calibrate", ...}'

`bench_calibrate` starts it, so that each figure comes from a process that did nothing else before.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .calibrate import calibrate
from .checkpoint import Checkpoint, open_checkpoint
from .forward import Windows
from .loader import LayerLoader
from .memory import parse_bytes, parse_dtype, plan_memory
from .recorders import neurons_of
from .stats import CalibrationStats, Domain


class Clock:
    """Progress of a calibration, taken apart: seconds that go into windows, solving OBS costs, and loading layers."""

    def __init__(self) -> None:
        self.solving = self.loading = 0.0
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.perf_counter()
        if "OBS" in text:
            self.solving += now - self._last
        self._last = now

    @contextmanager
    def watching_loads(self) -> Iterator[None]:
        """Adds up the time that layers take to load."""
        plain = LayerLoader.materialise_layer

        def timed(loader: LayerLoader, layer: int) -> nn.Module:
            start = time.perf_counter()
            module = plain(loader, layer)
            self.loading += time.perf_counter() - start
            return module

        LayerLoader.materialise_layer = timed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            LayerLoader.materialise_layer = plain  # type: ignore[method-assign]


def run_calibrate(checkpoint: Checkpoint, windows: Windows, options: dict[str, Any], obs: bool) -> dict[str, Any]:
    """One calibration as the command does it: seconds, and what went where."""
    return timed_calibrate(checkpoint, windows, options, obs)[1]


def timed_calibrate(
    checkpoint: Checkpoint, windows: Windows, options: dict[str, Any], obs: bool
) -> tuple[CalibrationStats, dict[str, Any]]:
    """What `run_calibrate` says, and the statistics."""
    limit = parse_bytes(options["memory"]) if options.get("memory") else None
    domains = [(Domain("random", "0" * 64, windows.size), windows)]
    how = plan_memory(
        checkpoint, len(windows), windows.shape[1], parse_dtype(options["dtype"]), limit, moments=None if obs else 0,
        batch=options["batch"],
    )  # fmt: skip
    clock, start = Clock(), time.perf_counter()
    with clock.watching_loads():
        stats = calibrate(checkpoint, domains, Path(options["work"]), how=how, obs=obs, progress=clock)
    seconds = time.perf_counter() - start
    arrays = [*stats.experts.values(), *stats.neurons.values(), stats.expert_inputs, *stats.linears.values()]
    return stats, {
        "seconds": seconds, "solving": clock.solving, "loading": clock.loading, "batch": how.batch, "plan": str(how),
        "statistics_bytes": sum(value.nbytes for value in arrays), "layer_bytes": how.needs.layer,
        "hidden_bytes": how.needs.hidden, "moment_bytes": how.needs.moment * how.needs.n_expert,
        "resident": how.resident, "estimate_bytes": how.peak,
    }  # fmt: skip


def run_speed(checkpoint: Checkpoint, windows: Windows, options: dict[str, Any]) -> dict[str, Any]:
    """The same tokens through the resident model and through calibrations, in turns: seconds of each kind in each round."""
    loader = LayerLoader(checkpoint, "cpu", parse_dtype(options["dtype"]) or torch.float32)
    for name, _ in loader.model.named_children():
        loader.materialise(name)
    model, batch = loader.model, options["batch"]
    few = windows[: options["observer_windows"]]
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: {"seconds": _plain(model, windows, batch)},
        "calibrate": lambda: run_calibrate(checkpoint, windows, options, False),
        "calibrate_obs": lambda: run_calibrate(checkpoint, windows, options, True),
    }
    if len(few):
        kinds["plain_few"] = lambda: {"seconds": _plain(model, few, batch)}
        kinds["observer"] = lambda: {"seconds": _observed(checkpoint, model, few, batch)}
    _plain(model, windows[:batch], batch)  # the first pass finds its memory
    rounds: list[dict[str, Any]] = []
    names = list(kinds)
    for number in range(options["rounds"]):
        turn = number % len(names)
        rounds.append({name: kinds[name]() for name in names[turn:] + names[:turn]})
    return {"rounds": rounds}


@torch.inference_mode()
def _plain(model: nn.Module, windows: Windows, batch: int) -> float:
    """Seconds of transformers' own forward pass."""
    start = time.perf_counter()
    for first in range(0, len(windows), batch):
        model(input_ids=torch.from_numpy(windows[first : first + batch]), use_cache=False)
    return time.perf_counter() - start


def _observed(checkpoint: Checkpoint, model: nn.Module, windows: Windows, batch: int) -> float:
    """Seconds of the forward pass with a dense observer behind every block of experts."""
    row, hooks, found = checkpoint.architecture, [], []
    for layer in checkpoint.moe_layers:
        block = model.get_submodule(f"{row.layers}.{layer}.{row.experts}".rpartition(".")[0])
        experts = model.get_submodule(f"{row.layers}.{layer}.{row.experts}")
        router = model.get_submodule(f"{row.layers}.{layer}.{row.router}").get_parameter("weight")
        observer = DenseObserver(experts, router, checkpoint.n_expert_used)
        hooks.append(block.register_forward_hook(observer))
        found.append(observer)
    try:
        seconds = _plain(model, windows, batch)
    finally:
        for hook in hooks:
            hook.remove()
    assert all(int(observer.frequency.sum()) == windows.size * checkpoint.n_expert_used for observer in found)
    return seconds


class DenseObserver:
    """What the public REAP observer (github.com/CerebrasResearch/reap, src/reap/observer.py) computes, written anew.

    A hook behind the block: every expert on every token into [E, T, d] in float32, then for each expert the norms of the
    tokens that chose it: frequency, sums of norms and of weighted norms, the largest activation. Not its other statistics,
    which serve merging. Its own code wants a module for each expert, which transformers 5 no longer has.
    """

    def __init__(self, experts: nn.Module, router: Tensor, top_k: int) -> None:
        self.experts, self.router, self.top_k = experts, router, top_k
        n_expert = len(router)
        self.frequency = torch.zeros(n_expert, dtype=torch.int64)
        self.ean, self.weighted, self.gates = (torch.zeros(n_expert, dtype=torch.float64) for _ in range(3))
        self.largest = torch.zeros(n_expert)

    @torch.no_grad()
    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], _output: object) -> None:
        """`args[0]`: the input of the block, [B, T, d]."""
        x = args[0].reshape(-1, args[0].shape[-1])
        logits = functional.linear(x, self.router)
        chosen = logits.topk(self.top_k, dim=-1).indices
        down = self.experts.get_parameter("down_proj")
        activations = torch.zeros(len(self.router), *x.shape)
        for expert in range(len(self.router)):
            activations[expert] = functional.linear(neurons_of(self.experts, expert, x), down[expert])
        weights = logits.softmax(dim=-1, dtype=torch.float32)
        self.frequency += torch.bincount(chosen.flatten(), minlength=len(self.router))
        for expert in range(len(self.router)):
            mask = (chosen == expert).any(dim=-1)
            if not mask.any():
                continue
            norm, gate = torch.linalg.vector_norm(activations[expert, mask], dim=-1), weights[mask, expert]
            self.ean[expert] += norm.sum()
            self.weighted[expert] += (norm * gate).sum()
            self.gates[expert] += gate.sum()
            self.largest[expert] = torch.maximum(self.largest[expert], activations[expert, mask].max())


def main() -> None:
    """Runs the task that the argument states."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    checkpoint = open_checkpoint(options["checkpoint"])
    windows = np.random.default_rng(0).integers(0, checkpoint.n_vocab, (options["windows"], options["n_ctx"]))
    if options["task"] == "calibrate":
        found = run_calibrate(checkpoint, windows, options, options["obs"])
    else:
        found = run_speed(checkpoint, windows, options)
    scale = 1 if sys.platform == "darwin" else 1024
    print(json.dumps(found | {"max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}), flush=True)


if __name__ == "__main__":
    main()
