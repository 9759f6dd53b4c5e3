"""How fast the patched runtime is: ratios of interleaved runs at the layer sizes of real models.

Absolute times drift with the machine's clock and load; so every file has a process of its own that stays loaded, and each
round asks all of them for the same tokens, in a random order, within seconds. What is timed, each generated token and each
prompt, is divided by the median of all processes in that round, and of these ratios the median over the rounds counts: neither a
machine that gets slower nor a round in which something else ran moves it. Where it happened to get its memory makes one of two
equal processes slower for all of its life; so the processes are started several times, most of them twice each time, and weights
are read into huge pages unless --mmap says otherwise. Threads keep to their cores: those that change them lose some per cent, now
more, now less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .processes import ending
from .random_model import SHAPES, ModelShape, active_bytes, pruned_widths, split_widths, write_random_model
from .runtime import Runtime
from .tensors import BLOCKS

Progress = Callable[[int, int, str], None]

PROMPT_TOKENS = 512
GENERATED_TOKENS = 64
# How often in each round: a generation takes a third of a prompt's time.
TURNS = {"generate": 3, "prompt": 1}
# Those whose ratios are near 1: speeds are means over two processes, and one stock process against the other is the control.
TWICE = ("stock", "unpatched", "split")
# What has to be reached; a ratio of 1 is the goal everywhere.
BARS = {
    "split_generate": 0.97, "split_prompt": 0.97, "pruned_generate": 0.90, "pruned_memory": 1.02,
    "patched_generate": 0.99, "patched_prompt": 0.99,
}  # fmt: skip
# How many standard errors a ratio has to be away from its bar to be clear of it; from an error of PRECISION on it need not.
SURE = 2
PRECISION = 0.003
# Starts go on to so many times what was asked for.
MOST = 2


@dataclass(frozen=True)
class Options:
    """How to measure: threads, layers on the GPU, and whether llama.cpp maps the file and repacks its weights."""

    threads: int = 2
    mmap: bool = False
    repack: bool = True
    n_gpu_layers: int = 0


@dataclass(frozen=True)
class Ratio:
    """Geometric mean over the starts, and its relative standard error."""

    value: float
    error: float

    def settled(self, bar: float) -> bool:
        """Whether more measuring would hardly change on which side of the bar it is."""
        return abs(self.value - bar) >= SURE * self.error or self.error <= PRECISION


@dataclass(frozen=True)
class Result:
    """One model shape in one type. `ratios` has the keys of BARS and control_*.

    split_*: speed with the experts in two equal tiers ÷ as one stack. patched_*: the stock file's speed with the
    patches ÷ without. control_*: one process of the stock file ÷ the other. pruned_generate: (speed pruned ÷ original) ÷
    (active bytes original ÷ pruned). pruned_memory: peak resident memory ÷ (file + KV + compute buffers), the file read
    instead of mapped: of mapped and repacked weights the kernel also counts the pages that it could drop. `speedup` and
    `active_bytes_ratio` explain pruned_generate. `starts`: how often the processes were started.
    """

    model: str
    type: str
    n_layer: int
    tokens_per_second: dict[str, float]
    ratios: dict[str, Ratio]
    speedup: float
    prompt_speedup: float
    active_bytes_ratio: float
    file_bytes: dict[str, int]
    same_logits: bool
    starts: int = 0

    def missed(self) -> list[str]:
        """The bars that were not reached, in words, and whether noise may be why."""
        out = []
        for key, bar in BARS.items():
            if key not in self.ratios:
                continue
            ratio = self.ratios[key]
            below = ratio.value - bar if key == "pruned_memory" else bar - ratio.value
            if below > 0:
                noisy = (
                    "" if ratio.settled(bar) else ", and noise hides it: let nothing else run, or ask for more --starts"
                )
                out.append(
                    f"{self.model} {self.type}: {key} {ratio.value:.4f} ± {ratio.error:.4f}, the bar is {bar}{noisy}"
                )
        if not self.same_logits:
            out.append(f"{self.model} {self.type}: split and stock differ in their logits")
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"missed": self.missed()}


class Worker:
    """A process with one loaded model: `program` is bench_worker or one that answers as it does."""

    def __init__(
        self, runtime: Runtime, model: Path, options: Options, *, routes: bool = False, huge_pages: bool = True,
        program: str = "gguftool.bench_worker",
    ) -> None:  # fmt: skip
        self.model = model
        settings = asdict(options) | {"routes": routes}
        command = [
            sys.executable,
            "-m",
            program,
            str(runtime.lib_dir),
            str(model),
            json.dumps(settings),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            # glibc otherwise keeps the buffers that a file was read through, tens of MB, as if they were in use.
            # hugetlb: of memory in small pages, other physical ones each time, a process gets slower or faster by chance;
            # but huge ones round up what a process takes.
            env={
                **os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000",
                "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(huge_pages)}",
                "OMP_PROC_BIND": "true", "OMP_PLACES": "cores",
            },
        )  # fmt: skip
        self._answer()

    def ask(self, do: str, n: int = 0, seed: int = 0, **more: Any) -> dict[str, Any]:
        """One question (see bench_worker). Raises GgufToolError where the process failed."""
        stream: IO[str] | None = self.process.stdin
        assert stream is not None
        with suppress(BrokenPipeError):  # it is gone, and _answer says how
            stream.write(json.dumps({"do": do, "n": n, "seed": seed, **more}) + "\n")
            stream.flush()
        return self._answer()

    def parts(self, do: str, n: int, seed: int) -> list[float]:
        """Seconds that each part of the work took: of `n` tokens one by one each token, else all of it."""
        return [float(part) for part in self.ask(do, n, seed)["parts"]]

    def seconds(self, do: str, n: int, seed: int) -> float:
        """Seconds that `n` tokens took."""
        return float(self.ask(do, n, seed)["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise GgufToolError(
                f"{self.model.name}: the benchmark's process gave no answer: {ending(self.process.wait())}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise GgufToolError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextmanager
def working(
    runtime: Runtime, model: Path, options: Options, *, routes: bool = False, huge_pages: bool = True,
    program: str = "gguftool.bench_worker",
) -> Iterator[Worker]:  # fmt: skip
    """A worker that ends with the block, however that ends."""
    worker = Worker(runtime, model, options, routes=routes, huge_pages=huge_pages, program=program)
    try:
        yield worker
    finally:
        if worker.process.poll() is None and sys.exc_info()[0] is not None:
            worker.process.kill()
        worker.close()


def check_names(models: Sequence[str], types: Sequence[str]) -> None:
    """Raises GgufToolError for a model shape or a type that there is not."""
    for name in models:
        if name not in SHAPES:
            raise GgufToolError(f"no model {name!r}; known are {', '.join(SHAPES)}")
    for name in types:
        if name not in BLOCKS or name == "I32":
            raise GgufToolError(f"no type {name!r}; known are {', '.join(n for n in BLOCKS if n != 'I32')}")


def measure(
    model: str, type_name: str, folder: Path, patched: Runtime, plain: Runtime | None, options: Options, *,
    starts: int = 4, rounds: int = 4, n_layer: int = 0, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Measures one shape in one type. The files (a few GB) are made in `folder` and removed.

    Args:
        starts: how often all processes are started anew; MOST times as often where a ratio is not `settled` by then.
        rounds: how often each of them is asked, in turns, after a first round that is not counted; see TURNS.
        n_layer: layers of the files; 0 picks by size.
        plain: a runtime without patches, to compare the stock file with; None leaves that out.
        progress: called with (done, total, text).

    Raises:
        GgufToolError: the disk is too small, or a model does not load.
    """
    shape = SHAPES[model]
    n_layer = n_layer or layers_for(shape, type_name)
    widths = {"stock": None, "split": split_widths(shape), "pruned": pruned_widths(shape)}
    steps = len(widths) + starts * MOST + 1
    paths = {}

    def tell(step: int, text: str = "") -> None:
        if progress:
            progress(step, steps, f"{model} {type_name}{text}")

    with ExitStack() as stack:
        for step, (name, chosen) in enumerate(widths.items()):
            tell(step, f": writing {name}")
            paths[name] = folder / f"{model}-{type_name}-{name}.gguf"
            stack.callback(paths[name].unlink, missing_ok=True)
            write_random_model(paths[name], shape, type_name, n_layer, patched.ggml, chosen)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        jobs = [(name, patched, path) for name, path in paths.items()]
        jobs += [("unpatched", plain, paths["stock"])] if plain is not None else []
        found: list[_Start] = []
        while len(found) < starts or (len(found) < MOST * starts and not _settled(_ratios(found))):
            tell(len(widths) + len(found))
            found.append(_start(jobs, options, rounds, len(found)))
        same = all(run.same_logits for run in found)
        with working(patched, paths["pruned"], replace(options, mmap=False), huge_pages=False) as reader:
            reader.seconds("prompt", PROMPT_TOKENS, 0)
            memory = reader.ask("memory")
        with working(patched, paths["pruned"], options, routes=True) as router:
            counts = np.sum([router.ask("routes", GENERATED_TOKENS, r)["chosen"] for r in range(rounds)], axis=0)
    whole = active_bytes(shape, type_name, n_layer, counts)
    kept = active_bytes(shape, type_name, n_layer, counts, pruned_widths(shape)[0])

    ratios = _ratios(found)
    speedups = {kind: ratios.pop(f"pruned_{kind}") for kind in _WORK}
    ratios["pruned_generate"] = replace(speedups["generate"], value=speedups["generate"].value * kept / whole)
    if memory["before"]:
        ratios["pruned_memory"] = Ratio(_memory_ratio(memory, sizes["pruned"]), 0.0)
    return Result(
        model, type_name, n_layer,
        {kind: n / float(np.median(_seconds(found, "stock", kind))) for kind, n in _WORK.items()},
        ratios, speedups["generate"].value, speedups["prompt"].value, whole / kept, sizes, same, len(found),
    )  # fmt: skip


