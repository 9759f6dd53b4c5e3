"""What calibration takes in memory and time, at the layer sizes of real models.

Memory: calibrations of few and of more layers, each in a fresh process that is watched from outside. Time: plain forward
passes of the resident model and calibrations of the same tokens in turns in one process; only times of the same round are
compared. A calibration is the whole of it: opening, loading layers, hidden states to disk and back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .bench import Ratio
from .errors import GgufToolError
from .memory import parse_bytes
from .processes import ending
from .random_checkpoint import N_LAYERS, first_layers, layer_parameters, shape_named, write_random_checkpoint
from .random_model import ModelShape

Progress = Callable[[int, int, str], None]

# Peak memory of the deeper model ÷ that of the shallower one; peak ÷ (2.5 x a layer + hidden states + statistics); tokens per
# second ÷ those of a plain forward pass; and how much faster than an observer that computes all experts.
BARS = {"memory_depth": 1.10, "memory_layers": 1.0, "speed": 0.8, "observer": 2.0}
AT_MOST = ("memory_depth", "memory_layers")


@dataclass(frozen=True)
class Options:
    """How to measure. `layers`: depths whose memory is compared. `windows`: of the memory runs; `speed_windows`: of the timed
    ones; `observer_windows`: those of them that the dense observer sees, 0 to leave it out."""

    layers: tuple[int, int] = (4, 12)
    windows: int = 8
    n_ctx: int = 512
    speed_windows: int = 48
    observer_windows: int = 4
    rounds: int = 3
    batch: int = 4
    threads: int = 2
    dtype: str = "float32"
    memory: str | None = None
    obs: bool = True


QUICK = Options(
    layers=(2, 3), windows=3, n_ctx=32, speed_windows=4, observer_windows=2, rounds=2, batch=2, threads=1
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Peaks of one process in bytes: of its own memory (anonymous pages, as sampled), of mapped files at that time, and of
    both as the kernel counts them; and what the process says of itself."""

    n_layers: int
    anonymous: int
    mapped: int
    max_rss: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One model. `ratios` has the keys of BARS, and speed_obs, whole_obs and so on, which have no bar.

    speed: a calibration without OBS costs ÷ the plain pass. speed_obs: one with second moments, less the time of solving.
    solve_seconds: solving a layer's OBS costs; load_seconds: loading a layer.
    """

    model: str
    options: Options
    layer_bytes: int
    memory: list[Memory]
    tokens_per_second: dict[str, float]
    solve_seconds: float
    load_seconds: float
    ratios: dict[str, Ratio]
    judged: bool = True
    whole: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for --json."""
        return asdict(self) | {"bars": BARS, "missed": self.missed()}

    def missed(self) -> list[str]:
        """A line for each bar that is missed; none of a quick run, whose sizes say nothing."""
        if not self.judged:
            return []
        found = []
        for name, bar in BARS.items():
            if name in self.ratios:
                value = self.ratios[name].value
                if value > bar if name in AT_MOST else value < bar:
                    side = "at most" if name in AT_MOST else "at least"
                    found.append(f"{self.model}: {name} {value:.3f}, the bar is {side} {bar}")
        return found


