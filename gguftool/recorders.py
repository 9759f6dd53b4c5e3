"""What is added up while a decoder layer runs: sums at the experts and at the inputs of the other matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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


class Moments(Protocol):
    """What adds up the second moments of a layer's neurons and solves OBS costs from them; `grams.Grams` is one."""

    def see(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None: ...

    def add(self, expert: int, h: Tensor, gate: Tensor) -> None: ...

    def costs(self, counts: Tensor) -> Tensor: ...


def run_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, n_expert: int, run: Callable[..., Tensor]
) -> Tensor:
    """Calls `run(expert, x [n, d], weights [n]) -> [n, d]` for every chosen expert on its own tokens only; [T, d]."""
    out = torch.zeros_like(hidden_states)
    for expert, slots in routed(top_k_index, n_expert):
        tokens = slots // top_k_index.shape[-1]
        gate = top_k_weights.flatten()[slots]
        out.index_add_(0, tokens, run(expert, hidden_states[tokens], gate).to(out.dtype))
    return out


def routed(top_k_index: Tensor, n_expert: int) -> Iterator[tuple[int, Tensor]]:
    """Every expert that was chosen, with the places in the flattened [T, k] where it was, in order."""
    order = torch.argsort(top_k_index.flatten(), stable=True)
    start = 0
    for expert, count in enumerate(torch.bincount(top_k_index.flatten(), minlength=n_expert).tolist()):
        if count:
            yield expert, order[start : start + count]
            start += count


def add_gram(gram: Tensor, h: Tensor, gate: Tensor) -> None:
    """Adds sum of g^2 h h^T over n tokens to a second moment [K, K]: h [n, K], g [n]."""
    weighted = (h * gate[:, None]).to(gram.dtype)
    gram.addmm_(weighted.T, weighted)


