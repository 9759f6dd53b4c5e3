"""What is added up while a decoder layer runs: sums at the experts and at the inputs of the other matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .errors import GgufToolError
from .experts import neurons_of, output_of
from .obs import costs
from .router_fix import RouterFix
from .stats import EXPERT_SUMS, NEURON_SUMS, WEIGHT_NORMS

Sums = dict[str, Tensor]
Neurons = NDArray[np.int64]


class Recorder(Protocol):
    """What stands in for an experts module's forward: the same output, and something recorded on the way."""

    domain: int

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor: ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was recorded, to be saved with the layer."""
        ...


def run_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, n_expert: int, run: Callable[..., Tensor]
) -> Tensor:
    """Calls `run(expert, x [n, d], weights [n]) -> [n, d]` for every chosen expert on its own tokens only; [T, d]."""
    out = torch.zeros_like(hidden_states)
    k = top_k_index.shape[-1]
    order = torch.argsort(top_k_index.flatten(), stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=n_expert)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if not count:
            continue
        slots = order[start : start + count]
        start += count
        tokens = slots // k
        gate = top_k_weights.flatten()[slots]
        out.index_add_(0, tokens, run(expert, hidden_states[tokens], gate).to(out.dtype))
    return out


class ExpertRecorder:
    """Stands in for an experts module's forward: the same output, and the sums of `stats` on the way.

    Attributes:
        experts: sums over the tokens routed to an expert of one domain, name -> float64 [D, E].
        neurons: sums of all domains and the norms of the down columns, name -> float64 [E, K].
        inputs: sum of x^2 over the tokens routed to an expert, float64 [E, d].
        grams: C = sum of g^2 h h^T, float32 [E, K, K], from which `arrays` solves the OBS costs; None where not wanted.
        domain: index of the domain that the next call belongs to.
    """

    @torch.no_grad()
    def __init__(
        self, module: nn.Module, n_domains: int, shape: tuple[int, int, int], layer: int, *, obs: bool = False
    ) -> None:
        """`shape` is (E, K, d). Raises GgufToolError for an experts module that is laid out in another way."""
        n_expert, width, n_embd = shape
        check_layout(module, shape, layer)
        self.module, self.domain = module, 0
        down = module.get_parameter("down_proj")
        self._token_sums = _zeros(down, len(EXPERT_SUMS), n_domains, n_expert)
        self.experts: Sums = dict(zip(EXPERT_SUMS, self._token_sums, strict=True))
        self.neurons: Sums = {name: _zeros(down, n_expert, width) for name in (*NEURON_SUMS, *WEIGHT_NORMS)}
        self.inputs = _zeros(down, n_expert, n_embd)
        self.grams: Tensor | None = None
        if obs:
            kind = torch.promote_types(down.dtype, torch.float32)
            self.grams = torch.zeros(n_expert, width, width, dtype=kind, device=down.device)
        for expert in range(n_expert):
            self.neurons["down_norm_sq"][expert] = down[expert].double().square().sum(dim=0)

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden states [T, d], chosen experts [T, k] and their weights [T, k] -> [T, d]."""
        return run_experts(hidden_states, top_k_index, top_k_weights, self.inputs.shape[0], self._run)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums by the names that the work directory keeps them under."""
        found = {f"expert.{name}": value.cpu().numpy() for name, value in self.experts.items()}
        found |= {f"neuron.{name}": value.cpu().numpy() for name, value in self.neurons.items()}
        if self.grams is not None:
            down, tokens = self.module.get_parameter("down_proj"), self.experts["count"].sum(dim=0)
            found["neuron.obs"] = costs(self.grams, down, tokens).cpu().numpy()
        return found | {"expert_inputs": self.inputs.cpu().numpy()}

    def _run(self, expert: int, x: Tensor, gate: Tensor) -> Tensor:
        """One expert on its n tokens x [n, d] with router weights [n]: its weighted output [n, d]; adds to the sums."""
        down = self.module.get_parameter("down_proj")[expert]
        h = neurons_of(self.module, expert, x)
        f = output_of(self.module, expert, h)
        self._record(expert, x, h, f, gate, down)
        return f * gate[:, None]

    def _record(self, expert: int, x: Tensor, h: Tensor, f: Tensor, gate: Tensor, down: Tensor) -> None:
        """Adds n tokens to the sums. Per token in float32 at least, over tokens in float64.

        Neuron projection p_k = h_k <W_:k, f> / ||f|| in its cheap form h * (f W) / ||f||: arXiv 2606.09885 (ENP).
        """
        work = torch.promote_types(x.dtype, torch.float32)
        x, h, f, gate, down = (value.to(work) for value in (x, h, f, gate, down))
        norm = torch.linalg.vector_norm(f, dim=1)
        cosine = functional.cosine_similarity(x, f, dim=1, eps=torch.finfo(work).tiny)
        per_token = {
            "count": torch.ones_like(gate),
            "gate": gate,
            "gate_sq": gate.square(),
            "norm": norm,
            "norm_sq": norm.square(),
            "gate_norm": gate * norm,
            "gate_sq_norm_sq": (gate * norm).square(),
            "turn": gate * norm * (1 - cosine),
            "max_out": torch.zeros_like(gate),
        }
        rows = torch.stack([per_token[name] for name in EXPERT_SUMS])
        self._token_sums[:, self.domain, expert] += rows.sum(dim=1, dtype=torch.float64)
        largest = self.experts["max_out"][self.domain, expert]
        torch.maximum(largest, f.abs().max().double(), out=largest)
        h_sq = h.square()
        proj = h * (f @ down) * torch.where(norm > 0, 1 / norm, 0)[:, None]
        per_neuron = {
            "h_sq": h_sq,
            "gate_sq_h_sq": gate.square()[:, None] * h_sq,
            "proj": proj,
            "proj_abs": proj.abs(),
        }
        if self.grams is not None:
            weighted = (h * gate[:, None]).to(self.grams.dtype)
            self.grams[expert].addmm_(weighted.T, weighted)
        for name, values in per_neuron.items():
            self.neurons[name][expert] += values.sum(dim=0, dtype=torch.float64)
        self.inputs[expert] += x.square().sum(dim=0, dtype=torch.float64)


class GramRecorder:
    """Stands in for an experts module's forward and takes C = sum of g^2 h h^T of the experts that a plan narrows.

    `arrays` gives the refitted down columns of these experts (see `refit`), not C, which would be too big to keep; with a
    `fix` those of whole experts too, all of them by the scale that takes back what a smaller router does.
    """

    def __init__(
        self,
        module: nn.Module,
        retained: Mapping[int, Neurons],
        solve: Callable[[Tensor, Tensor, Neurons, int], Tensor],
        fix: RouterFix | None = None,
        whole: Collection[int] = (),
    ) -> None:
        """`retained`: neurons that stay, by expert that is narrowed; `whole`: experts that keep all of theirs;
        `solve(down [d, K], C [K, K], neurons, tokens) -> [d, w]`."""
        self.module, self.retained, self.solve, self.domain = module, retained, solve, 0
        self.fix, self.whole = fix, whole
        down = module.get_parameter("down_proj")
        width = down.shape[2]
        work = torch.promote_types(down.dtype, torch.float32)
        self.grams = {expert: torch.zeros(width, width, dtype=work, device=down.device) for expert in retained}
        self.counts = dict.fromkeys(retained, 0)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden states [T, d], chosen experts [T, k] and their weights [T, k] -> [T, d]."""
        n_expert = self.module.get_parameter("down_proj").shape[0]
        if self.fix is not None:
            self.fix.add(hidden_states, top_k_index, top_k_weights)
        return run_experts(hidden_states, top_k_index, top_k_weights, n_expert, self._run)

    def _run(self, expert: int, x: Tensor, gate: Tensor) -> Tensor:
        h = neurons_of(self.module, expert, x)
        if expert in self.grams:
            weighted = (h * gate[:, None]).to(self.grams[expert].dtype)
            self.grams[expert].addmm_(weighted.T, weighted)
            self.counts[expert] += len(x)
        return output_of(self.module, expert, h) * gate[:, None]

    @torch.no_grad()
    def arrays(self) -> dict[str, NDArray[Any]]:
        """`<expert>.down` -> the new down columns, float32 [d, w]."""
        down = self.module.get_parameter("down_proj")
        found = {
            expert: self.solve(down[expert], self.grams[expert], neurons, self.counts[expert]).float()
            for expert, neurons in self.retained.items()
        }
        for expert, scale in self.fix.scales().items() if self.fix is not None else ():
            if expert in found or expert in self.whole:
                found[expert] = scale * found.get(expert, down[expert].float())
        return {f"{expert}.down": columns.cpu().numpy() for expert, columns in found.items()}