def measure(
    model: str, options: Options, folder: Path, *, quick: bool = False, tokens: int = 131072,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Measures one model in a scratch `folder`. `tokens`: for how many the whole model's figures are derived.

    Raises GgufToolError for an unknown model and for options by which nothing can be measured, before anything is written, and
    where a process fails.
    """
    _check(options)
    shape = shape_named(model)
    shape = tiny(shape) if quick else shape
    tell = progress or (lambda done, total, text: None)
    with tempfile.TemporaryDirectory(prefix="gguftool-bench-", dir=folder) as name:
        scratch = Path(name)
        tell(0, 4, f"writing {options.layers[1]} layers of random weights")
        deep = write_random_checkpoint(scratch / "deep", shape, options.layers[1])
        shallow = first_layers(scratch / "shallow", deep, options.layers[0])
        one = first_layers(scratch / "one", deep, 1)
        memory = []
        for number, (depth, path) in enumerate(zip(options.layers, (shallow, deep), strict=True), start=1):
            tell(number, 4, f"memory of calibrating {depth} layers")
            memory.append(_memory(depth, path, options, scratch))
        tell(3, 4, "speed, in turns")
        job = _job("speed", one, options, scratch) | {"windows": options.speed_windows}
        rounds = _watched(job)[0]["rounds"]
        tell(4, 4, "done")
    itemsize = 4 if options.dtype in ("float32", "auto") else 2
    return _result(model, shape, options, memory, rounds, layer_parameters(shape) * itemsize, quick, tokens)


def _check(options: Options) -> None:
    if len(options.layers) != 2 or not 1 <= options.layers[0] < options.layers[1]:
        raise GgufToolError(f"--layers {options.layers}: it takes two depths, the smaller one first, as 4,12")
    if options.observer_windows > options.speed_windows:
        raise GgufToolError(
            f"--observer-windows {options.observer_windows}: they are taken from the timed ones, of which there are "
            f"{options.speed_windows} (--speed-windows)"
        )
    if options.memory is not None:
        parse_bytes(options.memory)


def tiny(shape: ModelShape) -> ModelShape:
    """A model of the same family with everything small."""
    return replace(shape, n_embd=64, n_expert=8, n_expert_used=2, n_ff_exp=32, n_head=4, n_head_kv=2, head_dim=16)


def _job(task: str, checkpoint: Path, options: Options, scratch: Path) -> dict[str, Any]:
    return asdict(options) | {"task": task, "checkpoint": str(checkpoint), "work": str(scratch / "work")}


def _memory(depth: int, checkpoint: Path, options: Options, scratch: Path) -> Memory:
    facts, anonymous, mapped = _watched(_job("calibrate", checkpoint, options, scratch))
    return Memory(depth, anonymous, mapped, facts["max_rss"], facts)


def _watched(job: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """What a worker found, the most anonymous memory that it had, and its mapped file pages then; 0 off Linux."""
    command = [sys.executable, "-m", "gguftool.bench_calibrate_worker", json.dumps(job)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
        peak, mapped = 0, 0
        try:
            while process.poll() is None:
                anonymous, files = _pages(process.pid)
                if anonymous > peak:
                    peak, mapped = anonymous, files
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        if process.returncode:
            lines = err.read().strip().splitlines() if process.returncode > 0 else []
            lines = lines or [ending(process.returncode)]
            raise GgufToolError(f"the benchmark's process failed: {lines[-1]}")
        return json.loads(out.read().splitlines()[-1]), peak, mapped


def _pages(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory and of mapped files that a process has now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return tuple(1024 * int(found.get(name, 0)) for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def _result(
    model: str, shape: ModelShape, options: Options, memory: Sequence[Memory], rounds: Sequence[Mapping[str, Any]],
    layer_bytes: int, quick: bool, tokens: int,
) -> Result:  # fmt: skip
    def seconds(name: str, *less: str) -> np.ndarray:
        return np.array([one[name]["seconds"] - sum(one[name][part] for part in less) for one in rounds])

    count = options.speed_windows * options.n_ctx
    peaks = [one.anonymous or one.max_rss for one in memory]
    ratios = {"memory_depth": Ratio(peaks[1] / peaks[0], 0.0)}
    allowed = [
        2.5 * layer_bytes + one.facts["statistics_bytes"] + (one.facts["hidden_bytes"] if one.facts["resident"] else 0)
        for one in memory
    ]
    ratios["memory_layers"] = Ratio(max(p / a for p, a in zip(peaks, allowed, strict=True)), 0.0)
    plain = seconds("plain")
    ratios["speed"] = _ratio(plain / seconds("calibrate"))
    ratios["speed_behind_loading"] = _ratio(plain / seconds("calibrate", "loading"))
    ratios["speed_obs"] = _ratio(plain / seconds("calibrate_obs", "solving"))
    ratios["speed_obs_and_solving"] = _ratio(plain / seconds("calibrate_obs"))
    speeds = {
        "plain": count / np.median(plain),
        "calibrate": count / np.median(seconds("calibrate")),
        "calibrate, OBS, less solving": count / np.median(seconds("calibrate_obs", "solving")),
    }
    if options.observer_windows:
        few = options.observer_windows * options.n_ctx
        speeds["dense observer"] = few / np.median(seconds("observer"))
        per_token = seconds("observer") / seconds("plain_few") * plain / count
        ratios["observer"] = _ratio(per_token / (seconds("calibrate") / count))
    solving = float(np.median([one["calibrate_obs"]["solving"] for one in rounds]))
    loading = float(np.median([one["calibrate"]["loading"] for one in rounds]))
    per_token = float(np.median(seconds("calibrate_obs", "solving", "loading"))) / count
    result = Result(
        model, options, layer_bytes, list(memory), {name: float(value) for name, value in speeds.items()}, solving, loading,
        ratios, not quick,
    )  # fmt: skip
    return replace(result, whole=_whole_model(result, shape, per_token, tokens))


def _whole_model(result: Result, shape: ModelShape, per_token: float, tokens: int) -> dict[str, Any]:
    """What calibrating all layers takes, derived and not measured: time and disk add up over layers, memory does not."""
    layers, deep = N_LAYERS[shape.name], result.memory[-1]
    sums = deep.facts["statistics_bytes"] / deep.n_layers
    hidden = tokens * shape.n_embd * (4 if result.options.dtype in ("float32", "auto") else 2)
    solving = result.solve_seconds if result.options.obs else 0.0
    return {
        "layers": layers,
        "tokens": tokens,
        "hours": layers * (tokens * per_token + result.load_seconds + solving) / 3600,
        "solving_hours": layers * solving / 3600,
        "memory_bytes": int(max(deep.anonymous or deep.max_rss, 2 * layers * sums)),
        "disk_bytes": int(2 * hidden + layers * sums),
    }


def _ratio(values: np.ndarray) -> Ratio:
    """Geometric mean over the rounds with its relative standard error."""
    logs = np.log(values)
    error = float(logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else 0.0
    return Ratio(float(np.exp(logs.mean())), error)
