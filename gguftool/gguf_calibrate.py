"""Calibration of a GGUF by llama.cpp itself: the sums of `calibrate`, for whoever has no checkpoint.

The first pass over the texts takes every sum, and the second moments of as many layers as memory allows; further passes
take those of the other layers. In a quantized file everything is measured as the file computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ggml_nodes import ggml_path
from .gguf_file import Progress
from .gguf_model import GgufModel
from .gguf_pass import SAVE_SECONDS, Arrays, Corpus, GgufPasses, Stage, StageDir, check_memory, groups, norm_topk
from .llama_observer import Routed
from .obs import costs
from .recorders import ExpertSums, LinearRecorder, add_gram, routed
from .stats import EXPERT_SUMS, NEURON_SUMS, SOLVED, WEIGHT_NORMS, CalibrationStats, Domain
from .windows import Windows

# A layer's K x K second moments may take so much memory before OBS costs are left out: 302 MB at Qwen3-30B's sizes.
OBS_BYTES = 2 << 30


def calibrate_gguf(
    model: GgufModel,
    domains: Sequence[tuple[Domain, Windows]],
    work_dir: Path,
    *,
    llama: Any,
    batch: int = 4,
    obs: bool | None = None,
    memory: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> CalibrationStats:
    """Runs the GGUF over the windows of all domains on the CPU and returns what was measured.

    Args:
        domains: one (domain, token ids [windows, n_ctx]) for each text, as `corpus.load_domain` gives them.
        work_dir: holds the sums between passes and now and then within one. A run that was stopped goes on from there
            when it is started again on the same file and texts. Removed at the end, behind the saving to `out`.
        llama: the llama_cpp module. threads: of llama.cpp; by default all that this process may use.
        batch: windows that run at once, fewer where the vocabulary is large.
        obs: whether to solve OBS costs too; None where a layer's second moments take at most OBS_BYTES.
        memory: bytes that second moments may take; what does not fit costs further passes over the texts.
        save_seconds: how often the sums are saved at most; 0 for behind every batch.
        progress: called with (windows of all passes done, all of them, which pass runs).

    Raises GgufToolError for a file or windows that do not fit, and where a sum is not finite.
    """
    corpus, ggml = Corpus.of(model, domains, batch), ggml_path(llama)
    obs = solves_obs(model, obs, memory)
    parts = groups(model.moe_layers, obs_bytes(model), memory) if obs else [()]
    work = StageDir(work_dir, corpus.identity(model) | {"obs": [list(part) for part in parts]})
    stages: list[Callable[[], Stage]] = [partial(_Sums, model, ggml, len(domains), parts[0])]
    stages += [partial(_Moments, model, ggml, part) for part in parts[1:]]
    GgufPasses(llama, model, corpus, work, threads=threads, progress=progress, save_seconds=save_seconds).run(stages)
    arrays: Arrays = {}
    for stage in range(len(stages)):
        arrays |= work.load(stage)
    model = replace(model, norm_topk=norm_topk(llama, model))
    stats = _stats(model, corpus, arrays, (*NEURON_SUMS, *WEIGHT_NORMS, *(SOLVED if obs else ())))
    stats.check()
    if out is not None:
        stats.save(out)
    work.remove()
    return stats


def solves_obs(model: GgufModel, obs: bool | None, memory: int | None) -> bool:
    """Whether OBS costs are solved; `obs` and `memory` as in `calibrate_gguf`.

    Raises GgufToolError where they are and `memory` does not hold the second moments of one layer.
    """
    each = obs_bytes(model)
    if obs is None:
        obs = each <= OBS_BYTES
    if obs:
        check_memory(each, memory, "stats without OBS costs (`gguftool calibrate --no-obs`)")
    return obs


def obs_bytes(model: GgufModel) -> int:
    """Bytes of one layer's second moments, [E, K, K] in float32."""
    return 4 * model.n_expert * model.n_ff_exp**2


def _stats(model: GgufModel, corpus: Corpus, arrays: Arrays, neurons: Sequence[str]) -> CalibrationStats:
    layers = model.moe_layers
    residual = (
        arrays["residual"] if np.array_equal(arrays["residual_tokens"], [corpus.windows.size] * len(layers)) else None
    )
    linears = {name.removeprefix("linear."): v for name, v in arrays.items() if name.startswith("linear.")}
    # A matrix that not every token runs through has no place in sums over all tokens.
    linears = {name: v for name, v in linears.items() if arrays[f"tokens.{name}"] == corpus.windows.size}
    return CalibrationStats(
        model=model.facts(),
        domains=corpus.domains,
        n_ctx=corpus.n_ctx,
        experts={name: np.stack([arrays[f"{i}.expert.{name}"] for i in layers], axis=1) for name in EXPERT_SUMS},
        neurons={name: np.stack([arrays[f"{i}.neuron.{name}"] for i in layers]) for name in neurons},
        expert_inputs=np.stack([arrays[f"{i}.expert_inputs"] for i in layers]),
        residual_inverse=residual,
        linears=linears,
        linear_tokens=corpus.windows.size,
    )