_WORK = {"generate": GENERATED_TOKENS, "prompt": PROMPT_TOKENS}


def layers_for(shape: ModelShape, type_name: str) -> int:
    """Layers of the benchmark's files: as many as stay near 0.8 GB, from 1 to 4."""
    block, size = BLOCKS[type_name]
    layer = 3 * shape.n_expert * shape.n_ff_exp * shape.n_embd * size / block
    return int(np.clip(0.8e9 // layer, 1, 4))


@dataclass(frozen=True)
class _Start:
    """`seconds[name][kind]`: of each process of that name, see _typical."""

    seconds: dict[str, dict[str, list[float]]]
    same_logits: bool


def _start(jobs: Sequence[tuple[str, Runtime, Path]], options: Options, rounds: int, seed: int) -> _Start:
    """One life of all processes. They are loaded and asked in random orders, for the same tokens every time."""
    rng = np.random.default_rng(seed)
    jobs = [job for job in jobs for _ in range(2 if job[0] in TWICE else 1)]
    with ExitStack() as stack:
        workers: list[tuple[str, Worker]] = []
        for index in rng.permutation(len(jobs)):
            name, runtime, path = jobs[index]
            workers.append((name, stack.enter_context(working(runtime, path, options))))
        logits = {name: worker.ask("logits", 48, seed=1)["logits"] for name, worker in workers if name != "pruned"}
        times: list[dict[str, list[list[float]]]] = [{kind: [] for kind in _WORK} for _ in workers]
        for index in range(-1, rounds):
            for kind, n in _WORK.items():
                for place in (place for _ in range(TURNS[kind]) for place in rng.permutation(len(workers))):
                    taken = workers[place][1].parts(kind, n, seed)
                    if index >= 0:
                        times[place][kind].append(taken)
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in _WORK} for name, _ in workers}
    for kind in _WORK:
        for (name, _), value in zip(workers, _typical(np.array([each[kind] for each in times])), strict=True):
            seconds[name][kind].append(float(value))
    return _Start(seconds, all(one == logits["stock"] for one in logits.values()))


