"""Sequential refit: every layer is fitted on what the pruned layers before it give, towards what the original gives.

Two streams of hidden states run through the model: H of the original, and P of the pruned model as it has been fitted so
far. At a layer, with h the neurons of an expert on the pruned stream times their router weights g, and S those it keeps:

1. each expert for itself: the plain refit (`refit.solve`) with C = sum h h^T of the pruned stream;
2. all experts together, in one round: with R the difference between the original layer's output and the pruned one's,
   which holds what the other experts left undone and what the layers before did wrong, and with tokens weighted by
   1 / squared length of the original's output (the norms that read it divide by that; single tokens can be very long),

       W_S' += (sum R h_S^T) (C_SS + lambda I)^-1,    lambda = JOINT_RIDGE x mean of C's diagonal,

   both sums weighted; then R becomes what is left of it, and the next expert has its turn.

The second step works on more unknowns with the same tokens, so its ridge is larger: on two small trained models, 0.5
was at least as good as 0.1 and 0.01 on text from outside the calibration domain, and better inside. More rounds than one
fit the calibration text only. Experts with few tokens are corrected less, N / 2K of it, as in the plain refit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .durable import SAVED
from .errors import GgufToolError
from .experts import canonical, down_bias, neurons_of, output_of
from .forward import LayeredPass, LayerStream, Progress, Windows, identity
from .loader import usable_device
from .memory import DEFAULT_BATCH, MemoryPlan
from .obs import RIDGE
from .overrides import Key, Origin, Overrides
from .plan import LayerPlan, Neurons, PrunePlan
from .recorders import recording, run_experts
from .refit import check_plan, solve
from .routes import CHUNK, Routes, RoutesFile, mapped
from .stats import Domain
from .workdir import WorkDir

JOINT_RIDGE = 0.5


def refit_sequentially(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    domains: Sequence[tuple[Domain, Windows]],
    work_dir: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    how: MemoryPlan | None = None,
    stream: LayerStream | None = None,
    progress: Progress | None = None,
) -> Overrides:
    """The fitted down columns of every expert that keeps a neuron, narrowed or whole. Resumable at every layer.

    On disk meanwhile: the hidden states of both streams, the inputs of a layer's experts and R, five times tokens x d. An
    expert reads its tokens there in their order, but not all of them, so it is quickest where they fit into the free memory.
    In memory a layer and the second moments of one expert at a time; the fitted columns lie in a mapped file until the layer
    is saved. `how` takes the place of `dtype`, and says how many windows run at once; `stream` as in `calibrate`.

    Raises:
        GgufToolError: the plan is for another checkpoint, drops experts from the router, or there is nothing to refit.
    """
    check_plan(checkpoint, plan, sequential=True)
    usable_device(device, solves=True)
    batch = DEFAULT_BATCH
    if how is not None:
        dtype, batch = how.dtype, how.batch
    stream = stream or LayerStream(checkpoint, device, dtype)
    run = _Streams(stream, plan, domains, work_dir, dtype, progress, batch)
    run.run()
    places: dict[Key, tuple[Path, str]] = {
        (layer.index, int(name.partition(".")[0]), "down"): (run.pruned.sums_path(layer.index), name)
        for layer in plan.layers
        for name in run.pruned.names(layer.index)
    }
    origin = Origin("refit", plan.kept_hash, tuple(domain.as_dict() for domain, _ in domains), ("sequential refit",))
    return Overrides(origin, places, run.remove, work_dir)


class _Streams:
    """The two streams and where they stand. The original's is a layer ahead while a layer is fitted."""

    def __init__(
        self, stream: LayerStream, plan: PrunePlan, domains: Sequence[tuple[Domain, Windows]], work_dir: Path,
        dtype: torch.dtype, progress: Progress | None, batch: int = DEFAULT_BATCH,
    ) -> None:  # fmt: skip
        checkpoint = stream.checkpoint
        self.stream, self.checkpoint, self.dtype, self.work_dir = stream, checkpoint, dtype, work_dir
        self.layers = {layer.index: layer for layer in plan.layers}
        self.tell = progress or (lambda done, total, text: None)
        self.passing = LayeredPass(self.stream, domains, lambda module, _: _Inputs(module, None), batch=batch)
        key = identity(checkpoint, domains, dtype, dtype)
        key |= {"refit": plan.kept_hash, "ridge": RIDGE, "joint ridge": JOINT_RIDGE}
        self.original, self.pruned = self._open(key)
        ahead = (self.original.position or 0) - (self.pruned.position or 0)
        if self.original.position is None or self.pruned.position is None or ahead not in (0, 1):
            self.remove()
            self.original, self.pruned = self._open(key)

    def _open(self, key: dict[str, object]) -> tuple[WorkDir, WorkDir]:
        shape = self.passing.shape
        return tuple(  # type: ignore[return-value]
            WorkDir(self.work_dir / name, key | {"stream": name}, shape, self.dtype) for name in ("original", "pruned")
        )

    def run(self) -> None:
        """Both streams through every layer."""
        self.passing.start(self.original)
        self.passing.start(self.pruned)
        assert self.pruned.position is not None and self.original.position is not None
        for index in range(self.pruned.position, self.checkpoint.n_layers):
            self.tell(index, self.checkpoint.n_layers, f"layer {index + 1} of {self.checkpoint.n_layers}")
            if self.original.position == index:
                self.passing.layer(self.original, index)
            if index in self.layers:
                self._fit(index)
            else:
                self.passing.layer(self.pruned, index)
        self.tell(self.checkpoint.n_layers, self.checkpoint.n_layers, "refit")

    def remove(self) -> None:
        """Removes the state of both."""
        for work in (self.original, self.pruned):
            work.remove()
        (self.work_dir / SAVED).unlink(missing_ok=True)
        if self.work_dir.is_dir() and not any(self.work_dir.iterdir()):
            self.work_dir.rmdir()

    def _fit(self, index: int) -> None:
        """Fits layer `index` and moves the pruned stream behind it."""
        module = self.stream.loader.materialise_layer(index)
        target = module.get_submodule(self.checkpoint.architecture.experts)
        experts = canonical(target)
        goal, hidden = self.original.hidden(), self.pruned.hidden()
        n_tokens, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        with ExitStack() as stack:
            given = RoutesFile(self.pruned.path / "inputs.partial", n_tokens, width, self.dtype)
            stack.callback(given.close)
            rest = stack.enter_context(mapped(self.pruned.path / "rest.partial", (n_tokens, width), torch.float32))
            with recording(target, _Inputs(experts, given)):
                for _, part in self.passing.batches:
                    batch = hidden[part].to(device=self.stream.loader.device, dtype=self.dtype)
                    out = self.stream.layer(module, index, batch)
                    if not torch.isfinite(out).all():
                        raise GgufToolError(f"layer {index}: its output is not finite on the pruned stream")
                    span = slice(part.start * hidden.shape[1], part.stop * hidden.shape[1])
                    rest[span] = (goal[part].float() - out.float().cpu()).reshape(-1, width)
            size = max(1, sum(map(len, self.layers[index].retained)) * width)
            room = stack.enter_context(mapped(self.pruned.path / "fitted.partial", (size,), torch.float32))
            fit = LayerFit(experts, given.routes(), rest, _token_weights(goal), room)
            fitted = fit.solve(self.layers[index])
            with self.pruned.next_hidden() as append:
                for _, part in self.passing.batches:
                    span = slice(part.start * hidden.shape[1], part.stop * hidden.shape[1])
                    append((goal[part].float() - rest[span].view(goal[part].shape)).to(self.dtype))
        self.stream.loader.release_layer(index)
        self.checkpoint.check_unchanged()
        self.pruned.advance({f"{expert}.down": values for expert, values in fitted.items()})
        self.pruned.free()


