"""Passes of the texts through llama.cpp, and the state of them that survives a Ctrl-C.

llama.cpp runs a whole model at once, so what is added up in a pass is in memory for all of its layers. Sums are small;
second moments are not (302 MB a layer at Qwen3-30B's sizes), so work is cut into stages, each a pass over all windows
that takes those of some layers only. After a stage its results are a file; within one its sums are saved now and then,
always behind a whole batch, so that a run that goes on adds the same numbers in the same order as one that was not stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from .durable import replacing
from .errors import GgufToolError
from .gguf_file import Progress
from .gguf_model import GgufModel
from .llama_observer import LlamaRun, Routed, Sink
from .memory import gib
from .perplexity import open_session
from .stats import Domain
from .windows import Windows, batches, check_domains

# Rises where what a stage leaves behind changes.
VERSION = 1
# The sums are saved when so much time has passed, and not so often that more than a twentieth of it goes into saving.
SAVE_SECONDS = 20.0
# A batch is made smaller where its logits, which llama.cpp computes for every token, would take more.
LOGITS_BYTES = 1 << 30
# What second moments may take by default.
MEMORY = 4 << 30

Arrays = dict[str, NDArray[Any]]


class Stage(Sink, Protocol):
    """What one pass over the windows adds up."""

    domain: int

    def sums(self) -> dict[str, Tensor]:
        """Everything that the pass has added up so far, by name."""
        ...

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Takes up what `sums` gave once."""
        ...

    def arrays(self) -> Arrays:
        """The results, when all windows were seen."""
        ...


