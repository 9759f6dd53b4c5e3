"""Calibration against public REAP observers (arXiv 2510.13999): the same model files and tokens, in turns.

    scripts/bench-reap
    scripts/bench-reap --cerebras ~/src/reap --rounds 5

llm-compressor is installed from its package index into an environment of its own; its REAPPruningModifier runs through
oneshot(). With --cerebras the observer of the paper's authors runs too, from a checkout of github.com/CerebrasResearch/reap,
in a second environment, because it wants a transformers that has a module for each expert. The model has random weights
at the layer sizes of a real one. Theirs is held whole in memory, and loading it is not timed; a calibration of ours is the
whole of it: opening, loading layers, hidden states to disk and back, and all sums that it takes, not REAP's alone.
Observers that show every token to every expert see --few windows; their time is scaled by that of plain passes over the
same windows and over all. A plain pass is transformers' own, with nothing attached. CPU seconds are counted too: on a busy
machine they are the steadier ones (with OMP_WAIT_POLICY=passive, or threads that wait are counted).

Both sides' REAP saliencies of the same tokens are compared: exits with 1 where they differ by more than a thousandth. Those
of llm-compressor's default pipeline are shown and not judged: at the version below it was seen to run attention without
the causal mask, so that its layers see other hidden states.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from gguftool.bench import Ratio
from gguftool.bench_calibrate import tiny
from gguftool.bench_calibrate_worker import timed_calibrate
from gguftool.checkpoint import Checkpoint, open_checkpoint
from gguftool.cli_options import make_terminal
from gguftool.errors import GgufToolError
from gguftool.random_checkpoint import shape_named, write_random_checkpoint
from gguftool.runtime import cache_dir
from gguftool.saliency import expert_criterion
from gguftool.terminal import Terminal

# torch is that of gguftool, so that both sides multiply matrices by the same code.
PACKAGES = {
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers==5.17.0"),
    "cerebras": ("transformers==4.55.0",),
}
# What is timed: the process that does it, the question, and whether it sees few windows only.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("llmcompressor", {"kind": "plain"}, False),
    "plain, few": ("llmcompressor", {"kind": "plain"}, True),
    "llm-compressor, as it is": (
        "llmcompressor",
        {"kind": "llmcompressor", "pipeline": "independent", "all_experts": True},
        True,
    ),
    "llm-compressor, routed experts only": (
        "llmcompressor",
        {"kind": "llmcompressor", "pipeline": "independent", "all_experts": False},
        False,
    ),
    "llm-compressor, routed experts only, one pass": (
        "llmcompressor",
        {"kind": "llmcompressor", "pipeline": "basic", "all_experts": False},
        False,
    ),
    "cerebras": ("cerebras", {"kind": "cerebras"}, True),
}
OURS = "gguftool calibrate"
TOLERANCE = 1e-3

# seconds and cpu of each kind in one round
Times = Mapping[str, Mapping[str, float]]


def environment(folder: Path, packages: Sequence[str], terminal: Terminal) -> Path:
    """The python of an environment with these packages, made where it is not there. Raises GgufToolError where pip fails."""
    python, stamp, want = folder / "bin" / "python", folder / "packages.txt", " ".join(packages)
    if stamp.exists() and stamp.read_text() == want:
        return python
    terminal.say(f"installing {want} into {folder} (once)")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise GgufToolError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    stamp.write_text(want)
    return python


class Public:
    """A process of bench_reap_public.py."""

    def __init__(self, python: Path, options: Mapping[str, Any], log: Path) -> None:
        self.log = log
        worker = Path(__file__).with_name("bench_reap_public.py")
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        threads = str(options["threads"])
        self.process = subprocess.Popen(
            [str(python), str(worker), json.dumps(dict(options))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """One answer. Raises GgufToolError where the process ended instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(dict(question)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            lines = self.log.read_text().strip().splitlines() or [f"exit code {self.process.wait()}"]
            raise GgufToolError(f"the public code's process failed: {lines[-1]}")
        return json.loads(line)


@contextmanager
def public(python: Path, options: Mapping[str, Any], log: Path) -> Iterator[Public]:
    """A process that ends with the block."""
    one = Public(python, options, log)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def ratios(rounds: Sequence[Times], few: Sequence[str], clock: str) -> dict[str, tuple[Ratio, Ratio]]:
    """For each kind (its time ÷ a plain pass, its time ÷ our calibration), per token; only times of one round are compared.

    `few`: kinds that saw the windows of "plain, few" and not those of "plain". `clock`: "seconds" or "cpu".
    """

    def seconds(name: str) -> NDArray[np.float64]:
        return np.array([one[name][clock] for one in rounds])

    found = {}
    for name in rounds[0]:
        scaled = seconds(name) / seconds("plain, few") * seconds("plain") if name in few else seconds(name)
        found[name] = (_mean(scaled / seconds("plain")), _mean(scaled / seconds(OURS)))
    return found


def _mean(values: NDArray[np.float64]) -> Ratio:
    """Geometric mean and its relative standard error."""
    logs = np.log(values)
    error = float(logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else 0.0
    return Ratio(float(np.exp(logs.mean())), error)


def difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], layers: int) -> float:
    """The largest |theirs - ours| ÷ ours of any expert of the first `layers`; [layers, experts] both.

    An expert that saw no token has 0 on both sides.
    """
    one, other = ours[:layers], theirs[:layers]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(one == other, 0.0, np.abs(other - one) / one)))