class _Inputs:
    """Stands in for an experts module's forward: the same output; what comes in is kept where there is a file for it."""

    def __init__(self, module: nn.Module, file: RoutesFile | None) -> None:
        self.module, self.file, self.domain = module, file, 0

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden states [n, d], chosen experts [n, k] and their weights [n, k] -> [n, d]."""
        if self.file is not None:
            self.file.append(hidden_states, top_k_index, top_k_weights)
        down = self.module.get_parameter("down_proj")

        def run(expert: int, x: Tensor, gate: Tensor) -> Tensor:
            return output_of(self.module, expert, neurons_of(self.module, expert, x)) * gate[:, None]

        return run_experts(hidden_states, top_k_index, top_k_weights, down.shape[0], run)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Nothing is added up."""
        return {}


class LayerFit:
    """The fit of one layer's experts.

    Attributes:
        rest: R, float32 [T, d]: on entry the original layer's output minus that of the layer with all neurons on the pruned
            stream; after `solve` minus that of the fitted layer. Changed in place.
    """

    def __init__(
        self, experts: nn.Module, routes: Routes, rest: Tensor, weights: Tensor, room: Tensor | None = None
    ) -> None:
        """`weights`: what each token counts in the joint step, [T]. `room`: float32, where to keep the fitted columns of all
        experts, d for each kept neuron, instead of in memory."""
        self.experts, self.routes, self.rest, self.weights = experts, routes, rest, weights
        self.room = room
        self.down = experts.get_parameter("down_proj")

    @torch.no_grad()
    def solve(self, plan: LayerPlan) -> dict[int, NDArray[np.float32]]:
        """The fitted down columns, expert -> float32 [d, w], of every expert that keeps a neuron and saw a token."""
        fitted: dict[int, Tensor] = {}
        tokens: dict[int, tuple[Tensor, Tensor]] = {}
        for expert, neurons in zip(plan.router, plan.retained, strict=True):
            rows, weights = self.routes.of(expert)
            if len(rows):
                tokens[expert] = (rows, weights)
                fitted[expert] = self._keep(self._alone(expert, neurons, *tokens[expert]))
        for expert, neurons in zip(plan.router, plan.retained, strict=True):
            if expert in fitted and len(neurons):
                self._together(expert, neurons, fitted[expert], *tokens[expert])
        return {e: columns.float().cpu().numpy() for e, columns in fitted.items() if columns.shape[1]}

    def _keep(self, columns: Tensor) -> Tensor:
        """The columns where they stay until the layer is saved."""
        if self.room is None:
            return columns
        place, self.room = self.room[: columns.numel()], self.room[columns.numel() :]
        return place.view(columns.shape).copy_(columns)

    def _alone(self, expert: int, neurons: Neurons, rows: Tensor, weights: Tensor) -> Tensor:
        """The plain refit of an expert; R takes up what it changes."""
        down = self.down[expert].float()
        columns = down[:, torch.from_numpy(neurons).to(down.device)]
        if 0 < len(neurons) < down.shape[1]:
            columns = solve(down, self._gram(expert, rows, weights), neurons, len(rows)).float()
        if len(neurons) < down.shape[1]:
            for chunk, h in self._neurons(expert, rows, weights):
                self._add(chunk, h @ down.T - h[:, torch.from_numpy(neurons).to(h.device)] @ columns.T)
        bias = down_bias(self.experts, expert)
        if bias is not None and not len(neurons):
            self._add(rows.cpu(), (weights[:, None] * bias).float())
        return columns

    def _together(self, expert: int, neurons: Neurons, fitted: Tensor, rows: Tensor, weights: Tensor) -> None:
        """One step of the joint fit: what of R this expert's kept neurons can explain goes into `fitted`."""
        kept = torch.from_numpy(neurons).to(self.down.device)
        gram = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=self.down.device)
        cross = torch.zeros(self.down.shape[1], len(kept), dtype=torch.float64, device=self.down.device)
        energy = 0.0
        for chunk, h in self._neurons(expert, rows, weights):
            counts = self.weights[chunk].to(h.device)[:, None]
            energy += float((counts * h).double().mul(h).sum())
            own = h[:, kept]
            gram += (own.T @ (counts * own)).double()
            cross += (self.rest[chunk].to(own.device).T @ (counts * own)).double()
        width = self.down.shape[2]
        ridge = JOINT_RIDGE * energy / width
        if ridge <= 0:
            return
        gram.diagonal().add_(ridge)
        step = torch.linalg.solve(gram, cross.T).T * min(1.0, len(rows) / (2 * width))
        fitted += step.float().to(fitted.device)
        for chunk, h in self._neurons(expert, rows, weights):
            self._add(chunk, -(h[:, kept] @ step.float().T))

    def _gram(self, expert: int, rows: Tensor, weights: Tensor) -> Tensor:
        width = self.down.shape[2]
        gram = torch.zeros(width, width, dtype=torch.float32, device=self.down.device)
        for _, h in self._neurons(expert, rows, weights):
            gram.addmm_(h.T, h)
        return gram

    def _neurons(self, expert: int, rows: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return self.routes.neurons(self.experts, expert, rows, weights, CHUNK)

    def _add(self, rows: Tensor, change: Tensor) -> None:
        # A token has an expert once, so no row is named twice.
        self.rest[rows] += change.cpu()


def _token_weights(goal: Tensor) -> Tensor:
    """1 / squared length of the original's output, normalised to mean 1: [windows, n_ctx, d] -> float32 [T]."""
    inverse = torch.cat([1 / window.float().square().sum(dim=-1).clamp(min=1e-30) for window in goal])
    return inverse / inverse.mean()