class ExpertSums:
    """The sums of `stats` over the tokens of one layer's experts, wherever these tokens come from.

    Attributes:
        experts: sums over the tokens routed to an expert of one domain, name -> float64 [D, E].
        neurons: sums of all domains and the norms of the down columns, name -> float64 [E, K].
        inputs: sum of x^2 over the tokens routed to an expert, float64 [E, d].
        grams: C = sum of g^2 h h^T, float32 [E, K, K], from which `arrays` solves the OBS costs; None where not wanted.
        domain: index of the domain that what comes next belongs to.
    """

    @torch.no_grad()
    def __init__(
        self, n_domains: int, shape: tuple[int, int, int], down: Callable[[int], Tensor], *, obs: bool = False
    ) -> None:
        """`shape` is (E, K, d); `down(expert)` is its down projection [d, K], asked for anew whenever it is needed."""
        n_expert, width, n_embd = shape
        self.down, self.domain = down, 0
        like = down(0)
        self._token_sums = _zeros(like, len(EXPERT_SUMS), n_domains, n_expert)
        self.experts: Sums = dict(zip(EXPERT_SUMS, self._token_sums, strict=True))
        self.neurons: Sums = {name: _zeros(like, n_expert, width) for name in (*NEURON_SUMS, *WEIGHT_NORMS)}
        self.inputs = _zeros(like, n_expert, n_embd)
        self.grams: Tensor | None = None
        if obs:
            kind = torch.promote_types(like.dtype, torch.float32)
            self.grams = torch.zeros(n_expert, width, width, dtype=kind, device=like.device)
        for expert in range(n_expert):
            own = down(expert)
            column = own.to(torch.promote_types(own.dtype, torch.float32)).square().sum(dim=0)
            self.neurons["down_norm_sq"][expert] = column.to(self.inputs.device)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums by the names that the work directory keeps them under."""
        found = {f"expert.{name}": value.cpu().numpy() for name, value in self.experts.items()}
        found |= {f"neuron.{name}": value.cpu().numpy() for name, value in self.neurons.items()}
        if self.grams is not None:
            tokens = self.experts["count"].sum(dim=0)
            found["neuron.obs"] = costs(self.grams, map(self.down, range(len(tokens))), tokens).cpu().numpy()
        return found | {"expert_inputs": self.inputs.cpu().numpy()}

    def add(self, expert: int, x: Tensor, h: Tensor, f: Tensor, gate: Tensor, down: Tensor) -> None:
        """Adds n tokens of an expert: its inputs x [n, d], neurons h [n, K], output f [n, d], its bias included, without
        the router weights [n], and its down projection [d, K]."""
        kind = torch.promote_types(x.dtype, torch.float32)
        _add(self.inputs[expert], x.to(kind).square().sum(dim=0))
        self.record(expert, x, h, f, gate, down)

    def record(self, expert: int, x: Tensor, h: Tensor, f: Tensor, gate: Tensor, down: Tensor) -> None:
        """`add` without the inputs. Per token, and over those of one call, in float32 at least; over calls in float64.

        Neuron projection p_k = h_k <W_:k, f> / ||f|| in its cheap form h * (f W) / ||f||: arXiv 2606.09885 (ENP). Where
        experts have a bias, f holds it: the projection is on what the expert gives, not on W h alone.
        """
        work = torch.promote_types(x.dtype, torch.float32)
        # BF16 rounds f W by as much as it rounded f, and several times as fast; float16 might overflow.
        wide = f.dtype if f.dtype == torch.bfloat16 else work
        proj = (f.to(wide) @ down.to(wide)).to(work)
        x, h, f, gate = (value.to(work) for value in (x, h, f, gate))
        norm = torch.linalg.vector_norm(f, dim=1)
        lengths = (torch.linalg.vector_norm(x, dim=1) * norm).clamp(min=torch.finfo(work).tiny)
        per_token = {
            "count": torch.ones_like(gate),
            "gate": gate,
            "gate_sq": gate.square(),
            "norm": norm,
            "norm_sq": norm.square(),
            "gate_norm": gate * norm,
            "gate_sq_norm_sq": (gate * norm).square(),
            "turn": gate * norm * (1 - (x * f).sum(dim=1) / lengths),
            "max_out": torch.zeros_like(gate),
        }
        rows = torch.stack([per_token[name] for name in EXPERT_SUMS])
        _add(self._token_sums[:, self.domain, expert], rows.sum(dim=1))
        largest = self.experts["max_out"][self.domain, expert]
        torch.maximum(largest, f.abs().max().to(largest.device).double(), out=largest)
        if self.grams is not None:
            add_gram(self.grams[expert], h, gate)
        proj.mul_(h).mul_(torch.where(norm > 0, 1 / norm, 0)[:, None])
        plain, gated = torch.stack([per_token["count"], per_token["gate_sq"]]) @ h.square()
        sums = {"h_sq": plain, "gate_sq_h_sq": gated, "proj": proj.sum(dim=0), "proj_abs": proj.abs_().sum(dim=0)}
        for name, value in sums.items():
            _add(self.neurons[name][expert], value)


class KeptInputs(Protocol):
    """Keeps what experts are given, to compute their neurons a second time; `routes.RoutesFile` is one."""

    def append(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None: ...

    def moments(self, module: nn.Module, expert: int) -> tuple[Tensor, int]: ...

    def close(self) -> None: ...


class ExpertRecorder(ExpertSums):
    """Stands in for an experts module's forward: the same output, and the sums on the way.

    `moments` takes C = sum of g^2 h h^T, from which `arrays` solves the OBS costs; None where not wanted.
    """

    @torch.no_grad()
    def __init__(
        self, module: nn.Module, n_domains: int, shape: tuple[int, int, int], layer: int, moments: Moments | None = None
    ) -> None:
        """`shape` is (E, K, d). Raises GgufToolError for an experts module that is laid out in another way."""
        check_layout(module, shape, layer)
        self.module, self.moments = module, moments
        down = module.get_parameter("down_proj")
        super().__init__(n_domains, shape, lambda expert: down[expert])

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden states [T, d], chosen experts [T, k] and their weights [T, k] -> [T, d]."""
        if self.moments is not None:
            self.moments.see(hidden_states, top_k_index, top_k_weights)
        self._add_inputs(hidden_states, top_k_index)
        return run_experts(hidden_states, top_k_index, top_k_weights, self.inputs.shape[0], self._run)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums, and the OBS costs where they are wanted."""
        found = super().arrays()
        if self.moments is not None:
            found["neuron.obs"] = self.moments.costs(self.experts["count"].sum(dim=0)).cpu().numpy()
        return found

    def _run(self, expert: int, x: Tensor, gate: Tensor) -> Tensor:
        """One expert on its n tokens x [n, d] with router weights [n]: its weighted output [n, d]; adds to the sums."""
        h = neurons_of(self.module, expert, x)
        f = output_of(self.module, expert, h)
        self.record(expert, x, h, f, gate, self.down(expert))
        if self.moments is not None:
            work = torch.promote_types(x.dtype, torch.float32)
            self.moments.add(expert, h.to(work), gate.to(work))
        return f * gate[:, None]

    def _add_inputs(self, x: Tensor, chosen: Tensor) -> None:
        """Adds x^2 to the inputs of the experts that were chosen: one product with zeros and ones for all of them."""
        work = torch.promote_types(x.dtype, torch.float32)
        routed = torch.zeros(self.inputs.shape[0], len(x), dtype=work, device=x.device).scatter_(0, chosen.T, 1.0)
        _add(self.inputs, routed @ x.to(work).square())


class GramSums:
    """C = sum of g^2 h h^T of the experts of one layer that a plan narrows, wherever their tokens come from.

    `arrays` gives the refitted down columns of these experts (see `refit`), not C, which would be too big to keep; with a
    `fix` those of whole experts too, all of them by the scale that takes back what a smaller router does.
    """

    def __init__(
        self,
        down: Callable[[int], Tensor],
        retained: Mapping[int, Neurons],
        solve: Callable[[Tensor, Tensor, Neurons, int], Tensor],
        fix: RouterFix | None = None,
        whole: Collection[int] = (),
        *,
        on_the_way: bool = True,
    ) -> None:
        """`down(expert)`: its down projection [d, K]; `retained`: neurons that stay, by expert that is narrowed;
        `whole`: experts that keep all of theirs; `solve(down [d, K], C [K, K], neurons, tokens) -> [d, w]`."""
        self.down, self.retained, self.solve = down, retained, solve
        self.fix, self.whole = fix, whole
        like = down(0)
        work = torch.promote_types(like.dtype, torch.float32)
        width = like.shape[1]
        wanted = retained if on_the_way else ()
        self.grams = {expert: torch.zeros(width, width, dtype=work, device=like.device) for expert in wanted}
        self.counts = dict.fromkeys(retained, 0)

    def add(self, expert: int, h: Tensor, gate: Tensor) -> None:
        """Adds n tokens of an expert, its neurons h [n, K] and its router weights [n]."""
        if expert in self.grams:
            add_gram(self.grams[expert], h, gate)
            self.counts[expert] += len(h)

    def moments(self, expert: int) -> tuple[Tensor, int]:
        """C of one expert, and how many tokens it runs over."""
        return self.grams[expert], self.counts[expert]

    @torch.no_grad()
    def arrays(self) -> dict[str, NDArray[Any]]:
        """`<expert>.down` -> the new down columns, float32 [d, w]."""
        found = {}
        for expert, neurons in self.retained.items():
            gram, count = self.moments(expert)
            found[expert] = self.solve(self.down(expert), gram, neurons, count).float()
        for expert, scale in self.fix.scales().items() if self.fix is not None else ():
            if expert in found:
                found[expert] = scale * found[expert]
            elif expert in self.whole:
                found[expert] = scale * self.down(expert).float()
        return {f"{expert}.down": columns.cpu().numpy() for expert, columns in found.items()}


class GramRecorder(GramSums):
    """Stands in for an experts module's forward: the same output, and the second moments on the way."""

    def __init__(
        self,
        module: nn.Module,
        retained: Mapping[int, Neurons],
        solve: Callable[[Tensor, Tensor, Neurons, int], Tensor],
        fix: RouterFix | None = None,
        whole: Collection[int] = (),
        kept: KeptInputs | None = None,
    ) -> None:
        """`module`: the experts; `kept`: where C is not added up on the way but computed at the end, an expert at a time.
        All else as in `GramSums`."""
        self.module, self.domain, self.kept = module, 0, kept
        down = module.get_parameter("down_proj")
        super().__init__(lambda expert: down[expert], retained, solve, fix, whole, on_the_way=kept is None)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden states [T, d], chosen experts [T, k] and their weights [T, k] -> [T, d]."""
        n_expert = self.module.get_parameter("down_proj").shape[0]
        if self.fix is not None:
            self.fix.add(hidden_states, top_k_index, top_k_weights)
        if self.kept is not None:
            self.kept.append(hidden_states, top_k_index, top_k_weights)
        return run_experts(hidden_states, top_k_index, top_k_weights, n_expert, self._run)

    def _run(self, expert: int, x: Tensor, gate: Tensor) -> Tensor:
        h = neurons_of(self.module, expert, x)
        self.add(expert, h, gate)
        return output_of(self.module, expert, h) * gate[:, None]

    def moments(self, expert: int) -> tuple[Tensor, int]:
        """C of one expert, and how many tokens it runs over."""
        return super().moments(expert) if self.kept is None else self.kept.moments(self.module, expert)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As in `GramSums`; what was kept goes."""
        found = super().arrays()
        if self.kept is not None:
            self.kept.close()
        return found


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
        if name not in self.sums:
            self.sums[name] = _zeros(x, x.shape[-1])
        _add(self.sums[name], x.square().sum(dim=0))


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
    """Where sums are taken: on the device of `like`, or on the CPU where that cannot count in float64."""
    device = "cpu" if like.device.type == "mps" else like.device
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _add(total: Tensor, value: Tensor) -> None:
    total += value.to(total.device)
