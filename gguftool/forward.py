"""The model's own forward pass over all windows, one decoder layer in memory at a time.

The hidden states of all windows lie on disk. A layer is loaded, run over all of them and freed; what stands in for its
experts records what it sees. After every layer the work directory is a complete state to go on from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import GgufToolError
from .experts import canonical
from .inventory import matrices
from .loader import LayerLoader
from .ranks import ALONE, Ranks
from .recorders import LinearRecorder, Recorder, recording
from .stats import SOLVED, WEIGHT_NORMS, Domain
from .windows import Windows, batches, check_domains
from .workdir import WorkDir

Progress = Callable[[int, int, str], None]
Arrays = dict[str, NDArray[Any]]
# What of a layer is no sum, by the names that a recorder gives: maxima, and what every rank has alike.
LARGEST = ("expert.max_out",)
SAME = tuple(f"neuron.{name}" for name in (*WEIGHT_NORMS, *SOLVED))


@dataclass(frozen=True)
class LayerCall:
    """How the model calls each of its decoder layers for a batch of one size, beside the hidden states."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]


class LayerStream:
    """The model's own forward pass, cut into embedding, decoder layers and final norm."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.loader = LayerLoader(checkpoint, device, dtype)
        self._base, _, self._list = checkpoint.architecture.layers.rpartition(".")
        self._calls: dict[int, LayerCall] = {}

    def outer_modules(self) -> list[str]:
        """Paths of what lies around the decoder layers, without the output matrix: embedding and final norm."""
        base = self.loader.model.get_submodule(self._base)
        children = [(name, child) for name, child in base.named_children() if name != self._list]
        return [f"{self._base}.{name}" for name, child in children if any(True for _ in child.parameters())]

    @torch.inference_mode()
    def embed(self, windows: Windows) -> Tensor:
        """Token ids [B, T] -> what the first decoder layer is given, [B, T, d].

        Learns on the way how the model calls its layers for a batch of this size.
        """
        call, first = LayerCall([], []), []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden)
            call.args.append(args)
            call.kwargs.append(kwargs)
            return hidden

        self._run_without_layers(record, input_ids=torch.from_numpy(windows).to(self.loader.device))
        self._calls[len(windows)] = call
        return first[0]

    @torch.inference_mode()
    def layer(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Decoder layer `index` on hidden states [B, T, d], called as the model calls it."""
        call = self._calls[len(hidden)]
        out = module(hidden, *call.args[index], **call.kwargs[index])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.inference_mode()
    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, d] behind the last layer -> the input of the output matrix, [B, T, d]."""
        return self._run_without_layers(lambda x, *_, **__: x, inputs_embeds=hidden)

    def _run_without_layers(self, stand_in: Callable[..., Tensor], **inputs: Tensor) -> Tensor:
        """Runs the model's own forward with a function in place of every decoder layer."""
        base = self.loader.model.get_submodule(self._base)
        layers = getattr(base, self._list)
        setattr(base, self._list, nn.ModuleList(_StandIn(layer, stand_in) for layer in layers))
        try:
            result: Tensor = base(**inputs, use_cache=False, return_dict=True).last_hidden_state
            return result
        finally:
            setattr(base, self._list, layers)


