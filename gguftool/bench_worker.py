"""A program: one GGUF under one llama.cpp, timed on request.

    python -m gguftool.bench_worker LIB_DIR MODEL.gguf '{"threads": 2, ...}'

Loads the model, prints one line of JSON, then answers every line of JSON on its input with one on its output. The one
who asks decides the order, so several of these can be measured in turn.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

UBATCH = 512
# After it the threads of a process that was asked before do not spin for more work any longer.
SETTLE_SECONDS = 0.03
_TOPK = re.compile(rb"ffn_moe_topk-(\d+)")


class _Tensor(ctypes.Structure):
    """The head of struct ggml_tensor (ggml.h): all that is needed to walk its data."""

    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    )  # fmt: skip


class Session:
    """A loaded model and a context of UBATCH tokens."""

    def __init__(self, lib_dir: str, model: str, options: dict[str, Any]) -> None:
        os.environ["LLAMA_CPP_LIB_PATH"] = lib_dir
        import llama_cpp

        self.llama: Any = llama_cpp
        self.library = llama_cpp.llama_cpp._lib
        self.chosen: dict[int, NDArray[np.int64]] | None = None
        self.log: list[str] = []
        self.keep = [
            llama_cpp.llama_log_callback(lambda _level, text, _data: self.log.append(text.decode("utf-8", "replace")))
        ]
        llama_cpp.llama_log_set(self.keep[0], None)
        llama_cpp.llama_backend_init()
        before = _resident()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = options["n_gpu_layers"]
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if options["mmap"] else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = options["repack"]
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"{model} does not load: {''.join(self.log[-3:]).strip()}")
        self.threads = options["threads"]
        self.context = self.new_context(options["routes"])
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(UBATCH, 0, 1)
        self.before = before

    def new_context(self, watched: bool) -> Any:
        """A context of UBATCH tokens; a watched one tells which experts were chosen, which costs time."""
        context = self.llama.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = UBATCH
        context.n_threads = context.n_threads_batch = self.threads
        context.no_perf = True
        if watched:
            self.keep.append(self.llama.ggml_backend_sched_eval_callback(self._tap))
            context.cb_eval = self.keep[-1]
        made = self.llama.llama_init_from_model(self.model, context)
        if not made:
            raise RuntimeError(f"no context: {''.join(self.log[-3:]).strip()}")
        return made

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`do` is prompt (n tokens at once), generate (n tokens one by one), routes (of a generation), logits or memory."""
        kind, n = question["do"], int(question.get("n", 0))
        if kind == "memory":
            return self._memory()
        tokens = np.random.default_rng(question["seed"]).integers(0, self.n_vocab, max(n, 1)).astype(np.int32)
        # The threads of the one that was asked before spin for some milliseconds, on our cores; ours sleep and have to wake.
        time.sleep(SETTLE_SECONDS)
        self._forget()
        self._decode(tokens[:1], 0)
        self._forget()
        if kind == "routes":
            self.chosen = {}
        pieces = [tokens[i : i + 1] for i in range(len(tokens))] if kind in ("generate", "routes") else [tokens]
        cpu, ends = time.process_time(), [time.perf_counter()]
        for position, piece in enumerate(pieces):
            self._decode(piece, position)
            # Reading the logits waits until a device has finished.
            row = self.llama.llama_get_logits_ith(self.context, -1)
            ends.append(time.perf_counter())
        if kind == "routes":
            assert self.chosen is not None
            return {"chosen": [self.chosen[layer].tolist() for layer in sorted(self.chosen)]}
        if kind == "logits":
            return {"logits": [row[i] for i in range(self.n_vocab)]}
        return {
            "parts": np.diff(ends).tolist(),
            "seconds": ends[-1] - ends[0],
            "cpu_seconds": time.process_time() - cpu,
        }

    def _forget(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def _decode(self, tokens: NDArray[np.int32], start: int, every: bool = True) -> None:
        """Asks for the logits of every token, so that the last layer has as much to do as the others, or of the last only."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
            batch.logits[i] = every or i == len(tokens) - 1
            batch.seq_id[i][0] = 0
        if status := self.llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")

    def _tap(self, tensor: int, ask: bool, _data: object) -> bool:
        self.library.ggml_get_name.restype = ctypes.c_char_p
        self.library.ggml_get_name.argtypes = [ctypes.c_void_p]
        match = _TOPK.fullmatch(self.library.ggml_get_name(tensor))
        if match is None or self.chosen is None:
            return not ask
        if ask:
            return True
        head = _Tensor.from_address(tensor)
        used, n_tokens, stride = head.ne[0], head.ne[1], head.nb[1]
        raw = np.empty(stride * (n_tokens - 1) + 4 * used, dtype=np.uint8)
        get = self.library.ggml_backend_tensor_get
        get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        get(tensor, raw.ctypes.data, 0, raw.nbytes)
        ids = np.lib.stride_tricks.as_strided(raw.view(np.int32), (n_tokens, used), (stride, 4))
        counts = np.bincount(ids.ravel(), minlength=stride // 4)
        self.chosen[int(match[1])] = counts + self.chosen.get(int(match[1]), 0)
        return True

    def _memory(self) -> dict[str, Any]:
        sizes = re.findall(r"(\w+)\s+(model|KV|RS|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB", "".join(self.log))
        buffers: dict[str, float] = {}
        for device, kind, mib in sizes:
            buffers[f"{device} {kind}"] = float(mib) * 2**20
        return {"before": self.before, "peak": _peak(), "buffers": buffers}


def _resident() -> int:
    """Bytes resident now; 0 where the platform does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _peak() -> int:
    """Most bytes resident so far.

    Linux hands getrusage's number on from the process that started this one, so that it would be that one's peak.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(session_type: type[Session]) -> None:
    """The program: loads the model that the arguments name and answers until its input ends."""
    lib_dir, model, options = sys.argv[1:]
    # llama.cpp may print to the standard output; the answers have their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        session = session_type(lib_dir, model, json.loads(options))
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            print(json.dumps(session.answer(json.loads(line))), file=answers)
    except (RuntimeError, OSError) as error:
        print(json.dumps({"error": str(error)}), file=answers)


if __name__ == "__main__":
    serve(Session)
