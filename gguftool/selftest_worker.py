"""A program: the logits of small models on one device of one runtime, as a process can load one runtime only.

usage: python -m gguftool.selftest_worker < request.json

The request: {"runtime": folder} lists the devices. With "device" (a name, empty for the CPU alone), "text", "n_ctx",
"windows" and "runs" ([model, tokens computed at once, file to write]) it also writes, for every run, the logits at the
scored positions, float32 [positions, vocabulary], and the tokens that follow there, int32 [positions]. The answer is
one line of JSON; a stated failure is one line on stderr and exit code 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .devices import devices
from .errors import GgufToolError
from .perplexity import LoadedModel, open_session
from .runtime import load
from .runtime_base import Runtime, read_runtime


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    runtime = read_runtime(Path(request["runtime"]))
    if runtime is None:
        raise GgufToolError(f"{request['runtime']}: no runtime there")
    load(runtime)
    found = devices(runtime)
    if "runs" in request:
        _run(runtime, [device.handle for device in found if device.name == request["device"]], request)
    return {
        "devices": [
            {
                "name": device.name,
                "description": device.description,
                "type": device.type,
                "runs_models": device.runs_models,
            }
            for device in found
        ]
    }


def _run(runtime: Runtime, chosen: list[int], request: dict[str, Any]) -> None:
    if request["device"] and not chosen:
        raise GgufToolError(f"the runtime has no device {request['device']}")
    llama, n_ctx = load(runtime), request["n_ctx"]
    for model, n_ubatch, out in request["runs"]:
        # One thread: models as small as these would wait for each other's threads on a busy machine.
        how = {
            "n_ctx": n_ctx,
            "n_gpu_layers": 999 if chosen else 0,
            "n_ubatch": n_ubatch,
            "devices": chosen,
            "threads": 1,
        }
        with open_session(llama, **how) as session, LoadedModel(session, Path(model)) as loaded:
            windows = loaded.windows(request["text"], request["windows"])
            # The logits are a view, good until the next window.
            logits = np.concatenate([loaded.scores(window)[0].copy() for window in windows])
        np.savez(out, logits=logits, targets=windows[:, session.first_scored + 1 :].ravel())


def main() -> None:
    """Answers the request on stdin."""
    try:
        print(json.dumps(_answer(json.load(sys.stdin))))
    except GgufToolError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
