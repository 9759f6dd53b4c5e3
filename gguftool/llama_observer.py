"""What flows through llama.cpp while it runs a model: the inputs of its matrices, and what its experts do.

llama.cpp asks a callback about each node of its graph, and gives it the nodes that it wanted as soon as they are computed.
Nodes are recognised by the weights that they multiply by, and read through their sources, so that architectures with names
of their own will do: of `mul_mat_id` with a layer's down projection source 1 is h, the neurons, source 2 the chosen
experts, and the result f; of the same with gate or up source 1 is x. Only two names of llama.cpp's graph are needed: the
product of f with the router's weights (`ffn_moe_weighted`), and the residual stream behind a layer (`l_out`).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import GgufToolError
from .ggml_nodes import CALLBACK, Ggml, address, ggml_path, name_of
from .perplexity import Loaded, Session

_STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
# llama.cpp's own names, whole: ggml calls what it derives from a node "l_out-3 (reshaped)", "l_out-3 (view)" and so on.
_RESIDUAL = re.compile(r"l_out-(\d+)")
_WEIGHTED = re.compile(r"ffn_moe_weighted-\d+")
_NORMED = re.compile(r"ffn_moe_weights_(?:norm|softmax)-\d+")
_F32 = 0
_FLASH_ATTENTION_OFF = 0


@dataclass(frozen=True)
class Routed:
    """What T tokens did in one layer's experts, k of them each.

    Attributes:
        x: what the experts were given, [T, 1, d], or [T, k, d] where it is not the same for all.
        chosen: int64 [T, k]. weights: what their outputs are multiplied by, [T, k]; the number that some architectures
            have for each expert is part of it.
        h: neurons, [T, k, K]. f: outputs before the weights, [T, k, d], or None where they were not wanted.
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor
    h: Tensor
    f: Tensor | None

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [n, d], h [n, K], weights [n]) at places of the flattened [T, k]."""
        k = self.chosen.shape[1]
        x = self.x[slots // k, slots % k if self.x.shape[1] > 1 else 0]
        return x, self.h.flatten(0, 1)[slots], self.weights.flatten()[slots]


class Sink(Protocol):
    """Who takes what was seen."""

    @property
    def layers(self) -> Collection[int]:
        """Decoder layers whose experts are wanted. The rest of the graph is not computed if nothing else is wanted."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the outputs of the experts, the inputs of other matrices and the residual stream are wanted too."""
        ...

    def experts(self, layer: int, seen: Routed) -> None:
        """The experts of a layer ran."""
        ...

    def matrix(self, name: str, x: Tensor) -> None:
        """x [T, columns] is multiplied by the matrix `name`."""
        ...

    def residual(self, layer: int, out: Tensor) -> None:
        """The residual stream behind a layer, [T, d]."""
        ...


class _Watcher:
    """The callback's state while one batch runs."""

    def __init__(self, ggml: Ggml, sink: Sink) -> None:
        self.ggml, self.sink = ggml, sink
        self.mul_mat, self.mul_mat_id = ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID")
        self.mul, self.add_id = ggml.op("MUL"), ggml.op("ADD_ID")
        self.norm_topk = False
        self._layer: int | None = None
        self._x: dict[int, Tensor] = {}
        self._pending: dict[str, Any] = {}
        self._pending_weights = torch.ones(())
        self._output = 0
        self._shared: tuple[int, Tensor] | None = None
        self._left = set(sink.layers)

    def wants(self, node: Any) -> bool:
        """Whether the values of a node are needed; it has not been computed yet."""
        if node.op == self.mul_mat_id:
            match = _STACK.fullmatch(name_of(node.src[0].contents))
            return (
                match is not None
                and int(match[1]) in self.sink.layers
                and (match[2] == "down" or int(match[1]) not in self._x)
            )
        if node.op in (self.mul, self.add_id) and self._output:
            return address(node.src[0]) == self._output
        if _NORMED.fullmatch(name_of(node)):
            self.norm_topk = True
        if not self.sink.whole:
            return False
        if node.op == self.mul_mat:
            weight = node.src[0].contents
            return weight.name.endswith(b".weight") and weight.ne[2] * weight.ne[3] == 1
        return _RESIDUAL.fullmatch(name_of(node)) is not None

    def take(self, tensor: Any) -> bool:
        """Takes the values of a node that `wants` wanted. False where nothing more is needed of this graph."""
        node = tensor.contents
        if node.op == self.mul_mat_id:
            match = _STACK.fullmatch(name_of(node.src[0].contents))
            assert match is not None
            self._stack(tensor, int(match[1]), match[2])
        elif node.op == self.mul_mat:
            self.sink.matrix(name_of(node.src[0].contents), self._rows(node.src[1]))
        elif self._output and address(node.src[0]) == self._output:
            self._follow(tensor)
        else:
            match, values = _RESIDUAL.fullmatch(name_of(node)), self._floats(tensor)
            assert match is not None
            self.sink.residual(int(match[1]), values.reshape(-1, values.shape[-1]))
            self._shared = None
        return self.sink.whole or bool(self._left) or bool(self._pending)

    def finish(self) -> None:
        """The graph has been computed: gives on what waits for weights that are not applied behind the experts."""
        if self._pending:
            self._give(self._pending_weights)

    def _stack(self, tensor: Any, layer: int, role: str) -> None:
        node = tensor.contents
        if role != "down":
            self._x[layer] = self._floats(node.src[1])[0]
            return
        self.finish()
        chosen = torch.from_numpy(self.ggml.read(node.src[2])[0, 0]).long()
        self._layer, self._output = layer, address(tensor)
        self._pending_weights = torch.ones(chosen.shape)
        self._pending = {
            "x": self._x.pop(layer),
            "chosen": chosen,
            "h": self._floats(node.src[1])[0],
            "f": self._floats(tensor)[0] if self.sink.whole else None,
        }

    def _follow(self, tensor: Any) -> None:
        """What is done with the experts' outputs: biases and numbers of the experts first, the router's weights last."""
        node = tensor.contents
        if node.op == self.mul:
            weights = self._pending_weights * self._floats(node.src[1])[0, :, :, 0]
            if _WEIGHTED.fullmatch(name_of(node)):
                self._give(weights)
                return
            self._pending_weights = weights
        elif self.sink.whole:
            self._pending["f"] = self._floats(tensor)[0] / self._pending_weights[..., None]
        self._output = address(tensor)

    def _give(self, weights: Tensor) -> None:
        assert self._layer is not None
        seen, layer = Routed(weights=weights, **self._pending), self._layer
        self._pending, self._output, self._layer = {}, 0, None
        self._left.discard(layer)
        self.sink.experts(layer, seen)

    def _floats(self, tensor: Any) -> Tensor:
        return torch.from_numpy(self.ggml.read(tensor)).float()

    def _rows(self, tensor: Any) -> Tensor:
        """The values as [T, columns]; those of a source that several matrices share are read once."""
        source = address(tensor)
        if self._shared is None or self._shared[0] != source:
            values = self._floats(tensor)
            self._shared = (source, values.reshape(-1, values.shape[-1]))
        return self._shared[1]