def saliency(
    checkpoint: Checkpoint, windows: NDArray[np.int64], options: Mapping[str, Any]
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Our REAP saliency [layers, experts] of a calibration without OBS costs, and what that took."""
    start = time.process_time()
    stats, facts = timed_calibrate(checkpoint, windows, dict(options), False)
    times = {"seconds": facts["seconds"], "cpu": time.process_time() - start}
    return expert_criterion("reap").measure(stats), times


def measure(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Everything, for --json: times of each kind in each round, ratios, and how far saliencies are apart."""
    shape = shape_named(args.model)
    shape = tiny(shape) if args.quick else shape
    where = args.venv or cache_dir() / "public-reap"
    sides = ["llmcompressor"] + (["cerebras"] if args.cerebras else [])
    torch_version = f"torch=={torch.__version__.partition('+')[0]}"
    pythons = {side: environment(where / side, (torch_version, *PACKAGES[side]), terminal) for side in sides}
    kinds = {name: kind for name, kind in KINDS.items() if kind[0] in sides}
    torch.set_num_threads(args.threads)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gguftool-bench-", dir=args.dir)))
        terminal.say(f"writing {args.layers} layers of random weights")
        path = write_random_checkpoint(scratch / "model", shape, args.layers)
        small = write_random_checkpoint(scratch / "tiny", tiny(shape), 1)
        checkpoint = open_checkpoint(str(path))
        windows = np.random.default_rng(0).integers(0, checkpoint.n_vocab, (args.windows, args.n_ctx))
        np.save(scratch / "windows.npy", windows)
        options = {
            "checkpoint": str(path), "tiny": str(small), "windows": str(scratch / "windows.npy"), "work": str(scratch / "work"),
            "batch": args.batch, "threads": args.threads, "dtype": args.dtype, "source": f"{args.cerebras}/src",
        }  # fmt: skip
        workers = {side: stack.enter_context(public(pythons[side], options, scratch / f"{side}.log")) for side in sides}
        rounds, theirs, ours = _rounds(args, kinds, workers, checkpoint, windows, options, terminal)
    few = [name for name, kind in kinds.items() if kind[2]]
    apart = {
        name: difference(ours["few" if name in few else "all"], values, _comparable(name, args.layers))
        for name, values in theirs.items()
    }
    return {
        "model": args.model, "options": {name: str(value) for name, value in vars(args).items()},
        "packages": {side: [torch_version, *PACKAGES[side]] for side in sides}, "rounds": rounds,
        "ratios": {
            clock: {
                name: {"to_plain": vars(plain), "to_ours": vars(own)}
                for name, (plain, own) in ratios(rounds, few, clock).items()
            }
            for clock in ("seconds", "cpu")
        },
        "tokens": {name: args.n_ctx * _count(args, name) for name in rounds[0]}, "apart": apart,
    }  # fmt: skip


def _judged(name: str) -> bool:
    """Whether its saliencies have to be ours."""
    return KINDS[name][1].get("pipeline") != "independent"


def _comparable(name: str, layers: int) -> int:
    """How many layers saw what ours saw: behind the first, the default pipeline goes on with what pruned layers give."""
    return layers if _judged(name) else 1


def _count(args: argparse.Namespace, name: str) -> int:
    return args.few if name in KINDS and KINDS[name][2] else args.windows


def _rounds(
    args: argparse.Namespace, kinds: Mapping[str, tuple[str, dict[str, Any], bool]], workers: Mapping[str, Public],
    checkpoint: Checkpoint, windows: NDArray[np.int64], options: Mapping[str, Any], terminal: Terminal,
) -> tuple[list[Times], dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:  # fmt: skip
    """Seconds of each kind in each round, the saliencies that they gave, and ours of all windows and of few."""
    ours = {"few": saliency(checkpoint, windows[: args.few], options)[0]}
    rounds: list[Times] = []
    theirs: dict[str, NDArray[np.float64]] = {}
    names = [*kinds, OURS]
    order = np.random.default_rng(0)
    for number in range(args.rounds):
        times: dict[str, dict[str, Any]] = {}
        for place in order.permutation(len(names)):
            name = names[place]
            if name == OURS:
                ours["all"], times[name] = saliency(checkpoint, windows, options)
            else:
                side, question, _ = kinds[name]
                times[name] = workers[side].ask(question | {"n_windows": _count(args, name)})
                if "saliency" in times[name]:
                    theirs[name] = np.array(times[name].pop("saliency"))
            took = f"{times[name]['seconds']:.1f} s, {times[name]['cpu']:.1f} CPU s"
            terminal.say(f"round {number + 1} of {args.rounds}: {name}: {took}")
        rounds.append({name: times[name] for name in names})
    return rounds, theirs, ours


def table(result: Mapping[str, Any]) -> Table:
    """A row for each kind."""
    found = Table(
        title=f"{result['model']}: calibration and public REAP observers",
        title_justify="left",
        caption="÷ plain, ÷ gguftool: time per token as a multiple of a plain pass and of gguftool calibrate, ± one "
        "standard error; CPU: the same of CPU seconds; apart: the largest relative difference of any expert's saliency",
        caption_justify="left",
    )
    for name in ("", "tokens/s", "÷ plain", "÷ gguftool", "CPU ÷ plain", "CPU ÷ gguftool", "apart"):
        found.add_column(name, justify="right" if name else "left")
    for name, count in result["tokens"].items():
        speed = count / np.median([one[name]["seconds"] for one in result["rounds"]])
        both = [result["ratios"][clock][name][to] for clock in ("seconds", "cpu") for to in ("to_plain", "to_ours")]
        apart = result["apart"].get(name)
        found.add_row(
            name, f"{speed:.0f}", *(f"{one['value']:.3f} ± {one['value'] * one['error']:.3f}" for one in both),
            "" if apart is None else f"{apart:.1e}",
        )  # fmt: skip
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Exits with 2 for what makes no sense."""
    parser = argparse.ArgumentParser(prog="scripts/bench-reap", description=__doc__, formatter_class=_Raw)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="layer sizes: qwen3-30b-a3b or mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=1, help="layers of the model, below 10 (%(default)s)")
    parser.add_argument("--windows", type=int, default=48, help="windows of the timed runs (%(default)s)")
    parser.add_argument("--few", type=int, default=4, help="windows for observers of all experts (%(default)s)")
    parser.add_argument("--ctx", dest="n_ctx", type=int, default=512, help="tokens in a window (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed, in turns (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows that run at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--venv", type=Path, help="where the environments go (in gguftool's cache)")
    parser.add_argument(
        "--cerebras", type=Path, help="a checkout of github.com/CerebrasResearch/reap to compare with too"
    )
    parser.add_argument("--dir", type=Path, help="where the model's files go (temporary)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", dest="as_json", action="store_true", help="everything as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(arguments)
    if not 0 < args.layers < 10:
        parser.error(f"--layers {args.layers}: from 1 to 9")
    if args.cerebras is not None and not (args.cerebras / "src" / "reap" / "observer.py").is_file():
        parser.error(f"--cerebras {args.cerebras}: no src/reap/observer.py in there")
    return args


class _Raw(argparse.RawDescriptionHelpFormatter):
    """The module's text as it stands."""


def main() -> int:
    """Measures, prints, and says by its exit code whether saliencies agree."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes beside it end too
    terminal = make_terminal(args.as_json, args.quiet)
    try:
        result = measure(args, terminal)
    except GgufToolError as error:
        print(f"bench-reap: {error}", file=sys.stderr)
        return 1
    terminal.show(result, table(result))
    wrong = {name: value for name, value in result["apart"].items() if _judged(name) and value > TOLERANCE}
    for name, value in wrong.items():
        print(f"bench-reap: the saliencies of {name} differ by up to {value:.1e} from gguftool's", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
