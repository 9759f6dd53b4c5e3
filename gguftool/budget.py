"""What a GGUF takes in memory when it is run: measured in a process of its own that fills a whole context.

Nothing is computed by formula: llama.cpp's caches and buffers depend on the architecture, its kernels and the build. A file
that does not exist yet is stood in for by a skeleton of the same header, shapes and types (`outline`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import GgufToolError
from .memory import gib
from .perplexity import usable_cpus
from .runtime_base import Runtime

# Two runs of one file differ by a page here and there: measured 0.15 MiB. Kept free, so that no run is above a budget.
JITTER = 512 << 10
# What llama.cpp's programs have to be told so that they take no more than was measured: weights are read and not mapped (the
# pages of a mapped file count as the process', though the system can drop them), one conversation, no cache of old ones.
RUN_OPTIONS = "--load-mode none --parallel 1 --cache-ram 0"


@dataclass(frozen=True)
class Memory:
    """Bytes that a file took.

    Attributes:
        file: its size.
        peak: the most that was resident, everything together.
        process: of that, Python and the libraries before the model was loaded.
        kv: KV cache and recurrent states. compute: the graph's buffers and the logits. Both as llama.cpp says them.
    """

    file: int
    peak: int
    process: int
    kv: int
    compute: int

    @property
    def other(self) -> int:
        """What is left of the peak: vocabulary, workspaces of the kernels, allocators."""
        return self.peak - self.file - self.process - self.kv - self.compute

    @property
    def beside(self) -> int:
        """Everything but the file."""
        return self.peak - self.file

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Memory:
        """From `as_dict`."""
        return cls(**{name: int(values[name]) for name in cls.__dataclass_fields__})

    def as_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self) | {"other": self.other}

    def __str__(self) -> str:
        return (
            f"{gib(self.peak)} at its peak: weights {gib(self.file)}, KV cache {gib(self.kv)}, compute buffers "
            f"{gib(self.compute)}, process {gib(self.process)}, other {gib(self.other)}"
        )


def measure(runtime: Runtime, model: Path, ctx: int) -> Memory:
    """Runs `model` with a context of `ctx` tokens until it is full.

    Raises GgufToolError where it does not load, or where the system does not say what a process takes.
    """
    options = json.dumps({"ctx": ctx, "threads": usable_cpus()})
    command = [sys.executable, "-m", "gguftool.budget_worker", str(runtime.lib_dir), str(model), options]
    # glibc otherwise keeps buffers that were freed, up to 32 MiB each, as if they were in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise GgufToolError(
            f"{model.name}: measuring its memory ended with code {done.returncode}; is there enough of it free?"
        ) from None
    if "error" in answer:
        raise GgufToolError(answer["error"])
    if not answer["peak"]:
        raise GgufToolError("this system does not say how much memory a process takes, so no budget can be kept")
    buffers = answer["buffers"]
    return Memory(
        file=model.stat().st_size, peak=answer["peak"], process=answer["process"],
        kv=buffers.get("KV", 0) + buffers.get("RS", 0),
        compute=buffers.get("compute", 0) + buffers.get("output", 0),
    )  # fmt: skip
