"""A program: what one GGUF takes in memory when a context of N tokens is filled.

    python -m gguftool.budget_worker LIB_DIR MODEL.gguf '{"ctx": 8192, "threads": 2}'

Prints one line of JSON. Everything runs on the CPU; weights are read, not mapped, as with llama.cpp's `--load-mode none`:
of mapped weights the system also counts pages that it could drop.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

# llama-cli's and llama-server's own.
BATCH, UBATCH = 2048, 512
_BUFFER = re.compile(r"(\w+)\s+(model|KV|RS|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB")


def measure(lib_dir: str, model: str, ctx: int, threads: int) -> dict[str, Any]:
    """Bytes: `process` before the model was loaded, `peak` behind a full context, and llama.cpp's own `buffers`."""
    os.environ["LLAMA_CPP_LIB_PATH"] = lib_dir
    import llama_cpp

    log: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda _level, text, _data: log.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(keep, None)
    llama_cpp.llama_backend_init()
    process = peak()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), params)
    if not loaded:
        raise RuntimeError(f"{model} does not load: {''.join(log[-3:]).strip()}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_outputs_max = ctx, min(ctx, BATCH), min(ctx, UBATCH), 1
    options.n_threads = options.n_threads_batch = threads
    options.no_perf = True
    context = llama_cpp.llama_init_from_model(loaded, options)
    if not context:
        raise RuntimeError(f"{model}: no context of {ctx} tokens: {''.join(log[-3:]).strip()}")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(min(ctx, BATCH), 0, 1)
    # The last token alone, as when one is generated.
    for start, end in [*_batches(ctx - 1), (ctx - 1, ctx)]:
        batch.n_tokens = end - start
        for i in range(end - start):
            # A fixed walk through the vocabulary: neighbours are far apart, so that experts are not all the same.
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = (start + i) * 7919 % n_vocab, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == end - start - 1
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"{model}: llama_decode gave {status} at token {start} of {ctx}")
    return {"process": process, "peak": peak(), "buffers": _buffers("".join(log))}


def _batches(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


def _buffers(log: str) -> dict[str, int]:
    """Kind -> bytes, all devices together; llama.cpp says them in hundredths of MiB."""
    found: dict[str, int] = {}
    for _, kind, mib in _BUFFER.findall(log):
        found[kind] = found.get(kind, 0) + int(float(mib) * 2**20)
    return found


def peak() -> int:
    """Most bytes resident so far; 0 where the system does not say."""
    try:
        # Not ru_maxrss: that begins with what the process was started from.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    lib_dir, model, options = sys.argv[1:]
    # llama.cpp may print to the standard output; the answer has its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        print(json.dumps(measure(lib_dir, model, **json.loads(options))), file=answers)
    except (RuntimeError, OSError) as error:
        print(json.dumps({"error": str(error)}), file=answers)


if __name__ == "__main__":
    main()