def _typical(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of each process for all parts of its work, of times [processes, rounds, parts]; see above what counts."""
    together = np.median(times, axis=0)
    relative: NDArray[np.float64] = np.median(times / together, axis=1)
    return relative @ np.median(together, axis=0)


def _seconds(found: Sequence[_Start], name: str, kind: str) -> NDArray[np.float64]:
    """Of each start, the mean over the processes of that name."""
    return np.array([np.mean(run.seconds[name][kind]) for run in found])


def _ratios(found: Sequence[_Start]) -> dict[str, Ratio]:
    """The ratios of speed as `Result` has them; pruned_* is the speed-up alone, not yet held against the bytes."""
    ratios = {}
    for kind in _WORK:
        stock = _seconds(found, "stock", kind)
        ratios[f"split_{kind}"] = _ratio(stock / _seconds(found, "split", kind))
        ratios[f"pruned_{kind}"] = _ratio(stock / _seconds(found, "pruned", kind))
        pairs = [run.seconds["stock"][kind] for run in found]
        ratios[f"control_{kind}"] = _ratio(np.array([one / other for one, other in pairs]))
        if "unpatched" in found[0].seconds:
            ratios[f"patched_{kind}"] = _ratio(_seconds(found, "unpatched", kind) / stock)
    return ratios


def _settled(ratios: Mapping[str, Ratio]) -> bool:
    """Whether every ratio with a bar near 1 is clear of it, or exact."""
    return all(
        ratio.settled(BARS[key]) for key, ratio in ratios.items() if key in BARS and not key.startswith("pruned")
    )


def _ratio(values: NDArray[np.float64]) -> Ratio:
    logs = np.log(values)
    error = float(logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else 0.0
    return Ratio(float(np.exp(logs.mean())), error)


def _memory_ratio(memory: Mapping[str, Any], file_bytes: int) -> float:
    buffers = sum(size for name, size in memory["buffers"].items() if not name.endswith("model"))
    return float((memory["peak"] - memory["before"]) / (file_bytes + buffers))