class LinearRecorder:
    """Adds up x^2 over all tokens for the inputs of matrices: GGUF tensor name -> float64 [columns]."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Adds up the inputs of the modules (by the name to keep them under) for a while."""
        hooks = [m.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, m in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.add(name, args[0] if args else next(iter(kwargs.values())))

        return add

    def add(self, name: str, x: Tensor) -> None:
        """Adds x [..., columns]."""
        x = x.reshape(-1, x.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = x.square().sum(dim=0, dtype=torch.float64)
        self.sums[name] = self.sums[name] + total if name in self.sums else total


@contextmanager
def recording(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Puts the recorder in place of the experts module's forward for a while."""
    module.forward = recorder.__call__
    try:
        yield
    finally:
        del module.forward


def check_layout(module: nn.Module, shape: tuple[int, int, int], layer: int) -> None:
    """Raises GgufToolError unless the experts are plain stacks, [E, 2K, d] and [E, d, K], with or without biases."""
    n_expert, width, n_embd = shape
    want: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (n_expert, 2 * width, n_embd),
        "down_proj": (n_expert, n_embd, width),
    }
    if getattr(module, "has_bias", False):
        want |= {"gate_up_proj_bias": (n_expert, 2 * width), "down_proj_bias": (n_expert, n_embd)}
    have = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if have != want:
        raise GgufToolError(f"layer {layer}: the experts are laid out as {have}, gguftool reads {want}")
    other = {"is_transposed": False, "has_gate": True, "has_post_expert_norm": False}
    odd = [name for name, value in other.items() if getattr(module, name, value) != value]
    gated = hasattr(module, "_apply_gate") or callable(getattr(module, "act_fn", None))
    if odd or not gated:
        raise GgufToolError(f"layer {layer}: experts with {', '.join(odd) or 'no act_fn'} are not supported")


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