class _StandIn(nn.Module):
    """Takes a decoder layer's place, with its attributes, and calls a function instead."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__.update(replaced=layer, function=function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["replaced"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        result: Tensor = self.__dict__["function"](*args, **kwargs)
        return result


class LayeredPass:
    """The loops over layers and batches of one pass, whatever is recorded on the way."""

    def __init__(
        self,
        stream: LayerStream,
        domains: Sequence[tuple[Domain, Windows]],
        record: Callable[[nn.Module, int], Recorder],
        *,
        batch: int,
        linears: bool = False,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`record(experts module, decoder index)` makes what stands in for a layer's experts; `batch` windows run at
        once; `linears` adds up the inputs of all other matrices too. Of several `ranks` each runs its share of every
        domain's windows, and all of them save the sums of all. Raises GgufToolError for windows that the model cannot
        be run on."""
        if batch < 1:
            raise GgufToolError(f"a batch of {batch} windows makes no progress; it takes at least 1")
        self.stream, self.checkpoint = stream, stream.checkpoint
        self.n_ctx = check_windows(stream.checkpoint, domains, ranks)
        self.record, self.linears = record, linears
        self.ranks, self.tokens = ranks, sum(windows.size for _, windows in domains)
        parts = [windows[ranks.share(len(windows))] for _, windows in domains]
        self.windows = np.concatenate(parts)
        self.batches = list(batches([len(windows) for windows in parts], batch))
        self.shape = (*self.windows.shape, self.checkpoint.n_embd)
        self.progress = progress or (lambda done, total, text: None)

    def run(self, work: WorkDir) -> None:
        """Embeds, then runs every layer that `work` has not seen finished."""
        self.start(work)
        while work.position is not None and work.position < self.checkpoint.n_layers:
            self.layer(work, work.position)

    def start(self, work: WorkDir) -> None:
        """Embeds all windows where the work directory is new; else only learns how the layers are called."""
        self._line_up(work)
        model, loader = self.stream.loader.model, self.stream.loader
        for path in self.stream.outer_modules():
            loader.materialise(path)
        if work.position is None:
            with work.next_hidden() as append:
                for _, part in self.batches:
                    append(self.stream.embed(self.windows[part]))
            self.checkpoint.check_unchanged()
            work.advance()
        else:
            work.free()
            for size in sorted({part.stop - part.start for _, part in self.batches}):
                self.stream.embed(self.windows[:size])
        embedding = model.get_input_embeddings()
        loader.release(next(path for path, module in model.named_modules() if module is embedding))

    def _line_up(self, work: WorkDir) -> None:
        """Ranks that were stopped may be a layer apart: all go on behind the last one that all have finished."""
        with self.ranks.together():
            pass  # nobody failed on the way here
        positions = self.ranks.all_of(work.position)
        if None in positions:
            work.restart()
        elif work.position is not None and work.position > min(positions):
            work.go_back()
        if None not in positions and len(set(self.ranks.all_of(work.position))) > 1:
            work.restart()

    def layer(self, work: WorkDir, index: int) -> None:
        """Runs all windows through decoder layer `index` and saves its sums."""
        with self.ranks.together():
            experts, arrays = self._run_layer(work, index)
        arrays = self.ranks.add(arrays)
        if experts is not None:
            arrays |= self.ranks.add(experts.arrays(), LARGEST, SAME)
        odd = [name for name, value in arrays.items() if not np.isfinite(value).all()]
        if odd:
            raise GgufToolError(f"layer {index}: the sum {odd[0]} is not finite; the weights are damaged")
        with self.ranks.together():
            self.stream.loader.release_layer(index)
            # A layer that was read from two versions of the checkpoint must not be kept.
            self.checkpoint.check_unchanged()
            work.advance(arrays)
        work.free()

    def _run_layer(self, work: WorkDir, index: int) -> tuple[Recorder | None, Arrays]:
        """Runs this rank's windows through decoder layer `index`: what recorded its experts, and the other sums."""
        row, checkpoint = self.checkpoint.architecture, self.checkpoint
        module = self.stream.loader.materialise_layer(index)
        linears = LinearRecorder()
        residual = torch.zeros((), dtype=torch.float64)
        experts: Recorder | None = None
        hidden = work.hidden()
        with ExitStack() as stack:
            if index in checkpoint.moe_layers:
                target = module.get_submodule(row.experts)
                experts = self.record(canonical(target), index)
                stack.enter_context(recording(target, experts))
            if self.linears:
                stack.enter_context(linears.watching(_matrices(checkpoint, module, index)))
            append = stack.enter_context(work.next_hidden())
            for domain, part in self.batches:
                if experts is not None:
                    experts.domain = domain
                out = self.stream.layer(module, index, _to(hidden[part], self.stream.loader))
                if not torch.isfinite(out).all():
                    raise GgufToolError(
                        f"layer {index}: its output is not finite; the weights are damaged or {out.dtype} overflowed"
                    )
                append(out)
                if self.linears:
                    residual += (1 / out.float().square().sum(dim=-1).clamp(min=1e-30)).sum(dtype=torch.float64).cpu()
                self._report(index, part.stop)
        del hidden
        arrays = {f"linear.{name}": value.cpu().numpy() for name, value in linears.sums.items()}
        if self.linears:
            arrays["residual_inverse"] = residual.reshape(1).numpy()
        return experts, arrays

    def finish(self, work: WorkDir) -> Arrays:
        """The sums at the output matrix, under the name of the tensor that is multiplied there.

        Nothing reads them yet: llama-imatrix leaves that matrix out unless it is told --process-output, as its README says
        that quantizing it is mostly better without, and `quantize.imatrix_entries` leaves it out too. They cost one norm a
        token, beside a pass that is dear to take again, and stats that are added up must have the same sums.
        """
        tied = bool(getattr(self.checkpoint.config, "tie_word_embeddings", False))
        name = "token_embd.weight" if tied else "output.weight"
        with self.ranks.together():
            linears, hidden = LinearRecorder(), work.hidden()
            for _, part in self.batches:
                linears.add(name, self.stream.finish(_to(hidden[part], self.stream.loader)))
        return self.ranks.add({name: value.cpu().numpy() for name, value in linears.sums.items()})

    def note(self, layer: int, text: str) -> None:
        """Says what is being done behind the windows of a layer."""
        total, count = self.checkpoint.n_layers, len(self.windows)
        self.progress((layer + 1) * count, total * count, f"layer {layer + 1} of {total}, {text}")

    def _report(self, layer: int, windows: int) -> None:
        total, count = self.checkpoint.n_layers, len(self.windows)
        self.progress(layer * count + windows, total * count, f"layer {layer + 1} of {total}")