@dataclass(frozen=True)
class Corpus:
    """The windows of all domains, and in which batches they run.

    Attributes:
        windows: token ids, [windows, n_ctx]. batches: (domain, windows of it), in order.
    """

    domains: tuple[Domain, ...]
    windows: Windows
    batches: tuple[tuple[int, slice], ...]
    size: int

    @classmethod
    def of(cls, model: GgufModel, domains: Sequence[tuple[Domain, Windows]], batch: int) -> Corpus:
        """Raises GgufToolError for windows that the model cannot be run on."""
        if batch < 1:
            raise GgufToolError(f"a batch of {batch} windows makes no progress; it takes at least 1")
        n_ctx = check_domains(domains, model.n_ctx_train, model.n_vocab)
        size = max(1, min(batch, LOGITS_BYTES // (4 * model.n_vocab * n_ctx)))
        counts = [len(windows) for _, windows in domains]
        windows = np.concatenate([windows for _, windows in domains])
        return cls(tuple(domain for domain, _ in domains), windows, tuple(batches(counts, size)), size)

    @property
    def n_ctx(self) -> int:
        """Tokens of a window."""
        return int(self.windows.shape[1])

    def identity(self, model: GgufModel) -> dict[str, Any]:
        """What a stopped run has to share with a new one, for the new one to go on from it."""
        return {
            "model": model.fingerprint,
            "domains": [domain.as_dict() for domain in self.domains],
            "windows": hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest(),
            "n_ctx": self.n_ctx,
            "batch": self.size,
        }


class StageDir:
    """The work directory: a file for each finished stage, and one for the stage that is running."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Takes up what is in `path` where it has the same `identity`, and clears the rest."""
        self.path = path
        self._identity = json.dumps({"version": VERSION, **identity}, sort_keys=True)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in self._files():
                if self._position(file) is None:
                    file.unlink()
        except OSError as error:
            raise GgufToolError(f"{path}: the work directory cannot be written ({error})") from error

    def stage_path(self, stage: int) -> Path:
        """The file of a finished stage's results."""
        return self.path / f"stage-{stage:03}.safetensors"

    def is_done(self, stage: int) -> bool:
        """Whether a stage is finished."""
        return self._position(self.stage_path(stage)) is not None

    def load(self, stage: int) -> Arrays:
        """The results of a finished stage."""
        found: Arrays = load_file(self.stage_path(stage))
        return found

    def names(self, stage: int) -> list[str]:
        """The names of a finished stage's results, sorted; its header is read only."""
        with safe_open(self.stage_path(stage), "numpy") as file:
            return sorted(file.keys())

    def resume(self, stage: int, into: Stage) -> int:
        """Gives a stage the sums that were saved of it; returns how many batches they run over."""
        running = self.path / "running.safetensors"
        position = self._position(running)
        if position is None or position[0] != stage:
            return 0
        into.restore({name: torch.from_numpy(values) for name, values in load_file(running).items()})
        return position[1]

    def keep(self, stage: int, batches: int, sums: Mapping[str, Tensor]) -> None:
        """Saves a stage's sums over its first `batches` batches."""
        arrays = {name: value.numpy() for name, value in sums.items()}
        self._write(self.path / "running.safetensors", (stage, batches), arrays)

    def finish(self, stage: int, arrays: Arrays) -> None:
        """Saves the results of a stage."""
        self._write(self.stage_path(stage), (stage, -1), arrays)
        (self.path / "running.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the state, and the directory where nothing else is in it."""
        for file in self._files():
            file.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def _files(self) -> list[Path]:
        patterns = ("stage-*.safetensors", "running.safetensors", "*.safetensors.partial", ".*.safetensors.lock")
        return [file for pattern in patterns for file in self.path.glob(pattern)]

    def _position(self, file: Path) -> tuple[int, int] | None:
        """(stage, batches) of a file of this run; None for one that is absent, damaged or another run's."""
        try:
            with safe_open(file, "numpy") as opened:
                header = opened.metadata() or {}
        except (OSError, SafetensorError):
            return None
        if header.get("identity") != self._identity:
            return None
        return int(header["stage"]), int(header["batches"])

    def _write(self, target: Path, position: tuple[int, int], arrays: Arrays) -> None:
        header = {"identity": self._identity, "stage": str(position[0]), "batches": str(position[1])}
        try:
            with replacing(target) as partial:
                save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, partial, header)
        except (OSError, SafetensorError) as error:
            raise GgufToolError(f"{self.path}: the work directory cannot be written ({error})") from error


class GgufPasses:
    """Runs stages over the windows; what is finished already is not run again."""

    def __init__(
        self, llama: Any, model: GgufModel, corpus: Corpus, work: StageDir, *, threads: int | None = None,
        progress: Progress | None = None, save_seconds: float = SAVE_SECONDS,
    ) -> None:  # fmt: skip
        self.llama, self.model, self.corpus, self.work = llama, model, corpus, work
        self.threads, self.save_seconds = threads, save_seconds
        self.progress: Progress = progress or (lambda done, total, text: None)

    def run(self, stages: Sequence[Callable[[], Stage]]) -> None:
        """Makes and runs every stage that has not been finished, one in memory at a time."""
        todo = [index for index in range(len(stages)) if not self.work.is_done(index)]
        if not todo:
            return
        size = self.corpus.size
        with (
            open_session(self.llama, n_ctx=max(4, self.corpus.n_ctx), threads=self.threads) as session,
            LlamaRun(session, self.model.path, self.corpus.n_ctx, size) as run,
        ):
            for index in todo:
                self._stage(run, index, len(stages), stages[index]())

    def _stage(self, run: LlamaRun, index: int, count: int, stage: Stage) -> None:
        start = self.work.resume(index, stage)
        saved, cost, windows = time.monotonic(), 0.0, len(self.corpus.windows)
        for number, (domain, part) in enumerate(self.corpus.batches):
            if number < start:
                continue
            stage.domain = domain
            run.run(self.corpus.windows[part], stage)
            self.progress(index * windows + part.stop, count * windows, f"pass {index + 1} of {count}")
            now = time.monotonic()
            if not self.save_seconds or now - saved >= max(self.save_seconds, 20 * cost):
                self.model.file.check_unchanged()
                self.work.keep(index, number + 1, stage.sums())
                saved = time.monotonic()
                cost = saved - now
        arrays = stage.arrays()
        self.model.file.check_unchanged()
        if odd := [name for name, values in arrays.items() if not np.isfinite(values).all()]:
            raise GgufToolError(f"{self.model.path}: the sum {odd[0]} is not finite; the weights are damaged")
        self.work.finish(index, arrays)


def norm_topk(llama: Any, model: GgufModel) -> bool:
    """Whether the model's graph makes the weights of a token's experts add up to 1: one token is run to see it."""
    with open_session(llama, threads=1) as session, LlamaRun(session, model.path, 1, 1) as run:
        return run.run(np.zeros((1, 1), dtype=np.int64), _Nothing(model.moe_layers[-1:]))


@dataclass
class _Nothing:
    """A sink that throws away what it is given."""

    layers: tuple[int, ...]
    whole: bool = False

    def experts(self, layer: int, seen: Routed) -> None:
        """Thrown away."""

    def matrix(self, name: str, x: Tensor) -> None:
        """Thrown away."""

    def residual(self, layer: int, out: Tensor) -> None:
        """Thrown away."""


def groups(layers: Sequence[int], each: int, memory: int | None) -> list[tuple[int, ...]]:
    """The layers in as few equal groups as `memory` bytes allow, where a layer takes `each` bytes; at least one a group."""
    fit = max(1, (MEMORY if memory is None else memory) // max(1, each))
    count = max(1, -(-len(layers) // fit))
    return [tuple(part.tolist()) for part in np.array_split(np.array(layers, dtype=np.int64), count)]


def bounded(memory: int | None) -> str:
    """What a limit of memory is one of here, for a person: llama.cpp loads the whole model, however much that takes."""
    return "" if memory is None else f"; second moments stay below {gib(memory)}, the model itself comes on top"


def check_memory(each: int, memory: int | None, *remedies: str) -> None:
    """Raises GgufToolError where not even one layer's `each` bytes of second moments fit.

    `remedies`: what helps beside a larger limit.
    """
    if memory is not None and each > memory:
        remedy = ", or ".join((f"a limit of {gib(each, up=True).replace(' ', '')} or more", *remedies))
        raise GgufToolError(
            f"the second moments of one layer take {gib(each)}, and {gib(memory)} are allowed. What helps: {remedy}"
        )
