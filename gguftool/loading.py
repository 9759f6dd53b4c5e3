"""Does llama.cpp load a file? Asked of a process of its own, because llama.cpp answers some broken files by ending it.

As a program: `python -m gguftool.loading RUNTIME < paths` answers each line with one line of JSON: null where the file was
loaded, else why it was not.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import GgufToolError
from .runtime import load
from .runtime_base import Runtime, read_runtime

_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR


def refusals(runtime: Runtime, paths: Sequence[Path]) -> Iterator[str | None]:
    """For each file why llama.cpp does not load it, or None where it does. A file that ends the process is not loaded.

    Raises GgufToolError where no process can be started at all.
    """
    left = [str(path.absolute()) for path in paths]
    while left:
        done = subprocess.run(
            [sys.executable, "-m", "gguftool.loading", str(runtime.path)], input="\n".join(map(json.dumps, left)),
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        answers = done.stdout.splitlines()
        if not answers or answers[0] != "ready":
            raise GgufToolError(f"llama.cpp cannot be asked: {(done.stderr.splitlines() or ['no answer'])[-1]}")
        yield from (json.loads(line) for line in answers[1:])
        left = left[len(answers) - 1 :]
        if left:
            assertion = next((line for line in done.stderr.splitlines() if "GGML_ASSERT" in line), "no word of why")
            yield f"it ends the program ({assertion.strip()})"
            left = left[1:]


def _serve(folder: Path) -> None:
    runtime = read_runtime(folder)
    if runtime is None:
        raise GgufToolError(f"{folder}: no runtime there")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    llama = load(runtime)
    errors: list[str] = []

    def write(level: int, text: bytes, _data: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    callback = llama.llama_log_callback(write)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    llama.llama_backend_init()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        errors.clear()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # weights stay mapped: nothing is repacked
        model = llama.llama_model_load_from_file(os.fsencode(json.loads(line)), params)
        if model:
            llama.llama_model_free(model)
        found = " ".join(errors[0].split()) if errors else "no word of why"
        print(json.dumps(None if model else found), file=answers, flush=True)


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]))
    except GgufToolError as failure:
        sys.exit(f"error: {failure}")