class LlamaRun(Loaded):
    """A GGUF loaded to be watched, on the CPU. A context manager: leaving it frees the model.

    Keys and values are kept in float32, so that what is measured is the model and not its cache.
    """

    def __init__(self, session: Session, path: Path, n_ctx: int, batch: int) -> None:
        """`n_ctx`: tokens of a window; `batch`: most windows that run at once, each a sequence of its own."""
        super().__init__(session, path)
        self._n_ctx, self._size = n_ctx, batch
        self._ggml = Ggml(ggml_path(session.llama))
        self._watcher: _Watcher | None = None
        self._error: BaseException | None = None
        self._callback = CALLBACK(self._called)

    def run(self, windows: NDArray[np.int64], sink: Sink) -> bool:
        """Runs token ids [B, n_ctx] and gives `sink` what it wants.

        Returns whether the graph makes the router's weights add up to 1, as far as it was computed.
        Raises GgufToolError where llama.cpp fails, and whatever `sink` raises, KeyboardInterrupt included.
        """
        llama, n_ctx, batch = self._llama, self._n_ctx, self._batch
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch.n_tokens = windows.size
        np.ctypeslib.as_array(batch.token, (windows.size,))[:] = windows.reshape(-1)
        for i in range(windows.size):
            # Every token is an output: of the last layer llama.cpp computes nothing else.
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i % n_ctx, 1, 1
            batch.seq_id[i][0] = i // n_ctx
        watcher = self._watcher = _Watcher(self._ggml, sink)
        self._error = None
        with self._holding_back():
            code = llama.llama_decode(self._context, batch)
        if self._error is not None:
            raise self._error
        if code:
            raise GgufToolError(f"{self._path}: llama_decode failed ({code}): {self._last_errors()}")
        watcher.finish()
        return watcher.norm_topk

    def _called(self, tensor: Any, ask: bool, _data: object) -> bool:
        """llama.cpp's callback. No exception may leave it: what is raised waits until llama_decode has returned."""
        if self._error is None and self._watcher is not None:
            try:
                return self._watcher.wants(tensor.contents) if ask else self._watcher.take(tensor)
            except BaseException as error:
                self._error = error
        # Asked: the node that is wanted ends the computation behind it.
        return ask

    @contextmanager
    def _holding_back(self) -> Iterator[None]:
        """Ctrl-C waits until llama_decode has returned, and makes it return soon.

        Raised at the wrong place, on the way into the callback, it would be swallowed and a node be lost.
        """
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield
            return
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "_error", KeyboardInterrupt()))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _load(self) -> None:
        llama = self._llama
        self._session.log.errors.clear()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        # Weights stay mapped: packed anew for faster kernels they would take their size in memory once more.
        params.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(os.fsencode(self._path), params)
        if not self._model:
            raise GgufToolError(f"{self._path}: llama.cpp cannot load it: {self._last_errors()}")
        self._context = llama.llama_init_from_model(self._model, self._context_params())
        if not self._context:
            raise GgufToolError(
                f"{self._path}: no context of {self._size} x {self._n_ctx} tokens: {self._last_errors()}"
            )
        self._batch = llama.llama_batch_init(self._size * self._n_ctx, 0, 1)

    def _context_params(self) -> Any:
        params = self._llama.llama_context_default_params()
        tokens = self._size * self._n_ctx
        # llama.cpp rounds the context of a sequence up to 256 by itself.
        params.n_ctx = self._size * -(-self._n_ctx // 256) * 256
        params.n_batch = params.n_ubatch = params.n_outputs_max = tokens
        params.n_seq_max = self._size
        params.n_threads = params.n_threads_batch = self._session.threads
        params.flash_attn_type, params.type_k, params.type_v = _FLASH_ATTENTION_OFF, _F32, _F32
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        params.cb_eval = type(params.cb_eval)(ctypes.cast(self._callback, ctypes.c_void_p).value)
        return params