class _Sums:
    """The first pass: every sum of every layer, and the second moments of the layers `moments`."""

    whole = True

    def __init__(self, model: GgufModel, ggml: Path, n_domains: int, moments: Sequence[int]) -> None:
        self.layers, self.domain = model.moe_layers, 0
        shape = (model.n_expert, model.n_ff_exp, model.n_embd)
        self._experts = {
            layer: ExpertSums(
                n_domains, shape, partial(model.down, layer, ggml=ggml), obs=layer in moments
            )
            for layer in model.moe_layers
        }  # fmt: skip
        self._linears = LinearRecorder()
        self._tokens: dict[str, Tensor] = {}
        self._residual = torch.zeros(2, len(self.layers), dtype=torch.float64)

    @torch.no_grad()
    def experts(self, layer: int, seen: Routed) -> None:
        """Adds the tokens of one batch to a layer's sums."""
        sums = self._experts[layer]
        sums.domain = self.domain
        assert seen.f is not None
        outputs = seen.f.flatten(0, 1)
        for expert, slots in routed(seen.chosen, len(sums.inputs)):
            x, h, weights = seen.of(slots)
            sums.add(expert, x, h, outputs[slots], weights, sums.down(expert))

    def matrix(self, name: str, x: Tensor) -> None:
        """Adds the inputs of another matrix, [T, columns]."""
        self._linears.add(name, x)
        self._tokens[name] = self._tokens.get(name, torch.zeros((), dtype=torch.int64)) + len(x)

    def residual(self, layer: int, out: Tensor) -> None:
        """Adds 1 / squared length of the residual stream behind a layer with experts, [T, d]."""
        if layer in self.layers:
            own = self._residual[:, self.layers.index(layer)]
            own[0] += (1 / out.square().sum(dim=-1).clamp(min=1e-30)).sum(dtype=torch.float64)
            own[1] += len(out)

    def sums(self) -> dict[str, Tensor]:
        """Everything so far."""
        found = {"residual": self._residual}
        found |= {f"linear.{name}": value for name, value in self._linears.sums.items()}
        found |= {f"tokens.{name}": value for name, value in self._tokens.items()}
        for layer, own in self._experts.items():
            found |= {f"{layer}.{name}": value for name, value in _live(own).items()}
        return found

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Takes up what `sums` gave."""
        self._residual.copy_(sums["residual"])
        for name, value in sums.items():
            kind, _, rest = name.partition(".")
            if kind in ("linear", "tokens"):
                (self._linears.sums if kind == "linear" else self._tokens)[rest] = value
        for layer, own in self._experts.items():
            for name, value in _live(own).items():
                value.copy_(sums[f"{layer}.{name}"])

    def arrays(self) -> Arrays:
        """The sums, with the OBS costs in place of the second moments."""
        found: Arrays = {"residual": self._residual[0].numpy(), "residual_tokens": self._residual[1].numpy()}
        found |= {f"linear.{name}": value.numpy() for name, value in self._linears.sums.items()}
        found |= {f"tokens.{name}": value.numpy() for name, value in self._tokens.items()}
        for layer, own in self._experts.items():
            found |= {f"{layer}.{name}": value for name, value in own.arrays().items()}
        return found


def _live(own: ExpertSums) -> dict[str, Tensor]:
    """What `ExpertSums` adds to."""
    found = {f"expert.{name}": value for name, value in own.experts.items()}
    found |= {f"neuron.{name}": value for name, value in own.neurons.items()} | {"inputs": own.inputs}
    return found | ({} if own.grams is None else {"grams": own.grams})


class _Moments:
    """A further pass: the second moments of some layers, for their OBS costs."""

    whole = False

    def __init__(self, model: GgufModel, ggml: Path, layers: Sequence[int]) -> None:
        self.layers, self.domain = tuple(layers), 0
        self._model, self._ggml = model, ggml
        n_expert, width = model.n_expert, model.n_ff_exp
        self._grams = {layer: torch.zeros(n_expert, width, width) for layer in layers}
        self._tokens = {layer: torch.zeros(n_expert, dtype=torch.float64) for layer in layers}

    @torch.no_grad()
    def experts(self, layer: int, seen: Routed) -> None:
        """Adds the tokens of one batch to a layer's second moments."""
        for expert, slots in routed(seen.chosen, self._model.n_expert):
            _, h, weights = seen.of(slots)
            add_gram(self._grams[layer][expert], h, weights)
            self._tokens[layer][expert] += len(slots)

    def matrix(self, name: str, x: Tensor) -> None:
        """Not wanted."""

    def residual(self, layer: int, out: Tensor) -> None:
        """Not wanted."""

    def sums(self) -> dict[str, Tensor]:
        """Everything so far."""
        found = {f"grams.{layer}": value for layer, value in self._grams.items()}
        return found | {f"tokens.{layer}": value for layer, value in self._tokens.items()}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Takes up what `sums` gave."""
        for name, value in self.sums().items():
            value.copy_(sums[name])

    def arrays(self) -> Arrays:
        """The OBS costs."""
        return {
            f"{layer}.neuron.obs": costs(
                grams, (self._model.down(layer, e, self._ggml) for e in range(len(grams))), self._tokens[layer]
            ).numpy()
            for layer, grams in self._grams.items()
        }