def check_windows(checkpoint: Checkpoint, domains: Sequence[tuple[Domain, Windows]], ranks: Ranks = ALONE) -> int:
    """The context length of the windows.

    Raises GgufToolError for windows that the checkpoint cannot be run on, and for too few of them to share out.
    """
    n_ctx = check_domains(domains, getattr(checkpoint.config, "max_position_embeddings", None), checkpoint.n_vocab)
    if not any(len(windows[ranks.share(len(windows))]) for _, windows in domains):
        raise GgufToolError(
            f"{ranks.count} processes, and {sum(len(windows) for _, windows in domains)} windows of text: one has nothing "
            "to do; start fewer, or give more text"
        )
    return n_ctx


def _to(hidden: Tensor, loader: LayerLoader) -> Tensor:
    return hidden.to(device=loader.device, dtype=loader.model.dtype)


def _matrices(checkpoint: Checkpoint, layer: nn.Module, index: int) -> dict[str, nn.Module]:
    """GGUF tensor name -> module, for every module of a decoder layer that multiplies by a matrix of its own."""
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2:
            found |= dict.fromkeys(matrices(checkpoint, checkpoint.layer_name(index, f"{path}.weight")), module)
    return found


def identity(
    checkpoint: Checkpoint, domains: Sequence[tuple[Domain, Windows]], dtype: torch.dtype, hidden_dtype: torch.dtype
) -> dict[str, Any]:
    """What a stopped run has to share with a new one, for the new one to go on from it."""
    return {
        "model": checkpoint.fingerprint,
        "domains": [domain.as_dict() for domain, _ in domains],
        "windows": [hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest() for _, windows in domains],
        "n_ctx": int(domains[0][1].shape[1]),
        "dtype": str(dtype),
        "hidden_dtype": str(hidden_dtype),
    }
