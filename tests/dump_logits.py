"""A program: the logits of GGUF files under the libraries of one runtime, as a stranger's process would get them.

usage: dump_logits.py LIB_DIR TOKENS.npy BATCH (GGUF OUT.npy)...
"""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np


def logits(llama, path: str, tokens: np.ndarray, n_batch: int) -> np.ndarray:
    """Logits of every position, float32 [tokens, vocabulary]; of windows of their own for tokens [windows, n]."""
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"cannot load {path}")
    options = llama.llama_context_default_params()
    windows = np.atleast_2d(tokens)
    options.n_ctx, options.n_batch, options.n_ubatch = windows.shape[1], n_batch, n_batch
    # torch keeps keys and values in F32; the cache's usual F16 is enough to send a token to another expert.
    options.type_k = options.type_v = 0
    options.flash_attn_type = 0
    options.n_threads = options.n_threads_batch = 2
    context = llama.llama_init_from_model(model, options)
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    out = np.empty((*windows.shape, n_vocab), dtype=np.float32)
    batch = llama.llama_batch_init(n_batch, 0, 1)
    for window, own in zip(windows, out, strict=True):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for start in range(0, len(window), n_batch):
            part = window[start : start + n_batch]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, 1
            if llama.llama_decode(context, batch):
                sys.exit(f"cannot decode {path}")
            for i in range(len(part)):
                row = llama.llama_get_logits_ith(context, i)
                own[start + i] = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (n_vocab,))
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return out.reshape(-1, n_vocab)


def main() -> None:
    lib_dir, tokens, n_batch, *pairs = sys.argv[1:]
    os.environ["LLAMA_CPP_LIB_PATH"] = lib_dir
    import llama_cpp

    for source, out in zip(pairs[::2], pairs[1::2], strict=True):
        np.save(out, logits(llama_cpp, source, np.load(tokens), int(n_batch)))


if __name__ == "__main__":
    main()
